# SPDX-License-Identifier: Apache-2.0
"""Answers as text, JSON, ranking and picture, from one made by hand."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest

from helpers.plans import GIB, made_up_answer, made_up_step
from tpu_inference.plan import report
from tpu_inference.plan.answer import EXPERTS_AT_RANDOM, _about_times, _with_room_to_sample
from tpu_inference.plan.jobs import Done
from tpu_inference.plan.memory import Compiled
from tpu_inference.plan.plot import decode_lines, draw, hbm_bars

STEPS = (made_up_step(64, 1024, 2000, 4000), made_up_step(256, 1024, 5000, 8000))


def test_the_text_has_the_split_the_requests_and_the_steps():
    text = report.as_text(made_up_answer(steps=STEPS), {})
    assert "Fits, with 19.00 GiB" in text
    assert "KV cache" in text and "62.5 %  1000 blocks of 128 tokens" in text
    assert "124 of 1,024 tokens, 15 of 8,192 tokens" in text
    assert "decode 256" in text and "32,000-51,200" in text
    assert "sample[256] takes at least 100-200" in text
    assert "2 of 27 programs" in text and "One note." in text


def test_the_split_adds_up():
    memory = made_up_answer().memory
    assert memory.device.used + memory.kv_cache + memory.device.temporaries + memory.free == memory.device.limit
    assert memory.tokens == 15 * 8192


def test_what_does_not_fit_prints_the_engines_table():
    answer = made_up_answer(fits=False)
    text = report.as_text(answer, {})
    assert text.splitlines()[2].startswith("Does not fit. ") and answer.memory.device.table() in text


def test_json_says_whether_it_fits_and_can_be_read_back():
    found = json.loads(json.dumps(report.as_json(made_up_answer(steps=STEPS), {"v6e": 2.7})))
    assert found["fits"] is True and found["why_not"] is None
    assert found["hbm_bytes_per_device"]["kv_cache"] == 20 * GIB
    assert found["steps"][1]["tokens_per_s"] == [32000, 51200]
    assert found["requests_held"] == {"1024": 124, "8192": 15}
    assert json.loads(json.dumps(report.as_json(made_up_answer(fits=False), {})))["fits"] is False


def test_a_million_tokens_cost_the_slice_for_as_long_as_they_take():
    low, high = report.cost_per_million(made_up_answer(steps=STEPS), {"v6e": 3.6})
    assert high == pytest.approx(8 * 3.6 / 3600 / 32000 * 1e6)
    assert low == pytest.approx(8 * 3.6 / 3600 / 51200 * 1e6)
    assert report.cost_per_million(made_up_answer(steps=STEPS), {}) is None
    assert report.cost_per_million(made_up_answer(), {"v6e": 3.6}) is None


def test_ranking_is_by_fit_then_speed():
    slow = made_up_answer("v5e:2x4", steps=STEPS[:1])
    fast = made_up_answer("v6e:2x4", steps=STEPS)
    small = made_up_answer("v6e:2x2", fits=False)
    assert report.ranked([small, slow, fast]) == [fast, slow, small]
    lines = report.comparison([fast, slow, small], {"v6e": 2.7}).splitlines()
    assert len(lines) == 4 and "32,000-51,200" in lines[1] and " no " in lines[3]


def test_what_times_of_experts_rest_on_stands_beside_them():
    def notes(num_experts, **job):
        config = SimpleNamespace(model_config=SimpleNamespace(get_num_experts=lambda: num_experts))
        return _about_times(config, [Done((Compiled("forward[8x8]", 1.0, 2),), **job)])

    steps = tuple(step.cost for step in STEPS)
    assert notes(8, steps=steps) == [EXPERTS_AT_RANDOM]
    assert notes(0, steps=steps) == notes(8) == []
    (only,) = notes(8, untimed="broken")
    assert "forward[8x8]" in only and "broken" in only


def test_assumptions_about_times_stand_only_beside_times():
    assert len(report.assumptions([made_up_answer()])) == 1
    assert any("not measurements" in line for line in report.assumptions([made_up_answer(steps=STEPS)]))


def test_a_batch_that_cannot_be_sampled_does_not_fit():
    answer = made_up_answer()
    assert _with_room_to_sample(answer).memory.fits
    crowded = replace(answer, memory=replace(answer.memory, kv_cache=answer.memory.kv_cache + int(7.8 * GIB)))
    assert "Sampling 256 rows needs" in _with_room_to_sample(crowded).memory.why_not


def test_what_is_drawn():
    answer = made_up_answer(steps=STEPS)
    assert sum(sizes[0] for sizes in hbm_bars([answer]).values()) == pytest.approx(32)
    assert decode_lines(answer) == {1024: [(64, 2.0, 4.0), (256, 5.0, 8.0)]}


def test_the_picture(tmp_path):
    pytest.importorskip("matplotlib")
    draw([made_up_answer(steps=STEPS), made_up_answer("v5e:2x4", fits=False)], str(tmp_path / "a.svg"))
    assert "HBM of a device" in (tmp_path / "a.svg").read_text()
