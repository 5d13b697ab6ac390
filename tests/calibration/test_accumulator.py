# Licensed under the Apache License, Version 2.0
"""The sums over the rows of all experts at once, against one expert after another in float64."""

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from optimum_heapr.calibration import accumulator
from optimum_heapr.calibration.accumulator import BlockAccumulator, RoutedRows


torch.set_num_threads(1)
COUNTS = (70, 0, 130, 1, 300, 64, 0)


def rows(width: int, counts=COUNTS, padded: bool = False, dtype: torch.dtype = torch.float32):
    generator = torch.Generator().manual_seed(0)
    number = sum(counts)
    activation, gradient = (torch.randn(number, width, generator=generator) for _ in range(2))
    expert = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    valid = torch.rand(number, generator=generator) < 0.7 if padded else None
    if padded:  # as padding on the right has it
        gradient = gradient * valid[:, None]
    weight, norm = (torch.rand(number, generator=generator) + 0.5 for _ in range(2))
    routed = RoutedRows(expert, list(counts), weight.to(dtype), valid, norm)
    return activation.to(dtype), gradient.to(dtype), routed


def by_expert(activation, gradient, routed) -> dict[str, torch.Tensor]:
    """Each sum as its definition reads."""
    valid = torch.ones(len(activation)) if routed.valid is None else routed.valid
    of_all = (activation, gradient, routed.router_weight, routed.output_norm, valid)
    sums = []
    for h, g, r, norm, counts in zip(*(part.double().split(routed.counts) for part in of_all)):
        h, r = h * counts[:, None], r * counts
        rh = r[:, None] * h
        sums.append(
            (h.pow(2).sum(0), g.pow(2).sum(0), (h * g).pow(2).sum(0), counts.sum(), r @ norm, rh.T @ rh, g.T @ g)
        )
    names = list(BlockAccumulator(1, 1, torch.device("cpu"), gram=True).sums())
    return dict(zip(names, map(torch.stack, zip(*sums))))


@pytest.mark.parametrize("at_once", [1, 4096])
@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_equal_to_the_sums_of_each_expert(monkeypatch, dtype, padded, at_once):
    monkeypatch.setattr(accumulator, "NUMBERS_AT_ONCE_CPU", at_once)
    monkeypatch.setattr(accumulator, "GRAM_PANEL_CPU", 5)  # no divisor of the width
    batch = rows(12, padded=padded, dtype=dtype)
    sums = BlockAccumulator(len(COUNTS), 12, torch.device("cpu"), dtype, gram=True)
    for _ in range(3):
        sums.add(*batch)
    sums.complete()
    for name, expected in by_expert(*batch).items():
        found = sums.sums()[name]
        assert found.dtype in (torch.int64, torch.promote_types(dtype, torch.float32))
        scale = expected.abs().amax(dim=-1, keepdim=True) if expected.dim() == 3 else expected.abs()
        exact = 1e-12 if dtype == torch.float64 else 1e-6 if expected.dim() < 3 else 4e-6  # as any product of matrices
        assert ((found.double() / 3 - expected).abs() <= exact * scale).all(), name


def test_rounding_does_not_grow_with_the_rows_of_an_expert():
    batch = rows(8, (30_000, 10))
    sums = BlockAccumulator(2, 8, torch.device("cpu"))
    sums.add(*batch)
    for name in ("activation_sq_sum", "gradient_sq_sum", "fisher_sum"):
        torch.testing.assert_close(sums.sums()[name].double(), by_expert(*batch)[name], rtol=1e-6, atol=0)


def test_the_same_rows_give_the_same_bits_and_whole_matrices_can_be_added_to():
    batch, found = rows(40), []
    for _ in range(2):
        sums = BlockAccumulator(len(COUNTS), 40, torch.device("cpu"), gram=True)
        sums.add(*batch)
        sums.complete()
        sums.add(*batch)
        sums.complete()
        found.append({name: part.clone() for name, part in sums.sums().items()})
    assert all(torch.equal(part, found[1][name]) for name, part in found[0].items())
    for name in ("activation_gram_sum", "gradient_gram_sum"):
        assert torch.equal(found[0][name], found[0][name].mT)
        torch.testing.assert_close(found[0][name].double(), 2 * by_expert(*batch)[name], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(("value", "where"), [(torch.inf, 0), (torch.nan, 0), (torch.inf, 1), (1e30, 1)])
def test_what_is_not_finite_is_found_by_the_diagonal_of_a_matrix(value, where):
    batch = rows(6)
    batch[where][100, 4] = value
    sums = BlockAccumulator(len(COUNTS), 6, torch.device("cpu"), gram=True)
    sums.add(*batch)
    sums.complete()
    whole = [bool(part.isfinite().all()) for part in sums.sums().values()]
    assert sums.finite().tolist() == whole and not all(whole)


def test_nothing_waits_for_the_accelerator():
    """Tensors without values: an operation that has to know one raises."""
    activation, gradient, routed = rows(12, padded=True)
    mode = FakeTensorMode()
    for name, part in vars(routed).items():
        setattr(routed, name, part if name == "counts" else mode.from_tensor(part))
    with mode:
        sums = BlockAccumulator(len(COUNTS), 12, torch.device("cpu"), gram=True)
        sums.add(mode.from_tensor(activation), mode.from_tensor(gradient), routed)
        finite = sums.finite()
        with pytest.raises(DataDependentOutputException):
            bool(finite[0])
