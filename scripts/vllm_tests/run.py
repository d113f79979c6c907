# SPDX-License-Identifier: Apache-2.0
"""One pytest process a file that starts engines, so that nothing of them is left for the next; one for many files that start none."""

import contextlib
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable

from vllm_tests import results
from vllm_tests.environment import Workplace

TEST_SECONDS = 300
FILE_SECONDS = 1800
PYTEST = (
    "-q", "-p", "vllm_tests.plugin", "-p", "no:cacheprovider", "--tb=short", "--continue-on-collection-errors",
    "--timeout", str(TEST_SECONDS), "-o", "asyncio_mode=strict",
)  # fmt: skip


def run_together(place: Workplace, files: list[str], prefix: str = "") -> float:
    """Run the tests of some files in one process; returns how many seconds it took. Results and log are below `place`."""
    seconds = FILE_SECONDS * len(files)
    raw = place.raw_results
    raw.parent.mkdir(parents=True, exist_ok=True)
    raw.unlink(missing_ok=True)
    command = [*shlex.split(prefix), sys.executable, "-m", "pytest", *PYTEST, *files]
    env = {**place.environment(), results.VARIABLE: str(raw)}
    start = time.monotonic()
    with place.log(files[0]).open("wb") as log:
        process = subprocess.Popen(
            command, cwd=place.sources, env=env, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code = process.wait(seconds)
            ending = None if code in (0, 1, 5) else f"pytest ended with {code}"
        except subprocess.TimeoutExpired:
            ending = f"it took more than {seconds} s"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    results.split(raw, {file: place.results(file) for file in files}, ending)
    return time.monotonic() - start


def run(place: Workplace, groups: list[list[str]], *, prefix: str, minutes: float, say: Callable[[str], None]) -> None:
    """Run groups of files, a process each; none is begun after so many minutes."""
    end = time.monotonic() + 60 * minutes
    for number, files in enumerate(groups, 1):
        if time.monotonic() > end:
            say(f"{minutes:g} minutes are over: {len(groups) - number + 1} of {len(groups)} runs are left for --resume")
            return
        seconds = run_together(place, files, prefix)
        for file in files:
            say(f"[{number}/{len(groups)}] {file}: {results.read(place.results(file)).counts()}")
        say(f"    {seconds:.0f} s")
