# SPDX-License-Identifier: Apache-2.0
"""Fetch vLLM's tests, prepare stand-in checkpoints, run what applies, write docs/vllm_tests.md and docs/vllm_tests.json.

python -m vllm_tests [--only GLOB] [--resume] [--report]
"""

import argparse
from fnmatch import fnmatchcase
from pathlib import Path

from vllm_tests import fetch, report, results, run, standins
from vllm_tests.environment import ROOT, Workplace
from vllm_tests.selection import Selection


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m vllm_tests", description=__doc__.split("\n")[0])
    parser.add_argument("--directory", type=Path, default=ROOT / ".vllm_tests", help="where everything is kept")
    parser.add_argument(
        "--only", metavar="GLOB", action="append", help="of the files, like 'v1/core/*'; may be repeated"
    )
    parser.add_argument("--resume", action="store_true", help="leave out files that have results already")
    parser.add_argument("--report", action="store_true", help="run nothing: write the table from the results there are")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no file after so many")
    parser.add_argument("--prefix", default="", help="a command to put before each file's, like 'nice'")
    arguments = parser.parse_args()
    place, selection = Workplace(arguments.directory.resolve()), Selection.load()
    place.directory.mkdir(parents=True, exist_ok=True)
    fetch.sources(place)
    files = selection.find(place.sources)
    if not arguments.report:
        fetch.packages(place)
        standins.prepare(place.hub, place.sources)
        globs = [f"tests/{glob.removeprefix('tests/')}" for glob in arguments.only or ["*"]]
        chosen = [file for file in files if any(fnmatchcase(file, glob) for glob in globs)]
        if arguments.resume:
            chosen = [file for file in chosen if not results.complete(place.results(file))]
        run.run(
            place,
            selection.group(chosen),
            prefix=arguments.prefix,
            minutes=arguments.minutes,
            say=lambda text: print(text, flush=True),
        )
    if not arguments.only:
        print(report.write(place, files))


if __name__ == "__main__":
    main()
