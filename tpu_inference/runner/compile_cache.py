# SPDX-License-Identifier: Apache-2.0
"""JAX's persistent compilation cache: a second start compiles nothing, and a damaged or unwritable cache costs a warning.

JAX's own directory cache never replaces an entry, writes it in place and reads it unchecked: one that a full disk or a killed process cut short
would be compiled anew at every start, and flipped bits would be loaded as machine code. So what is kept under the directory is written here.
"""

import hashlib
import os
import tempfile
import threading
from pathlib import Path

import jax

from tpu_inference.compat.observing import jax_cache_interface, use_jax_cache
from tpu_inference.logger import init_logger

logger = init_logger(__name__)

MIN_FREE_BYTES = 256 * 2**20
SUFFIX = ".program"
DIGEST_BYTES = 32


def _digest(value: bytes) -> bytes:
    return hashlib.blake2b(value, digest_size=DIGEST_BYTES).digest()


class CheckedCache(jax_cache_interface()):  # type: ignore[misc]
    """One file an entry: a digest, then the value. Files appear complete or not at all, so that servers may share a directory."""

    def __init__(self, path: str) -> None:
        self._path = Path(path)
        self._writes = True
        self._lock = threading.Lock()

    def _file(self, key: str) -> Path:
        return self._path / f"{key}{SUFFIX}"

    def get(self, key: str) -> bytes | None:
        """The value, or None: not there, not readable, or damaged, and then it is removed with a warning."""
        file = self._file(key)
        try:
            content = file.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            logger.warning("The compile cache entry %s cannot be read (%s): that program is compiled.", file, error)
            return None
        digest, value = content[:DIGEST_BYTES], content[DIGEST_BYTES:]
        if digest == _digest(value):
            return value
        logger.warning(
            "The compile cache entry %s is damaged: that program is compiled again, and the entry replaced.", file
        )
        file.unlink(missing_ok=True)
        return None

    def put(self, key: str, value: bytes) -> None:
        """Keep the value. After the first failure, a warning, nothing more is written."""
        file = self._file(key)
        if not self._writes or file.exists():
            return
        temporary = None
        try:
            with tempfile.NamedTemporaryFile(dir=self._path, prefix=".", suffix=".part", delete=False) as out:
                temporary = Path(out.name)
                out.write(_digest(value) + value)
            os.replace(temporary, file)
        except OSError as error:
            if temporary is not None:
                temporary.unlink(missing_ok=True)
            self._stop_writing(error)

    def _stop_writing(self, error: OSError) -> None:
        with self._lock:  # programs are compiled by several threads
            first, self._writes = self._writes, False
        if first:
            logger.warning(
                "The compile cache %s cannot be written (%s): programs compiled from here on are not kept. Make room there, or set "
                "VLLM_XLA_CACHE_PATH to another directory.",
                self._path,
                error.strerror or error,
            )  # fmt: skip


def enable_compile_cache(path: str) -> str | None:
    """Keep compiled programs under `path`; JAX keys them by program, compiler version, flags and device.

    Returns the directory in use, or None where it cannot be: then one warning says why, and serving goes on without.
    """
    if not path:
        return None
    problem = _problem_with(path)
    if problem:
        logger.warning(
            "The compile cache %s is not used: %s. Every start compiles anew; set VLLM_XLA_CACHE_PATH to a writable directory.",
            path,
            problem,
        )
        jax.config.update("jax_enable_compilation_cache", False)
        return None
    use_jax_cache(path, CheckedCache)
    jax.config.update("jax_enable_compilation_cache", True)
    jax.config.update("jax_compilation_cache_dir", path)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    # An entry that JAX cannot load (of another machine, say) is a warning of JAX's, not an error.
    jax.config.update("jax_raise_persistent_cache_errors", False)
    return path


def _problem_with(path: str) -> str | None:
    try:
        os.makedirs(path, exist_ok=True)
        with tempfile.TemporaryFile(dir=path) as probe:
            probe.write(b"x")
        stat = os.statvfs(path)
    except OSError as error:
        return error.strerror or str(error)
    free = stat.f_bavail * stat.f_frsize
    return None if free >= MIN_FREE_BYTES else f"only {free / 2**20:.0f} MiB are free there"
