# Licensed under the Apache License, Version 2.0
"""A model, text and artefacts on disk, and the command line run inside this process: a new one costs seconds."""

import json
import signal
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from optimum_heapr.utils.companions import CARD_NAME, CONFIG_NAME, FOLDER, OWN_NAMES
from optimum_heapr.utils.manifest import MANIFEST
from tests.helpers import SENTENCES, random_ids, tiny_model, tiny_tokenizer


# Enough tokens for no warning about coverage: tests of errors want the error to be the only line.
CALIBRATION_FLAGS = ("--num-samples", "9", "--seq-length", "24")


class Result(NamedTuple):
    status: int
    output: str
    error: str


class Inputs(NamedTuple):
    """What commands read. Tests that would change one make a copy."""

    model: Path
    text: Path
    tokens: Path  # rows of `input_ids`
    statistics: Path
    plan: Path
    pruned: Path

    @property
    def calibration(self) -> list[str]:
        """Flags of a quick calibration."""
        return ["--dataset", str(self.text), *CALIBRATION_FLAGS]


def listing(folder: Path) -> dict[str, bytes | None]:
    """Everything below a folder, hidden files too: contents of files, `None` for folders."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


def weights_and_settings(folder: Path) -> dict[str, bytes | None]:
    """A saved model without the artefacts beside it, and without what was measured: that takes time, which differs."""
    others = {f"{FOLDER}/{name}" for name in OWN_NAMES if name != CONFIG_NAME} | {CARD_NAME, MANIFEST}
    return {name: content for name, content in listing(folder).items() if name not in others}


@pytest.fixture(scope="session", autouse=True)
def no_progress_bars():
    """As in a process of its own, where the command line switches them off before the libraries are imported."""
    import datasets
    from transformers.utils import logging

    logging.disable_progress_bar()
    datasets.disable_progress_bars()
    yield
    logging.enable_progress_bar()
    datasets.enable_progress_bars()


@pytest.fixture
def run(capsys, monkeypatch):
    """Runs `optimum-cli heapr …` here."""
    from optimum.commands.optimum_cli import main

    def run(*arguments) -> Result:
        monkeypatch.setattr(sys, "argv", ["optimum-cli", "heapr", *map(str, arguments)])
        monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # set by the commands; undone with the test
        monkeypatch.setenv("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
        monkeypatch.setenv("TQDM_DISABLE", "1")
        capsys.readouterr()
        try:
            main()
            status = 0
        except SystemExit as exit:
            status = exit.code or 0
        except KeyboardInterrupt:  # or it would end the test run
            status = -signal.SIGINT
        return Result(status, *capsys.readouterr())

    return run


@pytest.fixture(scope="session")
def inputs(tmp_path_factory) -> Inputs:
    from optimum_heapr import HeaprConfig, HeaprPruner

    folder = tmp_path_factory.mktemp("inputs")
    names = ("model", "text.jsonl", "tokens.jsonl", "statistics.safetensors", "plan.safetensors", "pruned")
    made = Inputs(*(folder / name for name in names))
    model = tiny_model("qwen3_moe")
    model.generation_config.temperature, model.generation_config.do_sample = 0.5, True
    model.save_pretrained(made.model)
    tiny_tokenizer(made.model)
    made.text.write_text("".join(json.dumps({"text": text}) + "\n" for text in SENTENCES * 3))
    made.tokens.write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in random_ids(9, 24).tolist()))
    config = HeaprConfig(ratio=0.25, dataset=str(made.text), num_samples=9, seq_length=24)
    pruner = HeaprPruner.from_pretrained(made.model, config)
    pruner.calibrate().save(made.statistics)
    pruner.prune()
    pruner.applied_plan.save(made.plan)
    pruner.save_pretrained(made.pruned)
    return made
