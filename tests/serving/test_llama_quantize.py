# Licensed under the Apache License, Version 2.0
"""What llama.cpp's `Q4_K_M` makes of experts of some widths, as the guide to serving says.

Skipped where `llama-quantize` is not on the PATH; `tests/serving/run_llama_cpp.sh` makes an environment that has it, and runs this.
"""

import importlib.util
import shutil
import subprocess
from collections import Counter

import pytest

from tests.docs.pages import ROOT
from tests.helpers import tiny_model


if importlib.util.find_spec("gguf") is None or shutil.which("llama-quantize") is None:
    pytest.skip("tests/serving/run_llama_cpp.sh makes an environment", allow_module_level=True)

PAGE = (ROOT / "docs/source/guides/serve.md").read_text(encoding="utf-8")
IN_THE_GUIDE = {
    (
        "Q4_K",
        "Q6_K",
    ): "| 256, 512 and other multiples of 256 | `--align-for gguf` | Q4_K, in half of the layers Q6_K | {:.2f} |",
    (
        "Q5_0",
        "Q8_0",
    ): "| 128, 192, 384 and other multiples of 32 | `--width-multiple 32` | Q5_0, in half of the layers Q8_0 | {:.2f} |",
    ("F16",): "| 200 and all others | | F16 | {:.2f} |",
}


@pytest.mark.parametrize(
    "width, down",
    [
        (256, ("Q4_K", "Q6_K")),
        (512, ("Q4_K", "Q6_K")),
        (128, ("Q5_0", "Q8_0")),
        (192, ("Q5_0", "Q8_0")),
        (384, ("Q5_0", "Q8_0")),
        (200, ("F16",)),
    ],
)
def test_types_by_width(width, down, tmp_path):
    import gguf

    from .gguf_models import write_gguf

    # Of 8 layers 4 get the larger type, as 24 of 48 do.
    sizes = {"hidden_size": 256, "num_hidden_layers": 8, "mlp_only_layers": [], "num_experts": 4}
    write_gguf(tiny_model(moe_intermediate_size=width, **sizes), tmp_path / "model.gguf")
    command = ["llama-quantize", "model.gguf", "small.gguf", "Q4_K_M", "1"]
    subprocess.run(
        command, cwd=tmp_path, capture_output=True, check=True, timeout=100
    )  # no error, whatever it falls back to

    experts = [tensor for tensor in gguf.GGUFReader(tmp_path / "small.gguf").tensors if "_exps" in tensor.name]
    types = Counter((tensor.name.split(".")[-2], tensor.tensor_type.name) for tensor in experts)
    assert types == {
        ("ffn_gate_exps", "Q4_K"): 8,
        ("ffn_up_exps", "Q4_K"): 8,
        **{("ffn_down_exps", name): 8 // len(down) for name in down},
    }
    bits = 8 * sum(int(tensor.n_bytes) for tensor in experts) / sum(int(tensor.n_elements) for tensor in experts)
    assert IN_THE_GUIDE[down].format(bits) in PAGE
