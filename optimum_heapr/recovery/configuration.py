# Licensed under the Apache License, Version 2.0
"""`RecoveryConfig`: every choice of a recovery run in one flat, validated dataclass.

As with `HeaprConfig`, a recipe is one written as YAML or JSON, and the flags of the command line are made from its fields.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..utils.errors import HeaprError, did_you_mean
from ..utils.options import Options, option


CONFIG_NAME = "recovery_config.json"

TARGETS = ("attention", "experts", "router", "all")

REPORTERS = {"trackio": ("trackio",), "wandb": ("wandb",), "tensorboard": ("tensorboard", "tensorboardX")}
"""Where the losses of a training can be reported to, and the packages that do it, of which one is enough."""


@dataclass(repr=False)
class RecoveryConfig(Options):
    """
    What is trained, on which text, against which loss, and for how long.

    Args:
        targets (`str`, *optional*, defaults to `"all"`):
            What is trained: `attention` (LoRA on the linear layers: attention, shared experts and dense layers),
            `experts` (LoRA on the routed experts), `router` (the routers and the norms, whole), or `all` of these.
        rank (`int`, *optional*, defaults to 16):
            Rank of the LoRA updates.
        alpha (`float`, *optional*):
            Scale of the LoRA updates, which count `alpha / rank`; by default `2 * rank`.
        dropout (`float`, *optional*, defaults to 0.0):
            Dropout in front of the LoRA updates; PEFT has none for parameters, so it needs the targets `attention`.
        cross_entropy_weight (`float`, *optional*, defaults to 1.0):
            Weight of the next-token cross-entropy.
        distillation_weight (`float`, *optional*, defaults to 0.0):
            Weight of the divergence from the teacher, the unpruned model; above 0 a teacher is needed.
        temperature (`float`, *optional*, defaults to 1.0):
            What the logits of teacher and student are divided by in the divergence.
        top_k_logits (`int`, *optional*, defaults to 64):
            The likeliest tokens of the teacher that are kept; all others count as one.
        cache_teacher (`bool`, *optional*, defaults to `False`):
            Write these to the disk once, before the training, so that only one model is in memory at a time.
        learning_rate (`float`, *optional*, defaults to 1e-4):
            Largest learning rate of AdamW; it rises over the first 5 % of the steps and falls as a cosine to 0.
        max_steps (`int`, *optional*, defaults to 300):
            Optimizer steps.
        batch_size (`int`, *optional*, defaults to 16):
            Samples in a step, over all processes.
        micro_batch_size (`int`, *optional*, defaults to 1):
            Samples that a process computes at once; gradients are accumulated until the batch is complete.
        weight_interpolation (`float`, *optional*, defaults to 1.0):
            Share of the update that is kept: the result lies that far on the straight line from the weights of the pruned
            model to the trained ones. Below 1 it loses less on text of another kind than the training text (WiSE-FT,
            arXiv 2109.01903).
        held_out (`float`, *optional*, defaults to 0.1):
            Share of the samples, of documents of their own, that is not trained on: their loss decides what is kept.
        eval_steps (`int`, *optional*, defaults to 50):
            Steps between two measurements of the loss that is held out.
        patience (`int`, *optional*, defaults to 3):
            Measurements without an improvement after which the training stops.
        bf16 (`bool`, *optional*, defaults to `False`):
            Compute in bfloat16 (autocast).
        gradient_checkpointing (`bool`, *optional*, defaults to `False`):
            Compute each layer twice and keep less for the backward.
        report_to (`str`, *optional*):
            Report the losses while the training runs, through the `Trainer`: `trackio`, `wandb` or `tensorboard`.
        dataset (`str`, *optional*):
            Training text: a local file or folder, the name of a dataset on the Hub, `wikitext2`, or a mixture with weights,
            as for calibration.
        dataset_config (`str`, *optional*):
            Configuration of a dataset on the Hub.
        split (`str`, *optional*, defaults to `"train"`):
            Split of the dataset.
        text_column (`str`, *optional*, defaults to `"text"`):
            Column that holds the text.
        packing (`bool`, *optional*, defaults to `True`):
            Join documents and cut them into samples of equal length; if off, a document is a sample.
        num_samples (`int`, *optional*, defaults to 1024):
            Samples, those held out included.
        seq_length (`int`, *optional*, defaults to 2048):
            Tokens in a sample.
        seed (`int`, *optional*, defaults to 0):
            Seed of the choice and order of samples and of the initial adapter.

    Raises:
        HeaprError: if a value is out of its range; the message names the value and what is allowed.
    """

    targets: str = option("all", "what is trained", TARGETS)
    rank: int = option(16, "rank of the LoRA updates")
    alpha: float | None = option(None, "scale of the LoRA updates, by default twice the rank")
    dropout: float = option(0.0, "dropout in front of the LoRA updates; for the targets attention")
    cross_entropy_weight: float = option(1.0, "weight of the next-token cross-entropy")
    distillation_weight: float = option(0.0, "weight of the divergence from the unpruned model; needs a teacher")
    temperature: float = option(1.0, "temperature of teacher and student in the divergence")
    top_k_logits: int = option(64, "likeliest tokens of the teacher that are kept; the others count as one")
    cache_teacher: bool = option(False, "write the teacher's logits to the disk first: one model in memory at a time")
    learning_rate: float = option(1e-4, "largest learning rate; it warms up and falls as a cosine")
    max_steps: int = option(300, "optimizer steps")
    batch_size: int = option(16, "samples in a step, over all processes")
    micro_batch_size: int = option(1, "samples that a process computes at once")
    weight_interpolation: float = option(1.0, "share of the update that is kept; below 1 is safer on other text")
    held_out: float = option(0.1, "share of the samples that is measured and not trained on")
    eval_steps: int = option(50, "steps between two measurements")
    patience: int = option(3, "measurements without an improvement before the training stops")
    bf16: bool = option(False, "compute in bfloat16")
    gradient_checkpointing: bool = option(False, "compute each layer twice and keep less")
    report_to: str | None = option(
        None, f"report the losses while the training runs: {', '.join(REPORTERS)} (default: nowhere)"
    )
    dataset: str | None = option(
        None, "training text: a file or folder, a dataset on the Hub, wikitext2, or a mixture"
    )
    dataset_config: str | None = option(None, "configuration of a dataset on the Hub")
    split: str = option("train", "split of the dataset")
    text_column: str = option("text", "column that holds the text")
    packing: bool = option(True, "join documents into samples of equal length; if off, a document is a sample")
    num_samples: int = option(1024, "samples, those held out included")
    seq_length: int = option(2048, "tokens in a sample")
    seed: int = option(0, "seed of the samples, their order and the initial adapter")

    NEEDS = {
        **dict.fromkeys(("rank", "alpha"), {"targets": ("attention", "experts", "all")}),  # LoRA's
        **dict.fromkeys(("temperature", "top_k_logits", "cache_teacher"), {"distillation_weight": ()}),
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("rank", "top_k_logits", "max_steps", "batch_size", "micro_batch_size", "eval_steps", "patience"):
            self.check_least(name, 1)
        for name, least in (("num_samples", 2), ("seq_length", 2), ("seed", 0)):
            self.check_least(name, least)
        for name in ("cross_entropy_weight", "distillation_weight"):
            self.check_least(name, 0)
        for name in ("learning_rate", "temperature", "alpha"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise HeaprError(f"{name}={value}: must be above 0; leave it out for the default")
        if not 0 < self.weight_interpolation <= 1:
            raise HeaprError(
                f"weight_interpolation={self.weight_interpolation}: must lie in (0, 1]; 1 keeps the whole update, 0.75 three "
                "quarters of it"
            )
        for name, low in (("held_out", "(0, 1)"), ("dropout", "[0, 1)")):
            value = getattr(self, name)
            if not 0 <= value < 1 or (low[0] == "(" and value == 0):
                raise HeaprError(f"{name}={value}: must lie in {low}")
        if self.report_to is not None and self.report_to not in REPORTERS:
            hint = did_you_mean(self.report_to, REPORTERS)
            raise HeaprError(f"report_to={self.report_to!r}: must be one of {', '.join(REPORTERS)}{hint}")
        if self.seed >= 2**32:
            raise HeaprError(f"seed={self.seed}: must be below 2**32; name a smaller one")
        if self.cross_entropy_weight == self.distillation_weight == 0:
            raise HeaprError(
                "distillation_weight=0.0: cross_entropy_weight is 0 as well, so no loss is left; raise one"
            )
        if self.batch_size % self.micro_batch_size:
            raise HeaprError(
                f"micro_batch_size={self.micro_batch_size}: must divide batch_size={self.batch_size}, the samples of a step"
            )
        if self.dropout and self.targets != "attention":
            raise HeaprError(
                f"dropout={self.dropout}: PEFT has no dropout for LoRA on parameters, such as packed experts; use 0, or "
                "targets='attention'"
            )

    @property
    def distills(self) -> bool:
        """Whether a teacher is needed."""
        return self.distillation_weight > 0
