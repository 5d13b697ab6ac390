# Licensed under the Apache License, Version 2.0
"""What the guides do with a quantizer, where there is one; `tests/surgery/run_quantizers.sh` makes an environment that has it."""

import importlib.util

import pytest

from tests.docs.pages import ROOT
from tests.docs.running import run_page


environment = "bitsandbytes"
if importlib.util.find_spec("bitsandbytes") is None:
    pytest.skip(
        "bitsandbytes is not installed; tests/surgery/run_quantizers.sh makes an environment", allow_module_level=True
    )


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "page",
    ["docs/source/guides/after_pruning.md", "docs/source/guides/one_gpu.md", "docs/source/guides/quantized.md"],
)
def test_snippets_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # On some CPUs its kernels for 4 bits want rows in 32s and columns in 64s, which small models do not have; findings/ has a script.
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: False)
    run_page(ROOT / page, tmp_path, {environment})
