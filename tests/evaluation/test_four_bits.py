# Licensed under the Apache License, Version 2.0
"""Layers in 4 bits that a kernel would stop at; with bitsandbytes itself in `tests/surgery/test_quantizers.py`."""

import pytest
import torch
from torch import nn

from optimum_heapr.evaluation.perplexity import evaluation_mode


class Linear4bit(nn.Linear):
    """What is read of bitsandbytes' layer, on a CPU with AVX512-BF16."""

    support_avx512bf16_for_cpu = True

    def __init__(self, rows, columns, device="cpu"):
        super().__init__(columns, rows, device=device)
        self.weight.blocksize = 64


def test_a_layer_goes_without_the_kernel_that_stops_at_its_shape_until_the_end(heapr_log):
    layers = {shape: Linear4bit(*shape) for shape in [(32, 64), (64, 128), (48, 64), (64, 96), (48, 64, "meta")]}
    model = nn.Sequential(*layers.values(), nn.Linear(2, 2))
    with pytest.raises(ZeroDivisionError), evaluation_mode(model):
        used = {shape for shape, layer in layers.items() if layer.support_avx512bf16_for_cpu}
        1 / 0
    assert used == layers.keys() - {(48, 64), (64, 96)}
    assert all(layer.support_avx512bf16_for_cpu for layer in layers.values())
    (record,) = heapr_log.records
    assert "2 layers in 4 bits have shapes" in record.getMessage() and "width_multiple=64" in record.getMessage()


def test_of_other_models_nothing_is_said(heapr_log):
    with evaluation_mode(nn.Sequential(nn.Linear(3, 5), Linear4bit(32, 64))), torch.no_grad():
        assert not heapr_log.records
