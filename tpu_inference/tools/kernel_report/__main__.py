# SPDX-License-Identifier: Apache-2.0
"""Report what an op costs on a named shape and chip, from the schedule of the real TPU compiler; no TPU is needed."""

import argparse
import json
import sys
import time
from pathlib import Path

from tpu_inference.errors import TpuInferenceError
from tpu_inference.tools.kernel_report import store
from tpu_inference.tools.kernel_report.cases import CHIPS, Case, cases, ops
from tpu_inference.tools.kernel_report.measure import measure
from tpu_inference.tools.kernel_report.render import as_text
from tpu_inference.tools.schedule.environment import ScheduleError, set_defaults
from tpu_inference.tools.schedule.recording import no_compile_cache


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tpu_inference.tools.kernel_report", description=__doc__)
    parser.add_argument("--op", required=True, help=f"one of: {', '.join(ops())}")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--shape", help="a name of the op's SHAPES")
    what.add_argument("--all", action="store_true", help="every shape of the op")
    parser.add_argument("--chip", help=f"default: {CHIPS[0]}; with --all: {', '.join(CHIPS)}")
    parser.add_argument("--json", action="store_true", help="print the reports as JSON, one a line")
    parser.add_argument(
        "--write",
        type=Path,
        metavar="DIRECTORY",
        help=f"keep the reports there, and bring {store.PAGE} up to date with it",
    )
    parser.add_argument("--compile-only", action="store_true", help="print the seconds of a compile, and no more")
    return parser.parse_args(argv)


def _chosen(args: argparse.Namespace) -> list[Case]:
    if args.all:
        return cases(args.op, (args.chip,) if args.chip else CHIPS)
    return [Case.of(args.op, args.shape, args.chip or CHIPS[0])]


def compile_only(args: argparse.Namespace) -> int:
    set_defaults()
    with no_compile_cache():
        for case in _chosen(args):
            lowered = case.lower()
            start = time.monotonic()
            lowered.compile()
            print(f"{time.monotonic() - start:.3f}")
    return 0


def run(args: argparse.Namespace) -> int:
    """Measure and print; how many shapes could not be measured. One that fails does not keep the others."""
    failed = 0
    for case in _chosen(args):
        try:
            report = measure(case)
        except ScheduleError as error:
            failed += 1
            print(f"{case.name} on {case.chip}: {error}", file=sys.stderr)
            continue
        print(json.dumps(report.to_json()) if args.json else as_text(report), flush=True)
        if args.write:
            store.write(args.write, report)
    if args.write and not store.update_page(args.write):
        print(f"{store.PAGE} is not here, so it was not brought up to date", file=sys.stderr)
    return failed


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    try:
        return compile_only(args) if args.compile_only else min(run(args), 1)
    except TpuInferenceError as error:
        print(error, file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
