# SPDX-License-Identifier: Apache-2.0
"""Profiles are bounded in steps, seconds and bytes, and there is one at a time."""

import shutil
import time
from collections import namedtuple
from pathlib import Path

import jax
import pytest
from vllm.config import ProfilerConfig

from tpu_inference.errors import TpuInferenceError
from tpu_inference.worker.profiler import Profiler


@pytest.fixture
def make(tmp_path):
    made = []

    def profiler(**settings):
        config = ProfilerConfig(profiler="torch", torch_profiler_dir=str(tmp_path / "traces"), **settings)
        made.append(Profiler(config, lambda: None))
        return made[-1]

    yield profiler
    for each in made:
        each.stop()


@pytest.fixture
def traces(tmp_path):
    return lambda: [path.relative_to(tmp_path / "traces") for path in Path(tmp_path).rglob("*.xplane.pb")]


def steps(profiler, count):
    for _ in range(count):
        jax.numpy.arange(3).block_until_ready()
        if profiler.active:
            profiler.step_done()


def test_from_start_to_stop(make, traces):
    profiler = make()
    profiler.start("night", None, None)
    steps(profiler, 3)
    assert traces() == []
    profiler.stop()
    (trace,) = traces()
    assert trace.parts[0] == "night"


def test_a_second_start_is_refused_and_the_first_goes_on(make, traces):
    profiler = make()
    profiler.start(None, None, None)
    with pytest.raises(TpuInferenceError, match="runs already"):
        profiler.start(None, None, None)
    profiler.stop()
    assert len(traces()) == 1


def test_it_waits_for_its_first_step_and_ends_with_its_last(make, traces):
    profiler = make(delay_iterations=9, max_iterations=9)
    profiler.start(None, 2, 3)
    steps(profiler, 4)
    assert profiler.active and traces() == []
    steps(profiler, 1)
    assert not profiler.active and len(traces()) == 1
    profiler.stop()
    assert len(traces()) == 1, "stopping what has ended writes nothing more"


@pytest.mark.parametrize("asked", [None, 0, 50])
def test_it_ends_after_the_most_steps_there_may_be(make, traces, monkeypatch, asked):
    monkeypatch.setenv("TPU_PROFILE_MAX_STEPS", "2")
    profiler = make()
    profiler.start(None, None, asked)
    steps(profiler, 2)
    assert not profiler.active and len(traces()) == 1


def test_it_ends_without_steps_too(make, traces, monkeypatch):
    monkeypatch.setenv("TPU_PROFILE_MAX_SECONDS", "1")
    profiler = make(torch_profiler_with_stack=False)
    profiler.start(None, None, None)
    end = time.monotonic() + 20
    while profiler.active and time.monotonic() < end:
        time.sleep(0.05)
    assert not profiler.active
    end = time.monotonic() + 20
    while not traces() and time.monotonic() < end:
        time.sleep(0.05)
    assert len(traces()) == 1


def test_a_disk_without_room_is_refused(make, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(2**40, 2**40, 2**20))
    profiler = make()
    with pytest.raises(TpuInferenceError, match=r"2\.00 GiB.*1\.00 MiB are free.*TPU_PROFILE_MAX_GIB"):
        profiler.start(None, None, None)
    assert not profiler.active


def test_a_trace_that_is_too_large_is_not_written(make, traces, monkeypatch):
    monkeypatch.setenv("TPU_PROFILE_MAX_GIB", "0.0000001")
    profiler = make()
    profiler.start(None, None, None)
    steps(profiler, 2)
    with pytest.raises(TpuInferenceError, match="was not written"):
        profiler.stop()
    assert traces() == [] and not profiler.active


def test_without_a_directory_it_says_how():
    with pytest.raises(TpuInferenceError, match="--profiler-config"):
        Profiler(ProfilerConfig(), lambda: None).start(None, None, None)
