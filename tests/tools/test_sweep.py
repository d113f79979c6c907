# SPDX-License-Identifier: Apache-2.0
"""The grid of layers that is compiled, and what is said of it."""

import json
from itertools import combinations, product
from pathlib import Path

import pytest

from tpu_inference.tools.kernel_report.render import replace_region
from tpu_inference.tools.kernel_report.store import PAGE
from tpu_inference.tools.sweep import (
    AXES,
    BEGIN,
    END,
    MOST_SECONDS,
    RESULT,
    Outcome,
    as_text,
    grid,
    main,
    name_of,
    summary,
)

ROOT = Path(__file__).resolve().parent.parent.parent


def test_parts_of_the_grid_are_the_grid():
    whole = [name_of(layer) for layer in grid()]
    parts = [name_of(layer) for offset in range(6) for layer in grid(6, offset)]
    assert len(whole) == len(set(whole)) == 3 * 6 * 5 * 3 * 2
    assert sorted(parts) == sorted(whole)


@pytest.mark.parametrize(("one_in", "count"), [(6, 90), (12, 46), (18, 30)])
def test_a_part_still_has_every_pair_of_values(one_in, count):
    layers = list(grid(one_in))
    assert len(layers) == count
    for one, other in combinations(AXES, 2):
        assert {(x[one], x[other]) for x in layers} == set(product(AXES[one], AXES[other]))


def test_summary_names_what_went_wrong():
    outcomes = [
        Outcome("a", "pallas", 1.0, ""),
        Outcome("b", "pallas", 2.0, "no room"),
        Outcome("c", "xla (page_size 16)", MOST_SECONDS + 1, ""),
    ]
    found = summary(outcomes)
    assert found["compiled"] == 2
    text = as_text({"v6e": found})
    assert "| v6e | 2 | 1 | 1 | 1 | 6.3 | 16.0 (`c`) |" in text
    assert "v6e fails: `b`: no room" in text
    assert "v6e runs the XLA form: `c`: xla (page_size 16)" in text
    assert "v6e takes 16.0 s: `c`" in text


def test_committed_page_is_what_the_committed_result_makes():
    text = (ROOT / PAGE).read_text(encoding="utf-8")
    result = json.loads((ROOT / RESULT).read_text(encoding="utf-8"))
    assert replace_region(text, as_text(result), (BEGIN, END)) == text


@pytest.mark.parametrize("chip", ["v1"])
def test_unknown_chip_lists_the_known(chip, capsys):
    assert main(["--chip", chip]) == 2
    assert "known are: v4, " in capsys.readouterr().err
