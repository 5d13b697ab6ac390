# Licensed under the Apache License, Version 2.0
"""The statistics file: what comes back, how large it is, and which files and models are refused."""

import json
from dataclasses import fields

import pytest
import torch
from safetensors.torch import load_file, save_file

from optimum_heapr.calibration.runner import calibrate
from optimum_heapr.calibration.statistics import AtomicStatistics, BlockStatistics
from optimum_heapr.criteria import importance
from optimum_heapr.criteria.obs import store_removal_curves
from optimum_heapr.experts import find_expert_blocks
from optimum_heapr.fingerprint import check_same_model, model_fingerprint
from optimum_heapr.utils.errors import HeaprError
from tests.helpers import calibration_data, random_statistics, tiny_model


PARTS = [
    part.name
    for part in fields(BlockStatistics)
    if not part.name.endswith("gram_sum") and not part.name.startswith(("removal", "source"))
]
SECOND = "model.layers.1.mlp.experts"


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "statistics.safetensors"
    random_statistics(unreached={1: [2]}).save(path)
    return path


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_is_saved_comes_back(tmp_path, dtype):
    statistics = random_statistics(blocks=12, unreached={1: [2]}, dtype=dtype)
    statistics.save(tmp_path / "statistics.safetensors")
    loaded = AtomicStatistics.load(tmp_path / "statistics.safetensors")
    assert loaded.fingerprint == statistics.fingerprint
    # In the model's order: sorted by name, layer 10 would come before layer 2.
    assert list(loaded.blocks) == list(statistics.blocks)
    for path, block in statistics.blocks.items():
        for name in PARTS:
            expected, actual = getattr(block, name), getattr(loaded.blocks[path], name)
            assert torch.equal(actual, expected) and actual.dtype == expected.dtype
    assert loaded.unreached == {"model.layers.1.mlp.experts": [2]}
    assert loaded.num_tokens == 100


def test_a_calibration_comes_back(tmp_path):
    statistics = calibrate(tiny_model("gpt_oss"), calibration_data(16, 5))
    statistics.save(tmp_path / "statistics.safetensors")
    loaded = AtomicStatistics.load(tmp_path / "statistics.safetensors")
    assert loaded.fingerprint == statistics.fingerprint
    for criterion in ("heapr", "fisher", "magnitude", "activation", "reap", "frequency", "random"):
        for path, scores in importance(statistics, criterion).items():
            assert torch.equal(importance(loaded, criterion)[path], scores)


def test_the_file_holds_one_tensor_a_statistic_under_the_path_of_the_block(saved):
    tensors = load_file(saved)
    assert set(tensors) == {f"model.layers.{layer}.mlp.experts.{name}" for layer in range(2) for name in PARTS}
    for name, tensor in tensors.items():
        of_an_expert = name.endswith(("token_count", "output_norm_sum"))
        assert tuple(tensor.shape) == ((4,) if of_an_expert else (4, 8))


def test_a_large_model_takes_less_than_80_megabytes(tmp_path):
    """48 layers of 128 experts of 768 atomic experts. The dtypes are those that a calibration in bfloat16 gives."""
    measured = next(
        iter(
            calibrate(tiny_model(dtype=torch.bfloat16, moe_intermediate_size=16), calibration_data(8)).blocks.values()
        )
    )
    shapes = {name: (128,) if name in ("token_count", "output_norm_sum") else (128, 768) for name in PARTS}

    def block():
        return BlockStatistics(
            **{name: torch.ones(shapes[name], dtype=getattr(measured, name).dtype) for name in PARTS}
        )

    # One layer is written, the others are the same size: the header grows with their number, tensors are not compressed.
    fingerprint = random_statistics().fingerprint
    sizes = []
    for layers in (1, 2):
        path = tmp_path / f"{layers}.safetensors"
        AtomicStatistics({f"model.layers.{i}.mlp.experts": block() for i in range(layers)}, fingerprint).save(path)
        sizes.append(path.stat().st_size)
    layer = sizes[1] - sizes[0]
    assert layer > 128 * 768 * 4 * 3  # at least the three sums are in it
    assert sizes[0] + 47 * (layer + 64) < 80e6


