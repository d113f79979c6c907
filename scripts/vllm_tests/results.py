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
            result.tests[line["id"]] = line["outcome"], line["cause"]
            result.seconds += line["seconds"]
        elif "ended" in line:
            result.ended = True
    return result


def complete(path: Path) -> bool:
    return read(path).ended


def split(raw: Path, paths: dict[str, Path], ending: str | None) -> None:
    """Divide the results of a process, which are then gone, among the files it ran.

    `ending`: what stopped it, which the test that ran then is charged with.
    """
    lines = list(_lines(raw))
    finished = {line["id"] for line in lines if "id" in line}
    running = [line["start"] for line in lines if "start" in line and line["start"] not in finished]
    if ending:
        charged = [running[-1]] if running else [] if finished else list(paths)
        lines += [{"id": test, "outcome": FAIL, "cause": ending, "seconds": 0} for test in charged]
    collected = [test for line in lines for test in line.get("collected", ())]
    for file, path in paths.items():
        own = [{"collected": [test for test in collected if test.split("::")[0] == file]}]
        own += [line for line in lines if "id" in line and line["id"].split("::")[0] == file]
        own.append({"ended": ending or "well"})
        path.write_text("".join(json.dumps(line) + "\n" for line in own))
    raw.unlink(missing_ok=True)
