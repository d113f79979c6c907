# SPDX-License-Identifier: Apache-2.0
"""One pytest process a file, so that nothing of a file's engines is left for the next."""

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
    "-q", "-p", "vllm_tests.plugin", "-p", "no:cacheprovider", "--tb=short", "--timeout", str(TEST_SECONDS), "-o", "asyncio_mode=strict",
)  # fmt: skip


def run_file(place: Workplace, file: str, prefix: str = "", seconds: int = FILE_SECONDS) -> float:
    """Run a file's tests within so many seconds; returns how many it took. Results and log are below `place`."""
    place.results(file).parent.mkdir(parents=True, exist_ok=True)
    place.results(file).unlink(missing_ok=True)
    command = [*shlex.split(prefix), sys.executable, "-m", "pytest", *PYTEST, file]
    env = {**place.environment(), results.VARIABLE: str(place.results(file))}
    start = time.monotonic()
    with place.log(file).open("wb") as log:
        process = subprocess.Popen(
            command, cwd=place.sources, env=env, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code = process.wait(seconds)
            ending = None if code in (0, 1, 5) else f"pytest ended with {code}"
        except subprocess.TimeoutExpired:
            ending = f"the file took more than {seconds} s"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    results.finish(place.results(file), file, ending)
    return time.monotonic() - start


def run(place: Workplace, files: list[str], *, resume: bool, prefix: str, say: Callable[[str], None]) -> None:
    """Run the files; `resume`: only those that have no complete results."""
    todo = [file for file in files if not (resume and results.complete(place.results(file)))]
    for number, file in enumerate(todo, 1):
        seconds = run_file(place, file, prefix)
        counts = results.read(place.results(file)).counts()
        say(f"[{number}/{len(todo)}] {file}: {counts} ({seconds:.0f} s)")
