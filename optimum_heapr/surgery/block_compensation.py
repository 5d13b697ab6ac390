# Licensed under the Apache License, Version 2.0
"""Compensation over a whole block: what goes from one expert is made up for by all experts that get the same token.

Within an expert ([`~optimum_heapr.surgery.compensation`]) only its own atomic experts can make up for those that go. But a
token meets several experts, and the shared ones besides, and what one cannot make up for another can. So here the down
projections of all of them are fitted together, to the output of the unpruned block for the inputs that it has in the
unpruned model, by [`~optimum_heapr.surgery.least_squares`]. The matrix of all pairs of atomic experts, 39 GB a layer for
128 experts of 768, is never made; what it takes instead is the calibration text once more, one layer at a time, forward.

Few tokens. As within one expert, the ridge grows where there are few tokens for what is fitted: all kept atomic experts
that a token meets count against the tokens of each expert.
"""

from __future__ import annotations

import math
import os
from typing import TYPE_CHECKING

import torch

from ..experts import experts_per_token
from ..layerwise.memory import available_bytes, processes_here
from ..utils.errors import HeaprError
from ..utils.logging import get_logger, is_main_process
from ..utils.placement import default_device
from .block_target import target_of
from .fitted import FittedBlock
from .least_squares import Part, chunks, numbers_at_once, solve_together
from .portion import Added, alone, numbers
from .reconstruction import inputs_bytes, training_bytes


if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..configuration import HeaprConfig
    from ..experts import ExpertBlock
    from .block_inputs import BlockInputs


logger = get_logger(__name__)


def fit_block(
    block: ExpertBlock,
    inputs: BlockInputs,
    kept: list[torch.Tensor],
    ridge: float,
    rerouting: tuple[torch.Tensor, torch.Tensor] | None = None,
    added: Added = alone,
) -> FittedBlock:
    """The down projections of one block, fitted together; as they are where nothing is removed or no token came.

    Args:
        block (`ExpertBlock`): experts of the unpruned model.
        inputs (`BlockInputs`): what it was called with; is used up.
        kept (`list[torch.Tensor]`): kept indices of each expert.
        ridge (`float`): least ridge, in units of the mean squared activation.
        rerouting (`tuple[torch.Tensor, torch.Tensor]`, *optional*): experts of each token in the pruned model, [tokens, K], and
            their router weights, if they are not those of the unpruned one.
        added (`Added`): sums over processes, each of which has calls of its own.
    """
    fit = BlockFit(block, inputs, kept, ridge, rerouting, added)
    inputs.forget()
    return fit.solved()


def check_block_memory(model: PreTrainedModel, blocks: list[ExpertBlock], config: HeaprConfig) -> None:
    """States what fitting a block takes, and refuses what there is no room for, before anything is calibrated.

    Args:
        model (`PreTrainedModel`): only shapes and devices are read.
        blocks (`list[ExpertBlock]`): its expert blocks.
        config (`HeaprConfig`): its calibration part is used.

    Raises:
        HeaprError: naming the bytes needed and available.
    """
    processes, samples = int(os.environ.get("WORLD_SIZE", "1")), config.num_samples
    shares = processes > 1 and config.max_loss_increase is None
    if shares:
        batches = math.ceil(samples / config.batch_size)
        samples = min(math.ceil(batches / processes) * config.batch_size, samples)
    needed = needed_bytes(model, blocks, config.replace(num_samples=samples))
    device = blocks[0].device if getattr(model, "hf_device_map", None) else default_device()
    # Weights that are going to be there as well.
    coming = sum(p.nbytes for p in model.parameters() if p.device.type not in (device.type, "meta"))
    available = available_bytes(device) // (processes_here() if shares and device.type == "cpu" else 1) - coming
    what, option = "Fitting", f"compensation_scope={config.compensation_scope!r}"
    if config.reconstruction_steps:
        what, option = "Fitting and training", f"reconstruction_steps={config.reconstruction_steps}"
    logger.info("%s a block takes %s bytes on %s, of %s available", what, f"{needed:,}", device, f"{available:,}")
    if processes > 1 and not shares and is_main_process():
        logger.warning(
            "max_loss_increase=%s: plans are measured, compensated and applied by the first of %d processes; all calibrate",
            config.max_loss_increase,
            processes,
        )
    if needed > available:
        raise HeaprError(
            f"{option}: needs {needed:,} bytes on {device} for {samples} samples of {config.seq_length} tokens, and "
            f"{available:,} are available; calibrate on fewer, or use "
            "memory='streaming', which has one layer there, or compensation_scope='expert'"
        )


