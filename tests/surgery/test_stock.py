# Licensed under the Apache License, Version 2.0
"""Stock layouts: the original architecture, exact, loadable where this package cannot be imported."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from optimum_heapr.configuration import HeaprConfig
from optimum_heapr.experts import find_expert_blocks
from optimum_heapr.families import TESTED
from optimum_heapr.pruner import HeaprPruner
from optimum_heapr.surgery.apply import apply_plan
from optimum_heapr.utils.errors import HeaprError
from tests.helpers import tiny_model
from tests.processes import run_python

from .stock_models import layout_plan, logits_of, masked_model, random_plan, token_ids, wide_model


LAYOUTS = ("uniform", "padded")
# Its shared MLP is sized by the same field as its experts, and has no count that could be raised.
REFUSED = "hunyuan_v1_moe"
FAMILIES = [family for family in TESTED if family != REFUSED]

LOAD_ELSEWHERE = """
import sys
sys.modules["optimum_heapr"] = None  # importing it raises ImportError
import torch, transformers
from safetensors.torch import load_file, save_file
folder = sys.argv[1]
ids = load_file(f"{folder}/ids.safetensors")["ids"]
logits, types = {}, []
for name in sys.argv[2:]:
    config = transformers.AutoConfig.from_pretrained(f"{folder}/{name}", trust_remote_code=name.startswith("deepseek-"))
    vision = type(config) in transformers.AutoModelForImageTextToText._model_mapping
    auto = transformers.AutoModelForImageTextToText if vision else transformers.AutoModelForCausalLM
    options = {"trust_remote_code": True} if name.startswith("deepseek-") else {}
    model, info = auto.from_pretrained(f"{folder}/{name}", output_loading_info=True, **options)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    with torch.no_grad():
        logits[name] = model.eval()(input_ids=ids).logits
    types.append(type(model).__name__)
