# SPDX-License-Identifier: Apache-2.0
"""A device that answers, one that hangs, one that fails, and what the watchdog makes of it."""

import threading

import jax
import pytest

from tpu_inference.errors import TpuInferenceError
from tpu_inference.worker.health import DeviceProbe, Watchdog


@pytest.fixture
def probe():
    return DeviceProbe(jax.devices()[:2])


def test_devices_that_answer(probe):
    probe.ask(30)
    probe.ask(30)


def break_device(probe, program):
    probe._programs[1] = (probe._programs[1][0], program)


def test_a_device_that_hangs(probe):
    never = threading.Event()
    break_device(probe, lambda x: never.wait())
    with pytest.raises(TpuInferenceError, match=r"did not answer within 0\.2 s"):
        probe.ask(0.2)
    never.set()


def fails(x):
    raise RuntimeError("HBM is gone")


@pytest.mark.parametrize(("program", "message"), [(fails, "HBM is gone"), (lambda x: x, r"answers that .* \+ 1 is")])
def test_a_device_that_fails_or_errs(probe, program, message):
    break_device(probe, program)
    with pytest.raises(TpuInferenceError, match=message):
        probe.ask(30)


def test_the_watchdog_reports_once(probe):
    told, reported = [], threading.Event()

    def on_failure(error):
        told.append(str(error))
        reported.set()

    break_device(probe, fails)
    dog = Watchdog(probe, 0.05, on_failure)
    dog.start()
    assert reported.wait(20)
    dog._thread.join(5)
    assert len(told) == 1 and "HBM is gone" in told[0]


def test_a_stopped_watchdog_says_nothing(probe):
    told = []
    dog = Watchdog(probe, 0.05, told.append)
    dog.start()
    dog.stop()
    dog._thread.join(5)
    assert not dog._thread.is_alive() and told == []


def test_it_watches_engine_processes_only():
    """This one is the user's own."""
    assert not Watchdog.is_wanted(60)
