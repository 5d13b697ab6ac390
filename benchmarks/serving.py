# Licensed under the Apache License, Version 2.0
"""Tokens a second in vLLM: variable widths against one width of the same size and against the unpruned model.

    python benchmarks/serving.py --kept 0.5          in an environment with vLLM (tests/serving/run_vllm.sh)

Prints one table. The models are random Qwen3-MoEs of a realistic shape; all three are in one process and take turns, and each
figure, also each ratio, is the median over rounds; decoding is the median step of a round. On a CPU with one thread it counts
seconds of the processor, of which other processes cost less.
"""

import argparse
import os
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch


THREADS = int(os.environ.setdefault("OMP_NUM_THREADS", "1"))
os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_CPU_OMP_THREADS_BIND="nobind", HF_HUB_OFFLINE="1")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
CLOCK = time.process_time if THREADS == 1 and not torch.cuda.is_available() else time.perf_counter

PROMPT, NEW_TOKENS = 64, 16


def checkpoints(folder: Path, args: argparse.Namespace) -> dict[str, Path]:
    """Random models: unpruned, of one width, and with widths of the same sum, uneven as those of a global plan."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    from optimum_heapr.modeling.modeling_heapr import pruned_model_class

    shape = {
        "vocab_size": 1024,
        "hidden_size": args.hidden,
        "num_hidden_layers": args.layers,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "head_dim": 64,
        "intermediate_size": args.width,
        "moe_intermediate_size": args.width,
        "num_experts": args.experts,
        "num_experts_per_tok": args.top_k,
        "max_position_embeddings": 1024,
    }
    generator = random.Random(0)
    widths = {}
    for layer in range(args.layers):
        shares = [generator.random() for _ in range(args.experts)]
        scale = args.kept * args.experts / sum(shares)
        widths[f"model.layers.{layer}.mlp.experts"] = [min(int(s * scale * args.width), args.width) for s in shares]
    pruned = pruned_model_class(Qwen3MoeForCausalLM)
    torch.set_default_dtype(torch.bfloat16)
    made = {
        "unpruned": lambda: Qwen3MoeForCausalLM(Qwen3MoeConfig(**shape)),
        "uniform": lambda: Qwen3MoeForCausalLM(
            Qwen3MoeConfig(**shape | {"moe_intermediate_size": round(args.kept * args.width)})
        ),
        "variable": lambda: pruned(pruned.config_class(**shape, expert_widths=widths)),
    }
    for name, make in made.items():
        make().save_pretrained(folder / name)
    torch.set_default_dtype(torch.float32)
    return {name: folder / name for name in made}


def steps(engine, prompts: list[list[int]], name: str) -> tuple[float, list[float]]:
    """Seconds until all prompts are read, and of each step that generates one token for every request."""
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0, max_tokens=1 + NEW_TOKENS, ignore_eos=True, detokenize=False)
    core, taken = engine.llm_engine, []
    for number, ids in enumerate(prompts):
        core.add_request(f"{name}-{number}", {"prompt_token_ids": ids}, sampling)
    while core.has_unfinished_requests():
        start = CLOCK()
        core.step()
        taken.append(CLOCK() - start)
    return sum(taken[:-NEW_TOKENS]), taken[-NEW_TOKENS:]


def loading_seconds() -> list[float]:
    """Is appended to by each model that vLLM loads from now on."""
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

    load, taken = DefaultModelLoader.load_weights, []

    def timed(*args):
        start = CLOCK()
        load(*args)
        taken.append(CLOCK() - start)

    DefaultModelLoader.load_weights = timed
    return taken


def expert_bytes(model) -> int:
    return sum(p.numel() * p.element_size() for name, p in model.named_parameters() if ".routed_experts." in name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kept", type=float, default=0.5)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--top-k", type=int, default=8)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--requests", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--compiled", action="store_true", help="with torch.compile, not in eager mode")
    args = parser.parse_args()
    generator = random.Random(1)

    with tempfile.TemporaryDirectory() as folder:
        from vllm import LLM

        loading = loading_seconds()
        engines = {
            name: LLM(
                str(path),
                dtype=args.dtype,
                enforce_eager=not args.compiled,
                skip_tokenizer_init=True,
                max_model_len=512,
                max_num_seqs=max(args.requests),
                gpu_memory_utilization=0.2,
                enable_prefix_caching=False,
            )
            for name, path in checkpoints(Path(folder), args).items()
        }
    decode: dict[tuple[str, int], list[float]] = {}
    prefill: dict[tuple[str, int], list[float]] = {}
    for round_ in range(args.rounds + 1):  # the first warms up
        for requests in args.requests:
            prompts = [[generator.randrange(1, 1024) for _ in range(PROMPT)] for _ in range(requests)]
            for name, engine in engines.items():
                first, each = steps(engine, prompts, f"{round_}-{requests}")
                prefill.setdefault((name, requests), []).append(requests * PROMPT / first)
                decode.setdefault((name, requests), []).append(requests / statistics.median(each))
                print(
                    f"round {round_}, {requests} requests, {name}: {first:.2f} s, then {statistics.median(each):.4f} s a step",
                    file=sys.stderr,
                    flush=True,
                )
    clock = "second of the processor, 1 thread" if CLOCK is time.process_time else "second"
    print(f"tokens a {clock}, {args.dtype}, {'compiled' if args.compiled else 'eager'}: decode / prefill")
    print(
        "| model | MB of experts | loading, s a GB of them | "
        + " | ".join(f"{n} requests" for n in args.requests)
        + " |"
    )
    print("|---|---|---|" + "---|" * len(args.requests))
    for (name, engine), loaded in zip(engines.items(), loading):
        size = sum(engine.apply_model(expert_bytes))
        cells = [
            " / ".join(f"{statistics.median(figures[name, n][1:]):.0f}" for figures in (decode, prefill))
            for n in args.requests
        ]
        print(f"| {name} | {size / 1e6:.0f} | {loaded / size * 1e9:.1f} | " + " | ".join(cells) + " |")
    for other in ("uniform", "unpruned"):
        cells = [
            " / ".join(
                f"{statistics.median(v / o for v, o in zip(figures['variable', n][1:], figures[other, n][1:])):.2f}"
                for figures in (decode, prefill)
            )
            for n in args.requests
        ]
        print(f"| variable : {other} | | | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
