# Licensed under the Apache License, Version 2.0
"""Perplexity of a model against a plain loop over windows."""

import math
import statistics

import datasets
import pytest
import torch
import torch.nn.functional as F

from optimum_heapr.evaluation.perplexity import evaluate_perplexity
from optimum_heapr.utils.errors import HeaprError
from tests.helpers import SENTENCES, random_samples, tiny_model, tiny_tokenizer


TEXTS = datasets.Dataset.from_dict({"text": list(SENTENCES)})


def plain_loop(model, windows):
    """Loss of each window, its first token given, summed; and the predicted tokens."""
    losses, counts = [], []
    for window in windows:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([window])).logits[0]
        losses.append(
            sum(-F.log_softmax(logits[i].double(), -1)[window[i + 1]].item() for i in range(len(window) - 1))
        )
        counts.append(len(window) - 1)
    return losses, counts


def windows_of(tokenizer, seq_length, texts=SENTENCES):
    """All texts in their order, each closed by the end token, cut into windows."""
    stream = [token for text in texts for token in [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]]
    cut = [stream[start : start + seq_length] for start in range(0, len(stream), seq_length)]
    return [window for window in cut if len(window) >= 2]


@pytest.mark.parametrize(("seq_length", "num_samples"), [(16, None), (16, 3), (50, None), (1000, None)])
def test_perplexity_is_that_of_a_plain_loop(seq_length, num_samples):
    model, tokenizer = tiny_model(), tiny_tokenizer()
    losses, counts = plain_loop(model, windows_of(tokenizer, seq_length)[:num_samples])
    result = evaluate_perplexity(model, tokenizer, TEXTS, seq_length=seq_length, num_samples=num_samples)
    assert result["num_tokens"] == sum(counts)
    assert math.isclose(result["loss"], sum(losses) / sum(counts), rel_tol=1e-5)
    assert math.isclose(result["perplexity"], math.exp(sum(losses) / sum(counts)), rel_tol=1e-4)
    assert (result["loss_standard_error"] > 0) == (len(counts) > 1)


def test_long_windows_are_computed_in_parts():
    """More than 1024 predicted tokens: the softmax goes through in parts."""
    model = tiny_model(max_position_embeddings=2048)
    ids = random_samples(1500)[0].tolist()
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids])).logits[0, :-1]
    expected = F.cross_entropy(logits, torch.tensor(ids[1:])).item()
    result = evaluate_perplexity(model, None, datasets.Dataset.from_dict({"input_ids": [ids]}))
    assert result["num_tokens"] == 1499 and math.isclose(result["loss"], expected, rel_tol=1e-5)


def test_rows_of_token_ids_are_windows_and_cut_to_the_length():
    model, rows = tiny_model("qwen2_moe"), [sample.tolist() for sample in random_samples(9, 40, 1, 2)]
    losses, counts = plain_loop(model, [rows[0], rows[1][:20], rows[3]])
    data = datasets.Dataset.from_dict({"input_ids": rows})
    result = evaluate_perplexity(model, None, data, seq_length=20)
    assert result["num_tokens"] == sum(counts) == 8 + 19 + 1
    assert math.isclose(result["loss"], sum(losses) / sum(counts), rel_tol=1e-5)
    ratios = [loss - result["loss"] * count for loss, count in zip(losses, counts)]
    error = math.sqrt(sum(ratio**2 for ratio in ratios) / 2 * 3) / sum(counts)
    assert math.isclose(result["loss_standard_error"], error, rel_tol=1e-4)


def test_a_dense_model_will_do_too():
    result = evaluate_perplexity(tiny_model("llama"), tiny_tokenizer(), TEXTS, seq_length=32)
    assert result["perplexity"] > 1


def test_a_file_is_read(tmp_path):
    (tmp_path / "eval.jsonl").write_text("".join(f'{{"text": "{text}"}}\n' for text in ("a b c", "d e f")))
    model, tokenizer = tiny_model(), tiny_tokenizer()
    losses, counts = plain_loop(model, windows_of(tokenizer, 2048, ("a b c", "d e f")))
    result = evaluate_perplexity(model, tokenizer, str(tmp_path / "eval.jsonl"))
    assert result["num_tokens"] == counts[0] and math.isclose(result["loss"], losses[0] / counts[0], rel_tol=1e-5)
    assert statistics.fmean(losses) > 0


def modes(model):
    return [module.training for module in model.modules()]


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_evaluated_without_dropout_and_comes_back_as_it_was(fails):
    model = tiny_model("qwen2_moe", attention_dropout=0.5)
    expected = evaluate_perplexity(model, tiny_tokenizer(), TEXTS, seq_length=32)
    model.train()
    model.model.layers[1].eval()
    before = modes(model)
    if fails:
        with torch.no_grad():
            model.lm_head.weight[:] = torch.nan
        with pytest.raises(
            HeaprError, match=r"loss=nan: not finite in window 0 of 'Dataset'; load the model in bfloat16"
        ):
            evaluate_perplexity(model, tiny_tokenizer(), TEXTS, seq_length=32)
    else:
        assert evaluate_perplexity(model, tiny_tokenizer(), TEXTS, seq_length=32) == expected
    assert modes(model) == before
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())


def refused(match, data, tokenizer=None, **options):
    with pytest.raises(HeaprError, match=match):
        evaluate_perplexity(tiny_model(), tokenizer, data, **options)


def test_bad_data_are_refused(tmp_path):
    refused("seq_length=1: must be at least 2", TEXTS, tiny_tokenizer(), seq_length=1)
    for number in (0, -1):
        match = f"num_samples={number}: must be at least 1; leave it out for all windows"
        refused(match, TEXTS, tiny_tokenizer(), num_samples=number)
    refused("holds text but the model has no tokenizer", TEXTS)
    refused("holds less than two tokens", datasets.Dataset.from_dict({"input_ids": [[1], [2]]}))
    refused("holds less than two tokens", datasets.Dataset.from_dict({"text": ["", ""]}), tiny_tokenizer())
    refused("text_column='body': 'Dataset' has columns text; name one", TEXTS, tiny_tokenizer(), text_column="body")
    refused("no such file or folder", str(tmp_path / "missing.jsonl"), tiny_tokenizer())
