# SPDX-License-Identifier: Apache-2.0
"""Where JAX keeps compiled programs and traces, and prometheus_client numbers."""

from collections.abc import Callable
from typing import Any


def jax_cache_interface() -> type:
    """The base class of what JAX keeps compiled programs in: `get(key)`, `put(key, value)` and `_path`."""
    from jax._src.compilation_cache_interface import CacheInterface

    return CacheInterface


def use_jax_cache(path: str, make: Callable[[str], Any]) -> None:
    """Let JAX's compilation cache be `make(path)` wherever its directory is `path`."""
    from jax._src import compilation_cache

    original = getattr(compilation_cache.get_file_cache, "of_jax", compilation_cache.get_file_cache)

    def get_file_cache(asked: str) -> Any:
        return (make(asked), asked) if asked == path else original(asked)

    get_file_cache.of_jax = original  # type: ignore[attr-defined]
    compilation_cache.get_file_cache = get_file_cache


class MetricFile:
    """Numbers in a memory-mapped file, as prometheus_client keeps those of one kind of metric for one of several processes."""

    def __init__(self, path: str) -> None:
        from prometheus_client.mmap_dict import MmapedDict

        self._values = MmapedDict(path)

    def key(self, metric: str, name: str, labels: dict[str, str], help_text: str) -> str:
        """The key of the line `name{labels}` of `metric`."""
        from prometheus_client.mmap_dict import mmap_key

        return mmap_key(metric, name, list(labels), list(labels.values()), help_text)

    def write(self, key: str, value: float, timestamp: float) -> None:
        """Seconds since the epoch decide between processes where only the latest counts, else 0."""
        self._values.write_value(key, value, timestamp)


def start_trace(*, python: bool) -> Any:
    """Start tracing this process and its devices, `python` calls too. Returns the session for `stop_trace`."""
    import jax
    from jax._src.lib import _profiler

    jax.devices()  # libtpu must have started, or no TPU operation is traced
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = int(python)
    options.raise_error_on_start_failure = True  # another trace of this process may run
    return _profiler.ProfilerSession(options)


def stop_trace(session: Any) -> bytes:
    """The trace, still in memory."""
    return session.stop()


def write_trace(session: Any, trace: bytes, directory: str) -> None:
    """Write it for TensorBoard and XProf, below `directory`/plugins/profile/."""
    session.export(trace, directory)
