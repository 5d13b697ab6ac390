# Licensed under the Apache License, Version 2.0
"""What a calibration computes and reads, by formula, from the shapes of a model that may be without storage.

Operations are those of matrix products, two for each multiplication and addition. What a matrix of a layer costs follows from
its number of parameters: each is used once by every token, those of routed experts by the tokens that are routed there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..experts import experts_per_token, find_expert_blocks, model_name
from ..layerwise.decoder import Decoder
from ..text.mixtures import parse_sources
from ..utils.errors import HeaprError


if TYPE_CHECKING:
    import torch

    from ..configuration import HeaprConfig


MODES = ("plain", "offload", "streaming")


@dataclass(frozen=True)
class LayerWork:
    """One decoder layer.

    Attributes:
        num_bytes (`int`): its weights.
        matrices (`int`): operations of a token with its matrices, forward; routed experts as many as a token has.
        down (`int`): of these, those of the down projections of routed experts; 0 for a layer without.
        attention (`int`): operations of a token with the keys and values of its sample, forward, each token with all of
            them: kernels that leave out what is masked do about half.
    """

    num_bytes: int
    matrices: int
    down: int
    attention: int


@dataclass(frozen=True)
class CalibrationWork:
    """What one calibration takes, whatever runs it.

    Attributes:
        layers (`list[LayerWork]`): first to last.
        rest_bytes (`int`): weights outside of the layers: embeddings, norms, head.
        head (`int`): operations of a token with the head, forward.
        tokens, micro_batches (`int`): of all samples.
        statistics_bytes (`int`): three float32 sums an atomic expert; a norm and a count (eight bytes) an expert; of a mixture, for
            each source and for all of them.
        matrix_bytes (`int`): two float32 matrices an expert, where `obs` or compensation within experts asks for them.
    """

    layers: list[LayerWork]
    rest_bytes: int
    head: int
    tokens: int
    micro_batches: int
    statistics_bytes: int
    matrix_bytes: int

    @classmethod
    def of(cls, model: torch.nn.Module, config: HeaprConfig) -> CalibrationWork:
        """Reads the shapes of a model.

        Args:
            model (`PreTrainedModel`): with or without storage.
            config (`HeaprConfig`): `num_samples`, `seq_length` and `batch_size` are used; samples are taken to be full.

        Raises:
            HeaprError: if the experts are not in one list of layers, or the configuration does not say how many a token has.
        """
        blocks, top_k = find_expert_blocks(model), experts_per_token(model)
        if top_k is None:
            raise HeaprError(
                f"model={model_name(model)!r}: its configuration does not say how many experts a token has"
            )
        decoder = Decoder(model, blocks)
        layers = []
        for index, layer in enumerate(decoder.layers):
            inside = decoder.blocks_of(index)
            routed = {id(part) for block in inside for part in block.module.parameters()}
            dense = sum(part.numel() for part in layer.parameters() if part.dim() > 1 and id(part) not in routed)
            experts = [top_k * block.hidden_size * block.width for block in inside]
            layers.append(
                LayerWork(
                    num_bytes=sum(part.numel() * part.element_size() for part in layer.parameters()),
                    matrices=2 * (dense + 3 * sum(experts)),
                    down=2 * sum(experts),
                    attention=_attention(model, index, config.seq_length),
                )
            )
        head, sources = model.get_output_embeddings(), len(parse_sources(config.dataset or "text"))
        copies = 1 if sources == 1 else sources + 1
        total = sum(part.numel() * part.element_size() for part in model.parameters())
        return cls(
            layers=layers,
            rest_bytes=total - sum(layer.num_bytes for layer in layers),
            head=0 if head is None else 2 * head.weight.numel(),
            tokens=config.num_samples * config.seq_length,
            micro_batches=-(-config.num_samples // config.batch_size),
            statistics_bytes=copies * sum(block.num_experts * (3 * 4 * block.width + 4 + 8) for block in blocks),
            matrix_bytes=sum(block.num_experts * 2 * 4 * block.width**2 for block in blocks),
        )

    @property
    def _first(self) -> int:
        """The first layer with routed experts: no gradient goes below it."""
        return next(index for index, layer in enumerate(self.layers) if layer.down)

    def flops(self, mode: str) -> int:
        """Operations of forward and backward of all samples.

        The backward has gradients of activations only: as much as the forward for a matrix, 5/2 of it for attention, whose
        kernels compute the weights again. It ends at h of the first experts, where only their down projection lies behind.
        `offload` and `streaming` compute each layer from there on a second time for the backward.

        Args:
            mode (`str`): `plain`, `offload` or `streaming`.
        """
        behind = self.layers[self._first :]
        forward = self.head + sum(layer.matrices + layer.attention for layer in self.layers)
        backward = self.head + behind[0].down
        backward += sum(layer.matrices + layer.attention * 5 // 2 for layer in behind[1:])
        again = 0 if mode == "plain" else sum(layer.matrices + layer.attention for layer in behind)
        return self.tokens * (forward + backward + again)

    def bytes_read(self, mode: str) -> int:
        """Weights that are brought to where they compute.

        All once (`plain`); each layer in every micro-batch, and once more for the backward (`offload`, where no layer has
        room to stay); or all twice, and once the layers below the first experts (`streaming`).

        Args:
            mode (`str`): `plain`, `offload` or `streaming`.
        """
        below = sum(layer.num_bytes for layer in self.layers[: self._first])
        behind = sum(layer.num_bytes for layer in self.layers[self._first :])
        if mode == "offload":
            return self.micro_batches * (below + 2 * behind) + self.rest_bytes
        return self.rest_bytes + below + behind if mode == "plain" else 2 * (self.rest_bytes + behind) + below


def _attention(model: torch.nn.Module, layer: int, length: int) -> int:
    """Operations of a token with the keys and values of its sample in one layer; none where it is not softmax attention."""
    text = model.config.get_text_config()
    kind = (getattr(text, "layer_types", None) or {layer: "full_attention"})[layer]
    if kind in ("linear_attention", "mamba", "conv"):
        return 0
    if kind == "sliding_attention" and getattr(text, "sliding_window", None):
        length = min(length, text.sliding_window)
    heads = text.num_attention_heads
    of_values = getattr(text, "head_dim", None) or text.hidden_size // heads
    of_keys = getattr(text, "qk_head_dim", None) or of_values
    return 2 * length * heads * (of_keys + (getattr(text, "v_head_dim", None) or of_values))
