# Licensed under the Apache License, Version 2.0
"""What a run does once it says once: no bar or warning comes twice because something is looked at before it is done."""

import shutil

import pytest
from safetensors.torch import load_file, save_file

from optimum_heapr.calibration import processes
from optimum_heapr.criteria import obs
from optimum_heapr.utils import logging


@pytest.fixture
def bars(monkeypatch):
    """Which bars there are, of this package and of transformers, whether somebody sees them or not."""
    from transformers import core_model_loading
    from transformers.utils import logging as of_transformers

    found = []

    def seen(bar):
        def shown(*arguments, **options):
            if of_transformers.is_progress_bar_enabled() or bar is logging.progress:
                found.append(options.get("desc"))
            return bar(*arguments, **options)

        return shown

    for module in (obs, processes):
        monkeypatch.setattr(module, "progress", seen(logging.progress))
    monkeypatch.setattr(core_model_loading, "tqdm", seen(core_model_loading.tqdm))
    of_transformers.enable_progress_bar()
    yield found
    of_transformers.disable_progress_bar()


def test_weights_are_loaded_and_curves_ordered_once(inputs, run, bars):
    flags = ["--criterion", "obs", "--max-loss-increase", 0.5, "--eval-samples", 4, "--dry-run"]
    result = run("prune", "-m", inputs.model, *inputs.calibration, *flags)
    assert result.status == 0 and result.output.count("removed ") > 3, result.error
    assert bars.count("Ordering") == 1 and bars.count("Loading weights") == 1


def test_a_warning_about_the_checkpoint_comes_once(inputs, run, tmp_path):
    model = shutil.copytree(inputs.model, tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    save_file(
        {**tensors, "stray.weight": tensors["lm_head.weight"][:1].clone()},
        model / "model.safetensors",
        {"format": "pt"},
    )
    result = run("calibrate", "-m", model, *inputs.calibration, "-o", tmp_path / "statistics.safetensors")
    assert result.status == 0 and result.error.count("stray.weight") == 1, result.error