def test_means_divide_by_the_tokens_of_the_expert_and_unreached_ones_are_zero():
    block = BlockStatistics(
        activation_sq_sum=torch.tensor([[6.0, 9.0], [0.0, 0.0]]),
        gradient_sq_sum=torch.ones(2, 2),
        fisher_sum=torch.ones(2, 2),
        weight_norm=torch.ones(2, 2),
        token_count=torch.tensor([3, 0]),
    )
    assert block.mean("activation_sq_sum").tolist() == [[2.0, 3.0], [0.0, 0.0]]
    assert block.reached.tolist() == [True, False]
    assert (block.num_experts, block.width) == (2, 2)


# Files that are refused


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(HeaprError, match=r"statistics='.*nothing\.safetensors': no such file; name a file that this"):
        AtomicStatistics.load(tmp_path / "nothing.safetensors")
    with pytest.raises(HeaprError, match="no such file"):
        AtomicStatistics.load(tmp_path)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.01, 0.5, 0.99, 1.0])
def test_a_truncated_file_is_refused(saved, share):
    content = saved.read_bytes()
    saved.write_bytes(content[: int(share * (len(content) - 1))])
    with pytest.raises(
        HeaprError, match=r"statistics='.*statistics\.safetensors': truncated or not a safetensors file"
    ):
        AtomicStatistics.load(saved)


@pytest.mark.parametrize("content", [b"hello", b"{}", b"\x00" * 100, b"PK\x03\x04" + b"\x80" * 64])
def test_a_foreign_file_is_refused(tmp_path, content):
    (tmp_path / "foreign").write_bytes(content)
    with pytest.raises(
        HeaprError, match=r"statistics='.*foreign': truncated or not a safetensors file.*make it again"
    ):
        AtomicStatistics.load(tmp_path / "foreign")


def test_another_safetensors_file_is_refused(tmp_path):
    save_file({"weight": torch.ones(2)}, tmp_path / "model.safetensors")
    with pytest.raises(HeaprError, match="holds 'unmarked' data, not 'heapr_statistics'; name the right file"):
        AtomicStatistics.load(tmp_path / "model.safetensors")
    save_file({"weight": torch.ones(2)}, tmp_path / "plan.safetensors", {"format": "heapr_plan", "version": "1"})
    with pytest.raises(HeaprError, match="holds 'heapr_plan' data, not 'heapr_statistics'"):
        AtomicStatistics.load(tmp_path / "plan.safetensors")


def rewrite(path, change_metadata=None, change_tensors=None):
    """Writes the file anew with other contents, as a damaged or newer writer would have."""
    from safetensors import safe_open

    tensors = load_file(path)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    if change_tensors:
        change_tensors(tensors)
    if change_metadata:
        change_metadata(metadata)
    save_file(tensors, path, metadata)


def change_document(change):
    def apply(metadata):
        document = json.loads(metadata["document"])
        change(document)
        metadata["document"] = json.dumps(document)

    return apply


def test_a_newer_version_is_refused_naming_both(saved):
    rewrite(saved, lambda metadata: metadata.update(version="7"))
    with pytest.raises(HeaprError, match="has version '7', this package reads '1'.*update optimum-heapr"):
        AtomicStatistics.load(saved)


def test_missing_tensors_and_documents_are_refused(saved):
    content = saved.read_bytes()
    rewrite(saved, change_tensors=lambda tensors: tensors.pop("model.layers.1.mlp.experts.fisher_sum"))
    with pytest.raises(HeaprError, match=r"\(it has no 'model\.layers\.1\.mlp\.experts\.fisher_sum'\); calibrate"):
        AtomicStatistics.load(saved)
    for change in (
        lambda metadata: metadata.pop("document"),
        lambda metadata: metadata.update(document="{"),
        lambda metadata: metadata.update(document="3"),
        lambda metadata: metadata.update(document="{}"),
        change_document(lambda document: document.update(blocks=5)),
        change_document(lambda document: document.update(fingerprint=None)),
        change_document(lambda document: document["fingerprint"].pop("model")),
        change_document(lambda document: document["fingerprint"].pop("data")),
    ):
        saved.write_bytes(content)
        rewrite(saved, change)
        with pytest.raises(HeaprError, match=r"statistics='.*statistics\.safetensors'"):
            AtomicStatistics.load(saved)


