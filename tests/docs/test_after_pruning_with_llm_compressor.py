# Licensed under the Apache License, Version 2.0
"""What the guides do with llm-compressor, where it is; `tests/surgery/run_llm_compressor.sh` makes an environment that has it."""

import importlib.util

import pytest

from tests.docs.pages import ROOT
from tests.docs.running import run_page


environment = "llm-compressor"
if importlib.util.find_spec("llmcompressor") is None:
    pytest.skip(
        "no llm-compressor here; tests/surgery/run_llm_compressor.sh makes an environment", allow_module_level=True
    )


@pytest.mark.timeout(900)
@pytest.mark.parametrize("page", ["docs/source/guides/after_pruning.md", "docs/source/guides/one_gpu.md"])
def test_snippets_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_page(ROOT / page, tmp_path, {environment})