def needed_bytes(model: PreTrainedModel, blocks: list[ExpertBlock], config: HeaprConfig) -> int:
    """What fitting one block, and training it if that is asked for, takes at most; arguments as of [`check_block_memory`]."""
    tokens, top_k = config.num_samples * config.seq_length, experts_per_token(model)
    needed = max(fitting_bytes(block, tokens, top_k) for block in blocks)
    if config.num_experts == "auto":  # what is measured by many fits to the same inputs
        needed += max(measuring_bytes(block, tokens) for block in blocks)
    if config.reconstruction_steps:
        needed = max(
            *(needed + inputs_bytes(block, tokens) for block in blocks),
            *(training_bytes(block, tokens, top_k) for block in blocks),
        )
    return needed


def fitting_bytes(block: ExpertBlock, tokens: int, top_k: int | None) -> int:
    """What fitting one block takes at most, shared experts left aside.

    It is the most of three moments: micro-batches are joined, and hidden states are there twice; the activations are there and
    the hidden states still are, with one expert's twice and a gradient; and the solver works, which has the Cholesky factors and, for
    as many unknowns as it solves for at once, numbers of its own. The kept rows are there throughout.
    """
    stored, exact = block.module.down_proj.dtype.itemsize, max(block.module.down_proj.dtype.itemsize, 4)
    met = top_k or block.num_experts
    hidden, activations = tokens * block.hidden_size * stored, tokens * met * block.width * stored
    routing = 28 * tokens * met  # of each token its experts, their weights, and twice its number for each of them
    weights = block.num_experts * block.width * block.hidden_size
    _, at_once = chunks(tokens, block.hidden_size)[0]
    besides = at_once * 4 * (block.hidden_size + block.width) * exact + weights * (stored + exact) + routing
    gathering = hidden + activations + tokens * block.width * stored + besides
    factors = block.num_experts * block.width**2
    solving = activations + (factors + numbers_at_once(weights)) * exact + besides
    return max(2 * hidden + routing, gathering, solving)


