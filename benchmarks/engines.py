# Licensed under the Apache License, Version 2.0
"""Stock layouts in vLLM: every family that it and transformers know, unpruned and with one narrower width.

    PYTHONPATH=. python benchmarks/engines.py            in an environment with vLLM (tests/serving/run_vllm.sh)

Tiny random models in float32, pruned by this package. Prints a table: whether vLLM loads what was saved, whether its greedy tokens are
those of transformers, and the largest difference of a log-probability of prompts and of what follows them. Where vLLM of the unpruned
model is not transformers, vLLM of the unpruned shape with zeros for what was removed takes its place. With `--output` rows go to a file
as well, and those that it has are not made again: a run can be stopped and go on.
"""

import argparse
import copy
import gc
import json
import math
import os
import sys
import tempfile
from pathlib import Path

import torch


os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.serving.variable_models import (  # noqa: E402
    CONFIGS,
    DEEPSEEK,
    FINE_GRAINED,
    GROUPED,
    LATENT,
    SMALL,
    VOCAB_SIZE,
)


WIDTH, KEPT = 96, 48
COARSE = CONFIGS["mixtral"]
SPARSE = {"mlp_layer_types": ["dense", "sparse", "sparse"]}
FULL = {"layer_types": ["full_attention"] * 3, "sliding_window": None}
SLIDING = {"layer_types": ["sliding_attention", "sliding_attention", "full_attention"], "sliding_window": 64}
FAMILIES = {name: config for name, config in CONFIGS.items() if name != "deepseek"} | {
    "afmoe": {
        **FINE_GRAINED,
        **SLIDING,
        "num_dense_layers": 1,
        "num_experts": 8,
        "num_shared_experts": 2,
        "global_attn_every_n_layers": 3,
        **{"score_func": "sigmoid", "route_norm": True, "n_group": 1, "topk_group": 1},
    },
    "axk1": {**GROUPED, **LATENT, "q_lora_rank": 32, "topk_method": "noaux_tc", "scoring_func": "sigmoid"},
    "cohere2_moe": {"intermediate_size": WIDTH, "num_experts": 8, "num_experts_per_tok": 2, **SLIDING},
    "dots1": {**GROUPED, **FULL},
    "exaone_moe": {**FINE_GRAINED, **SPARSE, **SLIDING, "num_experts": 8, "n_group": 1, "topk_group": 1},
    "flex_olmo": CONFIGS["olmoe"],
    "glm4_moe_lite": {**DEEPSEEK, **LATENT, **SPARSE, "n_group": 1, "topk_group": 1, "q_lora_rank": 32},
    "granitemoehybrid": {
        **COARSE,
        "layer_types": ["attention"] * 3,
        "shared_intermediate_size": 64,
        "mamba_n_heads": 4,
        "mamba_d_head": 32,
        "position_embedding_type": "rope",
    },
    "granitemoe_swa": {**COARSE, **SLIDING, "shared_intermediate_size": 64},
    "granitemoeshared": {**COARSE, "shared_intermediate_size": 64},
    "hunyuan_v1_moe": {"intermediate_size": WIDTH, "num_experts": 8, "moe_topk": 2, "num_shared_expert": 1},
    "hy_v3": {
        **FINE_GRAINED,
        **SPARSE,
        **{"num_experts": 8, "num_shared_experts": 2},
        **{"expert_hidden_dim": WIDTH, "first_k_dense_replace": 1, "route_norm": True, "qk_norm": True},
    },
    "laguna": {
        **FINE_GRAINED,
        **SPARSE,
        **{**FULL, "sliding_window": 64},
        **{"num_experts": 8, "shared_expert_intermediate_size": 64},
    },
    "lfm2_moe": {
        **FINE_GRAINED,
        "num_experts": 8,
        "num_dense_layers": 1,
        "layer_types": ["conv", "full_attention", "full_attention"],
    },
    "minimax_m2": {**COARSE, "rotary_dim": 32, "scoring_func": "sigmoid", "use_routing_bias": True},
    "phimoe": COARSE,
    "qwen3_next": {
        **{**CONFIGS["qwen2_moe"], "layer_types": ["linear_attention", "full_attention", "full_attention"]},
        **{"linear_num_key_heads": 2, "linear_num_value_heads": 2},
        **{"linear_key_head_dim": 32, "linear_value_head_dim": 32},
    },
    "solar_open": {**GROUPED, "n_group": 1, "topk_group": 1},
}
KEPT_OF = {"gpt_oss": 64}  # the kernel for CPUs does not pad there
# As published checkpoints spell it, and transformers does not.
ADDED = {"phimoe": {"architectures": ["PhiMoEForCausalLM"]}}
HEAD_DIM_FIXED = ("lfm2_moe", "phimoe", "granitemoe", "granitemoeshared", "granitemoehybrid", "olmoe", "flex_olmo")


def unpruned_model(family: str) -> torch.nn.Module:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    options = {**SMALL, **FAMILIES[family]}
    if family in HEAD_DIM_FIXED:
        options.pop("head_dim", None)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **options)).eval()
    for name, parameter in model.named_parameters():  # biases and norms start as constants, which hide mistakes
        if parameter.ndim == 1:
            torch.nn.init.normal_(parameter, 1.0 if "norm" in name else 0.0, 0.1)
    return model


def pruned_model(model: torch.nn.Module, kept: int):
    """A copy of a model with experts of one narrower width, and what saves it."""
    from optimum_heapr import HeaprConfig, HeaprPruner
    from optimum_heapr.calibration.runner import calibrate
    from tests.helpers import calibration_data

    config = HeaprConfig(ratio=1 - kept / WIDTH, layout="uniform", criterion="random", width_multiple=4)
    model = copy.deepcopy(model)
    data = calibration_data(8)
    for sample in data.samples:
        sample %= VOCAB_SIZE
    pruner = HeaprPruner(model, config=config)
    pruner.statistics = calibrate(model, data)
    return pruner.apply(pruner.plan()), pruner


