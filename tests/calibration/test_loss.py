# Licensed under the Apache License, Version 2.0
"""The calibration loss and its hand-written gradient against cross-entropy and autograd."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from optimum_heapr.calibration import loss as loss_module
from optimum_heapr.calibration.loss import summed_token_loss
from tests.helpers import random_ids


def reference_loss(logits, ids, mask):
    """Sum of F.cross_entropy over the targets that the mask lets count."""
    return sum(
        F.cross_entropy(row[:-1][m[1:] > 0], i[1:][m[1:] > 0], reduction="sum") for row, i, m in zip(logits, ids, mask)
    )


@pytest.mark.parametrize("chunk_tokens", [1024, 5, 1, 0.5])
def test_the_loss_and_its_gradient_are_those_of_cross_entropy(chunk_tokens, monkeypatch):
    monkeypatch.setattr(loss_module, "CHUNK_ELEMENTS", int(21 * chunk_tokens))
    generator = torch.Generator().manual_seed(0)
    values = 3 * torch.randn(3, 9, 21, generator=generator, dtype=torch.float64)
    ids = random_ids(3, 9, vocab_size=21)
    mask = (torch.arange(9) < torch.tensor([[9], [4], [2]])).long()

    leaf = values.clone().requires_grad_()
    expected = reference_loss(leaf, ids, mask)
    (2.5 * expected).backward()

    other = values.clone().requires_grad_()
    actual, count = summed_token_loss(other * 1.0, ids, mask)  # a copy: the logits are overwritten
    (2.5 * actual).backward()
    assert count == 8 + 3 + 1
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(other.grad, leaf.grad, rtol=1e-10, atol=1e-12)


def test_the_gradient_passes_through_a_soft_cap_on_the_logits():
    values = torch.randn(1, 6, 11, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ids, mask = random_ids(1, 6, vocab_size=11), torch.ones(1, 6, dtype=torch.long)
    leaf, other = values.clone().requires_grad_(), values.clone().requires_grad_()
    reference_loss(torch.tanh(leaf / 2) * 2, ids, mask).backward()
    summed_token_loss(torch.tanh(other / 2) * 2, ids, mask)[0].backward()
    torch.testing.assert_close(other.grad, leaf.grad, rtol=1e-10, atol=1e-12)


def test_the_softmax_of_half_precision_logits_is_taken_in_float32():
    logits = (4 * torch.randn(2, 40, 50, generator=torch.Generator().manual_seed(0))).bfloat16()
    ids, mask = random_ids(2, 40, vocab_size=50), torch.ones(2, 40, dtype=torch.long)
    expected = reference_loss(logits.float(), ids, mask)
    actual, _ = summed_token_loss(logits.clone(), ids, mask)
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=0)


class _Largest(TorchDispatchMode):
    """The most elements of a tensor that was newly allocated."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        known = {part.untyped_storage().data_ptr() for part in args if isinstance(part, torch.Tensor)}
        if isinstance(result, torch.Tensor) and result.untyped_storage().data_ptr() not in known:
            self.elements = max(self.elements, result.numel())
        return result


def test_a_large_vocabulary_needs_no_second_tensor_of_all_logits():
    """A vocabulary of 152k and 128 tokens: the logits are 19 million numbers."""
    logits = torch.zeros(1, 128, 151_936, dtype=torch.bfloat16).requires_grad_()
    ids, mask = random_ids(1, 128, vocab_size=151_936), torch.ones(1, 128, dtype=torch.long)
    with _Largest() as largest:
        loss, _ = summed_token_loss(logits, ids, mask)
        loss.backward()
    assert 0 < largest.elements <= loss_module.CHUNK_ELEMENTS < logits.numel() / 4
    assert loss.item() == pytest.approx(127 * math.log(151_936), rel=1e-5)
