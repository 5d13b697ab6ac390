# Licensed under the Apache License, Version 2.0
"""Second-order statistics and output norms against hooks and autograd in float64, and what they do not depend on."""

import pytest
import torch
from transformers import Qwen3MoeForCausalLM

from optimum_heapr import AtomicStatistics, HeaprConfig, HeaprError
from optimum_heapr.calibration.checks import check_gram_memory
from optimum_heapr.calibration.runner import calibrate
from optimum_heapr.criteria import importance
from optimum_heapr.experts import find_expert_blocks
from optimum_heapr.layerwise import memory
from optimum_heapr.text.samples import CalibrationData
from tests.helpers import plain_qwen3_moe


SUMS = ("activation_sq_sum", "gradient_sq_sum", "fisher_sum", "output_norm_sum")
GRAMS = ("activation_gram_sum", "gradient_gram_sum")


def tiny_model(dtype=torch.float32) -> Qwen3MoeForCausalLM:
    return plain_qwen3_moe().to(dtype)


def samples(lengths=(9, 5, 12, 7)) -> CalibrationData:
    generator = torch.Generator().manual_seed(1)
    return CalibrationData([torch.randint(0, 40, (n,), generator=generator) for n in lengths], "test", 0, 12)


def by_hand(model, data) -> dict[str, dict[str, torch.Tensor]]:
    """The same sums from a forward written out here, one sample at a time, in the dtype of the model."""
    taps = []

    def experts_forward(module):
        def forward(hidden_states, top_k_index, top_k_weights):
            result = torch.zeros_like(hidden_states)
            for expert in range(module.num_experts):
                token, slot = torch.where(top_k_index == expert)
                gate, up = (hidden_states[token] @ module.gate_up_proj[expert].T).chunk(2, dim=-1)
                h = torch.nn.functional.silu(gate) * up
                h.retain_grad()
                output = h @ module.down_proj[expert].T
                weight = top_k_weights[token, slot]
                taps.append((module, expert, h, weight.detach(), output.detach()))
                result = result.index_add(0, token, output * weight[:, None])
            return result

        return forward

    blocks = find_expert_blocks(model)
    for block in blocks:
        block.module.forward = experts_forward(block.module)
    sums = {b.path: {name: torch.zeros(4, 8, 8, dtype=torch.float64) for name in GRAMS} for b in blocks}
    for block in blocks:
        sums[block.path]["output_norm_sum"] = torch.zeros(4, dtype=torch.float64)
    for sample in data.samples:
        taps.clear()
        logits = model(input_ids=sample[None]).logits[0]
        torch.nn.functional.cross_entropy(logits[:-1], sample[1:], reduction="sum").backward()
        for block in blocks:
            found = sums[block.path]
            for module, expert, h, weight, output in taps:
                if module is block.module and len(h):
                    weighted = h.detach() * weight[:, None]
                    found["activation_gram_sum"][expert] += weighted.T @ weighted
                    found["gradient_gram_sum"][expert] += h.grad.T @ h.grad
                    found["output_norm_sum"][expert] += (weight * output.norm(dim=1)).sum()
    return sums


@pytest.fixture(scope="module")
def measured() -> AtomicStatistics:
    return calibrate(tiny_model(), samples(), 1, gram=True)


def test_equal_to_explicit_sums(measured):
    for path, sums in by_hand(tiny_model(torch.float64), samples()).items():
        for name, expected in sums.items():
            torch.testing.assert_close(getattr(measured.blocks[path], name).double(), expected, rtol=1e-4, atol=1e-5)


def test_gradient_diagonal_is_the_vector_statistic(measured):
    for block in measured.blocks.values():
        diagonal = block.gradient_gram_sum.diagonal(dim1=1, dim2=2)
        torch.testing.assert_close(diagonal, block.gradient_sq_sum, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("batch_size", [2, 3])
def test_batch_size_and_padding_do_not_matter(measured, batch_size):
    again = calibrate(tiny_model(), samples(), batch_size, gram=True)
    for path, block in again.blocks.items():
        assert torch.equal(block.token_count, measured.blocks[path].token_count)
        for name in SUMS + GRAMS:
            expected = getattr(measured.blocks[path], name)
            torch.testing.assert_close(getattr(block, name), expected, rtol=1e-3, atol=1e-5)


def test_vectors_do_not_depend_on_the_matrices(measured):
    for path, block in calibrate(tiny_model(), samples(), 1).blocks.items():
        assert not block.has_grams and block.activation_gram_sum is None
        for name in SUMS:
            assert torch.equal(getattr(block, name), getattr(measured.blocks[path], name))


def test_file_with_and_without(measured, tmp_path):
    measured.save(tmp_path / "all.safetensors")
    measured.save(tmp_path / "vectors.safetensors", grams=False)
    everything = AtomicStatistics.load(tmp_path / "all.safetensors")
    vectors = AtomicStatistics.load(tmp_path / "vectors.safetensors")
    for path, block in measured.blocks.items():
        assert torch.equal(everything.blocks[path].activation_gram_sum, block.activation_gram_sum)
        assert torch.equal(vectors.blocks[path].output_norm_sum, block.output_norm_sum)
        assert everything.blocks[path].has_grams and not vectors.blocks[path].has_grams
    with pytest.raises(HeaprError, match="criterion='obs'.*statistics='gram'"):
        importance(vectors, "obs")


def test_what_does_not_fit_is_refused(monkeypatch):
    blocks = find_expert_blocks(tiny_model())
    check_gram_memory(blocks)
    needed = 2 * 2 * 4 * 4 * 8 * 8  # blocks, matrices, bytes, experts, I, I
    monkeypatch.setattr(memory, "available_bytes", lambda device: needed - 1)
    with pytest.raises(HeaprError, match=f"statistics='gram'.*{needed:,}.*{needed - 1:,}.*statistics='vector'"):
        check_gram_memory(blocks)


def test_what_is_measured_follows_from_what_is_asked_for():
    assert not HeaprConfig().needs_grams and not HeaprConfig(statistics="vector").needs_grams
    assert HeaprConfig(criterion="obs").needs_grams and HeaprConfig(compensate=True).needs_grams
    assert HeaprConfig(statistics="gram").needs_grams
    with pytest.raises(HeaprError, match="statistics='vector'"):
        HeaprConfig(criterion="obs", statistics="vector")
