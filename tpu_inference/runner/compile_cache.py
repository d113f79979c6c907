# SPDX-License-Identifier: Apache-2.0
"""JAX's persistent compilation cache: a second start compiles nothing."""

import os
import tempfile

import jax

from tpu_inference.logger import init_logger

logger = init_logger(__name__)

MIN_FREE_BYTES = 256 * 2**20


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
    jax.config.update("jax_enable_compilation_cache", True)
    jax.config.update("jax_compilation_cache_dir", path)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    # A failing write (disk full while serving) is a warning of JAX's, not an error.
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