@torch.no_grad()
def with_zeros(model: torch.nn.Module, pruned: torch.nn.Module) -> torch.nn.Module:
    """A model of the unpruned shape that computes what a pruned one does."""
    from optimum_heapr.experts import find_expert_blocks

    zeroed = copy.deepcopy(model)
    blocks = {block.path: block.width for block in find_expert_blocks(zeroed)}
    others = {name: value for name, value in pruned.state_dict().items() if ".experts." not in name}
    zeroed.load_state_dict(others, strict=False)
    for path, width in blocks.items():
        source, target = pruned.get_submodule(path), zeroed.get_submodule(path)
        kept = source.down_proj.shape[-1]
        target.gate_up_proj.zero_()
        target.down_proj.zero_()
        target.gate_up_proj[:, :kept], target.gate_up_proj[:, width : width + kept] = source.gate_up_proj.chunk(2, 1)
        target.down_proj[..., :kept] = source.down_proj
    return zeroed


def in_vllm(folder: Path):
    """Tokens and log-probabilities, or the error that vLLM stops with."""
    from vllm.distributed import cleanup_dist_env_and_memory

    from tests.serving.engine import log_probabilities, served

    try:
        return log_probabilities(served(folder))
    except Exception as error:  # of any kind: a row of the table
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        return f"{type(error).__name__}: {lines[-1] if lines else ''}"[:160]
    finally:
        gc.collect()
        cleanup_dist_env_and_memory()


@torch.no_grad()
def in_transformers(model: torch.nn.Module) -> list[tuple[list[int], torch.Tensor]]:
    """The same of transformers. Before vLLM: it changes classes of transformers where it has no model of its own."""
    from tests.serving.engine import NEW_TOKENS, prompts

    found = []
    for ids in prompts():
        for _ in range(NEW_TOKENS):
            ids = [*ids, model(input_ids=torch.tensor([ids])).logits[0, -1].argmax().item()]
        scores = model(input_ids=torch.tensor([ids[:-1]])).logits[0].float().log_softmax(-1)
        found.append((ids, scores.gather(1, torch.tensor(ids[1:])[:, None])[:, 0]))
    return found


def compared(one, other) -> tuple[bool, float]:
    """Whether all tokens are equal, and the largest difference of a log-probability of those before the first that is not."""
    differences = []
    for (ids, values), (others, of_others) in zip(one, other):
        equal = next((at for at, (a, b) in enumerate(zip(ids, others)) if a != b), len(ids))
        differences.append((values - of_others)[: equal - 1].abs().max().item())
    return [ids for ids, _ in one] == [ids for ids, _ in other], max(differences)


def cell(result) -> str:
    if isinstance(result, str):
        return result
    tokens_are_equal, difference = result
    return "NaN" if math.isnan(difference) else f"{'equal' if tokens_are_equal else 'not equal'}, {difference:.1e}"


def row(family: str, folder: Path) -> list[str]:
    kept = KEPT_OF.get(family, KEPT)
    model = unpruned_model(family)
    pruned, pruner = pruned_model(model, kept)
    model.save_pretrained(folder / "unpruned")
    pruner.save_pretrained(folder / "uniform")
    changes = ADDED.get(family, {})
    for name in ("unpruned", "uniform") if changes else ():
        file = folder / name / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    results, reference = [], "transformers"
    expected, expected_pruned = in_transformers(model), in_transformers(pruned)
    stock, uniform = in_vllm(folder / "unpruned"), in_vllm(folder / "uniform")
    results.append(stock if isinstance(stock, str) else compared(stock, expected))
    if isinstance(uniform, str):
        results.append(uniform)
    elif not isinstance(results[0], str) and results[0][1] < 1e-4:
        results.append(compared(uniform, expected_pruned))
    else:
        with_zeros(model, pruned).save_pretrained(folder / "zeros")
        if changes:
            file = folder / "zeros" / "config.json"
            file.write_text(json.dumps(json.loads(file.read_text()) | changes))
        zeros, reference = in_vllm(folder / "zeros"), "vLLM, with zeros"
        results.append(zeros if isinstance(zeros, str) else compared(uniform, zeros))
    return [f"`{family}`", f"{WIDTH} → {kept}", *map(cell, results), reference]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", nargs="+", default=sorted(FAMILIES), choices=sorted(FAMILIES))
    parser.add_argument("--without-vllm", action="store_true", help="makes the models and prunes them, no more")
    parser.add_argument(
        "--output", type=Path, help="rows are appended to this file; families that it has are left out"
    )
    args = parser.parse_args()

    def say(line: str) -> None:
        print(line, flush=True)
        if args.output:
            with args.output.open("a", encoding="utf-8") as file:
                file.write(line + "\n")

    done = args.output.read_text(encoding="utf-8") if args.output and args.output.exists() else ""
    if not done:
        say(
            "| family | width | unpruned, against transformers | `uniform` | `uniform` against |\n|---|---|---|---|---|"
        )
    for family in [family for family in args.families if f"| `{family}` |" not in done]:
        with tempfile.TemporaryDirectory() as folder:
            if args.without_vllm:
                try:
                    print(family, type(pruned_model(unpruned_model(family), KEPT)[0]).__name__)
                except Exception as error:
                    print(family, type(error).__name__, error)
            else:
                try:
                    cells = row(family, Path(folder))
                except Exception as error:  # of any kind: a row of the table
                    cells = [f"`{family}`", "", " ".join(f"{type(error).__name__}: {error}".split())[:160], "", ""]
                say("| " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
