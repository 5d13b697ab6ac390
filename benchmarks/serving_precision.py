# Licensed under the Apache License, Version 2.0
"""What half precision does to a model in vLLM, against transformers in the same dtype and against float32.

    PYTHONPATH=. python benchmarks/serving_precision.py --models MODEL PRUNED ... --text text.jsonl

in an environment with vLLM (tests/serving/run_vllm.sh). Prints a table: how many sets of experts that a token is routed to in a layer
differ, how far log-probabilities of the text's tokens are from one another, and how often the likeliest next token is the same. The
texts are given, not generated: one token that differs would make all that follow differ. Half precision of transformers against its
own float32 is there to compare with; a router whose scores are close goes either way then.
"""

import argparse
import gc
import json
import os
from dataclasses import dataclass
from pathlib import Path

import torch

import optimum_heapr  # noqa: F401, transformers knows pruned models by it


os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_CPU_OMP_THREADS_BIND="nobind", HF_HUB_OFFLINE="1")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")


@dataclass
class Outcome:
    """What one engine says of texts.

    Attributes:
        log_probabilities (`torch.Tensor`): of each token but the first of each text.
        likeliest (`torch.Tensor`): the token that has the largest one there.
        routed (`torch.Tensor`): `[layers, tokens, top_k]`, experts of each token in ascending order; empty where kernels choose them.
    """

    log_probabilities: torch.Tensor
    likeliest: torch.Tensor
    routed: torch.Tensor


@torch.no_grad()
def in_transformers(folder: str, texts: list[list[int]], dtype: torch.dtype) -> Outcome:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    routed = {}
    for path, module in model.named_modules():
        if path.endswith(".experts"):
            module.register_forward_pre_hook(
                lambda _, args, kept=routed.setdefault(path, []): kept.append(args[1].sort(-1).values)
            )
    log_probabilities, likeliest = [], []
    for ids in texts:
        scores = model(input_ids=torch.tensor([ids])).logits[0, :-1].float().log_softmax(-1)
        log_probabilities.append(scores.gather(1, torch.tensor(ids[1:])[:, None])[:, 0])
        likeliest.append(scores.argmax(-1))
    return Outcome(
        torch.cat(log_probabilities), torch.cat(likeliest), torch.stack([torch.cat(kept) for kept in routed.values()])
    )


def _record_routing(model) -> None:
    """Keeps what each router of a model of vLLM chooses, in the order of the layers."""
    from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner

    model.routed = []
    for module in model.modules():
        if isinstance(module, MoERunner):
            model.routed.append(kept := [])
            module.router.set_capture_fn(lambda ids, kept=kept: kept.append(ids.sort(-1).values.clone()))


def _routing(model) -> torch.Tensor:
    found = torch.stack([torch.cat(kept) for kept in model.routed]) if all(model.routed) else torch.empty(0)
    for kept in model.routed:
        kept.clear()
    return found


def in_vllm(folder: str, texts: list[list[int]], dtype: torch.dtype, **options) -> Outcome:
    from vllm import LLM, SamplingParams

    longest = max(map(len, texts))
    engine = LLM(
        str(folder),
        dtype=str(dtype).removeprefix("torch."),
        max_model_len=longest + 1,
        max_num_seqs=1,  # so that tokens come in the order of the texts
        skip_tokenizer_init=True,
        enable_prefix_caching=False,
        gpu_memory_utilization=0.2,
        **{"enforce_eager": True, **options},
    )
    engine.apply_model(_record_routing)
    sampling = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=1, detokenize=False)
    outputs = engine.generate([{"prompt_token_ids": ids} for ids in texts], sampling, use_tqdm=False)
    [routed] = engine.apply_model(_routing)
    steps = [
        (step, token)
        for ids, output in zip(texts, outputs)
        for token, step in zip(ids[1:], output.prompt_logprobs[1:])
    ]
    likeliest = [next(token for token, found in step.items() if found.rank == 1) for step, _ in steps]
    log_probabilities = torch.tensor([step[token].logprob for step, token in steps])
    return Outcome(log_probabilities, torch.tensor(likeliest), routed)


def compared(one: Outcome, other: Outcome) -> dict[str, float]:
    """Routed sets that differ (in %), mean and largest difference of a log-probability, likeliest tokens that are the same (in %)."""
    difference = (one.log_probabilities - other.log_probabilities).abs()
    return {
        "routed": (one.routed != other.routed).any(-1).double().mean().item() * 100,
        "mean": difference.mean().item(),
        "largest": difference.max().item(),
        "likeliest": (one.likeliest == other.likeliest).double().mean().item() * 100,
        "loss": (other.log_probabilities - one.log_probabilities).mean().item(),
    }


def windows(folder: str, file: Path, number: int, length: int) -> list[list[int]]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = [json.loads(line)["text"] for line in file.read_text(encoding="utf-8").splitlines()]
    ids = tokenizer("\n\n".join(texts))["input_ids"]
    return [ids[start : start + length] for start in range(0, number * length, length)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--windows", type=int, default=32)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float16"])
    args = parser.parse_args()
    texts = windows(args.models[0], args.text, args.windows, args.length)

    print(
        "| model | dtype | compared | routed sets that differ | mean difference | largest | likeliest token the same | loss |"
    )
    print("|---|---|---|---:|---:|---:|---:|---:|")
    dtypes = {name: getattr(torch, name) for name in ("float32", *args.dtypes)}
    # All of transformers first: once an engine has started, the configurations of pruned models in this process are vLLM's.
    expected = {folder: {d: in_transformers(folder, texts, dtypes[d]) for d in dtypes} for folder in args.models}
    for folder in args.models:
        full = expected[folder]["float32"]
        for dtype, theirs in expected[folder].items():
            ours = in_vllm(folder, texts, dtypes[dtype])
            gc.collect()
            pairs = {"vLLM, transformers": (ours, theirs)}
            if dtype != "float32":
                pairs |= {"vLLM, float32": (ours, full), "transformers, float32": (theirs, full)}
            for name, pair in pairs.items():
                found = compared(*pair)
                print(
                    f"| {Path(folder).name} | {dtype} | {name} | {found['routed']:.2f} % | {found['mean']:.1e} "
                    f"| {found['largest']:.1e} | {found['likeliest']:.2f} % | {found['loss']:+.5f} |",
                    flush=True,
                )
    layers, tokens, _ = full.routed.shape
    print(f"{full.log_probabilities.numel()} log-probabilities and {layers * tokens} routed sets a model")


if __name__ == "__main__":
    main()
