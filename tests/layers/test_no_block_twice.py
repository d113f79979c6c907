# SPDX-License-Identifier: Apache-2.0
"""No arithmetic lives twice: no block of lines stands in two files of layers/."""

import re
from collections import defaultdict
from pathlib import Path

import tpu_inference.layers

LAYERS = Path(tpu_inference.layers.__path__[0])
BLOCK = 6
"""Lines of code."""


def code(path: Path) -> list[tuple[int, str]]:
    """(line number, line) without comments, docstrings, imports and what is punctuation only."""
    text = re.sub(r'"""(?:.|\n)*?"""', lambda found: "\n" * found[0].count("\n"), path.read_text())
    lines = ((i, re.sub(r"#.*", "", line).strip()) for i, line in enumerate(text.splitlines(), start=1))
    return [(i, line) for i, line in lines if re.search(r"\w", line) and not line.startswith(("import ", "from "))]


def test_no_block_stands_in_two_files():
    places = defaultdict(set)
    for path in sorted(LAYERS.rglob("*.py")):
        lines = code(path)
        for start in range(len(lines) - BLOCK + 1):
            block = tuple(line for _, line in lines[start : start + BLOCK])
            places[block].add(f"{path.relative_to(LAYERS)}:{lines[start][0]}")
    repeated = {files for files in map(frozenset, places.values()) if len({f.partition(":")[0] for f in files}) > 1}
    assert len(places) > 500, "nothing was looked at"
    assert not repeated, f"the same {BLOCK} lines: {[sorted(files) for files in repeated]}"
