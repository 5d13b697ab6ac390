# Licensed under the Apache License, Version 2.0
"""The guide to serving where vLLM is: its servers, and the requests that the guide sends them.

Skipped where vLLM is not installed; `tests/serving/run_vllm.sh` makes an environment that has it, and runs this.
"""

import importlib.util

import pytest

from tests.docs.pages import ROOT
from tests.docs.running import run_page


environment = "vLLM"
if importlib.util.find_spec("vllm") is None:
    pytest.skip("vLLM is not installed; tests/serving/run_vllm.sh makes an environment", allow_module_level=True)

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(1800)]


def test_snippets_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_page(ROOT / "docs/source/guides/serve.md", tmp_path, {environment})
