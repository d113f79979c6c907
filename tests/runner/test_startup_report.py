# SPDX-License-Identifier: Apache-2.0
"""The table of where start-up time and memory went."""

import time

import pytest

from tpu_inference.runner.startup_report import Phase, StartupReport, format_bytes


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [
        (2**20 - 1, "1.00 MiB"),
        (None, ""),
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.00 KiB"),
        (3 * 2**19, "1.50 MiB"),
        (5 * 2**30 + 2**28, "5.25 GiB"),
        (2**42, "4096.00 GiB"),
    ],
)
def test_format_bytes(num_bytes, text):
    assert format_bytes(num_bytes) == text


def test_phases_are_timed_and_kept_in_order():
    report = StartupReport()
    with report.phase("load") as phase:
        time.sleep(0.02)
        phase.num_bytes, phase.note = 2**20, "3 arrays"
    with report.phase("compile"):
        pass
    assert [p.name for p in report.phases] == ["load", "compile"]
    assert report.phases[0].seconds >= 0.02 > report.phases[1].seconds
    assert (report.phases[0].num_bytes, report.phases[0].note) == (2**20, "3 arrays")


def test_a_phase_that_fails_is_not_swallowed():
    report = StartupReport()
    with pytest.raises(RuntimeError, match="no memory"), report.phase("allocate"):
        raise RuntimeError("no memory")


def test_render():
    report = StartupReport([Phase("load weights", 12.5, 3 * 2**30, "2 files"), Phase("compile", 0.5)])
    assert report.render().splitlines() == [
        "phase         seconds    memory",
        "load weights    12.50  3.00 GiB  2 files",
        "compile          0.50",
        "total           13.00",
    ]


def test_an_empty_report_has_a_total():
    assert StartupReport().render().splitlines()[-1].split() == ["total", "0.00"]
