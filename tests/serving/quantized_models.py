# Licensed under the Apache License, Version 2.0
"""Tiny models as llm-compressor quantizes them: its environment writes them, and that of vLLM reads them.

    python -m tests.serving.quantized_models FOLDER

in the environment of `tests/surgery/run_llm_compressor.sh`; `tests/serving/run_vllm.sh` does so where LLM_COMPRESSOR names it.
"""

from __future__ import annotations

import sys
from itertools import product
from pathlib import Path

from tests.serving.variable_models import padded_checkpoint, variable_model


GROUP = 32
"""Columns that share a scale in 4 bits."""
SHAPE = {"hidden_size": 128, "moe_intermediate_size": 128, "num_hidden_layers": 2}
LEFT_AS_THEY_ARE = ["lm_head", "re:.*mlp.gate$"]
FORMS = ("pruned", "padded")
"""`padded` is a stock model, as uniform ones are."""


def main(folder: Path) -> None:
    from compressed_tensors.quantization import preset_name_to_scheme
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from transformers import AutoModelForCausalLM

    from optimum_heapr.surgery.linear import to_linear_experts

    model = variable_model("qwen3_moe", multiple=GROUP, **SHAPE)
    padded_checkpoint(folder / "padded", "qwen3_moe", model)
    to_linear_experts(model).save_pretrained(folder / "pruned")
    for name, scheme in product(FORMS, ("W8A8", "W4A16")):
        model = AutoModelForCausalLM.from_pretrained(folder / name, dtype="bfloat16")
        chosen = preset_name_to_scheme(scheme, ["Linear"])
        if chosen.weights.strategy == "group":
            chosen.weights.group_size = GROUP
        oneshot(model=model, recipe=QuantizationModifier(config_groups={"group_0": chosen}, ignore=LEFT_AS_THEY_ARE))
        model.save_pretrained(folder / f"{name}-{scheme}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
