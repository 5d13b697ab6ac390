# Licensed under the Apache License, Version 2.0
"""`HeaprConfig`: every choice of a pruning run in one flat, validated dataclass.

A recipe file is a `HeaprConfig` written as YAML, `heapr_config` in a pruned model's `config.json` is one written as
JSON, and the flags of the command line are made from its fields: there is no second list of options anywhere.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .utils.companions import CONFIG_NAME, saved_config
from .utils.errors import HeaprError
from .utils.files import write_json
from .utils.options import Options, only_one, option
from .utils.sizes import parse_size


CRITERIA = ("heapr", "fisher", "obs", "magnitude", "activation", "reap", "frequency", "random")
REDUCTIONS = ("mean", "total")
REDUCED = ("heapr", "fisher")  # costs a token, which weigh experts as the reduction says
SOURCE_REDUCTIONS = ("mean", "max")
BY_SOURCE = ("heapr", "fisher", "activation", "reap")  # means over tokens, of which each source has its own
STATISTICS = ("auto", "vector", "gram")
COMPENSATION_SCOPES = ("expert", "block")
ALLOCATIONS = ("global", "layer", "uniform")
LAYOUTS = ("variable", "uniform", "padded")
MEMORY = ("auto", "plain", "offload", "streaming")  # where a run has its weights; not part of what it measures
ALIGNMENTS = ("none", "vllm", "gguf", "fp8", "quantization")
GOALS = ("ratio", "target_parameters", "target_size", "max_loss_increase")  # ways to say how much goes: one is taken
DEFAULT_RATIO = 0.25  # where none is


@dataclass(repr=False)
class HeaprConfig(Options):
    """
    How much to prune, what to rank atomic experts by, and which text to calibrate on.

    Args:
        ratio (`float`, *optional*):
            Share of the routed atomic experts that goes, above 0 and below 1; 0.25 if neither it nor a target is given.
        target_parameters (`int`, *optional*):
            In place of `ratio`, parameters that the pruned model may have, all of them counted. What widths cannot hit exactly stays below it.
        target_size (`str` or `int`, *optional*):
            In place of `ratio`, bytes that the weights of the pruned model may take, a number or e.g. `"12GB"` or
            `"11.5GiB"`. Weights count in the dtype that they had in calibration; the headers of the files, and the zeros
            of the layout `padded`, come on top.
        max_loss_increase (`float`, *optional*):
            In place of `ratio`, nats a token that the loss may rise by: as much goes as, measured on text that calibration
            holds out or on `eval_dataset`, costs no more, one standard error included. Needs the model in memory.
        criterion (`str`, *optional*, defaults to `"heapr"`):
            What atomic experts are ranked by, one of `heapr`, `fisher`, `obs`, `magnitude`, `activation`, `random`, or
            `reap` and `frequency`, which rank whole experts. See `docs/source/concepts/criteria.md`.
        reduction (`str`, *optional*, defaults to `"mean"`):
            How `heapr` and `fisher` weigh experts: `mean` over the tokens routed to the expert, as published, or
            `total` over all tokens, so that experts count by how often they are used.
        reduction_over_sources (`str`, *optional*, defaults to `"mean"`):
            Of a mixture, whether criteria of `BY_SOURCE` rank by all of its text, `mean`, or by the worst of its sources, `max`.
        compensate (`bool`, *optional*, defaults to `False`):
            Fold what the removed atomic experts did into the down projections of those that stay, by least squares.
        compensation_scope (`str`, *optional*, defaults to `"expert"`):
            What makes up for a removed atomic expert: those that stay in the same `expert`, or all of the `block`, shared
            experts included, which takes the calibration text once more when the plan is applied.
        ridge (`float`, *optional*, defaults to 0.01):
            Least regularization of `obs` and of compensation, in units of the mean squared activation; experts that few tokens reached get more.
        reconstruction_steps (`int`, *optional*, defaults to 0):
            Steps that what stays of each block is trained for, after compensation over it, on the output of the unpruned
            block; held-out tokens decide how much of that is kept. Needs `compensation_scope="block"`.
        reconstruction_learning_rate (`float`, *optional*, defaults to 0.015):
            Its highest learning rate, in units of the root mean square of each weight.
        allocation (`str`, *optional*, defaults to `"global"`):
            Where the removed atomic experts come from: `global` ranks the whole model, `layer` removes the same share
            of each layer, `uniform` leaves every expert of the model the same width.
        num_experts (`int` or `str`, *optional*):
            With the layout `uniform`, experts that each layer keeps; the others, which cost least, go from its router, and
            at the same size these are wider. `auto` measures which number is best; it needs the scope `block`.
        width_multiple (`int`, *optional*, defaults to 1):
            Widths are multiples of this; the groups of atomic experts are chosen by importance.
        min_width (`int`, *optional*, defaults to 0):
            Atomic experts that every expert keeps at least; 0 lets a whole expert go.
        protect_unreached (`bool`, *optional*, defaults to `False`):
            Keep the experts that no calibration token reached as they are.
        protect (`str` or `list[str]`, *optional*):
            Layers or experts that are kept as they are, by the path of the expert block, with `*` for any part of it and
            numbers of experts after a colon: `"model.layers.0.* model.layers.5.mlp.experts:3,7"`. With the allocation
            `layer`, the share of a layer comes from its other experts, and a layer protected whole gives none.
        layout (`str`, *optional*, defaults to `"variable"`):
            How the pruned experts are stored: `variable` widths, which need this package or `trust_remote_code`, or the
            original architecture with experts of one width, `uniform`, or with experts zero-`padded` to the widest.
        align_for (`str`, *optional*, defaults to `"none"`):
            Whose rule the widths keep: multiples of 32 for `vllm` (experts that are not quantized), of 128 for `fp8` and
            `quantization`, of 256 for `gguf`. With `none`, stock layouts use multiples of 8, for `grouped_mm` in bfloat16.
        tensor_parallel (`int`, *optional*, defaults to 1):
            Ranks that experts will be split over; widths are multiples of the rule times this.
        statistics (`str`, *optional*, defaults to `"auto"`):
            What calibration measures: `vector`, three numbers an atomic expert, or `gram`, also two matrices an expert,
            which `obs` needs, and `compensate` within experts; `auto` is what the other options need.
        dataset (`str`, *optional*):
            Calibration text: a local file or folder, the name of a dataset on the Hub, `wikitext2` for the train split
            of WikiText-2 as in the paper, or a mixture with weights, `"a.jsonl:0.3,org/name[split]:0.7"`.
        dataset_config (`str`, *optional*):
            Configuration of a dataset on the Hub, e.g. `wikitext-2-raw-v1`.
        split (`str`, *optional*, defaults to `"train"`):
            Split of the dataset.
        text_column (`str`, *optional*, defaults to `"text"`):
            Column that holds the text, when the dataset has neither `messages` nor `input_ids`. Without that column, too,
            `prompt` and `completion`, `prompt` and `response`, or `instruction` and `output` are joined.
        packing (`bool`, *optional*, defaults to `True`):
            Join documents and cut them into samples of equal length; if off, a document is a sample, cut off after
            `seq_length` tokens, and its padding is left out of every statistic.
        dataset_streaming (`bool`, *optional*, defaults to `False`):
            Read files and datasets on the Hub only as far as needed; documents are then shuffled in a buffer of 1000.
        num_samples (`int`, *optional*, defaults to 128):
            Calibration samples.
        seq_length (`int`, *optional*, defaults to 2048):
            Tokens in a sample.
        batch_size (`int`, *optional*, defaults to 1):
            Samples in a micro-batch; it changes speed and memory, not the statistics.
        skip_nonfinite (`bool`, *optional*, defaults to `False`):
            Leave out micro-batches whose loss or gradients are not finite, and list their samples, instead of stopping.
        eval_samples (`int`, *optional*, defaults to 16):
            Windows of text that `prune` measures the loss on, before and after, with the speed and a few completions, for
            the report; 0 measures nothing.
        eval_dataset (`str`, *optional*):
            Text for that: as `dataset`, without mixtures, or `wikitext2` or `ptb` for the test split as in the paper. By
            default it is what calibration leaves over of its own text.
        seed (`int`, *optional*, defaults to 0):
            Seed of the choice of samples and of the `random` criterion.

    Raises:
        HeaprError: if a value is out of its range; the message names the value and what is allowed.
    """

    ratio: float | None = option(None, f"share of routed atomic experts to remove (default: {DEFAULT_RATIO})")
    target_parameters: int | None = option(None, "parameters that the pruned model may have; in place of ratio")
    target_size: str | None = option(None, "bytes that its weights may take, e.g. 12GB; in place of ratio")
    max_loss_increase: float | None = option(None, "nats a token the loss may rise by, measured; in place of ratio")
    criterion: str = option("heapr", "what atomic experts are ranked by", CRITERIA)
    reduction: str = option("mean", "heapr, fisher: mean over an expert's tokens, as published, or total", REDUCTIONS)
    reduction_over_sources: str = option("mean", "of a mixture: all text, or the worst source", SOURCE_REDUCTIONS)
    compensate: bool = option(False, "fold what is removed into the down projection of what stays")
    compensation_scope: str = option(
        "expert", "what makes up for it: the same expert, or the whole block, from the text", COMPENSATION_SCOPES
    )
    ridge: float = option(0.01, "least regularization of obs and compensation, relative to mean squared activation")
    reconstruction_steps: int = option(0, "steps of training each block, once it is compensated, on the unpruned one")
    reconstruction_learning_rate: float = option(0.015, "its learning rate, times the root mean square of each weight")
    allocation: str = option("global", "rank the whole model, each layer alone, or one width for all", ALLOCATIONS)
    num_experts: str | None = option(None, "layout uniform: experts kept in each router, wider at one size; or auto")
    width_multiple: int = option(1, "widths are multiples of this, chosen by importance")
    min_width: int = option(0, "atomic experts that every expert keeps at least")
    protect_unreached: bool = option(False, "keep the experts that no calibration token reached as they are")
    protect: str | None = option(
        None, "kept as they are: blocks, 'model.layers.0.*', or experts: 'model.layers.5.*:3'"
    )
    layout: str = option("variable", "variable widths, or the stock architecture: one width, or zero-padded", LAYOUTS)
    align_for: str = option("none", "runtime or tool whose rule widths keep; vllm: experts not quantized", ALIGNMENTS)
    tensor_parallel: int = option(1, "ranks that experts will be split over; widths are multiples for each")
    statistics: str = option("auto", "what calibration measures; gram adds what obs and compensation need", STATISTICS)
    dataset: str | None = option(
        None,
        "calibration text: a file or folder, a dataset on the Hub, wikitext2, or a mixture a.jsonl:0.3,name[split]:0.7",
    )
    dataset_config: str | None = option(None, "configuration of a dataset on the Hub, e.g. wikitext-2-raw-v1")
    split: str = option("train", "split of the dataset")
    text_column: str = option("text", "column that holds the text")
    packing: bool = option(True, "join documents into samples of equal length; if off, a document is a sample")
    dataset_streaming: bool = option(False, "read the dataset only as far as the samples need it")
    num_samples: int = option(128, "calibration samples")
    seq_length: int = option(2048, "tokens in a sample")
    batch_size: int = option(1, "samples in a micro-batch; changes speed and memory, not the statistics")
    skip_nonfinite: bool = option(False, "leave out micro-batches that are not finite instead of stopping")
    eval_samples: int = option(16, "windows of text that prune measures on, before and after; 0 measures nothing")
    eval_dataset: str | None = option(None, "text to measure on (default: what calibration leaves over of its own)")
    seed: int = option(0, "seed of the choice of samples and of the random criterion")

    NEEDS = {"reduction": {"criterion": REDUCED}, "ridge": {"criterion": ("obs",), "compensate": (True,)}}
    NEEDS |= {"reconstruction_learning_rate": {"reconstruction_steps": ()}, "eval_dataset": {"eval_samples": ()}}

    def __post_init__(self) -> None:
        for name in ("target_size", "num_experts"):
            if type(getattr(self, name)) is int:
                setattr(self, name, str(getattr(self, name)))
        if isinstance(self.protect, (list, tuple)) and all(isinstance(pattern, str) for pattern in self.protect):
            self.protect = " ".join(self.protect)
        super().__post_init__()
        if only_one(vars(self), GOALS) is None:
            self.ratio = DEFAULT_RATIO
        if self.ratio is not None and not 0 < self.ratio < 1:  # also false for NaN
            raise HeaprError(f"ratio={self.ratio}: must lie in (0, 1); 0.25 removes a quarter of all atomic experts")
        if self.target_parameters is not None:
            self.check_least("target_parameters", 1)
        if self.target_size is not None:
            parse_size("target_size", self.target_size)
        if self.max_loss_increase is not None:
            self.check_least("max_loss_increase", 1e-6)
            self.check_least("eval_samples", 2)  # windows to measure on, and their spread
        if self.protect is not None and not self.protect.split():
            raise HeaprError(f"protect={self.protect!r}: must name an expert block; leave it out to protect none")
        is_auto = self.num_experts == "auto"
        if not (is_auto or self.num_experts is None or (self.num_experts.isdecimal() and int(self.num_experts))):
            raise HeaprError(f"num_experts={self.num_experts!r}: must be a number, or auto; leave it out for all")
        if is_auto and (self.max_loss_increase is not None or not self.compensates_blocks):
            raise HeaprError("num_experts='auto': needs compensation_scope='block', and no max_loss_increase")
        if self.num_experts is not None and self.layout != "uniform":
            raise HeaprError(f"num_experts={self.num_experts}: needs layout='uniform', not layout={self.layout!r}")
        if self.reduction_over_sources == "max" and self.criterion not in BY_SOURCE:
            raise HeaprError(f"criterion={self.criterion!r}: reduction_over_sources='max' needs one of {BY_SOURCE}")
        if self.compensation_scope == "block" and not self.compensate:
            raise HeaprError("compensation_scope='block': set compensate=True, or leave the scope out")
        if self.reconstruction_steps and not self.compensates_blocks:
            raise HeaprError(
                f"reconstruction_steps={self.reconstruction_steps}: goes on from compensation over blocks; set compensate=True "
                "and compensation_scope='block' too, or leave it out"
            )
        if self.statistics == "vector" and (self.criterion == "obs" or self.compensates_experts):
            raise HeaprError(
                f"statistics='vector': criterion={self.criterion!r} with compensate={self.compensate} needs 'gram'; "
                "leave statistics at 'auto'"
            )
        self.check_least("seq_length", 2)
        for name in ("width_multiple", "num_samples", "batch_size", "tensor_parallel"):
            self.check_least(name, 1)
        for name in ("ridge", "min_width", "seed", "eval_samples", "reconstruction_steps"):
            self.check_least(name, 0)
        self.check_least("reconstruction_learning_rate", 0)
        if self.seed >= 2**32:
            raise HeaprError(f"seed={self.seed}: must be below 2**32, what random generators take; name a smaller one")
        if self.layout == "uniform":  # the stock architecture has one width
            if self.allocation == "layer":
                raise HeaprError("allocation='layer': layout='uniform' needs allocation='uniform'")
            self.allocation = "uniform"

    @classmethod
    def changed(cls, values: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
        """`values` with `changes` on top: how much goes, if that is changed, is what the change says, in whichever way.

        Raises:
            HeaprError: if the change says it in two ways.
        """
        if only_one(changes, GOALS) is not None:
            values = {name: value for name, value in values.items() if name not in GOALS}
        return super().changed(values, changes)

    @classmethod
    def from_artefact(cls, values: dict[str, Any]) -> HeaprConfig:
        """Reads what a plan or a pruned model holds: those of earlier versions have the ratio reached beside a target.

        Raises:
            HeaprError: as [`~HeaprConfig.from_dict`].
        """
        if isinstance(values, dict) and any(values.get(name) is not None for name in GOALS if name != "ratio"):
            values = {**values, "ratio": None}
        return cls.from_dict(values)

    @property
    def goal(self) -> tuple[str, Any]:
        """The option that says how much goes, and its value: one of `GOALS`."""
        name = only_one(vars(self), GOALS)
        return name, getattr(self, name)

    @property
    def needs_grams(self) -> bool:
        """Whether calibration has to measure the second-order statistics."""
        return self.statistics == "gram" or (
            self.statistics == "auto" and (self.criterion == "obs" or self.compensates_experts)
        )

    @property
    def compensates_experts(self) -> bool:
        """Whether each expert is compensated alone, which needs the second-order statistics when a plan is applied."""
        return self.compensate and self.compensation_scope == "expert"

    @property
    def compensates_blocks(self) -> bool:
        """Whether all experts of a block are compensated together, which needs the calibration text when a plan is applied."""
        return self.compensate and self.compensation_scope == "block"

    @classmethod
    def from_pretrained(cls, model: str | os.PathLike, **hub_options: Any) -> HeaprConfig:
        """Reads back the config that made a pruned model.

        Args:
            model (`str`): a folder, or the name of a repository on the Hub.
            hub_options: passed to `AutoConfig.from_pretrained`, e.g. `revision`, `token`.

        Raises:
            HeaprError: if the model cannot be found or was not pruned by this package.
        """
        return cls.from_artefact(saved_config(model, **hub_options))

    def save_pretrained(self, folder: str | os.PathLike) -> Path:
        """Writes `heapr_config.json` into `folder` and returns its path."""
        path = Path(folder) / CONFIG_NAME
        write_json(path, self.to_dict())
        return path
