#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Write the table of environment variables between the markers of docs/configuration.md, from `tpu_inference.envs`.

    python scripts/gen_env_docs.py [--check]

`--check` writes nothing, and exits with 1 where the table is out of date.
"""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FILE = ROOT / "docs" / "configuration.md"
BEGIN, END = "<!-- envs:begin -->", "<!-- envs:end -->"


def table() -> str:
    """Markdown, one row a variable."""
    from tpu_inference.envs import ENV_VARS

    lines = ["| Variable | Allowed | Default | What it does |", "| --- | --- | --- | --- |"]
    for var in ENV_VARS.values():
        default = (
            "see right" if callable(var.default) else f"`{var.default}`" if var.default not in (None, ()) else "unset"
        )
        lines.append(f"| `{var.name}` | {var.allowed} | {default} | {var.doc} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description="Write the table of environment variables into the documentation.")
    parser.add_argument(
        "--check", action="store_true", help="write nothing; exit with 1 where the table is out of date"
    )
    check = parser.parse_args().check
    sys.path.insert(0, str(ROOT))
    old = FILE.read_text(encoding="utf-8")
    head, rest = old.split(BEGIN)
    new = f"{head}{BEGIN}\n{table()}\n{END}{rest.split(END)[1]}"
    if new != old and check:
        print(f"{FILE.name}: the table of environment variables is out of date; run python scripts/gen_env_docs.py")
        return 1
    FILE.write_text(new, encoding="utf-8")
    print("table of environment variables: up to date")
    return 0


if __name__ == "__main__":
    sys.exit(main())
