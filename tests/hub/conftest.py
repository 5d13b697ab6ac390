# Licensed under the Apache License, Version 2.0
"""A Hub on this machine, and processes that know no other: the client reads its settings when it is imported."""

import json

import pytest

from tests import hub_emulator, processes
from tests.hub_emulator import WRITER, Hub


PRELUDE = """
import json, os, sys, time
import torch
time.sleep = lambda seconds: None  # retries need not wait
def answer(value):
    print("ANSWER " + json.dumps(value))
"""

# The package cannot be imported, as on a machine without it.
WITHOUT_PACKAGE = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "optimum_heapr":
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Blocked())
"""


@pytest.fixture(scope="module")
def hub():
    with Hub() as hub:
        yield hub


@pytest.fixture(scope="module")
def run_python(hub, tmp_path_factory):
    """Runs code in a process with a cache of its own; returns what the code gives to `answer`."""

    def run_python(code: str, *arguments, token: str | None = WRITER, package: bool = True):
        home = tmp_path_factory.mktemp("home")
        code = ("" if package else WITHOUT_PACKAGE) + PRELUDE + code
        environment = hub_emulator.environment(home, token)
        done = processes.run_python(code, *arguments, env=environment, cwd=home, has="hub")
        assert done.returncode == 0, done.stderr[-4000:]
        return json.loads(done.stdout.rpartition("ANSWER ")[2].splitlines()[0])

    return run_python
