# Licensed under the Apache License, Version 2.0
"""Configuration of DeepSeekMoE (`model_type: "deepseek"`, e.g. deepseek-ai/deepseek-moe-16b-base).

This file travels with checkpoints and is then loaded with `trust_remote_code=True`: it imports nothing but
transformers.
"""

from transformers.models.llama.configuration_llama import LlamaConfig


class DeepseekConfig(LlamaConfig):
    r"""Configuration of a [`DeepseekModel`]: the Llama architecture with DeepSeekMoE feed-forward blocks.

    The defaults are the values of deepseek-ai/deepseek-moe-16b-base. The fields that are not described here are those
    of [`~transformers.LlamaConfig`]. The keys of the published `config.json` are read as they are: `rope_theta` and
    `rope_scaling` (`{"type": "linear" | "dynamic", "factor": ...}`) end up in `rope_parameters`, `torch_dtype` in
    `dtype`.

    Args:
        intermediate_size (`int`, *optional*, defaults to 10944):
            Width of the dense feed-forward blocks.
        moe_intermediate_size (`int`, *optional*, defaults to 1408):
            Width of one routed expert.
        n_routed_experts (`int`, *optional*, defaults to 64):
            Number of routed experts in an MoE block; `None` makes every block dense. Also named `num_experts`.
        n_shared_experts (`int`, *optional*, defaults to 2):
            Number of shared experts, which run for every token and are stored as one feed-forward block of width
            `n_shared_experts * moe_intermediate_size`; `None` or 0 for none.
        num_experts_per_tok (`int`, *optional*, defaults to 6):
            Number of routed experts that each token is sent to.
        first_k_dense_replace (`int`, *optional*, defaults to 1):
            Number of dense blocks before the first MoE block.
        moe_layer_freq (`int`, *optional*, defaults to 1):
            After those, the layers whose index is a multiple of this have an MoE block; the others are dense.
        norm_topk_prob (`bool`, *optional*, defaults to `False`):
            Whether the router weights of a token's experts are scaled to sum to 1.
        scoring_func (`str`, *optional*, defaults to `"softmax"`):
            How router logits become scores. Only `"softmax"` exists in this architecture.
        aux_loss_alpha (`float`, *optional*, defaults to 0.001):
            Weight of the load-balancing loss of the original pre-training. Kept for the round trip only: the model
            does not compute that loss.
        seq_aux (`bool`, *optional*, defaults to `True`):
            Whether that loss was taken per sequence. Kept for the round trip only.
    """

    model_type = "deepseek"
    attribute_map = {"num_experts": "n_routed_experts"}

    # Llama's plan shards the dense blocks only, which would leave the experts whole on every rank without saying so.
    base_model_tp_plan = None
    base_model_ep_plan = None

    supported_scoring_funcs = ("softmax",)

    # Called once an instance exists; the package sets it to register the model classes no earlier than that.
    _on_use = None

    vocab_size: int = 102400
    hidden_size: int = 2048
    intermediate_size: int = 10944
    num_hidden_layers: int = 28
    num_attention_heads: int = 16
    num_key_value_heads: int | None = 16
    max_position_embeddings: int = 4096
    bos_token_id: int | None = 100000
    eos_token_id: int | list[int] | None = 100001

    moe_intermediate_size: int = 1408
    n_routed_experts: int | None = 64
    n_shared_experts: int | None = 2
    num_experts_per_tok: int | None = 6
    first_k_dense_replace: int = 1
    moe_layer_freq: int = 1
    norm_topk_prob: bool = False
    scoring_func: str = "softmax"
    aux_loss_alpha: int | float = 0.001
    seq_aux: bool = True

    def __post_init__(self, **kwargs) -> None:
        super().__post_init__(**kwargs)
        # transformers runs these checks for classes decorated with huggingface_hub's `strict`. That decorator wraps
        # every error in a type that is no `ValueError`, so they are called here instead.
        self.validate_architecture()
        self.validate_rope()
        if self._on_use is not None:
            type(self)._on_use(type(self))

    def is_moe_layer(self, layer_idx: int) -> bool:
        """Whether decoder layer `layer_idx` has an MoE block; a dense one otherwise."""
        return (
            self.n_routed_experts is not None
            and layer_idx >= self.first_k_dense_replace
            and layer_idx % self.moe_layer_freq == 0
        )

    def validate_architecture(self) -> None:
        """Raise a `ValueError` for values that this architecture cannot take."""
        super().validate_architecture()
        if self.scoring_func not in self.supported_scoring_funcs:
            raise ValueError(
                f"scoring_func={self.scoring_func!r} is not supported by the `deepseek` architecture. "
                f"Allowed: {', '.join(map(repr, self.supported_scoring_funcs))}."
            )
        if self.moe_layer_freq < 1:
            raise ValueError(f"moe_layer_freq={self.moe_layer_freq} must be at least 1 (1: every layer).")
        if self.n_routed_experts is not None:
            top_k = self.num_experts_per_tok
            if top_k is None or not 1 <= top_k <= self.n_routed_experts:
                raise ValueError(
                    f"num_experts_per_tok={top_k} must lie between 1 and n_routed_experts={self.n_routed_experts}."
                )


__all__ = ["DeepseekConfig"]
