# SPDX-License-Identifier: Apache-2.0
"""A few layers of the grid that `tools.sweep` compiles, chosen so that every value of every axis is among them."""

import os

os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")

from itertools import cycle

import pytest

from tpu_inference.tools.kernel_report.cases import CHIPS
from tpu_inference.tools.sweep import AXES, compile_layer, grid, name_of

pytestmark = [pytest.mark.slow, pytest.mark.aot]
COUNT = max(map(len, AXES.values()))
LAYERS = [{name: values[(i + j) % len(values)] for j, (name, values) in enumerate(AXES.items())} for i in range(COUNT)]


def test_layers_are_of_the_grid_and_leave_no_value_out():
    everything = list(grid())
    assert all(layer in everything for layer in LAYERS)
    for name, values in AXES.items():
        assert {layer[name] for layer in LAYERS} == set(values)


# Some 8 seconds each: chips take turns.
@pytest.mark.parametrize(
    ("chip", "layer"), list(zip(cycle(CHIPS), LAYERS)), ids=lambda x: x if isinstance(x, str) else name_of(x)
)
def test_compiles_to_the_kernels(chip, layer):
    outcome = compile_layer(layer, chip)
    assert (outcome.error, outcome.form) == ("", "pallas")
