# Licensed under the Apache License, Version 2.0
"""`AtomicStatistics`: what calibration measured, per atomic expert, and what it was measured on."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import MISSING, dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from ..utils.artefacts import MODEL_PARTS, check_parts, read_artefact, write_artefact
from ..utils.errors import HeaprError, reason_of
from ..utils.logging import is_main_process
from ..utils.values import TensorValue, are_finite


if TYPE_CHECKING:
    import torch

    from ..experts import ExpertBlock
    from ..utils.temporary import TemporaryFolder
    from .cost import Cost


FORMAT = "heapr_statistics"

SUMMED_BY_SOURCE = ("activation_sq_sum", "gradient_sq_sum", "fisher_sum", "token_count", "output_norm_sum")
"""What is kept for each source of a mixture as well, under `source_` and this name."""


@dataclass(eq=False, repr=False)
class BlockStatistics(TensorValue):
    """Sums over the calibration tokens for one expert block of E experts with I atomic experts each.

    Attributes:
        activation_sq_sum (`torch.Tensor`): sum of h^2 over the tokens routed to the expert, [E, I].
        gradient_sq_sum (`torch.Tensor`): sum of (dL/dh)^2, [E, I]; L is the summed token loss in nats.
        fisher_sum (`torch.Tensor`): sum of (h dL/dh)^2, [E, I].
        weight_norm (`torch.Tensor`): Euclidean norm of the atomic expert's weights, [E, I].
        token_count (`torch.Tensor`): tokens routed to each expert, [E], int64.
        output_norm_sum (`torch.Tensor`, *optional*): sum of router weight times norm of the expert's output, [E].
        activation_gram_sum (`torch.Tensor`, *optional*): sum of r^2 h h^T with r the router weight, [E, I, I].
        gradient_gram_sum (`torch.Tensor`, *optional*): sum of (dL/dh) (dL/dh)^T, [E, I, I].
        removal_order (`torch.Tensor`, *optional*): of criterion `obs`, which atomic expert each step removes, [E, I]
            int32; made from the matrices, and the same as from them.
        removal_cost (`torch.Tensor`, *optional*): what each of these steps costs, [E, I] float64.
        removal_ridge (`torch.Tensor`, *optional*): the ridge of each expert that they were computed with, [E].
        removal_scale (`torch.Tensor`, *optional*): what these costs are to be multiplied by for an increase of the loss, [E]:
            the matrices have the router weight in both, and it is one factor of the output.
        source_activation_sq_sum, source_gradient_sq_sum, source_fisher_sum (`torch.Tensor`, *optional*): of each of the S
            sources of the text, if these are several, [E, S, I].
        source_token_count, source_output_norm_sum (`torch.Tensor`, *optional*): likewise, [E, S].
    """

    activation_sq_sum: torch.Tensor
    gradient_sq_sum: torch.Tensor
    fisher_sum: torch.Tensor
    weight_norm: torch.Tensor
    token_count: torch.Tensor
    output_norm_sum: torch.Tensor | None = None
    activation_gram_sum: torch.Tensor | None = None
    gradient_gram_sum: torch.Tensor | None = None
    removal_order: torch.Tensor | None = None
    removal_cost: torch.Tensor | None = None
    removal_ridge: torch.Tensor | None = None
    removal_scale: torch.Tensor | None = None
    source_activation_sq_sum: torch.Tensor | None = None
    source_gradient_sq_sum: torch.Tensor | None = None
    source_fisher_sum: torch.Tensor | None = None
    source_token_count: torch.Tensor | None = None
    source_output_norm_sum: torch.Tensor | None = None

    def _summary(self) -> dict[str, str]:
        measured = "second order" if self.has_grams else "vectors"
        tokens = f"{int(self.token_count.sum()):,}"
        return {"experts": f"{self.num_experts} of width {self.width}", "routed tokens": tokens, "measured": measured}

    @property
    def num_experts(self) -> int:
        return self.activation_sq_sum.shape[0]

    @property
    def width(self) -> int:
        return self.activation_sq_sum.shape[1]

    @property
    def reached(self) -> torch.Tensor:
        """Which experts any calibration token was routed to, [E] bool."""
        return self.token_count > 0

    def mean(self, name: str) -> torch.Tensor:
        """One of the sums divided by the expert's token count, [E, I]; zero for experts that no token reached."""
        return self.per_token(getattr(self, name))

    def per_token(self, total: torch.Tensor) -> torch.Tensor:
        """A sum over the tokens of each expert, [E, ...], divided by how many these are."""
        return total / self.token_count.clip(min=1).reshape(-1, *[1] * (total.ndim - 1))

    @property
    def has_grams(self) -> bool:
        """Whether the second-order statistics, I x I for each expert, were measured."""
        return self.activation_gram_sum is not None and self.gradient_gram_sum is not None

    @property
    def has_curves(self) -> bool:
        """Whether the removal curves of criterion `obs` were computed."""
        return all(part is not None for part in (self.removal_order, self.removal_cost, self.removal_ridge))

    @property
    def sums(self) -> dict[str, torch.Tensor]:
        """What adds up over tokens, by name, as far as it was measured: not norms of weights, nor what sums gave."""
        names = [part.name for part in fields(self) if part.name.endswith(("_sum", "token_count"))]
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    def of_experts(self, experts: Sequence[int] | torch.Tensor) -> BlockStatistics:
        """The statistics of a block that holds some experts of this one alone."""
        parts = {part.name: getattr(self, part.name) for part in fields(BlockStatistics)}
        return BlockStatistics(**{name: part if part is None else part[experts] for name, part in parts.items()})

    def without_grams(self) -> BlockStatistics:
        """The same without the second-order statistics, which are most of what there is."""
        return replace(self, activation_gram_sum=None, gradient_gram_sum=None)

    def check_grams(self, path: str, reason: str, gradients: bool = True) -> None:
        """Refuses statistics without the matrices that are needed.

        Args:
            path (`str`): of the block.
            reason (`str`): what needs them.
            gradients (`bool`): whether those of the gradients are needed as well as those of the activations.

        Raises:
            HeaprError: naming what needs them, or the matrices that hold NaN or infinity.
        """
        if self.activation_gram_sum is None or (gradients and self.gradient_gram_sum is None):
            found = "vectors" if self.activation_gram_sum is None else "without the matrices of the gradients"
            advice = (
                "calibrate again with statistics='gram'" if is_main_process() else "the first process alone has them"
            )
            raise HeaprError(f"{reason}: needs second-order statistics, and those of {path} are {found}; {advice}")
        for name in ("activation_gram_sum", "gradient_gram_sum")[: 1 + gradients]:
            # One expert at a time: the answers for all would take a good part of the memory of the matrices.
            if not all(bool(matrix.isfinite().all()) for matrix in getattr(self, name)):
                raise HeaprError(f"{reason}: {path}.{name} holds values that are not finite; calibrate again")


