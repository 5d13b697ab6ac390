# Licensed under the Apache License, Version 2.0
"""DeepSeekMoE (`model_type: "deepseek"`, e.g. deepseek-ai/deepseek-moe-16b-base) on transformers' own building blocks.

The architecture (https://arxiv.org/abs/2401.06066) is Llama's, with the feed-forward block of most layers replaced by

    y = sum over the top-k routed experts i of  g_i E_i(x)  +  E_shared(x),    g = softmax(W_gate x)

transformers has Llama, and has DeepSeek-V2 and later, but not this model. The code published with its checkpoints
cannot stand in: it predates transformers 5, runs its experts under `no_grad` in eval mode and adds the gradient of a
balancing loss in train mode. Here the experts sit behind transformers' experts interface, so that
`experts_implementation` and everything else that builds on the interface work, and gradients are those of the loss
alone in either mode.

Importing this module registers how checkpoints map onto it: on disk each expert has its own `gate_proj`, `up_proj` and
`down_proj`, in memory the experts of a layer share two tensors. Saving writes the checkpoint's own keys back.

This file travels with checkpoints and is then loaded with `trust_remote_code=True`: besides torch and transformers it
imports only the configuration file next to it.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.integrations import use_experts_implementation
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaDecoderLayer,
    LlamaForCausalLM,
    LlamaModel,
    LlamaPreTrainedModel,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
)
from transformers.utils import logging

from .configuration_deepseek import DeepseekConfig


logger = logging.get_logger(__name__)


class DeepseekMLP(nn.Module):
    """Gated feed-forward block `[..., hidden] -> [..., hidden]`: that of a dense layer, or the shared experts."""

    def __init__(self, config: DeepseekConfig, intermediate_size: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, config.hidden_size, bias=False)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(hidden_states)) * self.up_proj(hidden_states))


@use_experts_implementation
class DeepseekExperts(nn.Module):
    """The routed experts of one layer, `E` of width `I`.

    `gate_up_proj [E, 2I, hidden]` holds each expert's gate rows, then its up rows; `down_proj` is `[E, hidden, I]`.
    The decorator chooses the forward by `config._experts_implementation`; the one below is `"eager"`.
    """

    def __init__(self, config: DeepseekConfig) -> None:
        super().__init__()
        self.num_experts = config.n_routed_experts
        self.hidden_dim = config.hidden_size
        self.intermediate_dim = config.moe_intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(self.num_experts, 2 * self.intermediate_dim, self.hidden_dim))
        self.down_proj = nn.Parameter(torch.empty(self.num_experts, self.hidden_dim, self.intermediate_dim))
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """`hidden_states [tokens, hidden]`, the other two `[tokens, top_k]` -> `[tokens, hidden]`."""
        output = torch.zeros_like(hidden_states)
        # Unbinding once, rather than indexing per expert, keeps the backward linear in the number of experts: the
        # gradient of an index is a zero tensor of the full size, and there would be one for every expert.
        gate_up_projs, down_projs = self.gate_up_proj.unbind(), self.down_proj.unbind()
        for expert in range(self.num_experts):
            token_idx, slot_idx = torch.where(top_k_index == expert)
            if token_idx.numel() == 0:
                continue
            activation = self._apply_gate(F.linear(hidden_states[token_idx], gate_up_projs[expert]))
            expert_output = F.linear(activation, down_projs[expert]) * top_k_weights[token_idx, slot_idx, None]
            output.index_add_(0, token_idx, expert_output.to(output.dtype))
        return output


class DeepseekTopKRouter(nn.Module):
    """The gate of an MoE block, `weight [E, hidden]`."""

    def __init__(self, config: DeepseekConfig) -> None:
        super().__init__()
        self.top_k = config.num_experts_per_tok
        self.norm_topk_prob = config.norm_topk_prob
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, config.hidden_size))

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """`[tokens, hidden]` -> logits `[tokens, E]`, weights and indices of the top-k experts `[tokens, top_k]`."""
        router_logits = F.linear(hidden_states, self.weight)
        # In the dtype of the model, as the published code does it. (transformers' later DeepSeek gates use float32.)
        scores = router_logits.softmax(dim=-1)
        top_k_weights, top_k_index = torch.topk(scores, k=self.top_k, dim=-1, sorted=False)
        if self.top_k > 1 and self.norm_topk_prob:
            top_k_weights = top_k_weights / (top_k_weights.sum(dim=-1, keepdim=True) + 1e-20)
        return router_logits, top_k_weights, top_k_index


class DeepseekMoE(nn.Module):
    """Routed experts, plus shared experts if the configuration has any: `[batch, sequence, hidden]` to the same."""

    def __init__(self, config: DeepseekConfig) -> None:
        super().__init__()
        self.experts = DeepseekExperts(config)
        self.gate = DeepseekTopKRouter(config)
        self.shared_experts = None
        if config.n_shared_experts:
            self.shared_experts = DeepseekMLP(config, config.moe_intermediate_size * config.n_shared_experts)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        tokens = hidden_states.reshape(-1, hidden_states.shape[-1])
        _, top_k_weights, top_k_index = self.gate(tokens)
        output = self.experts(tokens, top_k_index, top_k_weights).view_as(hidden_states)
        if self.shared_experts is not None:
            output = output + self.shared_experts(hidden_states)
        return output


class DeepseekDecoderLayer(LlamaDecoderLayer):
    """Llama's decoder layer with either kind of feed-forward block. The forward is Llama's."""

    def __init__(self, config: DeepseekConfig, layer_idx: int) -> None:
        # Not LlamaDecoderLayer.__init__, which would allocate a dense block in every layer.
        GradientCheckpointingLayer.__init__(self)
        self.hidden_size = config.hidden_size
        self.self_attn = LlamaAttention(config=config, layer_idx=layer_idx)
        self.mlp = (
            DeepseekMoE(config) if config.is_moe_layer(layer_idx) else DeepseekMLP(config, config.intermediate_size)
        )
        self.input_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)


class DeepseekPreTrainedModel(LlamaPreTrainedModel):
    config: DeepseekConfig
    _no_split_modules = ["DeepseekDecoderLayer"]
    _can_record_outputs = {"hidden_states": DeepseekDecoderLayer, "attentions": LlamaAttention}

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, DeepseekExperts):
            init.normal_(module.gate_up_proj, mean=0.0, std=self.config.initializer_range)
            init.normal_(module.down_proj, mean=0.0, std=self.config.initializer_range)
        elif isinstance(module, DeepseekTopKRouter):
            # As published: the default of `nn.Linear`, not `initializer_range`.
            init.kaiming_uniform_(module.weight, a=math.sqrt(5))

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        # transformers looks for "@use_experts_implementation" in the source of the module that defines `cls`, which
        # would miss subclasses defined elsewhere.
        return True


class DeepseekModel(DeepseekPreTrainedModel, LlamaModel):
    """The decoder without a head. The forward is Llama's."""

    def __init__(self, config: DeepseekConfig) -> None:
        # A value set on the configuration after it was made (a keyword argument of `from_pretrained`, say) has not
        # been checked yet.
        config.validate_architecture()
        # Not LlamaModel.__init__, which would first build a dense Llama of the same size.
        PreTrainedModel.__init__(self, config)
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.layers = nn.ModuleList([DeepseekDecoderLayer(config, i) for i in range(config.num_hidden_layers)])
        self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = LlamaRotaryEmbedding(config=config)
        self.gradient_checkpointing = False
        self.post_init()


