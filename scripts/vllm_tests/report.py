# SPDX-License-Identifier: Apache-2.0
"""docs/vllm_tests.md, whose head is written by hand and whose table is not, and docs/vllm_tests.json, from the results there are."""

import json
from collections import Counter
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


def _versions() -> dict[str, str]:
    return {"vllm": VERSION, **{name: version(name) for name in ("jax", "torch", "transformers")}}


def _entry(tests: dict[str, tuple[str, str]]) -> dict[str, Any]:
    """What the page says of one file."""
    counts = Counter(outcome for outcome, _ in tests.values())
    return {
        "counts": {outcome: counts[outcome] for outcome in OUTCOMES},
        "failures": {test: cause for test, (outcome, cause) in tests.items() if outcome == FAIL},
        "causes": dict(Counter(cause for outcome, cause in tests.values() if outcome == NOT_APPLICABLE)),
    }


def _published(data: dict[str, Any], file: str) -> dict[str, Any] | None:
    """What the page says already of a file, if it has been run with the versions there are."""
    counts = data.get("files", {}).get(file)
    if (
        data.get("versions") != _versions()
        or not counts
        or not (counts[PASS] or counts[FAIL] or counts[NOT_APPLICABLE])
    ):
        return None
    failures = {test: cause for test, cause in data["failures"].items() if test.split("::")[0] == file}
    return {"counts": counts, "failures": failures, "causes": data["not_applicable"].get(file, {})}


def collect(place: Workplace, files: list[str], published: dict[str, Any]) -> dict[str, Any]:
    """Everything the page says, as data. A file that has no results below `place` keeps those that are `published`."""
    entries = {}
    for file in files:
        here = place.results(file).exists() or Selection.load().cause(file)
        entries[file] = (None if here else _published(published, file)) or _entry(_tests(place, file))
    total = {outcome: sum(entry["counts"][outcome] for entry in entries.values()) for outcome in OUTCOMES}
    applicable = total[PASS] + total[FAIL]
    return {
        "versions": _versions(),
        "total": total,
        "share_of_applicable": round(total[PASS] / applicable, 4) if applicable else None,
        "files": {file: entry["counts"] for file, entry in entries.items()},
        "failures": {test: cause for entry in entries.values() for test, cause in entry["failures"].items()},
        "not_applicable": {file: entry["causes"] for file, entry in entries.items() if entry["causes"]},
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
    kept = page.with_suffix(".json")
    data = collect(place, files, json.loads(kept.read_text()) if kept.exists() else {})
    kept.write_text(json.dumps(data, indent=1) + "\n")
    table = _table(data)
    head, _, rest = page.read_text().partition(BEGIN)
    page.write_text(head + BEGIN + "\n" + "\n".join(table) + "\n" + END + rest.partition(END)[2])
    return table[0]
