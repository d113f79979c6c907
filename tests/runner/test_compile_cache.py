# SPDX-License-Identifier: Apache-2.0
"""The persistent compile cache: used where it can be, one warning where it cannot."""

import os
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from tpu_inference.runner import compile_cache
from tpu_inference.runner.compile_cache import enable_compile_cache

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
