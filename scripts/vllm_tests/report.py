# SPDX-License-Identifier: Apache-2.0
"""docs/vllm_tests.md, whose head is written by hand and whose table is not, and docs/vllm_tests.json, from the results there are."""

import json
from collections import Counter, defaultdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from vllm_tests import results
from vllm_tests.environment import ROOT, VERSION, Workplace
from vllm_tests.results import FAIL, NOT_APPLICABLE, NOT_RUN, OUTCOMES, PASS
from vllm_tests.selection import Selection

PAGE = ROOT / "docs" / "vllm_tests.md"
BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"


def _tests(place: Workplace, file: str) -> dict[str, tuple[str, str]]:
    """id -> (outcome, cause), by what selection.toml says now; a file without results counts as one test."""
    selection = Selection.load()
    if cause := selection.cause(file):
        return {file: (NOT_APPLICABLE, cause)}
    tests = results.read(place.results(file)).tests or {file: (NOT_RUN, "")}

    def why(test: str, outcome: str, cause: str) -> str | None:
        return selection.cause(test) or (selection.refused(cause) if outcome == FAIL else None)

    judged = {}
    for test, (outcome, cause) in tests.items():
        if excuse := why(test, outcome, cause):
            judged[test] = NOT_APPLICABLE, excuse
        else:
            judged[test] = outcome, (selection.explanation(test) or cause) if outcome == FAIL else cause
    return judged


def collect(place: Workplace, files: list[str]) -> dict[str, Any]:
    """Everything the page says, as data."""
    tables = {file: _tests(place, file) for file in files}
    every = [test for tests in tables.values() for test in tests.values()]
    total = Counter(outcome for outcome, _ in every)
    applicable = total[PASS] + total[FAIL]
    causes: dict[str, Counter[str]] = defaultdict(Counter)
    by_file = {}
    for file, tests in tables.items():
        counts = Counter(outcome for outcome, _ in tests.values())
        by_file[file] = {outcome: counts[outcome] for outcome in OUTCOMES}
        for outcome, cause in tests.values():
            causes[file][cause] += outcome == NOT_APPLICABLE
    return {
        "versions": {"vllm": VERSION, **{name: version(name) for name in ("jax", "torch", "transformers")}},
        "total": {outcome: total[outcome] for outcome in OUTCOMES},
        "share_of_applicable": round(total[PASS] / applicable, 4) if applicable else None,
        "files": by_file,
        "failures": {t: cause for tests in tables.values() for t, (outcome, cause) in tests.items() if outcome == FAIL},
        "not_applicable": {file: {c: n for c, n in found.items() if n} for file, found in causes.items() if +found},
    }


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


def _table(data: dict[str, Any]) -> list[str]:
    total, share = data["total"], data["share_of_applicable"]
    versions = ", ".join(f"{name} {number}" for name, number in data["versions"].items())
    untouched = sum(
        not any(counts[outcome] for outcome in (PASS, FAIL, NOT_APPLICABLE)) for counts in data["files"].values()
    )
    lines = [
        f"**{100 * share:.2f} % of {total[PASS] + total[FAIL]} applicable tests pass** ({total[PASS]} pass, {total[FAIL]} fail); "
        f"{total[NOT_APPLICABLE]} are not applicable, {total[NOT_RUN]} have not been run. With {versions}.",
        "",
        f"A file that is not applicable as a whole, or has not been run, counts as one: the latter are {untouched} of {len(data['files'])} files.",
        "",
        "### Failures",
        "",
        "| Test | Cause |",
        "| --- | --- |",
        *(f"| `{_cell(test.removeprefix('tests/'))}` | {_cell(cause)} |" for test, cause in data["failures"].items()),
        "",
        "### Files",
        "",
        "| File | " + " | ".join(OUTCOMES) + " | why not applicable |",
        "| --- " * (len(OUTCOMES) + 2) + "|",
    ]
    for file, counts in data["files"].items():
        why = "; ".join(f"{_cell(cause)} ({n})" for cause, n in data["not_applicable"].get(file, {}).items())
        numbers = " | ".join(str(counts[outcome] or "") for outcome in OUTCOMES)
        lines.append(f"| `{file.removeprefix('tests/')}` | {numbers} | {why} |")
    return lines


def write(place: Workplace, files: list[str], page: Path = PAGE) -> str:
    """Write both files; returns the summary."""
    data = collect(place, files)
    page.with_suffix(".json").write_text(json.dumps(data, indent=1) + "\n")
    table = _table(data)
    head, _, rest = page.read_text().partition(BEGIN)
    page.write_text(head + BEGIN + "\n" + "\n".join(table) + "\n" + END + rest.partition(END)[2])
    return table[0]
