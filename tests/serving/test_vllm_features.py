# Licensed under the Apache License, Version 2.0
"""What else vLLM does with a model, done with pruned ones: half precision, chunks, cached prefixes, adapters, ranks.

Skipped where vLLM is not installed; `tests/serving/run_vllm.sh` makes an environment that has it, and runs these.
"""

from __future__ import annotations

import gc
import importlib.util
import json

import pytest
import torch


if importlib.util.find_spec("vllm") is None:
    pytest.skip("vLLM is not installed; tests/serving/run_vllm.sh makes an environment", allow_module_level=True)

from optimum_heapr.serving.errors import ServingError  # noqa: E402
from tests.serving.engine import in_ranks, largest_difference, log_probabilities, prompts, served  # noqa: E402
from tests.serving.variable_models import padded_checkpoint, variable_checkpoint  # noqa: E402


pytestmark = [pytest.mark.vllm, pytest.mark.timeout(900)]


@pytest.fixture(autouse=True)
def one_engine_at_a_time():
    yield
    gc.collect()


@torch.no_grad()
def of_transformers(model: torch.nn.Module, texts: list[list[int]]) -> torch.Tensor:
    """The log-probability of each token but the first of each text."""
    found = []
    for ids in texts:
        scores = model(input_ids=torch.tensor([ids[:-1]])).logits[0].float().log_softmax(-1)
        found.append(scores.gather(1, torch.tensor(ids[1:])[:, None])[:, 0])
    return torch.cat(found)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_as_near_to_float32_as_that_of_transformers(dtype, tmp_path):
    """Rounding sends a token to other experts where two scores are close, in any engine: so no bound on single tokens."""
    model = variable_checkpoint(tmp_path, "qwen3_moe")
    found = log_probabilities(served(tmp_path, dtype=str(dtype).removeprefix("torch.")))
    texts, ours = [ids for ids, _ in found], torch.cat([values for _, values in found])
    exact, theirs = of_transformers(model, texts), of_transformers(model.to(dtype), texts)
    error, expected = ((values - exact).abs().median().item() for values in (ours, theirs))
    print(f"\n{dtype}: {error:.1e} in vLLM, {expected:.1e} in transformers")
    assert 0 < error < 2 * expected


def test_chunks_of_prompts_and_cached_prefixes(tmp_path):
    """Prompts go through in chunks of 16 tokens, and a second time with keys and values of the first."""
    model = variable_checkpoint(tmp_path, "qwen3_moe")
    engine = served(
        tmp_path, max_num_batched_tokens=16, enable_chunked_prefill=True, enable_prefix_caching=True, block_size=32
    )
    assert largest_difference(model, log_probabilities(engine)) < 1e-4

    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0, max_tokens=4, logprobs=0, ignore_eos=True, detokenize=False)
    first, again = (
        engine.generate([{"prompt_token_ids": prompts()[-1]}], sampling, use_tqdm=False)[0] for _ in range(2)
    )
    assert again.num_cached_tokens > 0
    assert list(again.outputs[0].token_ids) == list(first.outputs[0].token_ids)
    scores = [
        [step[t].logprob for t, step in zip(o.outputs[0].token_ids, o.outputs[0].logprobs)] for o in (first, again)
    ]
    assert torch.allclose(*map(torch.tensor, scores), atol=1e-4)


def test_as_draft_of_the_unpruned_model(tmp_path):
    """Both compute the same, the unpruned one with zeros: so all that is drafted is accepted, and tokens are those without a draft."""
    padded_checkpoint(tmp_path / "model", "qwen3_moe", variable_checkpoint(tmp_path / "draft", "qwen3_moe"))
    expected = log_probabilities(served(tmp_path / "model"))
    gc.collect()
    drafting = {"model": str(tmp_path / "draft"), "num_speculative_tokens": 3}
    engine = served(tmp_path / "model", speculative_config=drafting, disable_log_stats=False)
    assert [ids for ids, _ in log_probabilities(engine)] == [ids for ids, _ in expected]
    counted = {metric.name: metric.value for metric in engine.get_metrics() if hasattr(metric, "value")}
    drafted, accepted = (counted[f"vllm:spec_decode_num_{what}_tokens"] for what in ("draft", "accepted"))
    assert drafted >= 3 * 8
    # What is drafted beyond the last token that was asked for counts as not accepted.
    assert accepted >= 0.8 * drafted


def test_weights_are_not_loaded_a_second_time(tmp_path):
    """vLLM's CPU build computes something else then, of stock models as well, and says nothing."""
    variable_checkpoint(tmp_path, "qwen3_moe")
    engine = served(tmp_path)
    with pytest.raises(ServingError, match="start another engine"):
        engine.collective_rpc("reload_weights", kwargs={"weights_path": str(tmp_path)})


def adapter(folder, model, names: list[str]):
    """A LoRA adapter with random matrices, as PEFT writes one, and the model with it."""
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(model, LoraConfig(r=8, lora_alpha=32, target_modules=names))
    torch.manual_seed(3)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    adapted.save_pretrained(folder)
    return adapted.eval()


def test_adapters_of_attention(tmp_path):
    """Requests with an adapter and without it, in one engine; an adapter of experts is refused."""
    from vllm.lora.request import LoRARequest

    model = variable_checkpoint(tmp_path / "pruned", "qwen3_moe")
    engine = served(tmp_path / "pruned", enable_lora=True, max_lora_rank=8)
    assert largest_difference(model, log_probabilities(engine)) < 1e-4
    adapted = adapter(tmp_path / "adapter", model, ["q_proj", "k_proj", "v_proj", "o_proj"])
    found = log_probabilities(engine, lora_request=LoRARequest("attention", 1, str(tmp_path / "adapter")))
    assert largest_difference(adapted, found) < 1e-4
    with adapted.disable_adapter():
        assert largest_difference(adapted, found) > 0.01

    from safetensors.torch import load_file, save_file

    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    for which in ("A", "B"):
        tensors[f"base_model.model.model.layers.0.mlp.experts.1.up_proj.lora_{which}.weight"] = torch.zeros(8, 8)
    save_file(tensors, tmp_path / "adapter" / "adapter_model.safetensors")
    settings = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert "q_proj" in settings["target_modules"]
    with pytest.raises(ValueError, match="experts.1.up_proj"):
        log_probabilities(engine, lora_request=LoRARequest("experts", 2, str(tmp_path / "adapter")))


@pytest.mark.parametrize(
    "families, options",
    [
        (["qwen3_moe", "gpt_oss"], {"tensor_parallel_size": 2}),  # the second has biases, and gate and up in turn
        # Eager, vLLM's CPU build ends at the first request, of stock models as well.
        (["qwen3_moe"], {"pipeline_parallel_size": 2, "enforce_eager": False}),
    ],
    ids=["tensor", "pipeline"],
)
def test_two_ranks(families, options, tmp_path):
    """Halves of every expert, or of the layers, in processes of their own: log-probabilities are those of one process."""
    for family in families:
        variable_checkpoint(tmp_path / family, family)
    of_ranks = in_ranks([tmp_path / family for family in families], tmp_path, **options)
    for family, found in zip(families, of_ranks):
        expected = log_probabilities(served(tmp_path / family))
        gc.collect()
        assert [ids for ids, _ in found] == [ids for ids, _ in expected]
        difference = max((a - b).abs().max().item() for (_, a), (_, b) in zip(found, expected))
        print(f"\n{family}, two ranks against one, {options}: {difference:.1e}")
        assert difference < 1e-4
