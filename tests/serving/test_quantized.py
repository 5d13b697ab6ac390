# Licensed under the Apache License, Version 2.0
"""Which quantized checkpoints are served with variable widths; vLLM is not needed to say."""

from __future__ import annotations

import re
from types import SimpleNamespace

import pytest

from optimum_heapr.serving.errors import ServingError
from optimum_heapr.serving.quantized import Scheme, scheme_of


CHANNEL = {"type": "int", "num_bits": 8, "strategy": "channel", "symmetric": True}
DYNAMIC = {"type": "int", "num_bits": 8, "strategy": "token", "symmetric": True, "dynamic": True}
GROUP = {"type": "int", "num_bits": 4, "strategy": "group", "group_size": 128, "symmetric": True}


def found(*groups: tuple[dict, dict | None], method: str = "compressed-tensors") -> Scheme | None:
    settings = {
        "quant_method": method,
        "config_groups": {
            f"group_{number}": {"weights": weights, "input_activations": activations}
            for number, (weights, activations) in enumerate(groups)
        },
    }
    return of_settings(settings)


def of_settings(settings) -> Scheme | None:
    return scheme_of(SimpleNamespace(quantization=None, hf_config=SimpleNamespace(quantization_config=settings)))


def test_what_is_served():
    assert scheme_of(SimpleNamespace(quantization=None, hf_config=SimpleNamespace())) is None
    assert found((CHANNEL, DYNAMIC)) == Scheme(bits=8, group=None)
    assert found((GROUP, None)) == found(({**GROUP, "actorder": "static"}, None)) == Scheme(bits=4, group=128)


@pytest.mark.parametrize(
    "groups",
    [
        [(CHANNEL, None)],  # W8A16, which is packed
        [({**CHANNEL, "symmetric": False}, DYNAMIC)],
        [(CHANNEL, {**DYNAMIC, "dynamic": False})],  # vLLM's experts have scales of each token alone
        [(CHANNEL, {**DYNAMIC, "strategy": "tensor"})],
        [(CHANNEL, {**DYNAMIC, "symmetric": False})],
        [({**CHANNEL, "type": "float"}, {**DYNAMIC, "type": "float"})],
        [({**GROUP, "symmetric": False}, None)],
        [({**GROUP, "actorder": "group"}, None)],
        [({**GROUP, "actorder": True}, None)],  # the same in other words
        [(None, None)],
        [({**GROUP, "strategy": "channel", "group_size": None}, None)],
        [(GROUP, DYNAMIC)],
        [(GROUP, None), ({**GROUP, "group_size": 32}, None)],
        [],
    ],
)
def test_other_schemes_are_refused(groups):
    with pytest.raises(ServingError, match=r"with quantization \(compressed-tensors\) other than INT8") as error:
        found(*groups)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (
            ["compressed-tensors"],
            r"^quantization_config in config.json is \"\['compressed-tensors'\]\", and not a mapping",
        ),
        ({"config_groups": [GROUP]}, r"^quantization_config.config_groups in config.json is "),
        ({"config_groups": {"group_0": ["Linear"]}}, r"^quantization_config.config_groups.group_0 in config.json is "),
        ({"config_groups": {"group_0": {"weights": "int4"}}}, "^weights in config.json is 'int4', and not a mapping"),
        (
            {"config_groups": {"group_0": {"weights": GROUP, "input_activations": 8}}},
            "^input_activations in config.json",
        ),
        *(
            (
                {"config_groups": {"group_0": {"weights": {**GROUP, "group_size": size}}}},
                f"^group_size in config.json is {said}",
            )
            for size, said in (
                (None, "None"),
                (0, "0"),
                (-1, "-1"),
                ("128", "'128'"),
                ([32], r"\[32\]"),
                (True, "True"),
            )
        ),
    ],
)
def test_damaged_settings_are_refused_in_one_line(settings, said):
    settings = {"quant_method": "compressed-tensors", **settings} if isinstance(settings, dict) else settings
    with pytest.raises(ServingError, match=said + ".*the checkpoint is damaged: copy it again") as error:
        of_settings(settings)
    assert "\n" not in str(error.value)


def test_settings_without_groups_are_refused():
    with pytest.raises(ServingError, match=r"\(compressed-tensors\) other than INT8"):
        of_settings({"quant_method": "compressed-tensors", "config_groups": None})


def test_other_quantizers_are_refused():
    with pytest.raises(ServingError, match=r"\(gptq\) other than"):
        found((GROUP, None), method="gptq")
    # Asked for by a flag of vLLM, whatever the file says.
    with pytest.raises(ServingError, match=r"\(fp8\) other than"):
        scheme_of(SimpleNamespace(quantization="fp8", hf_config=SimpleNamespace()))


def test_columns_that_a_stored_column_stands_for():
    scheme = Scheme(bits=4, group=128)
    assert [scheme.columns_of(kind) for kind in ("weight_packed", "weight_scale", "weight")] == [8, 128, 1]
    assert Scheme(bits=8, group=None).columns_of("weight_scale") is None
    assert (str(scheme), str(Scheme(8, None))) == ("INT4 in groups of 128", "INT8")


@pytest.mark.parametrize(
    ("scheme", "said"),
    [
        (Scheme(8, None), "INT8 and float32 .* a GPU or on a CPU with AMX or of AMD with zentorch, or leave"),
        (Scheme(4, 128), "with AMX or of AMD with zentorch and without VLLM_CPU_INT4_W4A8=0, or leave"),
        (Scheme(4, 32), "on a CPU of AMD with zentorch and without VLLM_CPU_INT4_W4A8=0, or leave"),
    ],
)
def test_where_there_is_a_kernel(scheme, said):
    """The kernel for AMX takes any groups but those of 32."""
    error = scheme.without_kernel("float32", NotImplementedError("No backend.\nOf many."))
    assert re.search(said, str(error)) and "(No backend): serve" in str(error) and "\n" not in str(error)
