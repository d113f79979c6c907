# SPDX-License-Identifier: Apache-2.0
"""Rules by which weights are rounded at load."""

import re

import pytest

from tpu_inference.errors import ConfigError
from tpu_inference.models.common.quantization_rules import READY_MADE, read_rules

LAYER, EXPERT = "model.layers.3.mlp.down_proj", "model.layers.3.mlp.experts.12.down_proj"


@pytest.mark.parametrize(
    ("name", "dtype", "activations", "of_experts"),
    [
        ("int8_weights", "int8", None, "int8"),
        ("int8_weights_activations", "int8", "int8", "int8"),
        ("fp8", "float8_e4m3fn", None, "float8_e4m3fn"),
        ("fp8_weights_activations", "float8_e4m3fn", "float8_e4m3fn", "float8_e4m3fn"),
        ("int4_weights", "int4", None, "int8"),
    ],
)
def test_ready_made(name, dtype, activations, of_experts):
    rules = read_rules(name)
    assert (rules(LAYER).dtype, rules(LAYER).activations, rules(LAYER).at_load) == (dtype, activations, True)
    assert (rules(EXPERT).dtype, rules(EXPERT).activations) == (of_experts, None)


def test_int4_of_experts_is_refused(tmp_path):
    rules = read_rules(written(tmp_path, "- {module_path: .*, weight_qtype: int4}\n"))
    with pytest.raises(ConfigError, match="experts are not served with"):
        rules(EXPERT)


def test_all_ready_made_ones_are_read():
    assert {file.stem for file in READY_MADE.glob("*.yaml")} == {
        "int8_weights",
        "int8_weights_activations",
        "fp8",
        "fp8_weights_activations",
        "int4_weights",
    }


def written(tmp_path, text):
    path = tmp_path / "rules.yaml"
    path.write_text(text)
    return str(path)


def test_the_first_that_fits_the_whole_name_counts(tmp_path):
    rules = read_rules(
        written(
            tmp_path,
            "- {module_path: .*down_proj}\n- {module_path: model, weight_qtype: int8}\n- {module_path: .*q_proj, weight_qtype: int8}\n",
        )
    )
    assert rules(LAYER) is None and rules("model.norm") is None
    with pytest.raises(ConfigError, match="no rule that quantizes"):
        rules.refuse_if_without_effect()
    assert rules("model.layers.0.self_attn.q_proj").dtype == "int8"
    rules.refuse_if_without_effect()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{module_path: x}", "must be a list"),
        ("- [", "is no YAML"),
        ("- {module_path: '(', weight_qtype: int3}", "rule 1: module_path='\\(' is no regular.*weight_qtype='int3' is none of int8"),
        ("- {module_path: x, weight_qtype: int8, group: 128}", "group is not known"),
        ("- {module_path: x, weight_qtype: int8, tile_size: 48}", "tile_size=48 is no multiple of 32"),
        ("- {module_path: x, weight_qtype: int8, act_qtype: int8, tile_size: 64}", "of weights alone"),
        ("- {module_path: x, weight_qtype: float8_e4m3fn, act_qtype: int8}", "needs weight_qtype: int8"),
        ("- {module_path: x, weight_qtype: int8, act_qtype: float8_e4m3fn}", "act_qtype: float8_e4m3fn needs weight_qtype: float8_e4m3fn"),
        ("- {module_path: x, weight_qtype: int4, act_qtype: int4}", "act_qtype='int4' is none of int8, float8_e4m3fn"),
    ],
)  # fmt: skip
def test_what_is_not_served(tmp_path, text, said):
    with pytest.raises(ConfigError, match=said):
        read_rules(written(tmp_path, text))


def test_no_such_file():
    with pytest.raises(
        ConfigError,
        match=re.escape(
            "nor one of fp8, fp8_weights_activations, int4_weights, int8_weights, int8_weights_activations"
        ),
    ):
        read_rules("int9")


def test_activations_of_experts_are_refused(tmp_path):
    rules = read_rules(written(tmp_path, "- {module_path: .*, weight_qtype: int8, act_qtype: int8}"))
    with pytest.raises(ConfigError, match="those of experts are not rounded"):
        rules(EXPERT)
