# Licensed under the Apache License, Version 2.0
"""New processes that need not wait for torch: forked from one that has imported it and done nothing else.

Two thirds of the six seconds in which a new interpreter gets to work go into libraries that read no settings and that no
test is about. Those are there already; the libraries of Hugging Face and this package are not, so that a process finds
them as a new interpreter does and they read their settings from its environment.
"""

import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path


_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(
    [
        "torch",
        "torch._dynamo",
        "torch.distributed.tensor",
        "scipy.stats",
        "scipy.optimize",
        "pandas",
        "sympy",
        "pytest",
        "chardet",
        "fsspec",
        "jinja2",
        "psutil",
        "pyarrow.parquet",
        "regex",
        "requests",
        "yaml",
    ]
)


class Started:
    """A process at work, in the terms of `subprocess.Popen`; its output goes to files."""

    def __init__(self, code: str, arguments: list[str], env: Mapping[str, str] | None, cwd: os.PathLike | None):
        self._folder = Path(tempfile.mkdtemp(prefix="heapr-process-"))
        environment = dict(os.environ if env is None else env)
        job = (code, arguments, environment, str(cwd or os.getcwd()), str(self._folder))
        self._process = _SERVER.Process(target=_run, args=job)
        self._process.start()
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def wait_for_line(self, line: str, timeout: float = 120) -> bool:
        """Whether it printed this line before it ended."""
        until = time.monotonic() + timeout
        while True:
            ended = self.returncode is not None
            if line in self._read("output").splitlines():
                return True
            if ended or time.monotonic() > until:
                return False
            time.sleep(0.02)

    def communicate(self, timeout: float = 280) -> tuple[str, str]:
        """What it printed on both streams, once it has ended."""
        self._process.join(timeout)
        if self.returncode is None:
            self.kill()
            raise subprocess.TimeoutExpired("python", timeout, self._read("output"), self._read("error"))
        try:
            return self._read("output"), self._read("error")
        finally:
            shutil.rmtree(self._folder)

    def kill(self) -> None:
        self._process.kill()
        self._process.join()

    def _read(self, name: str) -> str:
        path = self._folder / name
        return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""


def start_python(
    code: str, *arguments, env: Mapping[str, str] | None = None, cwd: os.PathLike | None = None
) -> Started:
    """As `python -c code arguments`, in the environment `env` and the folder `cwd`."""
    return Started(code, [str(argument) for argument in arguments], env, cwd)


def run_python(code: str, *arguments, timeout: float = 280, **options) -> subprocess.CompletedProcess:
    """As [`start_python`], to its end."""
    process = start_python(code, *arguments, **options)
    output, error = process.communicate(timeout)
    return subprocess.CompletedProcess(["python", "-c", code], process.returncode, output, error)


OPTIMUM_CLI = "from optimum.commands.optimum_cli import main\nmain()"


def environment(**more: str) -> dict[str, str]:
    """Of a process that works on the CPU with others."""
    root = str(Path(__file__).resolve().parents[1])
    path = os.pathsep.join(filter(None, (os.environ.get("PYTHONPATH"), root)))
    return {"OMP_NUM_THREADS": "1", **os.environ, "PYTHONPATH": path, "ACCELERATE_USE_CPU": "true", **more}


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def in_two_processes(code: str, *arguments, **variables: str) -> list[subprocess.CompletedProcess]:
    """The code in two processes that work together; no launcher started them."""
    variables |= {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    processes = [
        start_python(code, *arguments, env=environment(RANK=str(rank), LOCAL_RANK=str(rank), **variables))
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


def _run(code: str, arguments: list[str], environment: dict[str, str], cwd: str, folder: str) -> None:
    """In the new process."""
    import torch

    for name, descriptor in (("output", 1), ("error", 2)):
        file = os.open(os.path.join(folder, name), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.dup2(file, descriptor)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    paths = environment.get("PYTHONPATH", "").split(os.pathsep)
    sys.path[:0] = ["", *filter(None, paths)]
    sys.argv = ["-c", *arguments]
    signal.signal(signal.SIGINT, signal.default_int_handler)
    torch.set_num_threads(int(environment["OMP_NUM_THREADS"]))  # OpenMP has read its own in the process forked from
    exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})
