# SPDX-License-Identifier: Apache-2.0
"""Many requests at a time, a canary among them, and what must be true of the server afterwards."""

import json
import re
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from fuzz.client import Outcome, reproduction, send
from fuzz.generate import Request, request
from helpers.server import Server, wait_until

CLIENTS = 16
CANARY_EVERY = 50
CANARY = dict(prompt="Once upon a time", max_tokens=12)
LEAK_BYTES = 128 * 2**20
"""What the server may hold more after the second half of a campaign than after the first: caches of grammars, arenas of the allocator."""
KNOWN = json.loads((Path(__file__).parent / "known_errors.json").read_text())
"""Errors 5xx of vLLM itself: patterns of path, body and answer, the frame in vLLM that they come from, what the server's log has
of each (tracebacks that pass through this package are failures of their own), and why it is not ours."""


@dataclass
class Report:
    """What a campaign saw."""

    statuses: Counter[int] = field(default_factory=Counter)
    known: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    canaries: int = 0
    memory: list[int] = field(default_factory=list)
    """Anonymous bytes of the server's processes: warm, halfway, at the end."""
    took: float = 0.0


def known_error(asked: Request, problem: str) -> str | None:
    """The frame in vLLM that a 5xx is known to come from."""
    body = asked.body.decode("utf-8", "replace")
    for entry in KNOWN:
        if (
            re.search(entry["path"], asked.path)
            and re.search(entry["body"], body)
            and re.search(entry["answer"], problem)
        ):
            return str(entry["frame"])
    return None


def unproven(known: Mapping[str, int], log: str) -> list[tuple[str, int, int]]:
    """(frame, errors laid to it, errors of it that the log tells of) where these are fewer."""
    told = {entry["frame"]: len(re.findall(entry["evidence"], log)) for entry in KNOWN}
    return [(frame, laid, told[frame]) for frame, laid in known.items() if told[frame] < laid]


class Campaign:
    """Requests `first`, `first` + 1, … of a seed against one server."""

    def __init__(self, server: Server, seed: int, say: Callable[[str], None] = print) -> None:
        self._server, self._seed, self._say = server, seed, say
        self._expected = server.complete(**CANARY)["text"]
        self.report = Report()

    def run(self, count: int) -> Report:
        """Requests 0..count-1, in two halves between which memory is measured; the end is checked with the rest."""
        start = time.monotonic()
        for part in (range(count // 10), range(count // 10, count // 2), range(count // 2, count)):
            self._send_all(part)
            self._settle()
            self.report.memory.append(self._server.memory())
        self._check_leak()
        self._check_log()
        self.report.took = time.monotonic() - start
        return self.report

    def only(self, index: int) -> tuple[Request, Outcome]:
        """One request alone, judged like the others."""
        asked = request(self._seed, index)
        outcome = send(self._server.port, asked)
        self._judge(index, asked, outcome)
        self._settle()
        return asked, outcome

    def _send_all(self, indices: Sequence[int]) -> None:
        with ThreadPoolExecutor(CLIENTS) as pool:
            for start in range(0, len(indices), CANARY_EVERY):
                batch = [(i, request(self._seed, i)) for i in indices[start : start + CANARY_EVERY]]
                for (i, asked), outcome in zip(
                    batch, pool.map(lambda item: send(self._server.port, item[1]), batch), strict=True
                ):
                    self._judge(i, asked, outcome)
                self._canary(f"after request {batch[-1][0]}")

    def _judge(self, index: int, asked: Request, outcome: Outcome) -> None:
        self.report.statuses[outcome.status] += 1
        self.report.seconds.append(outcome.seconds)
        if outcome.problem is None:
            return
        is_5xx = outcome.status >= 500 or outcome.problem.startswith("an error 5")
        frame = known_error(asked, outcome.problem) if is_5xx else None
        if frame:
            self.report.known[frame] += 1
        else:
            self._fail(
                f"request {index} ({asked.path}): {outcome.problem}\n    {reproduction(asked, self._seed, index)}"
            )

    def _canary(self, when: str) -> None:
        self.report.canaries += 1
        try:
            text = self._server.complete(**CANARY)["text"]
        except (OSError, AssertionError, ValueError) as error:
            code = self._server.process.poll()
            raise AssertionError(
                f"the server does not serve any more {when} (exit status {code}): {error!r}\n"
                + self._server.log[-6000:]
            ) from error
        if text != self._expected:
            self._fail(f"the canary {when} is {text!r}, not {self._expected!r}")

    def _settle(self) -> None:
        """Nothing is left of the requests: none runs or waits, no block is used, no slot taken."""
        wait_until(self._server.is_idle, 60, "the requests are gone")
        for name, count in self._server.live_state().items():
            if count:
                self._fail(f"{count} {name} are left when no request is")

    def _check_leak(self) -> None:
        _, half, end = self.report.memory
        if end - half > LEAK_BYTES:
            self._fail(f"memory grew by {(end - half) / 2**20:.0f} MiB in the second half")

    def _check_log(self) -> None:
        """No traceback in the server's log passes through this package."""
        for traceback in re.findall(
            r"Traceback \(most recent call last\):.*?(?=\n\S*(?:INFO|WARNING)|\Z)", self._server.log, re.DOTALL
        ):
            frames = re.findall(r'File "(\S*/tpu_inference/\S+)", line (\d+)', traceback)
            # The frame of a refusal is ours, and what it raises is vLLM's own kind of error for a 400.
            if frames and not all("platforms/" in name for name, _ in frames):
                self._fail(f"a traceback passes through tpu_inference:\n{traceback[-3000:]}")

        for frame, laid, told in unproven(self.report.known, self._server.log):
            self._fail(f"{laid} errors were laid to {frame}, and the log tells of {told}")

    def _fail(self, text: str) -> None:
        self.report.failures.append(text)
        self._say(f"FAILURE: {text}")
