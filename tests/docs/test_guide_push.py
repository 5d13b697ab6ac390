# Licensed under the Apache License, Version 2.0
"""The guide to pushing, in a process that knows no Hub but the one on this machine."""

import pytest

from tests import hub_emulator, processes
from tests.docs.pages import ROOT
from tests.hub_emulator import Hub


RUN = """
import sys
from pathlib import Path
from tests.docs.running import run_page
from tests.helpers import take_figures_briefly
take_figures_briefly()
run_page(Path(sys.argv[1]), Path.cwd())
"""


@pytest.mark.slow
def test_snippets_run(tmp_path):
    folder = tmp_path / "page"
    folder.mkdir()
    with Hub() as hub:
        environment = hub_emulator.environment(tmp_path / "home")
        page = ROOT / "docs/source/guides/push.md"
        done = processes.run_python(RUN, page, env=environment, cwd=folder, has="hub")
        assert done.returncode == 0, done.stderr[-4000:]
    assert len(hub.repositories["me/qwen3-pruned"].pushes) == 4
    assert hub.repositories["me/qwen3-pruned"].private