@dataclass(eq=False, repr=False)
class AtomicStatistics(TensorValue):
    """The result of a calibration; it does not depend on how much will be pruned.

    Attributes:
        blocks (`dict[str, BlockStatistics]`): by module path of the expert block, in the model's order.
        fingerprint (`dict`): what was measured: `model` (type, weights hash), `data` (hash of the token ids, number of
            samples and tokens, where they came from), `storage` (bytes of its weights), `seed`, `seq_length`, and the
            `loss` per token in nats.
        cost (`Cost`, *optional*): what the measuring took; it is not saved.
        files (`TemporaryFolder`, *optional*): holds what matrices are mapped from, and goes with these statistics; not saved.
    """

    blocks: dict[str, BlockStatistics]
    fingerprint: dict[str, Any] = field(default_factory=dict)
    cost: Cost | None = None
    files: TemporaryFolder | None = None  # the last, so that the matrices go before it

    _NOT_COMPARED = ("cost",)

    def _summary(self) -> dict[str, str]:
        kinds = sorted({block._summary()["experts"] for block in self.blocks.values()})
        measured = "second order" if all(block.has_grams for block in self.blocks.values()) else "vectors"
        curves = ", removal curves" if all(block.has_curves for block in self.blocks.values()) else ""
        return {
            "model": f"{self.fingerprint.get('model', {}).get('model_type')}, {len(self.blocks)} blocks",
            "experts": " or ".join(kinds),
            "measured": f"{measured}{curves}, on {self.fingerprint.get('data', {}).get('num_tokens', 0):,} tokens",
        }

    @property
    def num_tokens(self) -> int:
        """Calibration tokens."""
        return int(self.fingerprint["data"]["num_tokens"])

    @property
    def sources(self) -> list[dict[str, Any]]:
        """The sources of the calibration text: `name`, `num_samples` and `num_tokens` of each."""
        return self.fingerprint["data"].get("sources", [])

    def by_source(self, path: str) -> list[BlockStatistics] | None:
        """The vectors of one block on each of the sources alone, in their order; `None` if they were added up."""
        block = self.blocks[path]
        if block.source_token_count is None:
            return [block] if len(self.sources) == 1 else None
        sums = {name: getattr(block, f"source_{name}") for name in SUMMED_BY_SOURCE}
        return [
            BlockStatistics(weight_norm=block.weight_norm, **{name: part[:, number] for name, part in sums.items()})
            for number in range(len(self.sources))
        ]

    @property
    def has_grams(self) -> bool:
        """Whether any block has second-order statistics."""
        return any(block.activation_gram_sum is not None for block in self.blocks.values())

    @property
    def unreached(self) -> dict[str, list[int]]:
        """Experts that no calibration token was routed to, by block; blocks without any are left out."""
        found = {
            path: [expert for expert, reached in enumerate(block.reached.tolist()) if not reached]
            for path, block in self.blocks.items()
        }
        return {path: experts for path, experts in found.items() if experts}

    def save(self, path: str | os.PathLike, grams: bool = True) -> None:
        """Writes one safetensors file, whole or not at all.

        Args:
            path (`str`): the file.
            grams (`bool`): with the second-order statistics, if they were measured; they are most of the file. Removal
                curves are always written if there are any: without matrices these serve criterion `obs`.
        """
        tensors = {
            f"{block_path}.{part.name}": getattr(block, part.name)
            for block_path, block in self.blocks.items()
            for part in fields(BlockStatistics)
            if getattr(block, part.name) is not None and (grams or "_gram_" not in part.name)
        }
        write_artefact(path, FORMAT, tensors, {"fingerprint": self.fingerprint, "blocks": list(self.blocks)})

    @classmethod
    def load(cls, path: str | os.PathLike, framework: str = "pt") -> AtomicStatistics:
        """Reads what [`save`] wrote.

        Args:
            path (`str`): the file.
            framework (`str`): `np` for NumPy arrays in place of tensors: enough to look at, and torch is not imported for it.

        Raises:
            HeaprError: if the file is missing, truncated, or something else.
        """
        tensors, metadata = read_artefact(path, FORMAT, framework)
        required = [part.name for part in fields(BlockStatistics) if part.default is MISSING]
        optional = [part.name for part in fields(BlockStatistics) if part.default is not MISSING]
        try:
            check_parts(metadata, {"blocks": list, "fingerprint": dict})
            check_parts(metadata["fingerprint"], {"model": dict, "data": dict})
            check_parts(metadata["fingerprint"]["model"], MODEL_PARTS)
            blocks = {
                block: BlockStatistics(
                    **{part: tensors[f"{block}.{part}"] for part in required},
                    **{part: tensors.get(f"{block}.{part}") for part in optional},
                )
                for block in metadata["blocks"]
            }
            statistics = cls(blocks, metadata["fingerprint"])
            _ = statistics.num_tokens, [int(source["num_tokens"]) for source in statistics.sources]  # read later
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise HeaprError(f"statistics={str(path)!r}: is damaged ({reason_of(error)}); calibrate again") from error
        statistics.check(path)
        return statistics

    def check(self, path: str | os.PathLike) -> None:
        """Refuses blocks whose parts do not fit together or are not finite; of matrices, which are most of what there is,
        only the diagonal is read, and the rest where they are used.

        Raises:
            HeaprError: naming the part, and its shape and the shape expected if it is that.
        """
        for block_path, block in self.blocks.items():
            experts, width = (*block.activation_sq_sum.shape, 0, 0)[:2]
            for part in fields(BlockStatistics):
                tensor, name = getattr(block, part.name), part.name.removeprefix("source_")
                expected = (experts,) if name == part.name else (experts, len(self.sources))
                if name not in ("token_count", "output_norm_sum", "removal_ridge", "removal_scale"):
                    expected += (width, width) if "_gram_" in name else (width,)
                if tensor is not None and tuple(tensor.shape) != expected:
                    raise HeaprError(
                        f"statistics={str(path)!r}: {block_path}.{part.name} has shape {tuple(tensor.shape)}, not "
                        f"{expected}; calibrate again"
                    )
                values = tensor.diagonal(0, 1, 2) if tensor is not None and "_gram_" in name else tensor
                if values is not None and not are_finite(values):
                    raise HeaprError(
                        f"statistics={str(path)!r}: {block_path}.{part.name} holds values that are not finite; calibrate again"
                    )
            if block.has_curves and not (np.sort(np.asarray(block.removal_order)) == np.arange(width)).all():
                raise HeaprError(
                    f"statistics={str(path)!r}: {block_path}.removal_order must name each of {width} atomic experts once; "
                    "calibrate again"
                )

    def check_model(self, model: torch.nn.Module, blocks: Iterable[ExpertBlock]) -> None:
        """Refuses statistics of another model.

        Raises:
            HeaprError: if the fingerprints differ; the message names both values.
        """
        from ..fingerprint import check_same_model, model_fingerprint

        check_same_model(self.fingerprint["model"], model_fingerprint(model, list(blocks)), "statistics")