def measuring_bytes(block: ExpertBlock, tokens: int) -> int:
    """What is there besides, while fits are measured: hidden states for the next fit, and twice the target of an eighth of the tokens."""
    stored = block.module.down_proj.dtype.itemsize
    return tokens * block.hidden_size * (stored + max(stored, 4) // 4)


class BlockFit:
    """What is to be made up for in one block, and by what; arguments as for [`fit_block`].

    The target is what the block gave and what stays of it does not give, where fewer experts are routed to under the new routing.

    Args:
        besides (`torch.Tensor`, *optional*): what else is to be made up for, [tokens, d].
        fitted (`int`, *optional*): how many of the tokens here are fitted to; by default all.

    Attributes:
        energy (`float`): squared output of all routed experts, summed over the tokens of all processes.
        atomic_energy (`float`): the same of all atomic experts one by one.
        lost (`float`): the same of the target, of the tokens that are fitted to.
        parts (`dict[int | str, Part]`): by number of the expert, or by path of the shared expert.
    """

    @torch.no_grad()
    def __init__(
        self,
        block: ExpertBlock,
        inputs: BlockInputs,
        kept: list[torch.Tensor],
        ridge: float,
        rerouting: tuple[torch.Tensor, torch.Tensor] | None = None,
        added: Added = alone,
        besides: torch.Tensor | None = None,
        fitted: int | None = None,
    ):
        hidden, index, weight = inputs.routing()
        self._block, self._inputs, self._added = block, inputs, added
        self._tokens, self._fitted = len(hidden), len(hidden) if fitted is None else fitted
        self._rows = [block.down_rows(expert)[indices.to(block.device)] for expert, indices in enumerate(kept)]
        stays = torch.zeros(len(kept), block.width, dtype=torch.bool, device=hidden.device)
        for of_expert, indices in zip(stays, kept):
            of_expert[indices.to(hidden.device)] = True
        shared = dict(inputs.shared_activations())
        always_on = sum(activations.shape[1] for activations in shared.values())
        # Some routers name an expert that is none, for tokens that get fewer.
        new_index = index if rerouting is None else rerouting[0]
        counts = torch.bincount(new_index.flatten(), minlength=block.num_experts)[: block.num_experts].tolist()
        total, *counts = numbers(added, [len(hidden), *counts])
        met = sum(count * len(indices) for count, indices in zip(counts, kept)) / max(total, 1)  # by a token

        dtype = torch.promote_types(block.module.down_proj.dtype, torch.float32)
        names = [expert for expert, indices in enumerate(kept) if len(indices)]
        found: dict[int, list[tuple[torch.Tensor, torch.Tensor]]] = {name: [] for name in names}
        energies: dict[int | str, float] = dict.fromkeys([*names, *shared], 0.0)
        widths = [*(len(kept[name]) for name in names), *(activations.shape[1] for activations in shared.values())]
        gradient = torch.zeros(sum(widths), block.hidden_size, dtype=dtype, device=hidden.device)
        self._held_out: list[torch.Tensor] = []
        sums = torch.zeros(3, dtype=torch.float64)
        for first, end in chunks(self._tokens, block.hidden_size):
            routing, anew = (of and [part[first:end] for part in of] for of in ((index, weight), rerouting))
            here = target_of(block, stays, hidden[first:end], routing, anew)
            if besides is not None:
                here.target += besides[first:end]
            fitted_to = min(max(self._fitted - first, 0), end - first)
            self._held_out.append(here.target[fitted_to:].clone())
            target = here.target[:fitted_to]
            sums += torch.tensor([here.energy, here.atomic_energy, float(target.square().sum())], dtype=torch.float64)
            for name in names:
                tokens, activations, energy = here.fitted_with[name]
                energies[name] += energy
                found[name].append((tokens + first, activations))
            parts = [Part(*here.fitted_with[name][:2], 0.0) for name in names]
            everywhere = torch.arange(end - first, device=hidden.device)
            parts += [Part(everywhere, activations[first:end], 0.0) for activations in shared.values()]
            for part, own in zip(parts, gradient.split(widths)):
                part.of(0, fitted_to).add_correlation(target, own)
        # Tokens, and what is to be fitted with; one after another, as each is there twice for a moment.
        met_by = {name: tuple(torch.cat(parts) for parts in zip(*found.pop(name))) for name in names}
        for name, activations in shared.items():
            energies[name] = float(activations.to(dtype).square().mean(1).sum())
            met_by[name] = torch.arange(len(hidden), device=hidden.device), activations
        self.energy, self.atomic_energy, self.lost, *summed = numbers(added, [*sums.tolist(), *energies.values()])
        self.parts: dict[int | str, Part] = {}
        correlations = []
        for (name, found_for), energy, correlation in zip(met_by.items(), summed, gradient.split(widths)):
            if energy > 0:
                least = (met + always_on) / total if name in shared else met / counts[name] + always_on / total
                self.parts[name] = Part(*found_for, energy * max(ridge, least))
                correlations.append(correlation)
        self._gradient = gradient if len(correlations) == len(widths) else torch.cat([gradient[:0], *correlations])

    @torch.no_grad()
    def held_out_error(self) -> float:
        """What a fit to the tokens that are fitted to, here and in other processes, leaves of the target on the others, squared and
        summed.

        Raises:
            HeaprError: if activations are not finite.
        """
        if not self._is_finite():
            raise HeaprError(
                f"num_experts='auto': {self._block.path} has activations that are not finite, so that nothing can be measured; load "
                "the model in bfloat16 or float32, or name a number"
            )
        parts = list(self.parts.values())
        fitted_to = [part.of(0, self._fitted) for part in parts]
        changes, _ = self._solve(fitted_to, self._fitted)
        left = torch.cat(self._held_out)
        for part, change in zip(parts, changes):
            part.of(self._fitted, self._tokens).add_output(-change, left)
        return numbers(self._added, [float(left.square().sum())])[0]

    @torch.no_grad()
    def solved(self) -> FittedBlock:
        """The down projections that come closest to the target. What there is to be fitted to is used up."""
        rows, shared = list(self._rows), {}
        before = self.lost / self.energy if self.energy else 0.0
        plain = FittedBlock(rows, shared, before, before)
        if not self.parts or before == 0:
            return plain
        if not self._is_finite():
            logger.warning("%s: has activations that are not finite; it is cut without compensation", self._block.path)
            return FittedBlock(rows, shared, 0.0, 0.0)
        changes, lowered = self._solve(list(self.parts.values()), self._tokens)
        error = max(self.lost - lowered, 0.0) / self.energy  # below it by rounding
        if not error <= before:
            logger.warning("%s: no fit was better than none; it is cut without compensation", self._block.path)
            return plain
        for name, change in zip(self.parts, changes):
            if isinstance(name, int):
                rows[name] = (rows[name] + change).to(rows[name].dtype)
            else:
                weight = self._inputs.shared[name].down_proj.weight
                shared[f"{name}.down_proj.weight"] = (weight + change.T).to(weight.dtype)
        return FittedBlock(rows, shared, before, error)

    def _solve(self, parts: list[Part], tokens: int) -> tuple[list[torch.Tensor], float]:
        gradient = self._gradient
        del self._gradient  # the changes take its place
        return solve_together(parts, tokens, gradient, self._added)

    def _is_finite(self) -> bool:
        """Whether all that the fit rests on is, in all processes."""
        return all(map(math.isfinite, (self.lost, self.energy, *(part.ridge for part in self.parts.values()))))
