# Licensed under the Apache License, Version 2.0
"""Products of tokens with the rows of their experts, as operations of a graph. This file travels with pruned checkpoints.

How many tokens an expert gets, and how wide it is, is not for a compiler to know: shapes would depend on the routing. Here
are three operations whose results have known shapes; what an expert gives is padded to the width of the widest. They are
linear in both of their tensors, and the gradients of each are the others. All that they need is in their arguments, so
that an exported program runs without the model that it was made from.

Pairs are a token and one of its experts, P of them, sorted by where the expert is stored. In all three

- `tokens` [P] are the tokens of the pairs, and `ends` [experts] the numbers of pairs up to and with each stored expert;
- `weight` [R, d] has `parts * width` rows for each expert, one after the other, in the order of `widths`;
- rows of tokens may be of a higher precision, in which what they get is then summed; products are in that of the weight, or
  in float32 where the device lacks those (see `half_precision.py`), one an expert and of any shape;
- `padded` [P, parts * max(widths)] has each part of an expert's row, with zeros behind it;
- `grouped` asks for one grouped product for neighbours of equal width;
- `step`, where it is not 0, for products of few shapes (see `half_precision.py`), by widths that are multiples of it.
"""

import itertools
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import library
from transformers.integrations.moe import _grouped_mm

from .half_precision import lacks_products, rounded_rows, rounded_span, takes_all_experts, zeros_around


# Up to so many rows torch's own kernel for a linear layer in half precision takes less than converting its weight: measured with AVX2.
FEW_ROWS = 2


def product_dtype(weight: torch.Tensor) -> torch.dtype:
    """What a product with this weight is computed in here, as autocast decides."""
    device = weight.device.type
    lowered = torch.is_autocast_enabled(device) and weight.dtype != torch.float64
    return torch.get_autocast_dtype(device) if lowered else weight.dtype


def can_be_grouped(groups: int, dtype: torch.dtype, *sizes: int) -> bool:
    """Whether the grouped kernel takes matrices of these sizes: it has no float64, and wants rows of whole 16 bytes."""
    return groups > 1 and dtype != torch.float64 and all(size * dtype.itemsize % 16 == 0 for size in sizes)


def grouped_product(
    rows: torch.Tensor, weight: torch.Tensor, offsets: torch.Tensor, counts: list[int]
) -> torch.Tensor:
    """rows [n, a] sorted by group, weight [groups, a, b] -> [n, b]."""
    dtype = product_dtype(weight)  # the kernel itself does not know autocast
    if can_be_grouped(len(counts), dtype, *weight.shape[1:]):
        return _grouped_mm(rows, weight.to(dtype), offs=offsets)
    return torch.cat([part @ matrix for part, matrix in zip(rows.split(counts), weight)])


