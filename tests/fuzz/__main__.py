# SPDX-License-Identifier: Apache-2.0
"""`python -m fuzz`: the campaign from the command line, on a server of its own. Exit status 1 if anything failed."""

import argparse
import os
import sys
import tempfile
from pathlib import Path

# As in tests/conftest.py: before JAX and vLLM are imported by the server's processes.
os.environ.setdefault("JAX_PLATFORMS", "cpu")

from fuzz.campaign import Campaign, Report
from helpers.server import TELLING, server

WHAT = """The demo model on the CPU backend, a KV cache for three requests of the longest kind, 16 clients at a time. `tests/fuzz` has the
generator and what is checked of every answer and at the end; `tests/fuzz/known_errors.json` says of each 5xx of vLLM's own why it is not ours."""


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="fuzz", description=__doc__)
    parser.add_argument("-n", type=int, default=1000, help="requests")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="the one request with this number, and what was answered")
    parser.add_argument(
        "--log", type=Path, help="where the server's log goes (default: a temporary file, shown on failure)"
    )
    parser.add_argument("--report", type=Path, help="a Markdown file to write")
    return parser.parse_args()


def main() -> int:
    args = parse_args()
    with tempfile.TemporaryDirectory() as directory:
        log = args.log or Path(directory) / "server.log"
        with server(log, *TELLING.args, env=TELLING.env) as started:
            campaign = Campaign(started, args.seed)
            if args.only is not None:
                asked, outcome = campaign.only(args.only)
                print(
                    asked.path,
                    asked.body.decode("utf-8", "replace")[:4000],
                    outcome.status,
                    outcome.text[:4000],
                    sep="\n",
                )
            else:
                text = render(campaign.run(args.n), args.seed)
                print(text)
                if args.report:
                    args.report.write_text(f"# Fuzzing\n\n{WHAT}\n\n{text}\n")
            failures = campaign.report.failures
    return 1 if failures else 0


def render(report: Report, seed: int) -> str:
    """The figures, as Markdown."""
    seconds = sorted(report.seconds)
    statuses = ", ".join(
        f"{'client gone' if status == 0 else status}: {count}" for status, count in sorted(report.statuses.items())
    )
    lines = [
        f"Seed {seed}: {len(seconds)} requests in {report.took:.0f} s, {report.canaries} canaries, {len(report.failures)} failures.",
        "",
        f"- Status: {statuses}",
        f"- Seconds a request: median {seconds[len(seconds) // 2]:.3f}, 99 % {seconds[len(seconds) * 99 // 100]:.2f}, longest {seconds[-1]:.2f}",
        f"- Memory of the server (anonymous, MiB) after 10 %, half, all: {', '.join(f'{m / 2**20:.0f}' for m in report.memory)}",
        f"- 5xx of vLLM's own front end: {sum(report.known.values())}"
        + "".join(f"\n  - {frame}: {count}" for frame, count in report.known.items()),
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
