# Licensed under the Apache License, Version 2.0
"""Checks a folder before a server starts: every expert is there, as wide as the configuration says."""

from __future__ import annotations

import json
import re
from pathlib import Path

from .errors import ServingError


# A layer's number, then the block of that layer; `shared_experts.` is another block.
_OF_EXPERTS = re.compile(r".*?\.(\d+)\.(?:\w+\.)*?experts\.(.+)")
_PART = re.compile(r"(\d+)\.(\w+)\.(weight|weight_packed)")
# As in older checkpoints of Mixtral and its kin.
_DOWN = ("down_proj", "w2")

AGAIN = "the files do not belong together: copy the checkpoint again, or prune again"


def expert_tensor(name: str) -> tuple[int, str] | None:
    """Layer and rest of the name of a tensor of experts: (0, `3.up_proj.weight`); `None` for others."""
    match = _OF_EXPERTS.fullmatch(name)
    return (int(match[1]), match[2]) if match else None


def widths_by_layer(expert_widths) -> dict[int, list[int]]:
    """Widths of the experts of each layer, from the `expert_widths` of a configuration."""
    try:
        found = {int(re.search(r"\.(\d+)\.", path)[1]): widths for path, widths in expert_widths.items()}
        if not found or not all(type(width) is int and width >= 0 for widths in found.values() for width in widths):
            raise TypeError
    except (AttributeError, TypeError) as error:
        raise ServingError(
            f"expert_widths in config.json is {str(expert_widths)[:60]}, and not a list of widths for each block: the "
            "checkpoint is damaged, or a newer optimum-heapr made it (pip install -U optimum-heapr)"
        ) from error
    return found


def weight_files(folder: Path) -> list[Path]:
    """Files of weights, as the index names them or, without one, as they are called."""
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        return sorted(folder.glob("model*.safetensors"))
    try:
        return [
            folder / name for name in sorted({*json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()})
        ]
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ServingError(
            f"{index} is damaged, or names no files in a weight_map; copy the checkpoint again"
        ) from error


def check_folder(folder: str | Path, expert_widths) -> None:
    """Reads the headers of a local checkpoint; nothing is checked if `folder` is not one.

    Args:
        folder (`str` or `Path`): a folder, or the name of a repository.
        expert_widths (`dict[str, list[int]]`): by path of the expert block, atomic experts of each expert.

    Raises:
        [`ServingError`]: if a file is cut short or missing, an expert is missing, or one is not as wide as it should be.
    """
    widths = widths_by_layer(expert_widths)
    if not Path(folder).is_dir():
        return
    files = weight_files(Path(folder))
    if not files:
        raise ServingError(f"{folder}: no model*.safetensors in it; give the folder of a checkpoint")
    found: dict[int, set[int]] = {layer: set() for layer in widths}
    packed: set[int] = set()
    for file in files:
        for name, shape in _shapes(file).items():
            layer, rest = expert_tensor(name) or (None, "")
            if layer not in widths:
                continue
            match = _PART.fullmatch(rest)
            if match is None:
                packed |= {layer} if rest == "down_proj" else set()
                continue
            expert = int(match[1])
            found[layer].add(expert)
            if match[2] in _DOWN and match[3] == "weight_packed":  # of some columns each: compared when it is loaded
                continue
            width = (shape[1] if match[2] in _DOWN else shape[0]) if len(shape) == 2 else None
            if expert >= len(widths[layer]) or width != widths[layer][expert]:
                expected = widths[layer][expert] if expert < len(widths[layer]) else "no such expert"
                stored = f"of shape {shape}" if width is None else f"{width} wide"
                raise ServingError(f"{file.name}: {name} is {stored}, config.json says {expected}; {AGAIN}")
    for layer in sorted(set(widths) - packed):
        missing = [e for e, width in enumerate(widths[layer]) if width and e not in found[layer]]
        if missing:
            raise ServingError(f"{folder}: expert {missing[0]} of layer {layer} is in none of its files; {AGAIN}")


def _shapes(file: Path) -> dict[str, list[int]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as tensors:
            return {name: tensors.get_slice(name).get_shape() for name in tensors.keys()}
    except FileNotFoundError as error:
        raise ServingError(f"{file} is named in the index and not there; copy the checkpoint again") from error
    except SafetensorError as error:
        raise ServingError(f"{file} cannot be read ({error}); copy the checkpoint again") from error
