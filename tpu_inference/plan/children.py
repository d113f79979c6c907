# SPDX-License-Identifier: Apache-2.0
"""Work in processes of its own: libtpu reads its flags once a process, and two cores compile two programs at a time."""

import multiprocessing
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from multiprocessing import connection
from typing import Any, Generic, TypeVar

from tpu_inference.errors import TpuInferenceError

_T = TypeVar("_T")
AT_ONCE = 4
"""A compile takes a GiB or two."""
_TAIL = 2000
"""Characters of a dead process's messages that are shown."""


class Child(Generic[_T]):
    """`fn(*args)` in a fork of this process, so that what is imported here need not be imported again."""

    def __init__(self, fn: Callable[..., _T], *args: Any) -> None:
        context = multiprocessing.get_context("fork")
        # libtpu writes of hosts that it does not find; nobody needs that unless the process dies.
        self._messages = tempfile.TemporaryFile()  # noqa: SIM115 - read when the child has ended
        self.receiver, sender = context.Pipe(duplex=False)
        self._process = context.Process(target=self._run, args=(sender, fn, args), daemon=True)
        sys.stdout.flush()
        self._process.start()
        sender.close()

    def _run(self, sender: Any, fn: Callable[..., _T], args: tuple[Any, ...]) -> None:
        os.dup2(self._messages.fileno(), 2)
        try:
            sender.send((True, fn(*args)))
        except TpuInferenceError as error:
            sender.send((False, str(error)))
        sender.close()

    def result(self) -> _T:
        """What `fn` returned, once it has.

        Raises:
            TpuInferenceError: as `fn` did, or the process died.
        """
        try:
            done, value = self.receiver.recv()
        except EOFError:
            self._process.join()
            raise TpuInferenceError(self._obituary()) from None
        self._process.join()
        if not done:
            raise TpuInferenceError(value)
        return value

    def stop(self) -> None:
        """Its result is not wanted any more."""
        self._process.kill()
        self._process.join()

    def _obituary(self) -> str:
        self._messages.seek(0)
        text = self._messages.read().decode(errors="replace").strip()
        return (
            f"The planner's own process ended with code {self._process.exitcode} (negative: a signal; -9: perhaps no memory was left). "
            f"Its last words:\n{text[-_TAIL:]}"
        )


def run_all(jobs: Sequence[tuple], at_once: int | None = None) -> list[Any]:
    """Results of `fn(*args)` for every (fn, *args), in order; several at a time, the first ones first.

    Raises:
        TpuInferenceError: one failed; the others are stopped.
    """
    at_once = at_once or min(os.cpu_count() or 1, AT_ONCE)
    running: dict[int, Child] = {}
    results: dict[int, Any] = {}
    waiting = list(enumerate(jobs))
    try:
        while waiting or running:
            while waiting and len(running) < at_once:
                index, (fn, *args) = waiting.pop(0)
                running[index] = Child(fn, *args)
            for index in _ready(running):
                results[index] = running.pop(index).result()
    finally:
        for child in running.values():
            child.stop()
    return [results[index] for index in range(len(jobs))]


def _ready(running: dict[int, Child]) -> list[int]:
    """Those that have something to say; waits until one has."""
    talking = connection.wait([child.receiver for child in running.values()])
    return [index for index, child in running.items() if child.receiver in talking]
