#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Write the tables of served models (README.md, docs/index.md) and sampling parameters (docs/sampling.md) between their markers.

    python scripts/gen_support_table.py [--check]

`--check` writes nothing, and exits with 1 where a table is out of date.
"""

import argparse
import ast
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
FILES = {"README.md": "models", "docs/index.md": "models", "docs/sampling.md": "sampling"}
"""File -> the table that it has."""
BEGIN, END = "<!-- {}:begin -->", "<!-- {}:end -->"


def describe(target: str) -> tuple[str, str]:
    """(file, first line of its docstring) of "package.module:Class", read without importing it."""
    path = Path(*target.partition(":")[0].split(".")).with_suffix(".py")
    summary = (ast.get_docstring(ast.parse((ROOT / path).read_text(encoding="utf-8"))) or "").partition("\n")[0]
    return path.as_posix(), summary.rstrip(".")


def table(models: dict[str, str]) -> str:
    """Markdown, one row an architecture, families together."""
    rows = sorted((target, architecture) for architecture, target in models.items())
    lines = ["| Architecture (`config.json`) | Implementation | What it is |", "| --- | --- | --- |"]
    for target, architecture in rows:
        path, summary = describe(target)
        lines.append(f"| `{architecture}` | `{path}` | {summary} |")
    return "\n".join(lines)


def literals(path: Path, *names: str) -> dict[str, Any]:
    """Values of the assignments `name = literal` of a file, read without importing it."""
    found = {}
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id in names:
            found[node.targets[0].id] = ast.literal_eval(node.value)
    return found


def sampling_table(served: dict[str, str], front_end: str, reasons: dict[str, str]) -> str:
    """Markdown, one row a field of SamplingParams."""
    lines = ["| Field of `SamplingParams` | | |", "| --- | --- | --- |"]
    lines += [f"| `{name}` | served | {remark} |" for name, remark in served.items()]
    lines += [f"| `{name}` | served | by vLLM's front end |" for name in front_end.split()]
    lines += [f"| `{name}` | refused | {reason} |" for name, reason in reasons.items()]
    return "\n".join(lines)


def replace_region(text: str, body: str, name: str = "models") -> str:
    """`text` with `body` between the markers of `name`; ValueError without exactly one pair of them."""
    begin, end = BEGIN.format(name), END.format(name)
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise ValueError(f"needs one {begin} before one {end}")
    head, rest = text.split(begin)
    return f"{head}{begin}\n{body}\n{end}{rest.split(end)[1]}"


def main() -> int:
    parser = argparse.ArgumentParser(description="Write the tables of what is served into the documentation.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 where a table is out of date")
    check = parser.parse_args().check

    sys.path.insert(0, str(ROOT))
    from tpu_inference.models.common.registry import _MODELS

    fields = literals(ROOT / "tpu_inference/platforms/requests.py", "SERVED", "FRONT_END", "REASONS")
    bodies = {
        "models": table(_MODELS),
        "sampling": sampling_table(fields["SERVED"], fields["FRONT_END"], fields["REASONS"]),
    }
    stale = []
    for file, name in FILES.items():
        path = ROOT / file
        old = path.read_text(encoding="utf-8")
        new = replace_region(old, bodies[name], name)
        if new != old:
            stale.append(file)
            if not check:
                path.write_text(new, encoding="utf-8")
    if stale and check:
        print(f"{', '.join(stale)}: a table is out of date; run python scripts/gen_support_table.py")
        return 1
    print(f"tables of what is served: {'updated in ' + ', '.join(stale) if stale else 'up to date'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
