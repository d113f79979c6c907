# SPDX-License-Identifier: Apache-2.0
"""Whether the devices still answer.

vLLM's `/health` asks whether the engine process lives. So an engine whose devices do not answer ends itself, and `/health` tells.
"""

import logging
import multiprocessing
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future

import jax
import numpy as np

from tpu_inference.errors import TpuInferenceError
from tpu_inference.logger import init_logger

logger = init_logger(__name__)


class DeviceProbe:
    """A tiny computation on each device, compiled once."""

    def __init__(self, devices: Sequence[jax.Device]) -> None:
        self._asked = 0
        self._programs = []
        for device in devices:
            one = jax.device_put(np.int32(1), device)
            self._programs.append((device, jax.jit(lambda x: x + 1).lower(one).compile()))

    def _answers(self) -> None:
        for device, program in self._programs:
            self._asked += 1
            number = self._asked % 2**30
            answer = int(program(jax.device_put(np.int32(number), device)))
            if answer != number + 1:
                raise TpuInferenceError(f"{device} answers that {number} + 1 is {answer}")

    def ask(self, timeout: float) -> None:
        """Raises TpuInferenceError where a device fails, or has not answered in `timeout` seconds.

        Programs run in order: the answer comes after the steps that the device has been given before.
        """
        answer: Future[None] = Future()

        def run() -> None:
            try:
                answer.set_result(self._answers())
            except Exception as error:
                answer.set_exception(error)

        # A daemon: it waits for a device that hangs for ever.
        threading.Thread(target=run, name="device-probe", daemon=True).start()
        try:
            answer.result(timeout)
        except TimeoutError:
            names = ", ".join(str(device) for device, _ in self._programs)
            raise TpuInferenceError(f"The devices ({names}) did not answer within {timeout} s") from None
        except TpuInferenceError:
            raise
        except Exception as error:
            raise TpuInferenceError(f"The devices fail: {error}") from error


def end_engine(error: TpuInferenceError) -> None:
    """End this process at once: a device that hangs lets no clean-up finish."""
    logger.critical("%s. The engine ends: restart the server, and look at the device.", error)
    logging.shutdown()
    os._exit(1)


class Watchdog:
    """Asks the devices every `interval` seconds, in a thread, until one does not answer in as many."""

    def __init__(
        self, probe: DeviceProbe, interval: float, on_failure: Callable[[TpuInferenceError], None] = end_engine
    ) -> None:
        self._probe, self._interval, self._on_failure = probe, interval, on_failure
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="device-watchdog", daemon=True)

    @staticmethod
    def is_wanted(interval: float) -> bool:
        """Only in an engine process: a process of the user's own is not ours to end."""
        return bool(interval) and multiprocessing.parent_process() is not None

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stopped.set()

    def _run(self) -> None:
        while not self._stopped.wait(self._interval):
            try:
                self._probe.ask(self._interval)
            except TpuInferenceError as error:
                if not self._stopped.is_set():
                    self._on_failure(error)
                return
