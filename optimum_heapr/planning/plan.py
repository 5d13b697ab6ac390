# Licensed under the Apache License, Version 2.0
"""`PruningPlan`: which atomic experts of which expert stay, as data that can be looked at before anything is cut."""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from ..configuration import HeaprConfig
from ..utils.artefacts import read_artefact, write_artefact
from ..utils.companions import PLAN_NAME, own_file
from ..utils.errors import HeaprError, reason_of
from ..utils.public import public_data
from ..utils.values import TensorValue
from .alignment import warn_of_stock_widths
from .document import NEWER, check_document, check_dropped, check_layout


if TYPE_CHECKING:
    import torch

    from ..calibration.statistics import AtomicStatistics


FORMAT = "heapr_plan"


@dataclass(eq=False, repr=False)
class PruningPlan(TensorValue):
    """
    Attributes:
        kept (`dict[str, list[torch.Tensor]]`): by block path, for each expert the kept indices, ascending, int64.
        original_width (`dict[str, int]`): atomic experts of one expert before, by block path.
        config (`HeaprConfig`): what was asked for.
        model (`dict`): fingerprint of the model that the statistics were measured on.
        loss_increase (`dict[str, float]`): estimated increase of the loss by block path, nats a token.
        unreached (`dict[str, list[int]]`): experts that no calibration token reached, by block path.
        compensation (`dict[str, list[tuple[float, float]]]`): by block path, for each expert the relative squared error of
            its output on the calibration tokens, without and with compensation, or with the scope `block` that of the
            routed output of the block, for each the same; empty until it is applied with it.
        reconstruction (`dict[str, dict]`): by path of a block that was trained, what that rests on, as
            [`~optimum_heapr.surgery.reconstruction.reconstruct_block`] returns it.
        data (`dict`): fingerprint of the calibration text, if there was any.
        tokens (`dict[str, list[int]]`): calibration tokens that each expert got, by block path.
        storage (`dict`): bytes of the model's weights, and of one atomic expert, in the dtype of the calibration, and under
            `routing` what `optimum_heapr.sizing.describe_routing` says.
        importance (`dict`): histogram of the scores; see [`~optimum_heapr.planning.distribution.importance_distribution`].
        search (`list[dict]`): for `max_loss_increase`, each `ratio` that was measured on the way, the `increase` of the loss in
            nats a token, and its standard `error`.
        dropped (`dict[str, list[int]]`): experts that go from the router, by block path, ascending, of each block as many. They
            keep nothing; an expert that keeps nothing and is not among them stays in the router, and gives nothing.
        rectangles (`list[dict]`): for `num_experts="auto"`, what it was chosen from: `experts` of a layer, their `width`, and the
            estimated `increase` of the loss, nats a token.
        sources (`list[dict]`): of a mixture, what each source loses: its `name`, and the estimated `increase` of the loss without
            compensation, nats a token.
    """

    kept: dict[str, list[torch.Tensor]]
    original_width: dict[str, int]
    config: HeaprConfig
    model: dict[str, Any]
    loss_increase: dict[str, float]
    unreached: dict[str, list[int]]
    compensation: dict[str, list[tuple[float, float]]] = field(default_factory=dict)
    reconstruction: dict[str, dict[str, float | str | None]] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    tokens: dict[str, list[int]] = field(default_factory=dict)
    storage: dict[str, int] = field(default_factory=dict)
    importance: dict[str, Any] = field(default_factory=dict)
    search: list[dict[str, float]] = field(default_factory=list)
    dropped: dict[str, list[int]] = field(default_factory=dict)
    rectangles: list[dict[str, float]] = field(default_factory=list)
    sources: list[dict[str, Any]] = field(default_factory=list)

    def _summary(self) -> dict[str, str]:
        widths = [width for experts in self.routed_widths.values() for width in experts]
        gone = f", {sum(map(len, self.dropped.values()))} experts go from the router" if self.dropped else ""
        return {
            "model": str(self.model.get("model_type")),
            "removed": f"{self.removed:,} of {self.total:,} atomic experts ({self.ratio:.2%}){gone}",
            "widths": f"{min(widths)} to {max(widths)}",
            "ranked by": f"{self.config.criterion}, layout {self.config.layout}",
            "estimate": f"loss +{self.estimated_loss_increase:.5f} nats a token",
        }

    @classmethod
    def build(cls, statistics: AtomicStatistics, config: HeaprConfig) -> PruningPlan:
        """Ranks, allocates and estimates. Deterministic: equal inputs give equal plans.

        Raises:
            HeaprError: if the statistics are not finite or the ratio, or the target, cannot be reached; see
                [`~optimum_heapr.planning.allocation.allocate`].
        """
        from .building import build_plan  # the criteria and torch are for making a plan, not for looking at one

        return build_plan(statistics, config)

    @property
    def widths(self) -> dict[str, list[int]]:
        """Kept atomic experts of each expert, by block path."""
        return {path: [len(indices) for indices in experts] for path, experts in self.kept.items()}

    @property
    def routed(self) -> dict[str, list[int]]:
        """Experts that stay in the router, by block path, ascending: their places are their numbers in the pruned model."""
        gone = {path: set(self.dropped.get(path, ())) for path in self.kept}
        return {
            path: [expert for expert in range(len(experts)) if expert not in gone[path]]
            for path, experts in self.kept.items()
        }

    @property
    def routed_widths(self) -> dict[str, list[int]]:
        """Kept atomic experts of each expert that stays in the router, by block path."""
        widths = self.widths
        return {path: [widths[path][expert] for expert in experts] for path, experts in self.routed.items()}

    @property
    def routed_tokens(self) -> dict[str, list[int]]:
        """Calibration tokens that each expert got that stays in the router, by block path."""
        routed = self.routed
        return {path: [counts[expert] for expert in routed[path]] for path, counts in self.tokens.items()}

    @property
    def made_up_for(self) -> dict[str, list[tuple[float, float]]]:
        """Of `compensation` what there was to make up for, by path of each block that lost something: the errors of experts that lost
        some but not all of their atomic experts, or with the scope `block`, where others make up for whole ones, of all that lost any."""
        together, widths = self.config.compensates_blocks, self.widths
        found = {
            path: [
                pair
                for pair, width in zip(pairs, widths[path])
                if width < self.original_width[path] and (width or together)
            ]
            for path, pairs in self.compensation.items()
        }
        return {path: pairs for path, pairs in found.items() if pairs}

    def forget_fits(self) -> None:
        """Drops what an earlier application left in `compensation` and `reconstruction`: another may do less."""
        self.compensation, self.reconstruction = {}, {}

    @property
    def total(self) -> int:
        """Routed atomic experts of the unpruned model."""
        return sum(len(experts) * self.original_width[path] for path, experts in self.kept.items())

    @property
    def removed(self) -> int:
        """Routed atomic experts that go."""
        return self.total - sum(map(sum, self.widths.values()))

    @property
    def ratio(self) -> float:
        """Share of the routed atomic experts that goes: what was reached of what `config` asks for."""
        return self.removed / self.total

    @property
    def parameter_ratio(self) -> float:
        """Share of all parameters of the model that goes."""
        gone = self.removed * self.model["parameters_per_atomic_expert"]
        if self.dropped:
            gone += len(next(iter(self.dropped.values()))) * self.storage["routing"]["parameters"]
        return gone / self.model["num_parameters"]

    @property
    def estimated_loss_increase(self) -> float:
        """Sum over blocks of the second-order estimate, nats a token; see
        [`~optimum_heapr.planning.estimate.estimated_loss_increase`].

        It adds up blocks as if each were pruned alone, and knows nothing of experts that no token reached.
        """
        return sum(self.loss_increase.values())

    def warn_of_widths(self) -> None:
        """Says so where the layout stores widths that transformers does not run as it does by default."""
        each = self.model["parameters_per_atomic_expert"]
        itemsize = self.storage.get("bytes_per_atomic_expert", 2 * each) // each
        warn_of_stock_widths(self.config, sum(self.widths.values(), []), list(self.original_width.values()), itemsize)

    def public(self) -> PruningPlan:
        """A copy that names no place on this machine, for the folder of a model. Such a text is not found to be read again."""
        return replace(self, config=self.config.public(), data=public_data(self.data))

    def save(self, path: str | os.PathLike) -> None:
        """Writes one safetensors file, whole or not at all."""
        import torch

        tensors = {}
        for block, experts in self.kept.items():
            tensors[f"{block}.widths"] = torch.tensor([len(indices) for indices in experts], dtype=torch.int32)
            tensors[f"{block}.kept_indices"] = torch.cat(experts).to(torch.int32)
        document = {
            "blocks": list(self.kept),
            "original_width": self.original_width,
            "config": self.config.to_dict(),
            "model": self.model,
            "loss_increase": self.loss_increase,
            "unreached": self.unreached,
            "search": self.search,
            "rectangles": self.rectangles,
            "sources": self.sources,
            **{name: getattr(self, name) for name in NEWER},
        }
        write_artefact(path, FORMAT, tensors, document)

    @classmethod
    def load(cls, path: str | os.PathLike, framework: str = "pt") -> PruningPlan:
        """Reads what [`save`] wrote and checks that it fits together.

        Args:
            path (`str`): a file, or the folder of a pruned model.
            framework (`str`): `np` for NumPy arrays in place of tensors: enough to look at, and torch is not imported for it.

        Raises:
            HeaprError: if the file is missing, truncated, something else, or its indices do not fit its widths.
        """
        path = own_file(path, PLAN_NAME) if os.path.isdir(path) else path
        tensors, document = read_artefact(path, FORMAT, framework)
        try:
            check_document(document)
            kept = {}
            for block in document["blocks"]:
                indices, widths = tensors[f"{block}.kept_indices"], tensors[f"{block}.widths"].tolist()
                if min(widths) < 0 or sum(widths) != len(indices):
                    raise ValueError(f"{block} has {len(indices)} kept indices, and its widths ask for {sum(widths)}")
                indices = indices.long() if framework == "pt" else indices
                kept[block] = [indices[end - width : end] for width, end in zip(widths, accumulate(widths))]
            try:
                config = HeaprConfig.from_artefact(document["config"])
            except HeaprError as error:
                raise HeaprError(f"plan={str(path)!r}: its options are damaged ({error}); plan again") from error
            plan = cls(
                kept=kept,
                original_width=document["original_width"],
                config=config,
                model=document["model"],
                loss_increase=document["loss_increase"],
                unreached=document["unreached"],
                search=document.get("search", []),
                rectangles=document.get("rectangles", []),
                sources=document.get("sources", []),
                **{name: document.get(name, {}) for name in NEWER},
            )
            plan.check()
        except HeaprError:
            raise
        except (LookupError, RuntimeError, TypeError, ValueError, AttributeError) as error:
            raise HeaprError(
                f"plan={str(path)!r}: its parts do not fit together ({reason_of(error)}); plan again"
            ) from error
        return plan

    def check(self) -> None:
        """Refuses indices outside the width, out of order or twice, and experts that go from the router and are not empty.

        Raises:
            HeaprError: naming block, expert and the allowed range.
        """
        check_layout(self.dropped, self.config.layout)
        check_dropped(self.dropped, self.kept, self.storage)
        for path, experts in self.kept.items():
            width = self.original_width[path]
            for expert, indices in enumerate(experts):
                rising = bool((indices[1:] > indices[:-1]).all())
                if len(indices) and not (rising and 0 <= int(indices[0]) and int(indices[-1]) < width):
                    raise HeaprError(
                        f"plan: indices of expert {expert} of {path} must rise within [0, {width}); plan again"
                    )

    def check_shapes(self, shapes: dict[str, tuple[int, int]]) -> None:
        """Refuses a model whose expert blocks are not those of the plan.

        Args:
            shapes (`dict[str, tuple[int, int]]`): experts and width of each block of the model, by path.

        Raises:
            HeaprError: naming the block and both shapes.
        """
        check_layout(self.dropped, self.config.layout)  # which may be another one since the plan was read
        for path in [*shapes, *self.kept]:
            planned = (len(self.kept[path]), self.original_width[path]) if path in self.kept else None
            if planned != shapes.get(path):
                raise HeaprError(
                    f"plan: {path} has (experts, width) {planned} in the plan and {shapes.get(path)} in the model; "
                    "plan from statistics of this model"
                )
