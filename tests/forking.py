# Licensed under the Apache License, Version 2.0
"""A process that has imported libraries and forks itself for whoever asks, and a program that asks in the place of Python.

Launchers start an interpreter for each process of theirs, which then imports for five seconds what all import. With the arguments of
`python` this file, as a program, gets the same from a process that is there already: one forked from it, with the environment, the
folder and the streams of the caller, who passes signals on and ends as it does. It imports little, so as to be there at once.
"""

import atexit
import gc
import json
import os
import select
import signal
import socket
import sys
import threading


ADDRESS = "HEAPR_TESTS_FORK"  # the variable with the socket of the process that forks


def serve(address: str) -> None:
    """Returns in forked processes alone, once they are what was asked for. Ends when nobody holds its standard input."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen(64)
    gc.collect()
    gc.freeze()
    print("ready", flush=True)
    while True:
        asked, _, _ = select.select([listener, 0], [], [])
        if 0 in asked:
            os._exit(0)
        connection, _ = listener.accept()
        if os.fork() == 0:
            listener.close()
            return _keep(connection)
        connection.close()
        while _one_ended():
            pass


def _one_ended() -> bool:
    try:
        return os.waitpid(-1, os.WNOHANG)[0] != 0
    except ChildProcessError:
        return False


def _keep(connection: socket.socket) -> None:
    """Forks the process that was asked for, says how it ended, and ends it when nobody listens."""
    _, streams, _, _ = socket.recv_fds(connection, 1, 3)
    request = json.loads(connection.makefile().readline())
    os.setsid()
    pid = os.fork()
    if pid == 0:
        connection.close()
        return _become(request, streams)
    for stream in (*streams, 0, 1, 2):  # whoever reads them waits for all who hold them
        os.close(stream)
    connection.sendall(f"{pid}\n".encode())

    def end() -> None:
        connection.recv(1)
        os.kill(pid, signal.SIGKILL)

    threading.Thread(target=end, daemon=True).start()
    _, ended = os.waitpid(pid, 0)
    try:
        connection.sendall(f"{os.waitstatus_to_exitcode(ended)}\n".encode())
    finally:
        os._exit(0)


def _become(request: dict, streams: list[int]) -> None:
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["folder"])
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.argv = request["arguments"]


def run() -> None:
    """As `python` with the arguments of `sys.argv`, up to its end: to take all modules apart takes half a second more."""
    try:
        _run()
        code = 0
    except SystemExit as exit:
        code = exit.code if isinstance(exit.code, int) else int(exit.code is not None)
        if isinstance(exit.code, str):
            print(exit.code, file=sys.stderr)
    except Exception:
        sys.excepthook(*sys.exc_info())
        code = 1
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _run() -> None:
    import runpy

    import torch

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))  # OpenMP has read its own in the process forked from
    if sys.argv[0] == "-u":
        del sys.argv[0]
    sys.path[:0] = ["", *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    if sys.argv[0] == "-c":
        code = compile(sys.argv.pop(1), "<string>", "exec")
        exec(code, {"__name__": "__main__"})
    elif sys.argv[0] == "-m":
        del sys.argv[0]
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    else:
        sys.path[0] = os.path.dirname(sys.argv[0])
        runpy.run_path(sys.argv[0], run_name="__main__")


def ask(
    address: str, arguments: list[str], environment: dict[str, str], folder: str, streams: list[int]
) -> tuple[int, socket.socket]:
    """A process with these arguments of `python`: its number, and the connection that says how it ended."""
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(address)
    socket.send_fds(connection, [b"."], streams)
    request = {"arguments": arguments, "environment": environment, "folder": folder}
    connection.sendall(json.dumps(request).encode() + b"\n")
    return int(_line(connection)), connection


def status(connection: socket.socket) -> int:
    """Of the process, once it has ended: negative if by a signal."""
    return int(_line(connection))


def _line(connection: socket.socket) -> bytes:
    line = b""
    while not line.endswith(b"\n"):
        line += connection.recv(1) or b"-9\n"
    return line


def main() -> None:
    pid, connection = ask(os.environ[ADDRESS], sys.argv[1:], dict(os.environ), os.getcwd(), [0, 1, 2])
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, _: os.kill(pid, number))
    code = status(connection)
    if code < 0:
        if code != -signal.SIGKILL:
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    sys.exit(code)


if __name__ == "__main__":
    main()
