#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Write the tables of served models (README.md, docs/index.md), sampling parameters (docs/sampling.md) and flags (docs/features.md).

They go between their markers.

    python scripts/gen_support_table.py [--check]

`--check` writes nothing, and exits with 1 where a table is out of date.
"""

import argparse
import ast
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
FILES = {"README.md": "models", "docs/index.md": "models", "docs/sampling.md": "sampling", "docs/features.md": "flags"}
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
        target = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", None)
        if not isinstance(target, ast.Name) or node.value is None:
            continue
        try:
            found[target.id] = ast.literal_eval(_Names(found).visit(node.value))
        except ValueError:  # computed
            continue
    return {name: found[name] for name in names}


class _Names(ast.NodeTransformer):
    """Names of earlier literals become their values."""

    def __init__(self, known: dict[str, Any]) -> None:
        self._known = known

    def visit_Name(self, node: ast.Name) -> ast.expr:
        return ast.Constant(self._known[node.id]) if node.id in self._known else node


def sampling_table(served: dict[str, str], front_end: str, reasons: dict[str, str]) -> str:
    """Markdown, one row a field of SamplingParams."""
    lines = ["| Field of `SamplingParams` | | |", "| --- | --- | --- |"]
    lines += [f"| `{name}` | served | {remark} |" for name, remark in served.items()]
    lines += [f"| `{name}` | served | by vLLM's front end |" for name in front_end.split()]
    lines += [f"| `{name}` | refused | {reason} |" for name, reason in reasons.items()]
    return "\n".join(lines)


def flag(name: str) -> str:
    """As it is written on the command line; what is no flag of vLLM's stays as it is."""
    return f"`--{name.replace('_', '-')}`" if " " not in name else name


def flags_table(served: dict, without: dict, refused: dict, part_of: dict[str, str]) -> str:
    """Markdown, one row a flag of vLLM's engine."""
    rows = {name: ("served", remark) for name, remark in served.items()}
    rows |= {name: ("no effect", why) for name, (_, why) in without.items()}
    rows |= {name: ("refused", why) for name, (_, why) in refused.items()}
    rows |= {
        name: ("with it", f"part of {flag(parent)}, refused")
        for parent, names in part_of.items()
        for name in names.split()
    }
    lines = ["| Flag | | |", "| --- | --- | --- |"]
    lines += [
        f"| {flag(name)} | {status} | {text} |" for name, (status, text) in sorted(rows.items()) if name[0] != "_"
    ]
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
    flags = literals(ROOT / "tpu_inference/platforms/flags.py", "SERVED", "WITHOUT_EFFECT", "REFUSED", "PART_OF")
    bodies = {
        "models": table(_MODELS),
        "sampling": sampling_table(fields["SERVED"], fields["FRONT_END"], fields["REASONS"]),
        "flags": flags_table(*flags.values()),
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