@pytest.mark.parametrize("name", PARTS)
def test_tensors_whose_shapes_do_not_fit_together_are_refused(saved, name):
    def shorten(tensors):
        key = f"{SECOND}.{name}"
        tensors[key] = tensors[key][:3].clone()

    rewrite(saved, change_tensors=shorten)
    with pytest.raises(
        HeaprError, match=r"model\.layers\.1\.mlp\.experts\.\w+ has shape \(.*\), not \(.*calibrate again"
    ):
        AtomicStatistics.load(saved)


def with_matrices():
    """Random statistics with second-order ones, and with what `obs` makes of them."""
    statistics = random_statistics(sources=3)
    for block in statistics.blocks.values():
        block.activation_gram_sum = torch.diag_embed(block.activation_sq_sum)
        block.gradient_gram_sum = torch.diag_embed(block.gradient_sq_sum)
    return statistics


INTEGERS = ("token_count", "removal_order", "source_token_count")


@pytest.mark.parametrize("value", [torch.nan, -torch.inf])
@pytest.mark.parametrize("name", [part.name for part in fields(BlockStatistics) if part.name not in INTEGERS])
def test_values_that_are_not_finite_are_refused_by_name(tmp_path, name, value):
    statistics, path = with_matrices(), tmp_path / "statistics.safetensors"
    store_removal_curves(statistics)
    statistics.save(path)
    AtomicStatistics.load(path)
    tensor = getattr(statistics.blocks[SECOND], name).clone()
    tensor[(-1,) * tensor.dim()] = value
    setattr(statistics.blocks[SECOND], name, tensor)
    statistics.save(path)
    with pytest.raises(HeaprError) as refused:
        AtomicStatistics.load(path)
    message = f"statistics={str(path)!r}: {SECOND}.{name} holds values that are not finite; calibrate again"
    assert str(refused.value) == message


@pytest.mark.parametrize("name", ["activation_gram_sum", "gradient_gram_sum"])
def test_matrices_are_looked_at_whole_where_they_are_used(name):
    statistics = with_matrices()
    getattr(statistics.blocks[SECOND], name)[1, 0, 2] = torch.nan
    with pytest.raises(HeaprError, match=rf"criterion='obs': {SECOND}\.{name} holds values that are not finite"):
        store_removal_curves(statistics)


def test_sums_without_a_width_are_refused(saved):
    rewrite(saved, change_tensors=lambda tensors: tensors.update({f"{SECOND}.activation_sq_sum": torch.ones(4)}))
    with pytest.raises(HeaprError, match=r"activation_sq_sum has shape \(4,\), not"):
        AtomicStatistics.load(saved)


# Models that are refused


def check(statistics, model):
    statistics.check_model(model, find_expert_blocks(model))


@pytest.fixture(scope="module")
def measured():
    return calibrate(tiny_model(), calibration_data(8))


def test_the_same_model_is_accepted_in_any_precision(measured):
    check(measured, tiny_model())
    check(measured, tiny_model(dtype=torch.bfloat16))
    check(measured, tiny_model(dtype=torch.float64))


def test_a_bfloat16_checkpoint_is_the_same_model_in_float16():
    """Float16 has more digits than bfloat16, but neither its small numbers nor its range."""
    model = tiny_model(dtype=torch.bfloat16)
    blocks = find_expert_blocks(model)
    values = torch.tensor([2**-14, 1.0078125 * 2**-15, -1.9921875 * 2**-20, 2**-30, 65280.0, -1e10])
    with torch.no_grad():
        blocks[0].module.down_proj[0] = values.repeat(
            2
        )  # a column of the matrix for each, and some are sampled of each
    before = blocks[0].module.down_proj.clone()
    expected = model_fingerprint(model, blocks)
    assert torch.equal(blocks[0].module.down_proj, before)
    assert model_fingerprint(model.half(), blocks) == expected
    assert not torch.equal(blocks[0].module.down_proj[0, 0].bfloat16(), before[0, 0])
    with torch.no_grad():
        blocks[0].module.down_proj[0, 0] *= 1.05
    assert model_fingerprint(model, blocks)["experts"] != expected["experts"]