save_file(logits, f"{folder}/logits.safetensors")
print(" ".join(types))
"""


@pytest.fixture(scope="module")
def pruned(tmp_path_factory):
    """Every family in both layouts: the logits of the masked model, here, and loaded in another process."""
    folder = tmp_path_factory.mktemp("stock")
    results, classes = {}, {}
    for family in FAMILIES:
        for layout in LAYOUTS:
            name = f"{family}-{layout}"
            model = wide_model(family)
            unpruned = logits_of(model)
            plan = layout_plan(model, layout)
            expected = logits_of(masked_model(model, plan))
            pruner = HeaprPruner(model)
            classes[name] = type(model).__name__
            pruner.apply(plan)
            pruner.save_pretrained(folder / name)
            results[name] = {
                "unpruned": unpruned,
                "expected": expected,
                "here": logits_of(model),
                "config": model.config,
            }
    save_file({"ids": token_ids()}, folder / "ids.safetensors")
    done = run_python(LOAD_ELSEWHERE, folder, *results, has="libraries")
    assert done.returncode == 0, done.stderr[-2000:]
    for (name, result), class_name in zip(results.items(), done.stdout.split()):
        result["class"] = class_name
        assert class_name == classes[name]
    for name, logits in load_file(folder / "logits.safetensors").items():
        results[name]["elsewhere"] = logits
    return results


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", FAMILIES)
class TestEveryFamily:
    def test_equals_the_masked_model(self, pruned, family, layout):
        result = pruned[f"{family}-{layout}"]
        torch.testing.assert_close(result["here"], result["expected"], atol=1e-5, rtol=1e-5)
        assert (result["expected"] - result["unpruned"]).abs().max() > 1e-2  # the plan did remove something

    def test_loads_where_the_package_cannot_be_imported(self, pruned, family, layout):
        result = pruned[f"{family}-{layout}"]
        torch.testing.assert_close(result["elsewhere"], result["expected"], atol=1e-5, rtol=1e-5)

    def test_architecture_is_the_original(self, pruned, family, layout):
        config = pruned[f"{family}-{layout}"]["config"]
        assert config.model_type == family
        assert getattr(config, "expert_widths", None) is None
        text = config.get_text_config()
        width = getattr(text, "moe_intermediate_size", None) or text.intermediate_size
        assert width == (24 if layout == "uniform" else 16)


@pytest.mark.parametrize(
    "family, count",
    [("deepseek", "n_shared_experts"), ("deepseek_v2", "n_shared_experts"), ("glm4_moe", "n_shared_experts")],
)
@pytest.mark.parametrize("ratio, shared", [(0.25, 3), (0.5, 4), (0.75, 8)])
def test_shared_experts_keep_their_function(family, count, ratio, shared):
    model = wide_model(family)  # two shared experts of width 32
    layers = [layer.mlp.shared_experts for layer in model.model.layers if hasattr(layer.mlp, "shared_experts")]
    inputs = torch.randn(7, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = [mlp(inputs) for mlp in layers]
        apply_plan(model, random_plan(model, layout="uniform", ratio=ratio))
        after = [mlp(inputs) for mlp in layers]
    assert layers and getattr(model.config, count) == shared
    assert layers[0].down_proj.in_features == layers[0].down_proj.weight.shape[1] == shared * round(32 * (1 - ratio))
    for old, new in zip(before, after):
        torch.testing.assert_close(new, old, atol=1e-6, rtol=1e-6)


def test_dense_layers_keep_their_width():
    model = wide_model("deepseek_v3")
    dense = model.model.layers[0].mlp.gate_proj.weight
    apply_plan(model, random_plan(model, layout="uniform", ratio=0.5))
    assert model.model.layers[0].mlp.gate_proj.weight is dense
    assert (model.config.moe_intermediate_size, model.config.intermediate_size) == (16, 24)


def test_keys_that_engines_alone_read_follow_the_width():
    """vLLM sizes the experts of `hy_v3` by `expert_hidden_dim`, which transformers keeps and does not read."""
    model = wide_model("qwen3_moe")
    others = ("moe_shared_expert_intermediate_size", "other_size", "num_physical_experts")
    for key in ("expert_hidden_dim", *others):
        setattr(model.config, key, 32)
    apply_plan(model, random_plan(model, layout="uniform", ratio=0.25))
    assert (model.config.moe_intermediate_size, model.config.expert_hidden_dim) == (24, 24)
    assert [getattr(model.config, key) for key in others] == [32] * 3


def test_as_many_experts_as_they_are_wide():
    """Their number has the same value, and `qwen3_moe` keeps it under a name that its class does not have."""
    model = tiny_model("qwen3_moe", num_experts=16, moe_intermediate_size=16)
    apply_plan(model, random_plan(model, layout="uniform", ratio=0.5))
    assert (model.config.moe_intermediate_size, model.config.num_experts) == (8, 16)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_field_that_sizes_something_else_is_refused(layout):
    model = wide_model(REFUSED)
    before = logits_of(model)
    with pytest.raises(
        HeaprError, match=r"sizes model\.layers\.0\.mlp\.shared_mlp\.\w+ by 'intermediate_size' as well"
    ):
        apply_plan(model, layout_plan(model, layout))
    assert torch.equal(logits_of(model), before)  # nothing was cut
    assert model.config.intermediate_size == 32


@pytest.mark.parametrize(
    "family, options, message",
    [
        (REFUSED, {"layout": "uniform"}, "sizes model.layers.0.mlp.shared_mlp"),
        ("qwen3_moe", {"align_for": "fp8"}, "asks for multiples of 128"),
        (
            "qwen3_moe",
            {"layout": "uniform", "tensor_parallel": 2, "ratio": 0.3},
            r"not a multiple of 16 \(tensor_parallel=2\); nearest: 16",
        ),
    ],
)
def test_refused_before_anything_is_calibrated(family, options, message, monkeypatch):
    monkeypatch.setattr(HeaprPruner, "calibrate", lambda *_: pytest.fail("was calibrated"))
    with pytest.raises(HeaprError, match=message):
        HeaprPruner(wide_model(family), config=HeaprConfig(**options)).prune()


def test_refused_before_anything_is_compensated(monkeypatch):
    """Compensation changes weights, so it must not begin where the layout will be refused."""
    model = wide_model(REFUSED)
    plan = layout_plan(model, "uniform")
    plan.config = plan.config.replace(compensate=True)
    with pytest.raises(HeaprError, match="shared_mlp"):
        apply_plan(model, plan)


def test_padded_to_the_original_width_suits_any_family():
    model = wide_model(REFUSED)
    plan = random_plan(model, layout="padded", ratio=0.2)
    assert max(max(widths) for widths in plan.widths.values()) > 24
    expected = logits_of(masked_model(model, plan))
    apply_plan(model, plan)
    assert model.config.intermediate_size == 32
    torch.testing.assert_close(logits_of(model), expected, atol=1e-5, rtol=1e-5)


def test_padded_beyond_the_original_width():
    """Three ranks of multiples of 8 ask for 48 where the model has 40; shared experts of 80 become 96 wide."""
    model = wide_model("deepseek_v2", 40)
    plan = random_plan(model, layout="padded", ratio=0.2, tensor_parallel=3)
    assert max(max(widths) for widths in plan.widths.values()) > 24
    expected = logits_of(masked_model(model, plan))
    apply_plan(model, plan)
    assert (model.config.moe_intermediate_size, model.config.n_shared_experts) == (48, 2)
    assert model.model.layers[1].mlp.shared_experts.down_proj.in_features == 96
    torch.testing.assert_close(logits_of(model), expected, atol=1e-5, rtol=1e-5)


def test_uniform_needs_one_width():
    model = wide_model("qwen3_moe")
    plan = random_plan(model, ratio=0.3)
    plan.config = HeaprConfig(ratio=0.3, layout="uniform")
    with pytest.raises(HeaprError, match=r"layout='uniform': the plan keeps widths from \d+ to \d+; plan with"):
        apply_plan(model, plan)


def test_blocks_of_different_widths_are_refused():
    model, narrow = wide_model("qwen3_moe"), wide_model("qwen3_moe", 24)
    model.model.layers[1].mlp.experts = narrow.model.layers[1].mlp.experts
    plan = random_plan(model, layout="padded", ratio=0.6, widest=10)
    with pytest.raises(
        HeaprError, match=r"no single field of Qwen3MoeConfig sets the width of all experts \(24, 32\)"
    ):
        apply_plan(model, plan)


def test_fields_that_happen_to_be_equal_are_told_apart():
    """The hidden size, the dense width and the number of positions equal the width of experts here."""
    model = wide_model("qwen3_moe", hidden_size=32, intermediate_size=32, max_position_embeddings=32)
    plan = random_plan(model, layout="uniform", ratio=0.25)
    expected = logits_of(masked_model(model, plan))
    apply_plan(model, plan)
    config = model.config
    assert config.moe_intermediate_size == 24
    assert (config.hidden_size, config.intermediate_size, config.max_position_embeddings) == (32, 32, 32)
    torch.testing.assert_close(logits_of(model), expected, atol=1e-5, rtol=1e-5)


def test_same_plan_in_the_variable_layout_gives_the_same_function():
    stock, variable = wide_model("gpt_oss"), wide_model("gpt_oss")
    plan = random_plan(stock, layout="uniform", ratio=0.25)
    apply_plan(stock, plan)
    plan.config = plan.config.replace(layout="variable")
    apply_plan(variable, plan)
    torch.testing.assert_close(logits_of(stock), logits_of(variable), atol=1e-5, rtol=1e-5)


def test_default_width_suits_grouped_mm_in_bfloat16():
    model = wide_model("qwen3_moe").to(torch.bfloat16)
    apply_plan(model, random_plan(model, layout="uniform", ratio=0.3))  # 22 atomic experts: rounded up to 24
    model.set_experts_implementation("grouped_mm")
    assert model.config.moe_intermediate_size == 24
    assert torch.isfinite(logits_of(model)).all()


def test_stock_model_can_be_pruned_again():
    model = wide_model("mixtral")
    apply_plan(model, random_plan(model, layout="uniform", ratio=0.25))
    apply_plan(model, random_plan(model, layout="uniform", ratio=1 / 3))
    assert model.config.intermediate_size == find_expert_blocks(model)[0].width == 16


def test_stale_remote_code_is_forgotten():
    model = wide_model("deepseek_v2")
    model.config.auto_map = {"AutoModel": "modeling_deepseek.DeepseekV2Model"}
    apply_plan(model, random_plan(model, layout="uniform", ratio=0.25))
    assert "auto_map" not in model.config.to_dict()
