# Licensed under the Apache License, Version 2.0
"""Pruned models, made from the model class of the unpruned family.

`HeaprQwen3MoeForCausalLM` is `transformers.Qwen3MoeForCausalLM` with its experts replaced by `AtomicExperts`; any other
family works the same way, so the classes are made when they are first asked for.
This file travels with pruned checkpoints.
"""

from functools import cache

import torch
import transformers
from torch import nn
from transformers import initialization
from transformers.modeling_layers import (
    GenericForQuestionAnswering,
    GenericForSequenceClassification,
    GenericForTokenClassification,
)
from transformers.models.auto import modeling_auto

from .adapters import adapters_of_another_form, warn_of_experts
from .atomic_experts import AtomicExperts
from .configuration_heapr import PREFIX, pruned_config_class
from .conversion import expert_names, register_conversions
from .linear_experts import LinearExperts
from .unquantized import warn_of_unquantized_experts


# Tried in this order for the auto class that a family belongs to.
AUTO_CLASSES = {
    "AutoModelForCausalLM": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING,
    "AutoModelForImageTextToText": modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
}

# What else its checkpoints can be loaded as, where the family has it.
OTHER_AUTO_CLASSES = {
    "AutoModel": modeling_auto.MODEL_MAPPING,
    "AutoModelForSequenceClassification": modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    "AutoModelForTokenClassification": modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING,
    "AutoModelForQuestionAnswering": modeling_auto.MODEL_FOR_QUESTION_ANSWERING_MAPPING,
}


_BODY_BY_AUTO_MODEL = (
    GenericForQuestionAnswering,
    GenericForSequenceClassification,
    GenericForTokenClassification,
)


class PrunedModelMixin:
    """Puts `AtomicExperts` of the widths in the configuration where the stock experts were."""

    def __init__(self, config, *args, **kwargs):
        if isinstance(self, _BODY_BY_AUTO_MODEL) and type(config) is not self.config_class:
            # transformers keeps two copies of code that came with a checkpoint, of which only one was registered.
            register_classes(type(config))
        super().__init__(config, *args, **kwargs)
        if isinstance(getattr(self, self.base_model_prefix, None), PrunedModelMixin):
            return  # the body of a classifier was made by `AutoModel`
        if config.experts_as not in ("packed", "linear"):
            raise ValueError(f"experts_as={config.experts_as!r}: must be 'packed' or 'linear'")
        for path, widths in (config.expert_widths or {}).items():
            path, stock = self._stock_experts(path, widths)
            experts = AtomicExperts(stock, widths)
            if experts.down_proj.device.type != "meta":
                self._init_weights(experts)
            if config.experts_as == "linear":
                if stock.has_bias:
                    raise ValueError("experts_as='linear': experts of this family have biases, which stay packed")
                experts = LinearExperts(experts, expert_names(config.model_type))
                # Quantizers leave these as they are, and most stumble over weights without elements.
                empty = {f"{path}.{expert}" for expert, width in enumerate(widths) if not width}
                self._keep_in_fp32_modules = empty.union(self._keep_in_fp32_modules or ())
            self.set_submodule(path, experts)
        self._register_conversions()

    @classmethod
    def from_pretrained(cls, *args, output_loading_info: bool = False, **kwargs):
        """As always; refuses packed tensors for experts that are linear layers, and quantized checkpoints of which experts are not
        read, which would be left as random ones; says what a quantizer has passed over."""
        model, info = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        missing = sorted(name for name in info["missing_keys"] if ".experts." in name)
        if missing and model.config.experts_as == "linear":
            raise ValueError(
                "experts_as='linear': this checkpoint stores the experts of a layer together, or lacks some; load it with "
                "experts_as='packed' and save it without save_original_format=False"
            )
        if missing and getattr(model.config, "quantization_config", None):
            raise ValueError(
                f"{missing[0]} and {len(missing) - 1} more were not read: transformers reads weights one by one where a quantizer of "
                'this kind was at work, and packed experts are several; quantize the model loaded with experts_as="linear"'
            )
        warn_of_unquantized_experts(model)
        return (model, info) if output_loading_info else model

    def __setattr__(self, name, value):
        """As always; PEFT leaves `peft_config` on a model once its layers are in."""
        super().__setattr__(name, value)
        if name == "peft_config":
            warn_of_experts(self, value)

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing, unexpected, errors):
        """As always; PEFT reads an adapter so, and asks for no complaint of what the model does not have."""
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing, unexpected, errors)
        if hasattr(self, "peft_config"):
            names = (name.removeprefix(prefix) for name in state_dict if name.startswith(prefix))
            errors += adapters_of_another_form(self, names)

    def load_adapter(self, *args, **kwargs):
        """As always; refuses an adapter of experts in the other form."""
        info = super().load_adapter(*args, **kwargs)
        for reason in adapters_of_another_form(self, getattr(info, "unexpected_keys", ())):
            raise ValueError(reason)
        return info

    def _register_conversions(self) -> None:
        """Lets transformers know how this model is read and written: it looks for that by model type, of which others may be in the
        other form."""
        for experts in self.modules():
            if isinstance(experts, (AtomicExperts, LinearExperts)):
                packed = experts if isinstance(experts, AtomicExperts) else experts.packed
                register_conversions(
                    self.config.model_type, not packed.is_concatenated, packed.has_bias, packed is experts
                )
                return

    def _stock_experts(self, path: str, widths: list[int]) -> tuple[str, nn.Module]:
        """The experts that those of these widths replace, and their path in this model; refuses what the configuration made up."""
        head, _, rest = path.partition(".")
        if head == self.base_model_prefix and not hasattr(self, head):
            path = rest  # this is the model without its head
        try:
            stock = self.get_submodule(path)
            experts, width = len(stock.down_proj), stock.down_proj.shape[1 if stock.is_transposed else 2]
        except AttributeError as error:
            raise ValueError(
                f"expert_widths in config.json names {path!r}, where this model has no experts; copy the checkpoint again"
            ) from error
        fits = isinstance(widths, list) and len(widths) == experts
        if not fits or not all(isinstance(one, int) and 0 <= one <= width for one in widths):
            raise ValueError(
                f"expert_widths in config.json gives {path!r} {str(widths)[:60]}, and not {experts} widths from 0 to {width}; copy "
                "the checkpoint again"
            )
        return path, stock

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        if isinstance(module, AtomicExperts):
            for parameter in module.parameters(recurse=False):
                initialization.normal_(parameter, 0.0, getattr(self.config, "initializer_range", 0.02))
        else:
            super()._init_weights(module)

    def save_pretrained(self, *args, **kwargs):
        """As always; the configuration also names the other classes that the checkpoint can be loaded as."""
        base_config = _unpruned(self.config_class)
        module = type(self).__module__.rpartition(".")[2]
        names = {name: f"{module}.{PREFIX}{base.__name__}" for name, base in family_classes(base_config).items()}
        self.config.auto_map = {**names, **(getattr(self.config, "auto_map", None) or {})}
        self._register_conversions()
        if not _turn_round(getattr(self, "_weight_conversions", None) or ()):
            del self._weight_conversions  # it was read in 4 bits and dequantized, say: it is written as any other then
        return super().save_pretrained(*args, **kwargs)

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        return True