def product(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """a @ b of one type, or of that which autocast lowers them to; into `out` where it is given."""
    dtype = product_dtype(b)
    if not lacks_products(b, dtype):
        return a @ b if out is None else torch.mm(a, b, out=out)
    with torch.autocast(b.device.type, enabled=False):
        result = a.to(dtype).float() @ b.to(dtype).float()
    return result.to(dtype) if out is None else out.copy_(result)


def linear(rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`F.linear`, converted where that is faster: torch's own kernel for this order of factors is good at few rows."""
    if len(rows) <= FEW_ROWS or not lacks_products(weight, product_dtype(weight)):
        return F.linear(rows, weight, bias)
    result = product(rows, weight.T)
    return result if bias is None else result + bias.to(result.dtype)


def operation(function: Callable) -> Callable:
    """Registers an operation once in a process: a copy of this file that came with a checkpoint shares it.

    What an operation does must therefore never change under one name.
    """
    name = function.__name__
    if not hasattr(torch.ops.heapr, name):
        library.custom_op(f"heapr::{name}", function, mutates_args=())
        library.register_fake(f"heapr::{name}", _FAKES[name])
        library.register_autograd(f"heapr::{name}", _GRADIENTS[name], setup_context=_save)
    return getattr(torch.ops.heapr, name)


def _save(ctx, inputs, output) -> None:
    *tensors, ctx.widths, ctx.parts, ctx.grouped, ctx.step = inputs
    ctx.save_for_backward(*tensors)


def _expand_gradients(ctx, gradient):
    rows, tokens, ends, weight = ctx.saved_tensors
    options = (ctx.widths, ctx.parts, ctx.grouped, ctx.step)
    of_rows = reduce(gradient, tokens, ends, weight, rows, *options) if ctx.needs_input_grad[0] else None
    of_weight = outer(gradient, tokens, ends, rows, *options) if ctx.needs_input_grad[3] else None
    return of_rows, None, None, of_weight, None, None, None, None


def _reduce_gradients(ctx, gradient):
    padded, tokens, ends, weight, _ = ctx.saved_tensors
    options = (ctx.widths, ctx.parts, ctx.grouped, ctx.step)
    of_padded = expand(gradient, tokens, ends, weight, *options) if ctx.needs_input_grad[0] else None
    of_weight = outer(padded, tokens, ends, gradient, *options) if ctx.needs_input_grad[3] else None
    return of_padded, None, None, of_weight, None, None, None, None, None


def _outer_gradients(ctx, gradient):
    padded, tokens, ends, rows = ctx.saved_tensors
    options = (ctx.widths, ctx.parts, ctx.grouped, ctx.step)
    of_padded = expand(rows, tokens, ends, gradient, *options) if ctx.needs_input_grad[0] else None
    of_rows = reduce(padded, tokens, ends, gradient, rows, *options) if ctx.needs_input_grad[3] else None
    return of_padded, None, None, of_rows, None, None, None, None


_FAKES = {
    "expand": lambda rows, tokens, ends, weight, widths, parts, grouped, step: weight.new_empty(
        tokens.shape[0], parts * max(widths)
    ),
    "reduce": lambda padded, tokens, ends, weight, like, *options: torch.empty_like(like),
    "outer": lambda padded, tokens, ends, rows, widths, parts, *options: padded.new_empty(
        parts * sum(widths), rows.shape[1]
    ),
}
_GRADIENTS = {"expand": _expand_gradients, "reduce": _reduce_gradients, "outer": _outer_gradients}


@operation
def expand(
    rows: torch.Tensor,
    tokens: torch.Tensor,
    ends: torch.Tensor,
    weight: torch.Tensor,
    widths: list[int],
    parts: int,
    grouped: bool,
    step: int,
) -> torch.Tensor:
    """rows [tokens, d] -> padded: each pair's token times the rows of its expert."""
    if lacks_products(weight):
        grouped, step = False, 0
    padded = weight.new_zeros(len(tokens), parts * max(widths))
    view = padded.unflatten(1, (parts, -1))
    if step and takes_all_experts(weight, len(rows), len(tokens) / len(widths)):
        everything = weight @ rows.to(weight.dtype).T
        for pairs, _, span, width in _groups(ends, widths, parts, False):
            view[pairs, :, :width] = everything[span].index_select(1, tokens[pairs]).T.unflatten(1, (parts, width))
        return padded
    surplus = rounded_rows(len(tokens)) if step and len(tokens) else 0
    gathered = rows.index_select(0, F.pad(tokens, (0, surplus))).to(weight.dtype)
    for pairs, counts, span, width in _groups(ends, widths, parts, grouped):
        if len(counts) > 1:
            matrices = weight[span].unflatten(0, (len(counts), parts * width)).transpose(1, 2)
            results = grouped_product(gathered[pairs], matrices, _offsets(counts, rows.device), counts)
        else:
            first, before, end = rounded_span(span, step * parts, len(weight))
            count = pairs.stop - pairs.start
            some = gathered[pairs.start : pairs.start + (rounded_rows(count) if step else count)]
            results = linear(some, weight[first:end])[:count, before : before + parts * width]
        view[pairs, :, :width] = results.unflatten(1, (parts, width))
    return padded


@operation
def reduce(
    padded: torch.Tensor,
    tokens: torch.Tensor,
    ends: torch.Tensor,
    weight: torch.Tensor,
    like: torch.Tensor,
    widths: list[int],
    parts: int,
    grouped: bool,
    step: int,
) -> torch.Tensor:
    """padded -> [tokens, d], in shape and dtype `like` that: for each token the sum over its pairs of theirs times the rows of
    the expert."""
    if lacks_products(weight):
        grouped, step = False, 0
    output = torch.zeros_like(like)
    view = padded.unflatten(1, (parts, -1))
    if step and takes_all_experts(weight, len(like), len(tokens) / len(widths)):
        everything = padded.new_zeros(len(like), len(weight))
        for pairs, _, span, width in _groups(ends, widths, parts, False):
            everything[tokens[pairs], span] = view[pairs, :, :width].flatten(1)
        return output.copy_(everything @ weight)
    products = weight.new_zeros(len(tokens) + (rounded_rows(len(tokens)) if step else 0), weight.shape[1])
    for pairs, counts, span, width in _groups(ends, widths, parts, grouped):
        some = view[pairs, :, :width].flatten(1).contiguous()
        if len(counts) > 1:
            matrices = weight[span].unflatten(0, (len(counts), parts * width))
            products[pairs] = grouped_product(some, matrices, _offsets(counts, weight.device), counts)
        else:
            first, before, end = rounded_span(span, step * parts, len(weight))
            rounded = rounded_rows(len(some)) if step else len(some)
            some = zeros_around(some, before, end - first - some.shape[1] - before, rounded - len(some))
            # What is computed too much is overwritten by the next pairs.
            product(some, weight[first:end], out=products[pairs.start : pairs.start + rounded])
    return output.index_add_(0, tokens, products[: len(tokens)].to(output.dtype))


@operation
def outer(
    padded: torch.Tensor,
    tokens: torch.Tensor,
    ends: torch.Tensor,
    rows: torch.Tensor,
    widths: list[int],
    parts: int,
    grouped: bool,
    step: int,
) -> torch.Tensor:
    """padded and rows [tokens, d] -> a gradient [R, d] of the weight: for each expert the sum of products of its pairs."""
    grouped = grouped and not lacks_products(padded)
    gradient = padded.new_zeros(parts * sum(widths), rows.shape[1])
    view, gathered = padded.unflatten(1, (parts, -1)), rows.index_select(0, tokens).to(padded.dtype)
    for pairs, counts, span, width in _groups(ends, widths, parts, grouped):
        some = view[pairs, :, :width].flatten(1).contiguous().T
        if can_be_grouped(len(counts), padded.dtype, rows.shape[1], parts * width):
            results = _grouped_mm(some, gathered[pairs], offs=_offsets(counts, rows.device))
            gradient[span].unflatten(0, results.shape[:2]).copy_(results)
            continue
        for count, part, matrix in zip(counts, gathered[pairs].split(counts), gradient[span].chunk(len(counts))):
            if count:
                product(some[:, :count], part, out=matrix)
                some = some[:, count:]
    return gradient


def _groups(
    ends: torch.Tensor, widths: list[int], parts: int, together: bool
) -> Iterator[tuple[slice, list[int], slice, int]]:
    """Experts that have tokens and rows, or neighbours of equal width together: their pairs, the number of pairs of each,
    their rows of the weight, and the width."""
    counts = ends.diff(prepend=ends.new_zeros(1)).tolist()
    pair, row, slot = 0, 0, 0
    keys = widths if together else range(len(widths))
    for _, group in itertools.groupby(range(len(widths)), key=keys.__getitem__):
        slots = len(list(group))
        of_each, width = counts[slot : slot + slots], widths[slot]
        pairs, span = slice(pair, pair + sum(of_each)), slice(row, row + slots * parts * width)
        pair, row, slot = pairs.stop, span.stop, slot + slots
        if width and pairs.stop > pairs.start:
            yield pairs, of_each, span, width


def _offsets(counts: list[int], device: torch.device) -> torch.Tensor:
    return torch.tensor(counts, device=device).cumsum(0).to(torch.int32)
