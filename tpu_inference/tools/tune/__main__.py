# SPDX-License-Identifier: Apache-2.0
"""Search block sizes of an op's kernels on the emulator of the compiler's schedule; no TPU is needed."""

import argparse
import sys
from collections.abc import Iterator
from typing import Any

from tpu_inference.errors import TpuInferenceError
from tpu_inference.tools import schedule
from tpu_inference.tools.kernel_report.cases import CHIPS, device_of, pick, shapes
from tpu_inference.tools.schedule import TOPOLOGIES


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tpu_inference.tools.tune", description=__doc__)
    parser.add_argument("--op", required=True, help="for instance ragged_paged_attention or quantized_matmul")
    parser.add_argument("--chip", default=CHIPS[0], help=f"one of: {', '.join(TOPOLOGIES)}; default: {CHIPS[0]}")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--shape", help="a name of the op's SHAPES; all named shapes of the same layer are looked at")
    what.add_argument(
        "--all", action="store_true", help="every named shape that is of interest on the chip, and was not drawn"
    )
    what.add_argument("--random", type=int, metavar="N", help="N shapes that are not named, to judge the heuristic by")
    parser.add_argument("--seed", type=int, help="of --random; default: 0")
    parser.add_argument("--part", help="one kernel of the op alone; default: all of them")
    parser.add_argument(
        "--write",
        action="store_true",
        help="keep what gains in the op's tuned/<chip>.json; with --random the comparison, in benchmarks and docs",
    )
    args = parser.parse_args(argv)
    if args.seed is not None and args.random is None:
        parser.error("--seed is of --random")
    if args.random is not None and args.random < 1:
        parser.error("--random takes a number from 1")
    return args


def _parts(args: argparse.Namespace) -> tuple[Any, ...]:
    from tpu_inference.tools.tune.spaces import PARTS, parts_of

    parts = parts_of(pick("op", args.op, sorted({part.op for part in PARTS})))
    if args.part is None:
        return parts
    pick(f"part of {args.op}", args.part, [part.name for part in parts])
    return tuple(part for part in parts if part.name == args.part)


def _of_interest(op: str, chip: str) -> dict[str, Any]:
    return {name: shape for name, shape in shapes(op).items() if not shape.chips or chip in shape.chips}


def _by_key(op: str, chip: str) -> dict[str, dict[str, Any]]:
    """Key -> the named shapes that have it. Loads libtpu."""
    device, groups = device_of(chip), {}
    for name, shape in _of_interest(op, chip).items():
        groups.setdefault(str(shape.key(device)), {})[name] = shape
    return groups


def _is_chosen(group: dict[str, Any]) -> bool:
    """Drawn shapes stand for those that no table has."""
    return not all(name.startswith("drawn_") for name in group)


def _searches(args: argparse.Namespace, parts: tuple[Any, ...]) -> Iterator[Any]:
    from tpu_inference.tools.tune.measure import Search
    from tpu_inference.tools.tune.sample import draw, with_other_contexts

    named = _by_key(args.op, args.chip)
    if args.random is not None:
        drawn = draw(args.op, args.chip, args.random, args.seed or 0, set(named))
        groups = [{name: shape} for name, shape in drawn.items()]
    else:
        groups = [group for group in named.values() if (_is_chosen(group) if args.all else args.shape in group)]
    for group in groups:
        for part in parts:
            if concerned := {name: shape for name, shape in group.items() if part.concerns(shape)}:
                if part.name == "decode" and args.random is None:
                    concerned = with_other_contexts(concerned)
                yield Search(part, concerned, args.chip)


def run(args: argparse.Namespace) -> None:
    """Search, print, keep."""
    pick("chip", args.chip, TOPOLOGIES)
    parts = _parts(args)
    if args.shape is not None:
        pick(f"shape of {args.op} on {args.chip}", args.shape, _of_interest(args.op, args.chip))
    schedule.prepare()
    from tpu_inference.tools.tune import store

    found = []
    for search in _searches(args, parts):
        found.append(search.run())
        print(store.line(args.chip, found[-1]), flush=True)
        if not args.write:
            continue
        # After each search: one that is cut off keeps what it has.
        if args.random is None:
            store.write_table(args.op, args.chip, found[-1])
        else:
            store.write_record(args.op, args.chip, store.record_of(found, args.seed or 0))
    if args.random is not None:
        print(store.as_text(args.op, args.chip, store.record_of(found, args.seed or 0)))


def main(argv: list[str] | None = None) -> int:
    try:
        run(parse_args(argv))
    except TpuInferenceError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