def _turn_round(conversions) -> bool:
    """Whether all that was done to weights when they were read can be undone when they are written."""
    try:
        return all(operation.reverse_op for one in conversions for operation in getattr(one, "operations", ()))
    except NotImplementedError:
        return False


def pruned_model_class(
    base: type, config_class: type | None = None, module: str = __name__, auto_class: str | None = None
) -> type:
    """The class of pruned models of a family.

    Args:
        base (`type`): model class of the unpruned model, with a head.
        config_class (`type`, *optional*): pruned configuration class; made from the base's by default.
        module (`str`): module that the class can be imported from, by the name `Heapr` + name of the base.
        auto_class (`str`, *optional*): what its checkpoints are loaded with; found from the base by default.
    """
    pruned_config = config_class or pruned_config_class(base.config_class)
    if auto_class is None:
        fitting = [name for name, model_class in family_classes(base.config_class).items() if model_class is base]
        auto_class = fitting[0] if fitting else auto_class_name(base.config_class)
    return _pruned_model_class(base, pruned_config, module, auto_class)


@cache  # whoever asks gets the same class, or pickle would refuse its instances
def _pruned_model_class(base: type, pruned_config: type, module: str, auto_class: str) -> type:
    class PrunedModel(PrunedModelMixin, base):
        config_class = pruned_config

    if issubclass(base, GenericForQuestionAnswering):
        # Some families call the body of this one class otherwise, so that it would find no weight in their checkpoints.
        PrunedModel.base_model_prefix = modeling_auto.MODEL_MAPPING[base.config_class].base_model_prefix
    PrunedModel.__name__ = PrunedModel.__qualname__ = PREFIX + base.__name__
    PrunedModel.__module__ = module
    PrunedModel.register_for_auto_class(auto_class)
    return PrunedModel


def auto_class_name(base_config: type) -> str:
    """Name of the auto class that a family's models are loaded with."""
    for name, mapping in AUTO_CLASSES.items():
        if base_config in mapping:
            return name
    raise ValueError(f"{base_config.__name__}: belongs to none of {', '.join(AUTO_CLASSES)}")


def family_classes(base_config: type) -> dict[str, type]:
    """Model classes of a family by the names of their auto classes: first that with the head of language models."""
    first = auto_class_name(base_config)
    mappings = {first: AUTO_CLASSES[first], **OTHER_AUTO_CLASSES}
    found = {name: mapping[base_config] for name, mapping in mappings.items() if base_config in mapping}
    return {name: of_family for name, of_family in found.items() if isinstance(of_family, type)}


def register_classes(pruned_config: type) -> dict[str, type]:
    """Makes the pruned classes of a family, registers each with its auto class, and returns them by its name."""
    made = {
        name: pruned_model_class(base, pruned_config, auto_class=name)
        for name, base in family_classes(_unpruned(pruned_config)).items()
    }
    for name, model_class in made.items():
        getattr(transformers, name).register(pruned_config, model_class, exist_ok=True)
    return made


def _unpruned(pruned_config: type) -> type:
    """The configuration class that a pruned one was made from."""
    return next(base for base in pruned_config.__mro__[1:] if hasattr(base, "model_type"))


def __getattr__(name: str) -> type:
    if name.startswith(PREFIX) and hasattr(transformers, name.removeprefix(PREFIX)):
        base = getattr(transformers, name.removeprefix(PREFIX))
        pruned_config = pruned_config_class(base.config_class)
        # All of them: the body of a classifier is made by `AutoModel`.
        made = {model_class.__name__: model_class for model_class in register_classes(pruned_config).values()}
        return made.get(name) or pruned_model_class(base)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