class DeepseekForCausalLM(DeepseekPreTrainedModel, LlamaForCausalLM):
    """The decoder with a language-modelling head. The forward is Llama's."""

    def __init__(self, config: DeepseekConfig) -> None:
        # Not LlamaForCausalLM.__init__, which would build a LlamaModel, and that refuses `experts_implementation`.
        PreTrainedModel.__init__(self, config)
        self.model = DeepseekModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()


def _register_checkpoint_conversion() -> None:
    """Tell transformers how checkpoints of this model map onto the modules above, and back.

    The keys (`mlp.experts.{i}.gate_proj.weight`, ...) are those of Qwen2-MoE and of DeepSeek-V2 and later, for which
    transformers has the conversion; classes from outside transformers are converted only on registration. This module
    may be imported several times under different names (from a package and from checkpoints), so registering the same
    conversion again is fine, while a different one is someone else's and stays.
    """
    model_type = DeepseekConfig.model_type
    conversion = get_checkpoint_conversion_mapping("qwen2_moe")
    present = get_checkpoint_conversion_mapping(model_type)
    if present is not None and _patterns(present) != _patterns(conversion):
        logger.warning(
            f"A checkpoint conversion for model_type '{model_type}' is registered already and differs from the one "
            f"that {__name__} needs. It is left in place: DeepSeekMoE checkpoints may miss expert weights when loaded."
        )
        return
    register_checkpoint_conversion_mapping(model_type, conversion, overwrite=True)


def _patterns(conversion: list) -> list[tuple[list[str], list[str]]]:
    return [(transform.source_patterns, transform.target_patterns) for transform in conversion]


_register_checkpoint_conversion()


__all__ = ["DeepseekForCausalLM", "DeepseekModel", "DeepseekPreTrainedModel"]
