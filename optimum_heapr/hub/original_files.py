# Licensed under the Apache License, Version 2.0
"""Which files of a checkpoint go along when it is pruned, and where they are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..utils.companions import CARD_NAME, OWN_NAMES


# Weights in whatever format, and what is packed.
_WEIGHTS = (
    *(".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".onnx_data", ".gguf", ".ggml"),
    *(".npz", ".npy", ".pkl", ".pickle", ".tflite", ".ot", ".zip", ".tar", ".gz"),
)
_CODE = ("configuration_", "modeling_", "modular_")  # tokenizers and processors may come with code of their own
_OTHERS = {CARD_NAME, *OWN_NAMES, "adapter_config.json", "trainer_state.json", "quantize_config.json"}
_FOLDERS = ("additional_chat_templates",)


def _is_carried(name: str) -> bool:
    """Whether a file goes along with the pruned model, by its name: not weights, nor code of the model, nor its card."""
    folder, _, file = name.rpartition("/")
    path = Path(file)
    if folder not in ("", *_FOLDERS) or file.startswith(".") or file in _OTHERS:
        return False
    is_weights = path.suffix in _WEIGHTS or file.endswith(".index.json")
    return not is_weights and not (
        path.suffix == ".py" and not file.startswith(("tokenization_", "processing_", "image_"))
    )


def files_of_folder(folder: Path) -> dict[str, Path]:
    """By name, what goes along of a folder."""
    found = [path for place in ("", *_FOLDERS) for path in sorted((folder / place).glob("*")) if path.is_file()]
    names = {path.relative_to(folder).as_posix(): path for path in found}
    return {name: path for name, path in names.items() if _is_carried(name)}


def files_of_repository(repo_id: str, commit: str, config: Path, hub_options: dict[str, Any]) -> dict[str, Path]:
    """By name, what goes along of a repository; it is downloaded, or without a network found in the cache.

    Args:
        repo_id (`str`): name on the Hub.
        commit (`str`): which state of it.
        config (`Path`): its `config.json` in the cache.
        hub_options (`dict`): `token`, `cache_dir`, `subfolder` that the model was loaded with.
    """
    from huggingface_hub import HfApi, hf_hub_download
    from huggingface_hub.errors import HTTPError

    options = {name: hub_options[name] for name in ("token", "cache_dir") if hub_options.get(name) is not None}
    prefix = f"{hub_options['subfolder']}/" if hub_options.get("subfolder") else ""
    try:
        listed = HfApi(token=options.get("token")).list_repo_files(repo_id, revision=commit)
        names = [name.removeprefix(prefix) for name in listed if name.startswith(prefix)]
        chosen = [name for name in names if _is_carried(name)]
        return {name: Path(hf_hub_download(repo_id, prefix + name, revision=commit, **options)) for name in chosen}
    except (HTTPError, OSError):
        return files_of_folder(config.parent)
