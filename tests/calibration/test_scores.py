# Licensed under the Apache License, Version 2.0
"""The one-pass statistics against an implementation that forms the d x d covariance of every expert.

The reference shares no code with the package: its own loop over experts with the formulas of each family written out,
plain autograd through the whole model, one sample at a time without padding, in float64.
"""

import math

import pytest
import torch
import torch.nn.functional as F

from optimum_heapr.calibration.runner import calibrate
from optimum_heapr.criteria import importance
from tests.helpers import SUMS, assert_same_statistics, calibration_data, tiny_model


FAMILIES = ["qwen2_moe", "qwen3_moe", "mixtral", "gpt_oss", "deepseek_v2"]


def swiglu_atoms(experts, expert, x):
    """h [n, I] and the columns of the down projection [I, d] of an expert stored as all gate rows, then all up rows."""
    gate, up = experts.gate_up_proj[expert].tensor_split(2)
    return F.silu(x @ gate.T) * (x @ up.T), experts.down_proj[expert].T, 0


def gpt_oss_atoms(experts, expert, x):
    """As above for transposed weights, gate and up in turn, biases and clamps."""
    gate_up = x @ experts.gate_up_proj[expert] + experts.gate_up_proj_bias[expert]
    gate, up = gate_up[:, 0::2].clamp(max=7.0), gate_up[:, 1::2].clamp(-7.0, 7.0)
    return (up + 1) * gate * torch.sigmoid(1.702 * gate), experts.down_proj[expert], experts.down_proj_bias[expert]


class Reference:
    """Runs `model` with a loop over experts that remembers h and the output of each expert before the router weight."""

    def __init__(self, model, samples):
        self.experts = {path: module for path, module in model.named_modules() if path.endswith(".experts")}
        self.atoms = gpt_oss_atoms if model.config.model_type == "gpt_oss" else swiglu_atoms
        self.seen = {path: [[] for _ in range(len(module.down_proj))] for path, module in self.experts.items()}
        self.columns = {path: {} for path in self.experts}
        for path, module in self.experts.items():
            module.forward = lambda *args, path=path: self.forward(path, *args)
        try:
            self.loss = sum(self.backward(model, ids) for ids in samples)
        finally:
            for module in self.experts.values():
                del module.forward
            model.zero_grad(set_to_none=True)

    def forward(self, path, hidden, index, weights):
        total = torch.zeros_like(hidden)
        for expert in range(len(self.seen[path])):
            token, slot = torch.where(index == expert)
            if len(token) == 0:
                continue
            h, columns, bias = self.atoms(self.experts[path], expert, hidden[token])
            output = h @ columns + bias
            output.retain_grad()
            self.seen[path][expert].append((h, output))
            self.columns[path][expert] = columns.detach()
            total = total.index_add(0, token, output * weights[token, slot, None])
        return total

    @staticmethod
    def backward(model, ids):
        logits = model(input_ids=ids[None], use_cache=False).logits
        loss = F.cross_entropy(logits[0, :-1], ids[1:], reduction="sum")
        loss.backward()
        return loss.item()

    def expert(self, path, expert):
        """h [n, I], g [n, d] and the columns [I, d]; `None` if no token came."""
        if not self.seen[path][expert]:
            return None
        h, g = (torch.cat(parts) for parts in zip(*((h.detach(), y.grad) for h, y in self.seen[path][expert])))
        return h, g, self.columns[path][expert]

    def scores(self, path):
        """`1/2 mean(e_k^T G e_k)` with the outputs e_k and the covariance G written out; 0 without tokens."""
        width = next(iter(self.columns[path].values())).shape[0]
        scores = torch.zeros(len(self.seen[path]), width, dtype=torch.float64)
        for expert in range(len(scores)):
            if (data := self.expert(path, expert)) is not None:
                h, g, columns = data
                covariance = g.T @ g / len(g)  # [d, d]
                outputs = h[:, :, None] * columns  # e_k of each token, [n, I, d]
                scores[expert] = 0.5 * torch.einsum("nkd,dc,nkc->nk", outputs, covariance, outputs).mean(0)
        return scores

    def fisher(self, path):
        """`1/2 mean((e_k . g)^2)`: the squared derivative of the loss by a mask on the atomic expert."""
        width = next(iter(self.columns[path].values())).shape[0]
        scores = torch.zeros(len(self.seen[path]), width, dtype=torch.float64)
        for expert in range(len(scores)):
            if (data := self.expert(path, expert)) is not None:
                h, g, columns = data
                derivatives = torch.einsum("nkd,nd->nk", h[:, :, None] * columns, g)
                scores[expert] = 0.5 * derivatives.square().mean(0)
        return scores

    def counts(self, path):
        return torch.tensor([sum(len(h) for h, _ in expert) for expert in self.seen[path]])


