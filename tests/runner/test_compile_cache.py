# SPDX-License-Identifier: Apache-2.0
"""The persistent compile cache: used where it can be, one warning where it cannot."""

import os
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tpu_inference.runner import compile_cache
from tpu_inference.runner.compile_cache import CheckedCache, enable_compile_cache

OPTIONS = (
    "jax_enable_compilation_cache",
    "jax_compilation_cache_dir",
    "jax_persistent_cache_min_compile_time_secs",
    "jax_persistent_cache_min_entry_size_bytes",
    "jax_raise_persistent_cache_errors",
)


@pytest.fixture(autouse=True)
def restored():
    """JAX's settings are of the process, and so is the cache it has opened."""
    from jax.experimental.compilation_cache import compilation_cache

    before = {name: getattr(jax.config, name) for name in OPTIONS}
    compilation_cache.reset_cache()
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


@pytest.fixture
def warnings(monkeypatch):
    """Warnings logged, formatted."""
    logged = []
    monkeypatch.setattr(compile_cache.logger, "warning", lambda message, *args: logged.append(message % args))
    return logged


def test_a_directory_is_made_and_used(tmp_path, warnings):
    path = str(tmp_path / "deep" / "cache")
    assert enable_compile_cache(path) == path
    assert os.path.isdir(path)
    assert jax.config.jax_enable_compilation_cache
    assert jax.config.jax_compilation_cache_dir == path
    assert not warnings
    assert os.listdir(path) == [], "the probe is gone"


def test_programs_of_any_size_and_time_are_kept(tmp_path):
    path = enable_compile_cache(str(tmp_path / "cache"))
    jax.jit(lambda x: x * 3 + 1).lower(jnp.ones(5)).compile()
    assert os.listdir(path)


def test_an_empty_path_turns_it_off_quietly(warnings):
    before = {name: getattr(jax.config, name) for name in OPTIONS}
    assert enable_compile_cache("") is None
    assert {name: getattr(jax.config, name) for name in OPTIONS} == before
    assert not warnings


def under_a_file(tmp_path, _):
    (tmp_path / "file").write_text("")
    return tmp_path / "file" / "cache", "Not a directory"


def a_file(tmp_path, _):
    (tmp_path / "file").write_text("")
    return tmp_path / "file", "File exists"


def little_space(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "statvfs", lambda path: SimpleNamespace(f_bavail=3 * 2**8, f_frsize=2**12))
    return tmp_path, "only 3 MiB are free"


def read_only(tmp_path, monkeypatch):
    def refuse(dir):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(compile_cache.tempfile, "TemporaryFile", refuse)
    return tmp_path, "Permission denied"


@pytest.mark.parametrize("make", [under_a_file, a_file, little_space, read_only])
def test_an_unusable_directory_is_one_warning(make, tmp_path, monkeypatch, warnings):
    path, why = make(tmp_path, monkeypatch)
    assert enable_compile_cache(str(path)) is None
    assert not jax.config.jax_enable_compilation_cache
    assert len(warnings) == 1
    for part in (str(path), why, "VLLM_XLA_CACHE_PATH"):
        assert part in warnings[0]


def test_a_usable_directory_after_an_unusable_one(tmp_path, warnings):
    (tmp_path / "file").write_text("")
    assert enable_compile_cache(str(tmp_path / "file")) is None
    assert enable_compile_cache(str(tmp_path / "cache"))
    assert jax.config.jax_enable_compilation_cache


# --------------------------------------------------------------------------------------------------------------- entries


def compiled(factor):
    """A new function's program, run: the persistent cache is asked each time."""
    jax.clear_caches()
    return float(jax.jit(lambda x: x * factor + 1).lower(np.float32(3)).compile()(np.float32(3)))


def truncated(content):
    return content[: len(content) // 2]


def a_bit_flipped(content):
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 4]) + content[middle + 1 :]


@pytest.mark.parametrize("damage", [truncated, a_bit_flipped, lambda _: b"", lambda _: b"nonsense" * 99])
def test_a_damaged_entry_is_one_warning_and_replaced(damage, tmp_path, warnings):
    path = Path(enable_compile_cache(str(tmp_path / "cache")))
    assert compiled(5) == 16
    (entry,) = path.iterdir()
    whole = entry.read_bytes()
    entry.write_bytes(damage(whole))
    assert compiled(5) == 16
    assert len(warnings) == 1 and str(entry) in warnings[0] and "damaged" in warnings[0]
    assert [file.name for file in path.iterdir()] == [entry.name], "it is there again, and nothing else"
    assert compiled(5) == 16
    assert len(warnings) == 1, "and it is whole"


def test_an_entry_that_cannot_be_read(tmp_path, warnings):
    path = Path(enable_compile_cache(str(tmp_path / "cache")))
    assert compiled(7) == 22
    (entry,) = path.iterdir()
    entry.unlink()
    entry.mkdir()
    assert compiled(7) == 22
    assert len(warnings) == 1 and "cannot be read" in warnings[0]


FULL_DISK = """
import resource, sys, warnings, logging
import jax, numpy as np
from tpu_inference.runner import compile_cache
warnings.simplefilter("error")  # JAX's own warnings of a failing cache
logged = []
compile_cache.logger.warning = lambda message, *args: logged.append(message % args)
compile_cache.enable_compile_cache(sys.argv[1])
jax.jit(lambda x: x + 1).lower(np.float32(3)).compile()
resource.setrlimit(resource.RLIMIT_FSIZE, (100, resource.RLIM_INFINITY))  # writes end in the middle, as on a full disk
for k in range(4):
    assert float(jax.jit(lambda x: x * k).lower(np.float32(3)).compile()(np.float32(3))) == 3 * k
assert len(logged) == 1 and "cannot be written" in logged[0] and sys.argv[1] in logged[0], logged
"""


def test_a_disk_that_fills_up_is_one_warning(tmp_path):
    """The kernel refuses to write on; programs are compiled and run, and no half entry is left."""
    path = tmp_path / "cache"
    done = subprocess.run([sys.executable, "-c", FULL_DISK, str(path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert [file.suffix for file in path.iterdir()] == [".program"]


def test_writers_and_readers_of_one_directory(tmp_path, warnings):
    """Nobody ever sees half an entry."""
    value, seen = os.urandom(2**20), []

    def work():
        cache = CheckedCache(str(tmp_path))
        for i in range(20):
            cache.put(f"k{i}", value)
            seen.append(cache.get(f"k{i}") == value)

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(seen) and len(seen) == 120 and not warnings
    assert {file.suffix for file in tmp_path.iterdir()} == {".program"} and len(list(tmp_path.iterdir())) == 20
