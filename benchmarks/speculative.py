# Licensed under the Apache License, Version 2.0
"""A pruned model as the draft of its own unpruned one: tokens for each pass of the large model, and time against greedy decoding.

    python benchmarks/speculative.py --model MODEL --statistics statistics.safetensors --text text.jsonl --ratios 0.25 0.5 0.7
    PYTHONPATH=. python benchmarks/speculative.py --vllm …     the same in vLLM (tests/serving/run_vllm.sh makes an environment)

Greedy decoding is what is sped up, so the tokens must be the same; a run that gives others fails. Prints one table.
"""

from __future__ import annotations

import argparse
import copy
import gc
import tempfile
import time
from pathlib import Path

import torch

from optimum_heapr import HeaprConfig, HeaprPruner
from optimum_heapr.checkpoints.loading import load_model
from optimum_heapr.evaluation.perplexity import evaluation_windows


def generated(
    model, prompts: list[torch.Tensor], new_tokens: int, **options
) -> tuple[list[torch.Tensor], float, float]:
    """Tokens of each prompt, tokens in a pass of the model, and seconds."""
    passes = []
    hook = model.register_forward_hook(lambda *_: passes.append(1))
    start = time.perf_counter()
    tokens = [
        model.generate(
            prompt[None],
            attention_mask=torch.ones_like(prompt[None]),
            do_sample=False,
            max_new_tokens=new_tokens,
            **options,
        )[0, len(prompt) :]
        for prompt in prompts
    ]
    hook.remove()
    return tokens, len(prompts) * new_tokens / len(passes), time.perf_counter() - start


def generated_in_vllm(
    model: str, prompts: list[torch.Tensor], new_tokens: int, draft: str | None = None, draft_tokens: int = 0
) -> tuple[list[torch.Tensor], float, float]:
    """The same of an engine of vLLM, without each prompt's first pass, which gives one token: drafts begin after it."""
    from vllm import SamplingParams
    from vllm.distributed import cleanup_dist_env_and_memory

    from tests.serving.engine import served

    drafting = {"model": draft, "num_speculative_tokens": draft_tokens}
    options = {"speculative_config": drafting} if draft else {}
    engine = served(model, max_num_seqs=len(prompts), disable_log_stats=False, **options)
    sampling = SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True, detokenize=False)
    start = time.perf_counter()
    outputs = engine.generate([{"prompt_token_ids": prompt.tolist()} for prompt in prompts], sampling, use_tqdm=False)
    seconds = time.perf_counter() - start
    counted = {metric.name: metric.value for metric in engine.get_metrics() if hasattr(metric, "value")}
    passes = counted["vllm:spec_decode_num_drafts"] if draft else len(prompts) * (new_tokens - 1)
    del engine
    gc.collect()
    cleanup_dist_env_and_memory()
    tokens = [torch.tensor(output.outputs[0].token_ids) for output in outputs]
    return tokens, len(prompts) * (new_tokens - 1) / passes, seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--statistics", required=True, help="with second-order matrices, of the same model")
    parser.add_argument("--text", required=True, help="beginnings of its windows are the prompts")
    parser.add_argument("--ratios", nargs="+", type=float, default=[0.25, 0.5, 0.7])
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--prompt-length", type=int, default=32)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--draft-tokens", type=int, default=4, help="tokens that the draft proposes at a time")
    parser.add_argument("--vllm", action="store_true", help="in vLLM, all prompts at a time")
    args = parser.parse_args()

    model, tokenizer = load_model(args.model, dtype="float32")
    model.eval().generation_config.eos_token_id = None  # all prompts go on to the end
    prompts = evaluation_windows(tokenizer, args.text, args.prompt_length, args.prompts)
    if args.vllm:
        expected, each, seconds = generated_in_vllm(args.model, prompts, args.new_tokens)
    else:
        expected, each, seconds = generated(model, prompts, args.new_tokens)
    print("| removed | drafted tokens accepted | tokens a pass of the large model | time |\n|---|---|---|---|")
    print(f"| no draft | | {each:.2f} | 1 |", flush=True)
    for ratio in args.ratios:
        config = HeaprConfig(criterion="obs", compensate=True, ratio=ratio)
        pruner = HeaprPruner(copy.deepcopy(model), tokenizer, config)
        draft = pruner.apply(pruner.plan(args.statistics), args.statistics)
        if args.vllm:
            with tempfile.TemporaryDirectory() as folder:
                pruner.save_pretrained(Path(folder) / "draft")
                tokens, each, taken = generated_in_vllm(
                    args.model, prompts, args.new_tokens, str(Path(folder) / "draft"), args.draft_tokens
                )
        else:
            draft.generation_config.num_assistant_tokens = args.draft_tokens
            draft.generation_config.num_assistant_tokens_schedule = "constant"
            draft.generation_config.assistant_confidence_threshold = 0.0
            tokens, each, taken = generated(model, prompts, args.new_tokens, assistant_model=draft)
        if not all(torch.equal(one, other) for one, other in zip(tokens, expected, strict=True)):
            raise SystemExit(f"{ratio}: other tokens than greedy decoding gives")
        print(
            f"| {ratio:.0%} | {(each - 1) / args.draft_tokens:.0%} | {each:.2f} | {taken / seconds:.2f} |", flush=True
        )


if __name__ == "__main__":
    main()
