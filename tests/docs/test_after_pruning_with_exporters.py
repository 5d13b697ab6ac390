# Licensed under the Apache License, Version 2.0
"""What the guides do with exporters for other runtimes, where these are; `tests/modeling/run_exporters.sh` makes an environment."""

import importlib.util

import pytest

from tests.docs.pages import ROOT
from tests.docs.running import run_page


environment = "exporters"
if not all(importlib.util.find_spec(name) for name in ("onnxruntime", "executorch")):
    pytest.skip("no exporters here; tests/modeling/run_exporters.sh makes an environment", allow_module_level=True)


@pytest.mark.timeout(900)
@pytest.mark.parametrize("page", ["docs/source/guides/after_pruning.md"])
def test_snippets_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_page(ROOT / page, tmp_path, {environment})
