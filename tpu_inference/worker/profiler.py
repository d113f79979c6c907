# SPDX-License-Identifier: Apache-2.0
"""Profiles of a serving engine, bounded in steps, seconds and bytes: what `/start_profile` and `/stop_profile` do."""

import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

from vllm.config import ProfilerConfig

from tpu_inference import envs
from tpu_inference.compat.observing import start_trace, stop_trace, write_trace
from tpu_inference.errors import TpuInferenceError
from tpu_inference.logger import init_logger
from tpu_inference.runner.startup_report import format_bytes

logger = init_logger(__name__)

HOW_TO = '--profiler-config \'{"profiler": "torch", "torch_profiler_dir": "/a/directory"}\''


def _lower(*limits: int) -> int:
    """The lowest of the limits that are set; 0 where none is."""
    return min((limit for limit in limits if limit), default=0)


def free_bytes(directory: str) -> int:
    """Of the disk that `directory` is, or will be, on."""
    path = Path(directory)
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


class Profiler:
    """At most one profile at a time. Steps are counted on the engine's thread; a timer ends a profile of an idle engine."""

    def __init__(self, config: ProfilerConfig | None, wait_for_device: Callable[[], None]) -> None:
        self._config, self._wait_for_device = config, wait_for_device
        self._lock = threading.RLock()
        self._session: object | None = None
        self._timer: threading.Timer | None = None
        self._delay = self._left = 0
        """Steps to go until the trace begins, and from then until it ends (0: no limit)."""
        self._directory = ""
        self.active = False
        """Read after every step."""

    def start(self, prefix: str | None, delay: int | None, steps: int | None) -> None:
        """Trace the next `steps` steps, after `delay` others, below the directory of the config, in `prefix` of it.

        Raises:
            TpuInferenceError: no directory was configured; a profile runs; the disk has too little room.
        """
        config = self._config
        if config is None or not config.torch_profiler_dir:
            raise TpuInferenceError(f"Profiling is off: start the server with {HOW_TO}.")
        with self._lock:
            if self.active:
                raise TpuInferenceError("A profile runs already: stop it before you start another.")
            directory = os.path.join(config.torch_profiler_dir, prefix) if prefix else config.torch_profiler_dir
            self._refuse_full_disk(directory)
            self._directory = directory
            self._left = _lower(config.max_iterations if steps is None else steps, envs.TPU_PROFILE_MAX_STEPS)
            self._delay = config.delay_iterations if delay is None else delay
            if not self._delay:
                self._begin(config)
            self.active = True

    @staticmethod
    def _refuse_full_disk(directory: str) -> None:
        # A trace is written twice: for XProf, and compressed for a trace viewer.
        needed, free = int(2 * envs.TPU_PROFILE_MAX_GIB * 2**30), free_bytes(directory)
        if free < needed:
            raise TpuInferenceError(
                f"A profile may take {format_bytes(needed)} of {directory}, where {format_bytes(free)} are free: "
                "make room, use another directory, or lower TPU_PROFILE_MAX_GIB."
            )

    def _begin(self, config: ProfilerConfig) -> None:
        self._session = start_trace(python=config.torch_profiler_with_stack)
        if seconds := envs.TPU_PROFILE_MAX_SECONDS:
            self._timer = threading.Timer(seconds, self._end_by_itself, (self._session, f"{seconds} s have passed"))
            self._timer.daemon = True
            self._timer.start()
        logger.info("Profiling into %s", self._directory)

    def step_done(self) -> None:
        """Take note of a step; call it while `active`."""
        with self._lock:
            if self._session is None:
                self._delay -= 1
                if self._delay == 0:
                    self._begin(self._config)
            elif self._left:
                self._left -= 1
                if self._left == 0:
                    self._end_by_itself(self._session, "its last step is done")

    def _end_by_itself(self, session: object, why: str) -> None:
        with self._lock:
            if self._session is not session:
                return
            logger.info("The profile ends: %s", why)
            try:
                self._end()
            except Exception as error:  # nobody waits for an answer
                logger.error("The profile is lost: %s", error)

    def stop(self) -> None:
        """End the profile and write it, unless it has ended by itself.

        Raises:
            TpuInferenceError: it is too large to be written.
        """
        with self._lock:
            if not self.active:
                logger.info("No profile runs: none was started, or it has ended by itself")
            elif self._session is None:
                self.active = False
                logger.info("The profile ends before its first step: nothing was written")
            else:
                self._end()

    def _end(self) -> None:
        session, self._session, self.active = self._session, None, False
        if self._timer is not None:
            self._timer.cancel()
        self._wait_for_device()
        trace = stop_trace(session)
        largest = int(envs.TPU_PROFILE_MAX_GIB * 2**30)
        if len(trace) > largest:
            raise TpuInferenceError(
                f"The trace has {format_bytes(len(trace))}, more than TPU_PROFILE_MAX_GIB allows, and was not written: "
                "profile fewer steps, without Python calls (torch_profiler_with_stack=false), or raise the limit."
            )
        if (free := free_bytes(self._directory)) < 2 * len(trace):
            raise TpuInferenceError(
                f"The trace has {format_bytes(len(trace))} and was not written: {format_bytes(free)} are free in {self._directory}."
            )
        write_trace(session, trace, self._directory)
        logger.info("Wrote a profile of %s into %s", format_bytes(len(trace)), self._directory)
