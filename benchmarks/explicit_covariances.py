# Licensed under the Apache License, Version 2.0
"""The paper's procedure as its formulas are written, for `calibration.py` to compare with.

HEAPr (arXiv 2509.22299) keeps `G_i = mean(g g^T)`, the d x d covariance of the loss gradient at the output of expert i, and
scores atomic expert k of it by `1/2 mean(e_k^T G_i e_k)`: one forward and one backward for G, with weight gradients as
a plain `loss.backward()` makes them, and a second forward for the outputs e_k. Where there is a cheaper way to write the same
quantity, this takes it: `e_k^T G e_k = h_k^2 w_k^T G w_k`, with the second factor computed once for each expert, and the
experts' products are those of `grouped_mm`.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, _grouped_linear


IMPLEMENTATION = "explicit_covariances"


class ExpertCovariances:
    """What is kept of one block: G [E, d, d] and the sum of h^2 [E, I], in float32, and the tokens of each expert [E]."""

    def __init__(self, experts: torch.nn.Module):
        num_experts, hidden, width = experts.down_proj.shape
        self.gradient_sum = torch.zeros(num_experts, hidden, hidden)
        self.activation_sq_sum = torch.zeros(num_experts, width)
        self.token_count = torch.zeros(num_experts, dtype=torch.int64)
        self.down_proj = experts.down_proj

    @property
    def num_bytes(self) -> int:
        kept = (self.gradient_sum, self.activation_sq_sum, self.token_count)
        return sum(tensor.numel() * tensor.element_size() for tensor in kept)

    def add_gradient(self, gradient: torch.Tensor, counts: list[int]) -> None:
        for expert, rows in enumerate(gradient.split(counts)):
            rows = rows.float()
            self.gradient_sum[expert].addmm_(rows.T, rows)
            self.token_count[expert] += len(rows)

    def add_activation(self, activation: torch.Tensor, counts: list[int]) -> None:
        for expert, rows in enumerate(activation.split(counts)):
            self.activation_sq_sum[expert] += rows.float().square().sum(0)

    def scores(self) -> torch.Tensor:
        """[E, I], float64."""
        columns = self.down_proj.detach().float()
        quadratic = torch.stack([((G @ W) * W).sum(0) for G, W in zip(self.gradient_sum, columns)])
        count = self.token_count.clamp(min=1).double().unsqueeze(1)
        return 0.5 * (self.activation_sq_sum / count) * (quadratic / count)


def experts_forward(self, hidden_states, top_k_index, top_k_weights):
    """transformers' `grouped_mm`, with the hook on the expert's output before the router weight."""
    covariances: ExpertCovariances = self._covariances
    top_k = top_k_index.shape[-1]
    expert_of_row, order = torch.sort(top_k_index.reshape(-1), stable=True)
    counts = torch.bincount(expert_of_row, minlength=self.num_experts)
    offsets, counts = counts.cumsum(0).to(torch.int32), counts.tolist()
    gate_up = _grouped_linear(hidden_states[order // top_k], self.gate_up_proj, offsets, None, self.is_transposed)
    activation = self._apply_gate(gate_up)
    output = _grouped_linear(activation, self.down_proj, offsets, None, self.is_transposed)
    if torch.is_grad_enabled():
        output.register_hook(lambda gradient: covariances.add_gradient(gradient, counts))
    else:
        covariances.add_activation(activation, counts)
    output = output * top_k_weights.reshape(-1)[order].unsqueeze(-1)
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(order.shape[0])
    return output[inverse].view(-1, top_k, output.shape[-1]).sum(1).to(hidden_states.dtype)


def inputs_of(ids: torch.Tensor) -> dict[str, Any]:
    """As calibration passes them. Without the mask another kernel computes the attention, and of experts that a token likes
    equally well it may then go to another."""
    return {"input_ids": ids[None], "attention_mask": torch.ones_like(ids[None]), "use_cache": False}


def explicit_scores(model: torch.nn.Module, samples: list[torch.Tensor]) -> tuple[dict[str, torch.Tensor], int]:
    """Scores [E, I] by block path, and the bytes of the statistics that they took; the model is left as it was."""
    blocks = {path: module for path, module in model.named_modules() if path.endswith(".experts")}
    ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, experts_forward)
    before = model.get_experts_implementation()
    for block in blocks.values():
        block._covariances = ExpertCovariances(block)
    model.set_experts_implementation(IMPLEMENTATION)
    model.requires_grad_(True)
    try:
        for ids in samples:
            logits = model(**inputs_of(ids)).logits[0, :-1]
            torch.nn.functional.cross_entropy(logits.float(), ids[1:], reduction="sum").backward()
            model.zero_grad(set_to_none=True)
        with torch.no_grad():
            for ids in samples:
                model(**inputs_of(ids), logits_to_keep=1)
        scores = {path: block._covariances.scores() for path, block in blocks.items()}
        return scores, sum(block._covariances.num_bytes for block in blocks.values())
    finally:
        model.requires_grad_(False)
        model.set_experts_implementation(before)
        for block in blocks.values():
            del block._covariances
