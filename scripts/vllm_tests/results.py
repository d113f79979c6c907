# SPDX-License-Identifier: Apache-2.0
"""What became of each test: lines of JSON that plugin.py writes, one file of them a test file."""

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

VARIABLE = "VLLM_TESTS_RESULTS"
PASS, FAIL, NOT_APPLICABLE, NOT_RUN = OUTCOMES = ("pass", "fail", "not applicable", "not run")


@dataclass
class FileResult:
    tests: dict[str, tuple[str, str]] = field(default_factory=dict)
    """id -> (outcome, cause)"""
    seconds: float = 0.0
    ended: bool = False

    def counts(self) -> str:
        found = Counter(outcome for outcome, _ in self.tests.values())
        return ", ".join(f"{found[outcome]} {outcome}" for outcome in OUTCOMES if found[outcome]) or "no tests"


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    if path.exists():
        yield from map(json.loads, path.read_text().splitlines())


def read(path: Path) -> FileResult:
    """Tests that were collected and have no outcome are not run."""
    result = FileResult()
    for line in _lines(path):
        if "collected" in line:
            result.tests.update((test, (NOT_RUN, "")) for test in line["collected"])
        elif "id" in line:
            # A file that is not collected has no name of its own in pytest's reports of a session.
            result.tests[line["id"]] = line["outcome"], line["cause"]
            result.seconds += line["seconds"]
        elif "ended" in line:
            result.ended = True
    return result


def complete(path: Path) -> bool:
    return read(path).ended


def finish(path: Path, file: str, ending: str | None) -> None:
    """Close a file's results; `ending`: what stopped pytest, which the test that ran then is charged with."""
    lines = list(_lines(path))
    finished = {line["id"] for line in lines if "id" in line}
    running = [line["start"] for line in lines if "start" in line and line["start"] not in finished]
    with path.open("a") as out:
        if ending and (running or not finished):
            line = {"id": running[-1] if running else file, "outcome": FAIL, "cause": ending, "seconds": 0}
            out.write(json.dumps(line) + "\n")
        out.write(json.dumps({"ended": ending or "well"}) + "\n")
