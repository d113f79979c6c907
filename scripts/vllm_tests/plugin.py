# SPDX-License-Identifier: Apache-2.0
"""A pytest plugin for one file of vLLM's tests: leaves out what selection.toml says is not applicable, and writes what became of each test.

Each line of the file VLLM_TESTS_RESULTS is one JSON object: {"collected": [ids]}, {"start": id}, or {"id", "outcome", "cause", "seconds"}.
"""

import functools
import json
import os
import re
import sys
from typing import Any

import pytest

from vllm_tests.results import FAIL, NOT_APPLICABLE, PASS, VARIABLE
from vllm_tests.selection import Selection

LONGEST_CAUSE = 300


class Recorder:
    def __init__(self, path: str, selection: Selection) -> None:
        self._out = open(path, "a")  # noqa: SIM115 - open as long as the session
        self._selection = selection
        self._phases: dict[str, list[pytest.TestReport]] = {}

    def _write(self, **line: Any) -> None:
        self._out.write(json.dumps(line) + "\n")
        self._out.flush()

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        self._write(collected=[item.nodeid for item in items])
        causes = {item.nodeid: self._selection.cause(item.nodeid) for item in items}
        left_out = [item for item in items if causes[item.nodeid]]
        for item in left_out:
            self._write(id=item.nodeid, outcome=NOT_APPLICABLE, cause=causes[item.nodeid], seconds=0)
        items[:] = [item for item in items if not causes[item.nodeid]]
        config.hook.pytest_deselected(items=left_out)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self._write(id=report.nodeid, outcome=FAIL, cause="not collected: " + _last_line(report), seconds=0)
        elif report.skipped:
            self._write(id=report.nodeid, outcome=NOT_APPLICABLE, cause=_reason(report), seconds=0)

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self._phases[nodeid] = []
        self._write(start=nodeid)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._phases.setdefault(report.nodeid, []).append(report)

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        phases = self._phases.pop(nodeid)
        outcome, cause = _verdict(phases)
        seconds = round(sum(phase.duration for phase in phases), 2)
        self._write(id=nodeid, outcome=outcome, cause=cause, seconds=seconds)


def _verdict(phases: list[pytest.TestReport]) -> tuple[str, str]:
    for phase in phases:
        if phase.failed:
            return FAIL, _last_line(phase)
    for phase in phases:
        if hasattr(phase, "wasxfail"):
            return (PASS, "") if phase.passed else (NOT_APPLICABLE, f"vLLM expects it to fail: {phase.wasxfail}")
        if phase.skipped:
            return NOT_APPLICABLE, _reason(phase)
    return PASS, ""


def _reason(report: Any) -> str:
    """Why the test skipped itself."""
    text = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    return "vLLM skips it: " + text.removeprefix("Skipped: ")[:LONGEST_CAUSE]


def _last_line(report: Any) -> str:
    """What this platform refused, or the exception, of all that pytest prints."""
    if refusal := re.search(
        r"(tpu_inference does not serve this yet: .*?)(?: \[type=|$)", report.longreprtext, re.MULTILINE
    ):
        return refusal[1][:LONGEST_CAUSE]
    if invalid := re.search(r"^E?\s*(Value error, .*?)(?: \[type=|$)", report.longreprtext, re.MULTILINE):
        return invalid[1][:LONGEST_CAUSE]  # of pydantic, whose first line says nothing
    crash = getattr(report.longrepr, "reprcrash", None)
    text = crash.message if crash else report.longreprtext
    lines = [line.removeprefix("E ").strip() for line in text.splitlines() if line.strip()]
    return (lines[0] if crash else lines[-1])[:LONGEST_CAUSE] if lines else "no message"


def pytest_collection_finish(session: pytest.Session) -> None:
    """Set what vLLM's fixtures take for granted of a device.

    HfRunner runs transformers, with whose answers tests compare, on torch's device "tpu": there is none, JAX has it, and the CPU will do.
    VllmRunner asks for sizes of CUDA graphs wherever a test does not, which this platform refuses.
    """
    conftest = sys.modules.get("tests.conftest")
    if conftest is None:
        return
    conftest.HfRunner.get_default_device = lambda self: "cpu"
    init = conftest.VllmRunner.__init__

    @functools.wraps(init)
    def without_graphs(self: Any, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **{**kwargs, "compilation_config": kwargs.get("compilation_config") or {"mode": 0}})

    conftest.VllmRunner.__init__ = without_graphs


def pytest_configure(config: pytest.Config) -> None:
    if path := os.environ.get(VARIABLE):
        config.pluginmanager.register(Recorder(path, Selection.load()), "vllm_tests_recorder")
