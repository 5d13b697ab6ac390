# Licensed under the Apache License, Version 2.0
"""The loss of recovery against formulas written out over whole distributions in float64."""

import pytest
import torch
import torch.nn.functional as F

from optimum_heapr.recovery import loss as loss_module
from optimum_heapr.recovery.loss import IGNORED, TeacherOutput, divergence, summed_recovery_loss, token_losses


VOCABULARY = 30


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Several chunks, and a last one that is not full."""
    monkeypatch.setattr(loss_module, "CHUNK_TOKENS", 4)


def logits(seed, scale=2.0, shape=(2, 5)):
    return scale * torch.randn(*shape, VOCABULARY, generator=torch.Generator().manual_seed(seed))


def with_a_rest(probabilities, indices):
    """The distribution over the tokens that are named and one more outcome, all others, [..., k + 1]."""
    top = probabilities.gather(-1, indices)
    return torch.cat([top, 1 - top.sum(-1, keepdim=True)], -1)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("top_k", [1, 6, VOCABULARY - 1, 1000])
def test_the_divergence_is_that_of_the_largest_probabilities_and_the_rest(temperature, top_k):
    teacher, student = logits(0), logits(1)
    output = TeacherOutput.of(teacher.clone(), temperature, top_k)
    assert output.indices.shape == (2, 5, min(top_k, VOCABULARY - 1))
    p, q = ((part.double() / temperature).softmax(-1) for part in (teacher, student))
    chosen = p.topk(output.indices.shape[-1]).indices
    p, q = with_a_rest(p, chosen), with_a_rest(q, chosen)
    expected = (p * (p / q).log()).sum(-1)
    actual = divergence(student.flatten(0, 1), output.flatten(), temperature)
    torch.testing.assert_close(actual.view(2, 5).double(), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("top_k", [1, 6, VOCABULARY - 1])
def test_its_gradient_is_that_of_the_formula(temperature, top_k):
    output = TeacherOutput.of(logits(0).flatten(0, 1), temperature, top_k)
    weight = torch.rand(10, generator=torch.Generator().manual_seed(2))
    student, same = (logits(1).flatten(0, 1).requires_grad_() for _ in range(2))
    p, q = ((part.double() / temperature).softmax(-1) for part in (logits(0).flatten(0, 1), same))
    p, q = with_a_rest(p, output.indices), with_a_rest(q, output.indices)
    (weight * (p * (p / q).log()).sum(-1)).sum().backward()
    (weight * divergence(student, output, temperature)).sum().backward()
    torch.testing.assert_close(student.grad, same.grad, rtol=1e-4, atol=1e-6)


def test_all_tokens_but_one_are_the_whole_divergence_and_fewer_a_lower_bound():
    teacher, student = logits(0), logits(1)
    p, q = (part.double().log_softmax(-1).flatten(0, 1) for part in (teacher, student))
    whole = F.kl_div(q, p, reduction="none", log_target=True).sum(-1)
    by_size = [
        divergence(student.flatten(0, 1), TeacherOutput.of(teacher.clone(), 1.0, k).flatten(), 1.0)
        for k in (1, 4, 12, VOCABULARY - 1)
    ]
    torch.testing.assert_close(by_size[-1].double(), whole, rtol=1e-4, atol=1e-6)
    for fewer, more in zip(by_size, by_size[1:]):
        assert (fewer <= more + 1e-5).all()
    same = divergence(teacher.flatten(0, 1), TeacherOutput.of(teacher.clone(), 1.0, 4).flatten(), 1.0)
    assert same.abs().max() < 1e-5


def test_probabilities_too_small_for_a_float_do_no_harm():
    sharp = torch.full((1, 1, VOCABULARY), -200.0)
    sharp[..., 3] = 200.0
    for teacher, student in ((sharp, logits(1, shape=(1, 1))), (logits(1, shape=(1, 1)), sharp), (sharp, sharp)):
        rows = student.clone().requires_grad_()
        output = TeacherOutput.of(teacher.clone(), 1.0, 4)
        total = summed_recovery_loss(rows * 1, torch.zeros(1, 1, dtype=torch.long), output, 1.0, 1.0, 1.0)
        total.backward()
        assert torch.isfinite(total) and torch.isfinite(rows.grad).all()


@pytest.mark.parametrize("weights", [(1.0, 0.0), (0.0, 1.0), (0.3, 0.7)])
def test_the_sum_and_its_gradient(weights):
    temperature = 2.0
    targets = torch.randint(0, VOCABULARY, (2, 5), generator=torch.Generator().manual_seed(3))
    targets[0, 2] = targets[1, 4] = IGNORED
    counted = (targets != IGNORED).double()
    teacher = logits(0)
    output = TeacherOutput.of(teacher.clone(), temperature, 6)

    exact = logits(1).double().requires_grad_()
    nll = -exact.log_softmax(-1).gather(-1, targets.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    p = with_a_rest((teacher.double() / temperature).softmax(-1), output.indices)
    q = with_a_rest((exact / temperature).softmax(-1), output.indices)
    kl = (p * (p / q).log()).sum(-1)
    expected = (counted * (weights[0] * nll + weights[1] * temperature**2 * kl)).sum()
    (expected / 7).backward()

    rows = logits(1).requires_grad_()
    total = summed_recovery_loss(rows * 1, targets, output, *weights, temperature)
    (total / 7).backward()
    assert total.item() == pytest.approx(expected.item(), rel=1e-5)
    torch.testing.assert_close(rows.grad.double(), exact.grad, rtol=1e-3, atol=1e-6)


def test_logits_in_half_precision_are_summed_in_float32():
    targets = torch.zeros(2, 5, dtype=torch.long)
    rows = logits(1).bfloat16()
    expected = F.cross_entropy(rows.float().flatten(0, 1), targets.flatten(), reduction="sum")
    rows.requires_grad_()
    total = summed_recovery_loss(rows * 1, targets)
    total.backward()
    assert total.dtype == torch.float32 and total.item() == pytest.approx(expected.item(), rel=1e-6)
    assert rows.grad.dtype == torch.bfloat16


def test_without_a_gradient_the_logits_stay_as_they_are():
    rows = logits(1)
    with torch.no_grad():
        summed_recovery_loss(rows, torch.zeros(2, 5, dtype=torch.long))
    assert torch.equal(rows, logits(1))


def test_losses_of_single_tokens():
    targets = torch.tensor([[1, IGNORED, 2, 3, 4], [5, 6, 7, IGNORED, 8]])
    expected = -logits(1).log_softmax(-1).gather(-1, targets.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    actual = token_losses(logits(1), targets)
    torch.testing.assert_close(actual, expected * (targets != IGNORED))
