# Licensed under the Apache License, Version 2.0
"""Sizes against counts made another way: token by token, and by torch's own counter of FLOPs."""

from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch.utils.flop_counter import FlopCounterMode

from optimum_heapr import HeaprConfig, HeaprPruner
from optimum_heapr.evaluation.size import ModelSize, routed_experts, routing_counts
from optimum_heapr.experts import experts_per_token
from tests.helpers import random_ids, tiny_model


IDS = random_ids(2, 20)


def pruned(model, **options):
    pruner = HeaprPruner(model, None, HeaprConfig(**{"ratio": 0.5, "num_samples": 2, "seq_length": 20, **options}))
    pruner.calibrate(Dataset.from_dict({"input_ids": IDS.tolist()}))
    return pruner.prune()


def models():
    return {
        "unpruned": tiny_model(),
        "shared experts": tiny_model("deepseek_v2"),
        "biases": tiny_model("gpt_oss"),
        "variable": pruned(tiny_model()),
        "padded": pruned(tiny_model(moe_intermediate_size=16), layout="padded"),
        "uniform": pruned(tiny_model(moe_intermediate_size=16), layout="uniform"),
    }


@pytest.fixture(scope="module", params=models().items(), ids=lambda item: item[0])
def model(request):
    return request.param[1]


@torch.no_grad()
def routes(model, ids) -> dict[str, torch.Tensor]:
    """The experts of each token, by block."""
    seen, handles = {}, []
    for path, block in routed_experts(model).items():
        handles.append(
            block.module.register_forward_pre_hook(
                lambda _, given, path=path: seen.__setitem__(path, given[1].clone())
            )
        )
    model(input_ids=ids)
    for handle in handles:
        handle.remove()
    return seen


@torch.no_grad()
def test_routing_is_counted_and_leaves_no_hook(model):
    seen = routes(model, IDS)
    with routing_counts(model) as counts:
        model(input_ids=IDS[:1])
        model(input_ids=IDS[1:])
    model(input_ids=IDS)
    for path, chosen in seen.items():
        expected = [int((chosen == expert).sum()) for expert in range(len(counts[path]))]
        assert counts[path] == expected and sum(expected) == IDS.numel() * experts_per_token(model)


@torch.no_grad()
def test_tokens_of_router_weight_zero_are_not_counted():
    model = tiny_model()
    path, block = next(iter(routed_experts(model).items()))
    index, weight = torch.tensor([[0], [0], [1]]), torch.tensor([[0.0], [0.5], [0.5]])
    hidden = torch.ones(3, model.config.hidden_size)
    with routing_counts(model) as counts:
        block.module(hidden, index, weight)
        block.module(hidden, top_k_index=index, top_k_weights=weight)
    assert counts == {path: [2, 2] + [0] * (len(block.widths) - 2)}


@torch.no_grad()
def test_active_parameters_are_those_that_tokens_use(model):
    seen = routes(model, IDS)
    with routing_counts(model) as counts:
        model(input_ids=IDS)
    size = ModelSize.of(model, counts)
    everything = sum(parameter.numel() for parameter in model.parameters())
    assert size.parameters == everything and size.weight_bytes == 4 * everything
    used = 0
    for path, block in routed_experts(model).items():
        # Rows of the gate, the up and the down projection, with biases of the first two.
        each = 3 * 32 + 2 * bool(block.module.has_bias)
        everything -= each * sum(block.widths)
        used += sum(each * block.widths[expert] for expert in seen[path].flatten().tolist())
    assert size.active_parameters == pytest.approx(everything + used / IDS.numel(), abs=1)


@torch.no_grad()
def test_flops_are_those_that_torch_counts(model):
    model.set_attn_implementation("eager")  # attention over the context as matrix products, to be subtracted
    model.set_experts_implementation("eager")
    with routing_counts(model) as counts:
        model(input_ids=IDS)
    with FlopCounterMode(display=False) as counter:
        model(input_ids=IDS)
    by_operation = counter.get_flop_counts()["Global"]
    products = sum(flops for operation, flops in by_operation.items() if "bmm" not in str(operation))
    counted = products / IDS.numel()
    estimate = ModelSize.of(model, counts).flops_per_token
    assert estimate == pytest.approx(counted, rel=0.06)  # norms and biases are parameters, but no matrices


@pytest.mark.filterwarnings("ignore:adapters of packed experts")
def test_a_model_with_adapters_is_seen_as_the_model_in_it():
    for model in (tiny_model(), pruned(tiny_model())):
        plain, paths = ModelSize.of(model), list(routed_experts(model))
        adapters = LoraConfig(r=2, target_modules=["q_proj"], target_parameters=["experts.gate_up_proj"])
        model = get_peft_model(model, adapters)
        with routing_counts(model) as counts, torch.no_grad():
            model(input_ids=IDS)
        assert list(counts) == paths and sum(counts[paths[0]]) == 2 * IDS.numel()
        size = ModelSize.of(model)
        adapted = size.parameters - plain.parameters
        assert size.active_parameters == pytest.approx(plain.active_parameters + adapted, abs=1) and adapted > 0


def test_without_counts_all_experts_are_used_alike():
    model = tiny_model()
    size = ModelSize.of(model)
    inactive = 2 * (6 - 2) * 12 * 3 * 32
    assert size.active_parameters == size.parameters - inactive
    with torch.device("meta"):
        assert ModelSize.of(type(model)(model.config)) == size  # storage is not needed


def test_tied_embeddings_count_as_a_head():
    tied, apart = ModelSize.of(tiny_model(tie_word_embeddings=True)), ModelSize.of(tiny_model())
    assert apart.parameters - tied.parameters == 320 * 32
    assert tied.flops_per_token == apart.flops_per_token


def test_a_dense_model_uses_everything():
    model = tiny_model("llama")
    assert ModelSize.of(model).active_parameters == model.num_parameters() and routed_experts(model) == {}


def test_an_unknown_router_is_said_to_be_unknown():
    model = tiny_model()
    model.config = SimpleNamespace(
        get_text_config=lambda: SimpleNamespace(tie_word_embeddings=False), _name_or_path=""
    )
    size = ModelSize.of(model)
    assert size.active_parameters is None and size.flops_per_token is None and size.parameters > 0
