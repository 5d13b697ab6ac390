# Licensed under the Apache License, Version 2.0
"""A Hub on this machine, and fresh processes that know no other: the client reads its settings when it is imported."""

import json
import os

import pytest

from tests import processes
from tests.helpers import repository
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
    """Runs code in a fresh process with a cache of its own; returns what the code gives to `answer`."""

    def run_python(code: str, *arguments, token: str | None = WRITER, package: bool = True):
        home = tmp_path_factory.mktemp("home")
        environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        environment |= {
            "HF_ENDPOINT": hub.url,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "NO_PROXY": "127.0.0.1",
            "PYTHONPATH": str(repository()),
            **({"HF_TOKEN": token} if token else {}),
        }
        code = ("" if package else WITHOUT_PACKAGE) + PRELUDE + code
        done = processes.run_python(code, *arguments, env=environment, cwd=home)
        assert done.returncode == 0, done.stderr[-4000:]
        return json.loads(done.stdout.rpartition("ANSWER ")[2].splitlines()[0])

    return run_python
