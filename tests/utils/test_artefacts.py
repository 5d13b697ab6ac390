# Licensed under the Apache License, Version 2.0
"""Statistics, plans and states say what they are, and of files they alone are replaced."""

import pytest
import torch
from safetensors.torch import save_file

from optimum_heapr.utils.artefacts import artefact_format, check_output_artefact, read_artefact, write_artefact
from optimum_heapr.utils.errors import HeaprError


def test_an_artefact_says_what_it_is(tmp_path):
    path = tmp_path / "a.safetensors"
    write_artefact(path, "heapr_plan", {"x": torch.arange(3).flip(0)[::2]}, {"blocks": ["a", "ü"]})
    tensors, document = read_artefact(path, "heapr_plan")
    assert tensors["x"].tolist() == [2, 0] and document == {"blocks": ["a", "ü"]}
    assert artefact_format(path) == "heapr_plan"
    with pytest.raises(HeaprError, match="holds 'heapr_plan' data, not 'heapr_statistics'"):
        read_artefact(path, "heapr_statistics")


def test_tensors_that_share_memory_are_written(tmp_path):
    """The accumulators of a block are rows of one tensor."""
    first, second = torch.arange(6.0).view(2, 3)
    write_artefact(tmp_path / "a", "heapr_plan", {"first": first, "second": second}, {})
    tensors, _ = read_artefact(tmp_path / "a", "heapr_plan")
    assert tensors["first"].tolist() == [0, 1, 2] and tensors["second"].tolist() == [3, 4, 5]


def test_the_kind_of_a_foreign_or_torn_file_is_unknown(tmp_path):
    save_file({"x": torch.ones(1)}, tmp_path / "model.safetensors")
    assert artefact_format(tmp_path / "model.safetensors") is None
    (tmp_path / "torn").write_bytes((tmp_path / "model.safetensors").read_bytes()[:20])
    with pytest.raises(HeaprError, match="truncated or not a safetensors file"):
        artefact_format(tmp_path / "torn")
    with pytest.raises(HeaprError, match="no such file; name a statistics file, a plan or a pruned model"):
        artefact_format(tmp_path / "missing")


def test_of_files_only_artefacts_are_replaced(tmp_path):
    for name, content in (("paper.tex", b"mine"), ("torn", (80).to_bytes(8, "little") + b'{"__metadata__":{"form')):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(HeaprError, match=f"{name}': is not a statistics file or plan"):
            check_output_artefact(tmp_path / name, overwrite=True)
    (tmp_path / "empty").touch()
    write_artefact(tmp_path / "plan", "heapr_plan", {}, {})
    for name in ("new", "empty", "plan"):
        check_output_artefact(tmp_path / name, overwrite=True)
    with pytest.raises(HeaprError, match="file exists; name another or pass overwrite=True"):
        check_output_artefact(tmp_path / "plan")
