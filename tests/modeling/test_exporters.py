# Licensed under the Apache License, Version 2.0
"""Programs of pruned models in other runtimes, which know ordinary operations alone: ONNX Runtime and ExecuTorch.

Skipped where these are not installed; `tests/modeling/run_exporters.sh` makes an environment that has them.
"""

import importlib.util

import pytest
import torch

from optimum_heapr.surgery.linear import to_linear_experts
from tests.helpers import random_ids, tiny_model
from tests.modeling.test_compiled import tiny_pruned


if not all(importlib.util.find_spec(name) for name in ("onnxruntime", "executorch")):
    pytest.skip("no exporters here; tests/modeling/run_exporters.sh makes an environment", allow_module_level=True)

IDS = random_ids(2, 16)


class Logits(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids):
        return self.model(input_ids=input_ids, use_cache=False).logits


def stock(model_type):
    model = tiny_model(model_type, num_hidden_layers=1)
    model.set_experts_implementation("batched_mm")
    return model


FORMS = {
    "qwen3_moe, linear": lambda: to_linear_experts(tiny_pruned("qwen3_moe", (0, 7), num_hidden_layers=1)),
    "deepseek, linear": lambda: to_linear_experts(tiny_pruned("deepseek", num_hidden_layers=2)),
    "qwen3_moe, uniform": lambda: stock("qwen3_moe"),
}


@pytest.fixture(params=FORMS)
def model(request):
    return Logits(FORMS[request.param]()).eval()


@torch.no_grad()
def test_onnx_runtime_gives_the_same_for_texts_of_any_length(model, tmp_path):
    import onnxruntime

    sizes = {0: torch.export.Dim("batch", min=1, max=8), 1: torch.export.Dim("length", min=2, max=64)}
    program = torch.onnx.export(model, (IDS,), dynamo=True, dynamic_shapes=(sizes,), input_names=["input_ids"])
    program.save(tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    for ids in (IDS, IDS[:1, :9]):
        [found] = session.run(None, {"input_ids": ids.numpy()})
        torch.testing.assert_close(torch.from_numpy(found), model(ids), atol=1e-4, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("backend", ["portable", "xnnpack"])
def test_executorch_gives_the_same_for_texts_of_any_length(model, backend, tmp_path):
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import EdgeCompileConfig, to_edge_transform_and_lower
    from executorch.runtime import Runtime

    program = torch.export.export(model, (IDS,), dynamic_shapes=({1: torch.export.Dim("length", min=2, max=64)},))
    partitioner = [XnnpackPartitioner()] if backend == "xnnpack" else []
    unchecked = EdgeCompileConfig(_check_ir_validity=False)  # findings/executorch_fixes_sizes_of_what_is_split.sh
    lowered = to_edge_transform_and_lower(program, partitioner=partitioner, compile_config=unchecked).to_executorch()
    (tmp_path / "model.pte").write_bytes(lowered.buffer)
    method = Runtime.get().load_program(tmp_path / "model.pte").load_method("forward")
    for ids in (IDS, IDS[:, :9].contiguous()):
        [found] = method.execute([ids])
        torch.testing.assert_close(found, model(ids), atol=1e-4, rtol=1e-4)
