# Licensed under the Apache License, Version 2.0
"""Samples that are longer than a model has positions for are warned of, where they are calibrated or evaluated on."""

import logging

import datasets
import pytest

from optimum_heapr import HeaprConfig, HeaprPruner
from optimum_heapr.evaluation.perplexity import evaluate_perplexity
from tests.helpers import random_ids, tiny_model


WARNING = "samples have up to 24 tokens, and the model has positions for 16"


@pytest.mark.parametrize("positions", [16, 24])
def test_samples_longer_than_the_model_has_positions_for(positions, heapr_log):
    heapr_log.set_level(logging.WARNING)
    rows = datasets.Dataset.from_dict({"input_ids": random_ids(2, 24).tolist()})
    model = tiny_model("qwen3_moe", max_position_embeddings=positions)
    evaluate_perplexity(model, None, rows)
    evaluate_perplexity(model, None, rows)  # as after something was done to it: that is said once
    assert heapr_log.text.count(WARNING) == (positions == 16)
    heapr_log.clear()
    model = tiny_model("qwen3_moe", max_position_embeddings=positions)
    HeaprPruner(model, config=HeaprConfig(num_samples=2, seq_length=24)).calibrate(rows)
    assert (WARNING in heapr_log.text) == (positions == 16)
