# SPDX-License-Identifier: Apache-2.0
"""Programs compiled ahead of time, and the watch on any compiled later."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tpu_inference.runner import compilation_manager
from tpu_inference.runner.compilation_manager import CompilationManager, CompileCase, RecompilationError


def double(x, y):
    return x * 2 + y


def case(size, name="double", fn=double):
    args = (jax.ShapeDtypeStruct((size,), jnp.float32), jax.ShapeDtypeStruct((size,), jnp.float32))
    return CompileCase(name, size, jax.jit(fn), args)


def unexpected():
    raise AssertionError("it was compiled already")


@pytest.fixture
def managers():
    """Makes managers, and takes their listeners off JAX afterwards."""
    made = []

    def make(strict):
        made.append(CompilationManager(strict=strict))
        return made[-1]

    yield make
    for manager in made:
        manager._serving = False
        jax.monitoring.unregister_event_listener(manager._on_event)
        jax.monitoring.unregister_event_duration_listener(manager._on_duration)


@pytest.fixture
def warnings(monkeypatch):
    logged = []
    monkeypatch.setattr(compilation_manager.logger, "warning", lambda message, *args: logged.append(message % args))
    return logged


def test_warm_up_compiles_each_once(managers):
    manager = managers(strict=True)
    cases = [case(size) for size in (1, 2, 4, 8)]
    report = manager.warm_up(cases, progress=False)
    assert report.programs == len(manager) == 4
    assert report.seconds > 0
    assert len(report.slowest) == 3
    assert report.slowest == sorted(report.slowest, reverse=True)
    assert {name for _, name in report.slowest} <= {"double[1]", "double[2]", "double[4]", "double[8]"}
    again = manager.warm_up([*cases, case(16)], progress=False)
    assert (again.programs, len(manager)) == (1, 5)


def test_get_returns_the_executable_of_the_bucket(managers):
    manager = managers(strict=True)
    manager.warm_up([case(2), case(3), case(3, "triple", lambda x, y: x * 3)], progress=False)
    manager.start_serving()
    ones = np.ones(3, np.float32)
    assert np.asarray(manager.get("double", 3, unexpected)(ones, ones)).tolist() == [3, 3, 3]
    assert np.asarray(manager.get("triple", 3, unexpected)(ones, ones)).tolist() == [3, 3, 3]
    assert np.asarray(manager.get("triple", 3, unexpected)(2 * ones, ones)).tolist() == [6, 6, 6]


def test_an_error_of_the_compiler_is_raised(managers):
    def broken(x, y):
        return x @ jnp.ones((99, 2))

    with pytest.raises(TypeError, match="99"):
        managers(strict=False).warm_up([case(2), case(3, "broken", broken)], progress=False)


def test_strict_raises_with_the_shapes(managers):
    manager = managers(strict=True)
    manager.warm_up([case(2), case(4)], progress=False)
    manager.start_serving()
    with pytest.raises(RecompilationError, match=re.escape("double[7]")) as error:
        manager.get("double", 7, lambda: case(7))
    assert "float32[7]" in str(error.value)
    assert "compiled are 2, 4" in str(error.value)
    assert len(manager) == 2


def test_lenient_warns_compiles_and_keeps(managers, warnings):
    manager = managers(strict=False)
    manager.warm_up([case(2)], progress=False)
    manager.start_serving()
    program = manager.get("double", 7, lambda: case(7))
    assert len(warnings) == 1
    for part in ("double[7]", "float32[7]", "compiled are 2"):
        assert part in warnings[0]
    assert np.asarray(program(np.ones(7, np.float32), np.zeros(7, np.float32))).tolist() == [2] * 7
    assert manager.get("double", 7, unexpected) is program
    manager.check()
    assert len(warnings) == 1, "reported once"
    # Still on watch.
    manager.get("double", 9, lambda: case(9))
    assert len(warnings) == 2


def test_without_warm_up_programs_compile_on_first_use(managers, warnings):
    manager = managers(strict=True)
    assert manager.get("double", 2, lambda: case(2)) is manager.get("double", 2, unexpected)
    manager.check()
    assert not warnings


def stray():
    """A compilation that no manager asked for."""
    return jax.jit(lambda x: x - 17.25)(np.ones(13, np.float32)).block_until_ready()


def test_a_stray_compilation_while_serving_is_seen(managers):
    manager = managers(strict=True)
    manager.start_serving()
    stray()
    with pytest.raises(RecompilationError, match=r"compiled while serving: .*lambda"):
        manager.check()
    manager.check()  # once


def test_a_stray_compilation_is_a_warning_unless_strict(managers, warnings):
    manager = managers(strict=False)
    manager.start_serving()
    stray()
    manager.check()
    assert len(warnings) == 1 and "compiled while serving" in warnings[0]


def test_before_serving_anything_may_compile(managers):
    manager = managers(strict=True)
    stray()
    manager.check()
    assert manager.compiled_while_serving == []


def test_hits_of_the_persistent_cache_are_counted(managers, tmp_path):
    from jax.experimental.compilation_cache import compilation_cache

    from tpu_inference.runner.compile_cache import enable_compile_cache

    names = [
        "jax_enable_compilation_cache", "jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs",
        "jax_persistent_cache_min_entry_size_bytes", "jax_raise_persistent_cache_errors",
    ]  # fmt: skip
    before = {name: getattr(jax.config, name) for name in names}
    compilation_cache.reset_cache()
    enable_compile_cache(str(tmp_path))
    try:
        first = managers(strict=True).warm_up([case(21), case(22)], progress=False)
        jax.clear_caches()
        second = managers(strict=True).warm_up([case(21), case(22), case(23)], progress=False)
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()
    assert (first.programs, first.cached) == (2, 0)
    assert (second.programs, second.cached) == (3, 2)
