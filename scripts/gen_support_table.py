#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Write the table of served models between the markers of README.md and docs/index.md, from the registry.

    python scripts/gen_support_table.py [--check]

`--check` writes nothing, and exits with 1 where a table is out of date.
"""

import argparse
import ast
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FILES = ("README.md", "docs/index.md")
BEGIN, END = "<!-- models:begin -->", "<!-- models:end -->"


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


def replace_region(text: str, body: str) -> str:
    """`text` with `body` between the markers; ValueError without exactly one pair of them."""
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(f"needs one {BEGIN} before one {END}")
    head, rest = text.split(BEGIN)
    return f"{head}{BEGIN}\n{body}\n{END}{rest.split(END)[1]}"


def main() -> int:
    parser = argparse.ArgumentParser(description="Write the table of served models into the documentation.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 where a table is out of date")
    check = parser.parse_args().check

    sys.path.insert(0, str(ROOT))
    from tpu_inference.models.common.registry import _MODELS

    body, stale = table(_MODELS), []
    for name in FILES:
        path = ROOT / name
        old = path.read_text(encoding="utf-8")
        new = replace_region(old, body)
        if new != old:
            stale.append(name)
            if not check:
                path.write_text(new, encoding="utf-8")
    if stale and check:
        print(f"{', '.join(stale)}: the table of models is out of date; run python scripts/gen_support_table.py")
        return 1
    print(f"table of models: {'updated in ' + ', '.join(stale) if stale else 'up to date'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
