# Licensed under the Apache License, Version 2.0
"""New processes that need not wait for imports: forked from one that has made them and done nothing else.

Most of the seconds in which a new interpreter gets to work go into libraries that no test is about. `has` says which of them may be
there already: those that read no settings, so that a process finds the libraries of Hugging Face as a new interpreter does, and they
read theirs from its environment; these as well, with the settings of the suite, or with those of the Hub on this machine; or the
package too.
"""

import functools
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

from tests import forking, hub_emulator


ROOT = str(Path(__file__).resolve().parents[1])
_FOLDER = os.environ["HF_HOME"]  # of this run of the suite, which removes it

LIBRARIES = """
import accelerate.commands.launch, datasets, peft, torch.distributed.run
import transformers.generation.utils, transformers.modeling_utils, transformers.trainer
import transformers.models.qwen3_moe.modeling_qwen3_moe
"""
_PATH = os.pathsep.join(filter(None, (ROOT, os.environ.get("PYTHONPATH"))))
# Of the suite, before any test changes them; the command line switches bars off before the libraries are imported.
_SETTINGS = {
    **os.environ,
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "PYTHONPATH": _PATH,
}


class Stage(NamedTuple):
    """What is imported, in a process forked from another stage, with which settings in its environment."""

    before: str | None
    imports: str
    settings: Callable[[], Mapping[str, str]] = lambda: _SETTINGS


STAGES = {
    "torch": Stage(
        None,
        """
import contextlib
for name in "chardet fsspec jinja2 pandas psutil pyarrow.parquet pytest regex requests scipy.optimize scipy.stats sympy yaml".split():
    with contextlib.suppress(ImportError):  # environments of single engines have less
        __import__(name)
import torch, torch._dynamo, torch.distributed.tensor
""",
    ),
    "libraries": Stage("torch", LIBRARIES),
    "package": Stage(
        "libraries",
        """
import optimum.commands.optimum_cli
import optimum_heapr.cli.calibrate, optimum_heapr.cli.prune, optimum_heapr.recovery.runner
from tests.helpers import take_figures_briefly
take_figures_briefly()
""",
    ),
    "hub": Stage("torch", LIBRARIES, lambda: hub_emulator.environment() | {"PYTHONPATH": _PATH}),
}
SERVE = "import sys\n{imports}\nfrom tests import forking\nforking.serve(sys.argv[1])\nforking.run()"

_lives: list[int] = []  # each stage ends when this process, which holds the other end of its standard input, does


@functools.cache
def _address(stage: str) -> str:
    """Where the process listens that has what the stage says; it is started when first asked for."""
    address = os.path.join(tempfile.mkdtemp(prefix="fork-", dir=_FOLDER), stage)
    before, imports, settings = STAGES[stage]
    arguments = ["-c", SERVE.format(imports=imports), address]
    standard_input, life = os.pipe()
    ready, output = os.pipe()
    if before:
        forking.ask(_address(before), arguments, dict(settings()), ROOT, [standard_input, output, 2])[1].detach()
    else:
        subprocess.Popen([sys.executable, *arguments], env=settings(), cwd=ROOT, stdin=standard_input, stdout=output)
    _lives.append(life)
    os.close(standard_input)
    os.close(output)
    with open(ready) as lines:
        assert lines.readline() == "ready\n", f"the process that has {stage} ended while it imported it"
    return address


class Started:
    """A process at work, in the terms of `subprocess.Popen`; its output goes to files."""

    def __init__(
        self, code: str, arguments: list[str], env: Mapping[str, str] | None, cwd: os.PathLike | None, has: str
    ):
        self._folder = Path(tempfile.mkdtemp(prefix="process-", dir=_FOLDER))
        self.returncode: int | None = None
        environment = dict(os.environ if env is None else env)
        files = [open(os.devnull), *(open(self._folder / name, "ab") for name in ("output", "error"))]
        streams = [file.fileno() for file in files]
        arguments = ["-c", code, *arguments]
        self.pid, self._connection = forking.ask(
            _address(has), arguments, environment, str(cwd or os.getcwd()), streams
        )
        for file in files:
            file.close()

    def poll(self, timeout: float = 0) -> int | None:
        """How it ended, within so many seconds from now."""
        if self.returncode is None and select.select([self._connection], [], [], timeout)[0]:
            self.returncode = forking.status(self._connection)
            self._connection.close()
        return self.returncode

    def wait_for_line(self, line: str, timeout: float = 120) -> bool:
        """Whether it printed this line before it ended."""
        until = time.monotonic() + timeout
        while True:
            ended = self.poll() is not None
            if line in self._read("output").splitlines():
                return True
            if ended or time.monotonic() > until:
                return False
            time.sleep(0.02)

    def communicate(self, timeout: float = 280) -> tuple[str, str]:
        """What it printed on both streams, once it has ended."""
        if self.poll(timeout) is None:
            self.kill()
            raise subprocess.TimeoutExpired("python", timeout, self._read("output"), self._read("error"))
        try:
            return self._read("output"), self._read("error")
        finally:
            shutil.rmtree(self._folder)

    def kill(self) -> None:
        if self.poll() is None:
            self.returncode = -signal.SIGKILL
            self._connection.close()

    def _read(self, name: str) -> str:
        path = self._folder / name
        return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""


def start_python(
    code: str, *arguments, env: Mapping[str, str] | None = None, cwd: os.PathLike | None = None, has: str = "torch"
) -> Started:
    """As `python -c code arguments`, in the environment `env` and the folder `cwd`, from the stage `has`."""
    return Started(code, [str(argument) for argument in arguments], env, cwd, has)


def run_python(code: str, *arguments, timeout: float = 280, **options) -> subprocess.CompletedProcess:
    """As [`start_python`], to its end."""
    process = start_python(code, *arguments, **options)
    output, error = process.communicate(timeout)
    return subprocess.CompletedProcess(["python", "-c", code], process.returncode, output, error)


OPTIMUM_CLI = "from optimum.commands.optimum_cli import main\nmain()"


def environment(**more: str) -> dict[str, str]:
    """Of a process that works on the CPU with others."""
    path = os.pathsep.join(filter(None, (os.environ.get("PYTHONPATH"), ROOT)))
    return {"OMP_NUM_THREADS": "1", **os.environ, "PYTHONPATH": path, "ACCELERATE_USE_CPU": "true", **more}


def launched(**more: str) -> dict[str, str]:
    """Of a launcher whose processes are forked as well: it takes the program that asks for them as its Python."""
    python = Path(tempfile.mkdtemp(prefix="python-", dir=_FOLDER)) / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} -IS {forking.__file__} "$@"\n')
    python.chmod(0o700)
    return environment(PYTHON_EXEC=str(python), **{forking.ADDRESS: _address("package")}, **more)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def in_two_processes(code: str, *arguments, **variables: str) -> list[subprocess.CompletedProcess]:
    """The code in two processes that work together; no launcher started them."""
    variables |= {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    processes = [
        start_python(
            code, *arguments, env=environment(RANK=str(rank), LOCAL_RANK=str(rank), **variables), has="package"
        )
        for rank in range(2)
    ]
    try:
        outputs = [process.communicate() for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [
        subprocess.CompletedProcess(["python", "-c", code], process.returncode, *output)
        for process, output in zip(processes, outputs)
    ]
