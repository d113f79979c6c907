# SPDX-License-Identifier: Apache-2.0
"""What the engine says of its steps on vLLM's `/metrics`, beside vLLM's own metrics.

The engine is a process of its own and `/metrics` is the API server's. So the engine keeps its values in small memory-mapped files, in the format that
prometheus_client has for several processes, and the front end's registry reads them when it is scraped: a step costs a few stores, no message.
With several API servers vLLM itself puts prometheus_client in that mode; the files then lie in its directory, and nothing more is needed.
"""

import atexit
import itertools
import multiprocessing
import os
import shutil
import tempfile
import time
from bisect import bisect_left
from collections.abc import Callable

from prometheus_client import REGISTRY
from prometheus_client.multiprocess import MultiProcessCollector

from tpu_inference import envs
from tpu_inference.compat.observing import MetricFile
from tpu_inference.logger import init_logger

logger = init_logger(__name__)

HOST_SECONDS = (0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 5.0)
"""Upper bounds of the histogram of a step's host time."""
_numbers = itertools.count()
_made_here: tuple[int, str] | None = None
"""(process, directory): a child that was forked has its parent's."""


def expose() -> None:
    """In the front end: choose the directory for the engines that this process will start, and read it whenever metrics are asked for."""
    global _made_here
    is_child = multiprocessing.parent_process() is not None
    if is_child or envs.PROMETHEUS_MULTIPROC_DIR or (_made_here and _made_here[0] == os.getpid()):
        return
    directory = tempfile.mkdtemp(prefix="tpu-inference-metrics-")
    _made_here = (os.getpid(), directory)
    os.environ["TPU_METRICS_DIR"] = directory
    atexit.register(_remove, *_made_here)
    REGISTRY.register(MultiProcessCollector(None, path=directory))


def _remove(process: int, directory: str) -> None:
    if os.getpid() == process:
        shutil.rmtree(directory, ignore_errors=True)


class Series:
    """A number of the engine's: one line of `/metrics`."""

    def __init__(self, write: Callable[[float], None]) -> None:
        self._write = write
        self.value = 0.0
        write(0.0)

    def inc(self, amount: float = 1) -> None:
        self.value += amount
        self._write(self.value)

    def set(self, value: float) -> None:
        self.value = value
        self._write(value)


class StepMetrics:
    """The series of one engine. Its methods run on the engine's thread."""

    def __init__(self, model_name: str, engine: int = 0, directory: str | None = None) -> None:
        """`directory`: default is what `expose` chose, else none, and nothing is written."""
        self._directory = directory or envs.PROMETHEUS_MULTIPROC_DIR or envs.TPU_METRICS_DIR
        self._labels = {"model_name": model_name, "engine": str(engine)}
        self._files: dict[str, MetricFile] = {}
        self._suffix = f"{os.getpid()}-tpu{next(_numbers)}"
        self._buckets: dict[object, tuple[Series, Series, Series]] = {}
        help_text = "Seconds that the engine's thread spent in the runner for one step."
        name = "vllm:tpu_step_host_seconds"
        self._host_sum = self._series("histogram", name, f"{name}_sum", help_text)
        self._host_counts = [
            self._series("histogram", name, f"{name}_bucket", help_text, le=str(bound))
            for bound in (*HOST_SECONDS, "+Inf")
        ]
        self._recompiles = self._counter(
            "vllm:tpu_recompiles", "Programs compiled in a step, which waited for it: after warm-up there are none."
        )
        self._version = self._series(
            "gauge_mostrecent", *["vllm:tpu_weights_version"] * 2, "Weights being served: 1 at start-up, one more after each reload."
        )  # fmt: skip

    def _series(self, kind: str, metric: str, name: str, help_text: str, **labels: str) -> Series:
        if not self._directory:
            return Series(lambda value: None)
        if kind not in self._files:
            self._files[kind] = MetricFile(os.path.join(self._directory, f"{kind}_{self._suffix}.db"))
        file, stamped = self._files[kind], kind.startswith("gauge")
        key = file.key(metric, name, {**self._labels, **labels}, help_text)
        return Series(lambda value: file.write(key, value, time.time() if stamped else 0.0))

    def _counter(self, metric: str, help_text: str, **labels: str) -> Series:
        return self._series("counter", metric, f"{metric}_total", help_text, **labels)

    def _bucket(self, bucket: object) -> tuple[Series, Series, Series]:
        label = str(bucket)
        return (
            self._counter(
                "vllm:tpu_steps", "Steps that were run in a compiled shape (tokens x requests).", bucket=label
            ),
            self._counter("vllm:tpu_step_tokens", "Tokens of those steps.", bucket=label),
            self._counter(
                "vllm:tpu_step_padding_tokens", "Token positions that those steps computed for nothing.", bucket=label
            ),
        )

    def step(self, bucket: object, tokens: int, padding: int, host_seconds: float) -> None:
        """Of a step that is done: `tokens` it had, `padding` more that its `bucket` has, seconds of host time."""
        series = self._buckets.get(bucket)
        if series is None:
            series = self._buckets[bucket] = self._bucket(bucket)
        steps, step_tokens, step_padding = series
        steps.inc()
        step_tokens.inc(tokens)
        step_padding.inc(padding)
        self._host_sum.inc(host_seconds)
        self._host_counts[bisect_left(HOST_SECONDS, host_seconds)].inc()

    def recompiles(self, total: int) -> None:
        """Programs that steps have waited for so far."""
        if total != self._recompiles.value:
            self._recompiles.set(total)

    def weights_version(self, version: int) -> None:
        self._version.set(version)
