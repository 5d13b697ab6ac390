# Licensed under the Apache License, Version 2.0
"""Settings of every test: the CPU, one thread (or `OMP_NUM_THREADS`), no network, no caches outside a temporary folder."""

import functools
import gc
import logging
import os
import shutil
import signal
import sys
import tempfile
from importlib import import_module

import pytest
import torch


# The Hugging Face libraries read these when they are imported, which is after this file. A test that needs a Hub of its
# own sets them anew in a subprocess.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# On a host with a GPU too: models would be moved there, and tests go on with tensors of the CPU.
os.environ.setdefault("ACCELERATE_USE_CPU", "true")
_CACHE = tempfile.mkdtemp(prefix="heapr-tests-")
os.environ["HF_HOME"] = _CACHE

# Sums depend on how many threads share them. Processes that tests start inherit the variable, so that theirs are the same.
THREADS = int(os.environ.setdefault("OMP_NUM_THREADS", "1"))
torch.set_num_threads(THREADS)

# A shell that runs the suite in the background lets it ignore Ctrl-C, and every process that a test starts as well.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items):
    """Files that fork their process come first, while it is small, then those of slow tests alone, so that no process is left with
    one of them at the end."""
    forks = {item.path for item in items if item.get_closest_marker("forks")}
    quick = {item.path for item in items if item.get_closest_marker("slow") is None}
    items.sort(key=lambda item: (item.path not in forks, item.path in quick))


def pytest_collection_finish(session):
    """Whatever is there by now stays; libraries that collect garbage after each of their runs need not go through it."""
    if "PYTEST_XDIST_WORKER" in os.environ and session.items:  # one that runs many files needs them all
        import_module("datasets")
        import_module("peft")
        import_module("transformers.trainer")
    gc.collect()
    gc.freeze()


def pytest_unconfigure(config):
    shutil.rmtree(_CACHE, ignore_errors=True)


@pytest.fixture
def heapr_log(caplog):
    """What the package logs; optimum's logger may not propagate to the root, where pytest listens."""
    logger = logging.getLogger("optimum.heapr")
    logger.addHandler(caplog.handler)
    propagates, logger.propagate = logger.propagate, False  # or what is said once is there twice
    yield caplog
    logger.propagate = propagates
    logger.removeHandler(caplog.handler)


@pytest.fixture(autouse=True)
def settings_of_the_process():
    """What a command or a `Trainer` may set for its process, which here goes on: threads, and from which level on is logged."""
    transformers = logging.getLogger("transformers")
    level = transformers.level
    yield
    torch.set_num_threads(THREADS)
    transformers.setLevel(level)


class _StandardError(logging.StreamHandler):
    """Writes to the standard error of the moment, which pytest replaces from test to test."""

    def __init__(self):
        logging.Handler.__init__(self)

    @property
    def stream(self):
        return sys.stderr


@pytest.fixture(scope="session", autouse=True)
def optimum_logs_from_the_start():
    """Optimum takes the standard error that is there when it first logs: in whichever test that is, and closed after it."""
    from optimum.utils.logging import get_logger

    logger = get_logger("optimum")
    for handler in list(logger.handlers):
        logger.removeHandler(handler)
    logger.addHandler(_StandardError())


@pytest.fixture(scope="session", autouse=True)
def files_may_be_lost_with_the_power():
    """No test cuts it, and thousands of files need not be waited for until the disk has them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda handle: None)
        yield


@pytest.fixture(scope="session", autouse=True)
def installed_distributions_are_read_once():
    """Optimum reads the metadata of each, a hundred or two, whenever its command runs; here it runs a thousand times."""
    from optimum.commands import optimum_cli

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(optimum_cli, "load_subpackages", functools.cache(optimum_cli.load_subpackages))
        yield


@pytest.fixture(scope="session", autouse=True)
def figures_are_taken_briefly():
    from tests.helpers import take_figures_briefly

    take_figures_briefly()
