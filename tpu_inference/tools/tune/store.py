# SPDX-License-Identifier: Apache-2.0
"""The tuned tables that kernels read, and the record of how near the heuristic comes without them."""

import datetime
import json
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import tpu_inference.kernels
from tpu_inference.tools.kernel_report.render import replace_region
from tpu_inference.tools.kernel_report.store import PAGE
from tpu_inference.tools.tune.measure import Tuned

LEAST_GAIN = 0.02
"""Of an entry that is worth keeping."""
MOST_LOSS = 0.01
"""On any shape or latency, of such an entry."""
RECORDS = Path("benchmarks/tpu_schedule/tuning")
BEGIN, END = "<!-- tuning:begin -->", "<!-- tuning:end -->"
_HEAD = "| Shape | Part | Heuristic, µs | Tuned, µs | Heuristic at, % of tuned | What the search changed |"


def _made() -> dict[str, str]:
    return {"jax": version("jax"), "libtpu": version("libtpu"), "date": datetime.date.today().isoformat()}


def _dump(path: Path, data: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


def worth_keeping(tuned: Tuned) -> bool:
    """Whether a table is better with it than without."""
    return tuned.gain >= LEAST_GAIN and tuned.worst >= -MOST_LOSS


def line(chip: str, tuned: Tuned) -> str:
    """What a search found, for a terminal."""
    spills = [[x.spills for x in costs.values()] for costs in (tuned.start_costs, tuned.costs)]
    return (
        f"{tuned.part} of {', '.join(tuned.costs)} on {chip}: gains {100 * tuned.gain:.1f} % (least {100 * tuned.worst:.1f} %), {tuned.tried} tried: "
        f"{tuned.start} -> {tuned.fields}; spills {spills[0]} -> {spills[1]}{'' if worth_keeping(tuned) else '; not kept'}"
    )


def table_path(op: str, chip: str, root: Path | None = None) -> Path:
    """`kernels/<op>/tuned/<chip>.json`."""
    root = root or Path(tpu_inference.kernels.__file__).parent
    return root / op / "tuned" / f"{chip}.json"


def write_table(op: str, chip: str, found: Tuned, root: Path | None = None) -> None:
    """Put the entry into the table, or an older one out of it where the heuristic is as good."""
    path = table_path(op, chip, root)
    table = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    parts = {name: entry for name, entry in table.get(found.key, {}).items() if name != found.part}
    if worth_keeping(found):
        figures = {name: {"microseconds": x.microseconds, "spills": x.spills} for name, x in found.costs.items()}
        before = {name: {"microseconds": x.microseconds, "spills": x.spills} for name, x in found.start_costs.items()}
        parts[found.part] = {
            "config": found.fields, "gain": round(found.gain, 3), "figures": figures, "heuristic": before, **_made(),
        }  # fmt: skip
    table[found.key] = parts
    table = {key: parts for key, parts in sorted(table.items()) if parts}
    if table or path.exists():
        _dump(path, table)


def record_of(found: Iterable[Tuned], seed: int) -> dict[str, Any]:
    """Of shapes drawn with a seed, what the heuristic comes to and what the search did."""
    rows = []
    for tuned in found:
        (name, mine), (_, start) = next(iter(tuned.costs.items())), next(iter(tuned.start_costs.items()))
        rows.append(
            {
                "shape": name, "part": tuned.part, "heuristic": start.microseconds, "tuned": mine.microseconds,
                "share": round(mine.score / start.score, 4), "spills": [start.spills, mine.spills], "tried": tuned.tried,
                "start": tuned.start, "config": tuned.fields,
            }
        )  # fmt: skip
    return {"seed": seed, **_made(), "shapes": rows}


def write_record(op: str, chip: str, record: Mapping[str, Any], root: Path = RECORDS) -> None:
    """Keep it, and bring the page's table up to date where there is a page."""
    _dump(root / f"{op}_{chip}.json", record)
    if PAGE.exists():
        PAGE.write_text(page(PAGE.read_text(encoding="utf-8"), root), encoding="utf-8")


def _row(row: Mapping[str, Any]) -> str:
    changed = [f"{name} {row['start'][name]} → {x}" for name, x in row["config"].items() if x != row["start"][name]]
    times = [" / ".join(f"{x:.1f}" for x in row[name]) for name in ("heuristic", "tuned")]
    return f"| {row['shape']} | {row['part']} | {times[0]} | {times[1]} | {100 * row['share']:.0f} | {', '.join(changed) or 'nothing'} |"


def as_text(op: str, chip: str, record: Mapping[str, Any]) -> str:
    """Markdown of one record."""
    shares = [row["share"] for row in record["shapes"]]
    below = sum(share < 0.9 for share in shares)
    summary = (
        f"{len(shares)} shapes drawn with seed {record['seed']}: the heuristic reaches {100 * min(shares):.0f} % to {100 * max(shares):.0f} % of "
        f"what the search found, {100 * sum(shares) / len(shares):.0f} % in the mean; below 90 %: {below or 'none'}."
    )
    table = [_HEAD, "| --- " * (_HEAD.count("|") - 1) + "|", *map(_row, record["shapes"])]
    made = f"Made with jax {record['jax']}, libtpu {record['libtpu']}, {record['date']}."
    return "\n".join([f"### Heuristic of `{op}` on {chip}", "", summary, "", *table, "", made])


def page(text: str, root: Path = RECORDS) -> str:
    """The text of docs/kernels.md with the tables of the records."""
    blocks = []
    for path in sorted(root.glob("*.json")):
        op, _, chip = path.stem.rpartition("_")
        blocks.append(as_text(op, chip, json.loads(path.read_text(encoding="utf-8"))))
    return replace_region(text, "\n\n".join(blocks), (BEGIN, END))