@pytest.mark.parametrize("lengths", [(16, 16, 16), (5, 17, 2, 9)], ids=["equal", "padded"])
@pytest.mark.parametrize("model_type", FAMILIES)
def test_scores_are_those_of_the_explicit_covariance(model_type, lengths):
    model, data = tiny_model(model_type, dtype=torch.float64), calibration_data(*lengths)
    reference = Reference(model, data.samples)
    statistics = calibrate(model, data, batch_size=3)
    scores, fisher = importance(statistics, "heapr"), importance(statistics, "fisher")
    # The rotary embedding of deepseek_v2 is computed in float32 whatever the dtype, so that padding shifts a rounding;
    # the other combinations agree to 1e-12.
    rtol = 1e-5 if model_type == "deepseek_v2" else 1e-6
    assert list(statistics.blocks) == list(reference.experts) and len(scores) == 2
    for path, block in statistics.blocks.items():
        assert torch.equal(block.token_count, reference.counts(path))
        reached = block.reached
        assert reached.sum() > 2
        # h is exactly zero nowhere, so a relative comparison of every score means something.
        assert (reference.scores(path)[reached] > 0).all()
        torch.testing.assert_close(scores[path][reached], reference.scores(path)[reached], rtol=rtol, atol=0)
        torch.testing.assert_close(fisher[path][reached], reference.fisher(path)[reached], rtol=rtol, atol=0)
    predicted = sum(length - 1 for length in lengths)
    assert math.isclose(statistics.fingerprint["loss"], reference.loss / predicted, rel_tol=rtol)


@pytest.mark.parametrize("model_type", ["qwen2_moe", "gpt_oss"])
def test_statistics_do_not_depend_on_the_batch_size(model_type):
    model, data = tiny_model(model_type, dtype=torch.float64), calibration_data(7, 16, 3, 16, 2)
    alone = calibrate(model, data, batch_size=1)
    for batch_size in (2, 3, 5, 8):
        assert_same_statistics(calibrate(model, data, batch_size), alone)


def test_padding_tokens_count_nowhere():
    """The tokens of padding are real ids that would be routed: the mask alone keeps them out."""
    model, data = tiny_model("qwen3_moe", dtype=torch.float64), calibration_data(3, 16)
    statistics = calibrate(model, data, batch_size=2)
    for block in statistics.blocks.values():
        assert int(block.token_count.sum()) == (3 + 16) * model.config.num_experts_per_tok


def test_half_precision_is_near_float32():
    model, data = tiny_model("qwen3_moe"), calibration_data(16, 16)
    exact = calibrate(model, data)
    rounded = calibrate(tiny_model("qwen3_moe", dtype=torch.bfloat16), data)
    for path, block in rounded.blocks.items():
        for name in SUMS:
            assert getattr(block, name).dtype == torch.float32
        ratio = block.activation_sq_sum.sum() / exact.blocks[path].activation_sq_sum.sum()
        assert 0.9 < ratio < 1.1
        # Sums of thousands of squares in bfloat16 would have 8 bits; rounding to them must change the sums.
        assert not torch.equal(block.activation_sq_sum, block.activation_sq_sum.bfloat16().float())