def test_hashes_of_an_earlier_version_are_not_compared(measured):
    model = {**measured.fingerprint["model"], "experts": "0123456789abcdef", "weights": "0123456789abcdef"}
    earlier = AtomicStatistics(measured.blocks, {**measured.fingerprint, "model": model})
    check(earlier, tiny_model())
    with pytest.raises(HeaprError, match="made for a model with num_parameters"):
        check(earlier, tiny_model(moe_intermediate_size=16))


@pytest.mark.parametrize(
    ("other", "key"),
    [
        ({"model_type": "qwen2_moe"}, "model_type"),
        ({"num_experts_per_tok": 3}, "experts_per_token"),
        ({"moe_intermediate_size": 16}, "num_parameters"),
        ({"seed": 1}, "experts"),
    ],
)
def test_another_model_is_refused_naming_both_values(measured, other, key):
    model = tiny_model(**other)
    expected, actual = measured.fingerprint["model"], model_fingerprint(model, find_expert_blocks(model))
    assert expected[key] != actual[key]
    with pytest.raises(HeaprError) as error:
        check(measured, model)
    assert str(error.value) == (
        f"statistics: made for a model with {key} {json.dumps(expected[key])}, this model has "
        f"{json.dumps(actual[key])}; calibrate this model"
    )


@pytest.mark.parametrize(
    ("part", "key"),
    [
        ("mlp.experts.down_proj", "experts"),
        ("mlp.experts.gate_up_proj", "weights"),
        ("self_attn.q_proj.weight", "weights"),
        ("mlp.gate.weight", "weights"),
    ],
)
def test_a_fine_tuned_sibling_is_refused(measured, part, key):
    """Same type, same shapes, same sizes: only the values of some weights differ."""
    model = tiny_model()
    with torch.no_grad():
        model.get_parameter(f"model.layers.1.{part}").mul_(1.05)
    with pytest.raises(HeaprError, match=f"made for a model with {key} "):
        check(measured, model)


def test_a_sibling_with_one_other_expert_is_refused(measured):
    model = tiny_model()
    with torch.no_grad():
        model.model.layers[0].mlp.experts.down_proj[4] *= 1.05
    with pytest.raises(HeaprError, match="made for a model with weights "):
        check(measured, model)


def test_values_that_one_side_could_not_read_are_not_compared(measured):
    """Statistics measured on an offloaded model serve the same model in memory, but still no model of other shapes."""
    model = tiny_model(seed=1)
    blocks = find_expert_blocks(model)
    offloaded = model_fingerprint(model.to("meta"), blocks)
    assert offloaded["weights"] is None and offloaded["experts"] is None
    check(measured, model)
    with pytest.raises(HeaprError, match="made for a model with"):
        check(measured, tiny_model(moe_intermediate_size=16).to("meta"))


def test_models_of_equal_size_but_other_shapes_differ(measured):
    """Half as many experts of twice the width: the same type and number of expert weights."""
    wide, narrow = (
        tiny_model(num_experts=experts, moe_intermediate_size=width) for experts, width in ((4, 24), (8, 12))
    )
    prints = [model_fingerprint(model, find_expert_blocks(model)) for model in (wide, narrow)]
    assert prints[0]["shapes"] != prints[1]["shapes"]


def test_a_key_that_one_side_lacks_is_a_difference():
    with pytest.raises(HeaprError, match='plan: made for a model with model_type "a", this model has null'):
        check_same_model({"model_type": "a"}, {}, "plan")


def test_a_type_that_numpy_has_not_is_looked_at_all_the_same(tmp_path):
    statistics, path = with_matrices(), tmp_path / "statistics.safetensors"
    statistics.blocks[SECOND].fisher_sum = statistics.blocks[SECOND].fisher_sum.bfloat16()
    statistics.save(path)
    assert AtomicStatistics.load(path) == statistics
    statistics.blocks[SECOND].fisher_sum[0, 0] = torch.nan
    statistics.save(path)
    with pytest.raises(HeaprError, match="fisher_sum holds values that are not finite"):
        AtomicStatistics.load(path)
