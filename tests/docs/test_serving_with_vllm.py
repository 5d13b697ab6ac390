# Licensed under the Apache License, Version 2.0
"""The guides to serving where vLLM is: its servers, and the requests that the guides send them.

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


@pytest.mark.parametrize("name", ["docs/source/guides/serve.md", "docs/source/guides/qwen3_server.md"])
def test_snippets_run(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_page(ROOT / name, tmp_path, {environment})
