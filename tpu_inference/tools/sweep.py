# SPDX-License-Identifier: Apache-2.0
"""Compile the paged attention op for a grid of layers on every chip, and say what is refused, slow or served by another form."""

import argparse
import datetime
import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from itertools import product
from operator import mul
from pathlib import Path
from typing import Any

from tpu_inference.errors import TpuInferenceError
from tpu_inference.tools.kernel_report.cases import CHIPS, device_of, lower, pick
from tpu_inference.tools.kernel_report.render import replace_region
from tpu_inference.tools.kernel_report.store import PAGE
from tpu_inference.tools.schedule import TOPOLOGIES
from tpu_inference.tools.schedule.environment import set_defaults
from tpu_inference.tools.schedule.recording import no_compile_cache

AXES: Mapping[str, Sequence[Any]] = {
    "heads": ((32, 8), (8, 1), (6, 6)),
    "head_dim": (64, 80, 96, 128, 192, 256),
    "page_size": (16, 32, 64, 128, 256),
    "cache_dtype": ("bfloat16", "float8_e4m3fn", "int8"),
    "rows": ("decode", "mixed"),
}
STEPS = (7, 1, 4, 6, 9)
"""How far a value of each axis moves in the grid's parts: see `grid`."""
_DECODES = ((1023, 1),) * 32
ROWS = {"decode": _DECODES, "mixed": (*_DECODES, (200, 480))}
MOST_SECONDS = 15.0
"""That a compile may take."""
RESULT = Path("benchmarks/tpu_schedule/sweep/ragged_paged_attention.json")
BEGIN, END = "<!-- sweep:begin -->", "<!-- sweep:end -->"


@dataclass(frozen=True)
class Outcome:
    """Of one layer on one chip."""

    layer: str
    form: str
    """"pallas", or another form and why."""
    seconds: float
    """Of the compile."""
    error: str
    """The compiler's; empty where it compiled."""


def grid(one_in: int = 1, offset: int = 0) -> Iterator[dict[str, Any]]:
    """Layers as `AXES` cross, or one in `one_in` of them; at 6, 12 and 18 every pair of values of two axes still meets.

    `offset` below `one_in` picks another part of the grid.
    """
    for indices in product(*(range(len(values)) for values in AXES.values())):
        if sum(map(mul, STEPS, indices)) % one_in == offset:
            yield {name: values[i] for (name, values), i in zip(AXES.items(), indices, strict=True)}


def name_of(layer: Mapping[str, Any]) -> str:
    heads, kv_heads = layer["heads"]
    return f"{layer['rows']} q{heads}_kv{kv_heads}_d{layer['head_dim']}_page{layer['page_size']}_{layer['cache_dtype']}"


def compile_layer(layer: Mapping[str, Any], chip: str) -> Outcome:
    """Compile it for the chip; an error of the compiler's is an outcome."""
    import jax

    from tpu_inference.kernels.ragged_paged_attention.shapes import AttentionShape

    heads, kv_heads = layer["heads"]
    fields = {name: layer[name] for name in ("head_dim", "page_size", "cache_dtype")}
    shape = AttentionShape(name_of(layer), ROWS[layer["rows"]], heads, kv_heads, **fields)
    device = device_of(chip)
    lowered, start, error = lower(shape, device), time.monotonic(), ""
    try:
        lowered.compile()
    except jax.errors.JaxRuntimeError as raised:
        error = (str(raised).strip().splitlines() or ["no message"])[0][:300]
    return Outcome(shape.about, shape.form(device), round(time.monotonic() - start, 1), error)


def summary(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Of one chip; what did not go as it should by name."""
    slowest = max(outcomes, key=lambda outcome: outcome.seconds)
    return {
        "compiled": sum(not x.error for x in outcomes),
        "failed": [asdict(x) for x in outcomes if x.error],
        "other_form": [[x.layer, x.form] for x in outcomes if x.form != "pallas"],
        "over_limit": [[x.layer, x.seconds] for x in outcomes if x.seconds > MOST_SECONDS],
        "slowest": [slowest.layer, slowest.seconds],
        "mean_seconds": round(sum(x.seconds for x in outcomes) / len(outcomes), 1),
        "made": f"jax {version('jax')}, libtpu {version('libtpu')}, {datetime.date.today().isoformat()}",
    }


def as_text(result: Mapping[str, Any]) -> str:
    """Markdown of summaries by chip."""
    head = (
        f"| Chip | Layers compiled | Failed | XLA form | Over {MOST_SECONDS:.0f} s | Mean, s | Slowest, s | Made with |"
    )
    lines = [head, "| --- " * (head.count("|") - 1) + "|"]
    for chip, x in result.items():
        cells = (
            chip, x["compiled"], len(x["failed"]), len(x["other_form"]), len(x["over_limit"]), x["mean_seconds"],
            f"{x['slowest'][1]} (`{x['slowest'][0]}`)", x["made"],
        )  # fmt: skip
        lines.append(f"| {' | '.join(map(str, cells))} |")
    for chip, x in result.items():
        lines += [f"\n{chip} fails: `{failed['layer']}`: {failed['error']}" for failed in x["failed"]]
        lines += [f"\n{chip} runs the XLA form: `{layer}`: {form}" for layer, form in x["other_form"]]
        lines += [f"\n{chip} takes {seconds} s: `{layer}`" for layer, seconds in x["over_limit"]]
    return "\n".join(lines)


def write(chip: str, found: Mapping[str, Any], path: Path = RESULT) -> None:
    """Put a chip's summary into the result, and bring the page up to date where there is one."""
    result = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    result[chip] = dict(found)
    result = {name: result[name] for name in TOPOLOGIES if name in result}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    if PAGE.exists():
        PAGE.write_text(
            replace_region(PAGE.read_text(encoding="utf-8"), as_text(result), (BEGIN, END)), encoding="utf-8"
        )


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tpu_inference.tools.sweep", description=__doc__)
    parser.add_argument("--chip", nargs="+", default=list(CHIPS), help=f"of {', '.join(TOPOLOGIES)}")
    parser.add_argument("--one-in", type=int, default=1, metavar="N", help="one in N layers of the grid; default: all")
    parser.add_argument("--write", action="store_true", help=f"keep the summary in {RESULT} and {PAGE}")
    args = parser.parse_args(argv)
    if args.one_in < 1:
        parser.error("--one-in takes a number from 1")
    return args


def run(args: argparse.Namespace) -> int:
    """Compile and print; how many layers fail or take too long."""
    for chip in args.chip:
        pick("chip", chip, TOPOLOGIES)
    set_defaults()
    wrong = 0
    for chip in args.chip:
        outcomes = []
        with no_compile_cache():
            for layer in grid(args.one_in):
                outcomes.append(compile_layer(layer, chip))
                print(f"{chip} {json.dumps(asdict(outcomes[-1]))}", file=sys.stderr, flush=True)
        found = summary(outcomes)
        wrong += len(found["failed"]) + len(found["over_limit"])
        print(as_text({chip: found}), flush=True)
        if args.write:
            write(chip, {"one_in": args.one_in, **found})
    return wrong


def main(argv: list[str] | None = None) -> int:
    try:
        return min(run(parse_args(argv)), 1)
    except TpuInferenceError as error:
        print(error, file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
