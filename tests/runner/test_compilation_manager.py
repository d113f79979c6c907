# SPDX-License-Identifier: Apache-2.0
"""Programs compiled ahead of time, and the watch on any compiled later."""

import gc
import re
import threading
import weakref

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
def warnings(monkeypatch):
    logged = []
    monkeypatch.setattr(compilation_manager.logger, "warning", lambda message, *args: logged.append(message % args))
    return logged


def test_warm_up_compiles_each_once():
    manager = CompilationManager(strict=True)
    cases = [case(size) for size in (1, 2, 4, 8)]
    report = manager.warm_up(cases, progress=False)
    assert report.programs == len(manager) == 4
    assert report.seconds > 0
    assert len(report.slowest) == 3
    assert report.slowest == sorted(report.slowest, reverse=True)
    assert {name for _, name in report.slowest} <= {"double[1]", "double[2]", "double[4]", "double[8]"}
    again = manager.warm_up([*cases, case(16)], progress=False)
    assert (again.programs, len(manager)) == (1, 5)


def test_get_returns_the_executable_of_the_bucket():
    manager = CompilationManager(strict=True)
    manager.warm_up([case(2), case(3), case(3, "triple", lambda x, y: x * 3)], progress=False)
    manager.start_serving()
    ones = np.ones(3, np.float32)
    assert np.asarray(manager.get("double", 3, unexpected)(ones, ones)).tolist() == [3, 3, 3]
    assert np.asarray(manager.get("triple", 3, unexpected)(ones, ones)).tolist() == [3, 3, 3]
    assert np.asarray(manager.get("triple", 3, unexpected)(2 * ones, ones)).tolist() == [6, 6, 6]


def test_an_error_of_the_compiler_is_raised():
    def broken(x, y):
        return x @ jnp.ones((99, 2))

    with pytest.raises(TypeError, match="99"):
        CompilationManager(strict=False).warm_up([case(2), case(3, "broken", broken)], progress=False)


def test_strict_raises_with_the_shapes():
    manager = CompilationManager(strict=True)
    manager.warm_up([case(2), case(4)], progress=False)
    manager.start_serving()
    with pytest.raises(RecompilationError, match=re.escape("double[7]")) as error:
        manager.get("double", 7, lambda: case(7))
    assert "float32[7]" in str(error.value)
    assert "compiled are 2, 4" in str(error.value)
    assert len(manager) == 2


def test_lenient_warns_compiles_and_keeps(warnings):
    manager = CompilationManager(strict=False)
    manager.warm_up([case(2)], progress=False)
    manager.start_serving()
    with manager.watch():
        program = manager.get("double", 7, lambda: case(7))
    assert len(warnings) == 1
    for part in ("double[7]", "float32[7]", "compiled are 2"):
        assert part in warnings[0]
    assert np.asarray(program(np.ones(7, np.float32), np.zeros(7, np.float32))).tolist() == [2] * 7
    assert manager.get("double", 7, unexpected) is program
    assert len(warnings) == 1, "reported once"
    # Still on watch.
    manager.get("double", 9, lambda: case(9))
    assert len(warnings) == 2


def test_without_warm_up_programs_compile_on_first_use(warnings):
    manager = CompilationManager(strict=True)
    with manager.watch():
        assert manager.get("double", 2, lambda: case(2)) is manager.get("double", 2, unexpected)
    assert not warnings


def stray():
    """A compilation that no manager asked for."""
    return jax.jit(lambda x: x - 17.25)(np.ones(13, np.float32)).block_until_ready()


def test_a_stray_compilation_in_a_step_is_seen():
    manager = CompilationManager(strict=True)
    manager.start_serving()
    with pytest.raises(RecompilationError, match=r"compiled while serving: .*lambda"), manager.watch():
        stray()
    with manager.watch():  # reported once
        pass


def test_a_stray_compilation_is_a_warning_unless_strict(warnings):
    manager = CompilationManager(strict=False)
    manager.start_serving()
    with manager.watch():
        stray()
    assert len(warnings) == 1 and "compiled while serving" in warnings[0]


def test_before_serving_anything_may_compile():
    manager = CompilationManager(strict=True)
    with manager.watch():
        stray()
    assert manager.compiled_while_serving == []


def test_between_steps_and_in_other_threads_anything_may_compile():
    manager, other = CompilationManager(strict=True), CompilationManager(strict=True)
    manager.start_serving()
    other.start_serving()
    stray()
    with manager.watch():
        thread = threading.Thread(target=stray)
        thread.start()
        thread.join()
    with other.watch():
        pass
    assert manager.compiled_while_serving == other.compiled_while_serving == []


def test_an_error_in_a_step_is_not_hidden_and_ends_the_watch():
    manager = CompilationManager(strict=True)
    manager.start_serving()
    with pytest.raises(ZeroDivisionError), manager.watch():
        raise ZeroDivisionError
    stray()
    assert manager.compiled_while_serving == []


def test_a_manager_is_let_go_with_its_programs():
    """JAX keeps listeners for the life of the process."""
    manager = CompilationManager(strict=True)
    manager.warm_up([case(2)], progress=False)
    gone = weakref.ref(manager)
    del manager
    gc.collect()
    assert gone() is None
    stray()  # its listeners do nothing now


def test_hits_of_the_persistent_cache_are_counted(tmp_path):
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
        first = CompilationManager(strict=True).warm_up([case(21), case(22)], progress=False)
        jax.clear_caches()
        second = CompilationManager(strict=True).warm_up([case(21), case(22), case(23)], progress=False)
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()
    assert (first.programs, first.cached) == (2, 0)
    assert (second.programs, second.cached) == (3, 2)


# ---------------------------------------------------------------------------------------------------- while serving


def test_the_rest_compiles_in_the_background():
    manager = CompilationManager(strict=True)
    manager.warm_up([case(2)], progress=False)
    manager.start_serving()
    with manager.watch():  # strict: another thread's compiling is no stray
        assert manager.warm_up_in_background([case(2), case(4), case(8)]) == 2
        manager.wait()
    assert [manager.has("double", size) for size in (2, 4, 8, 16)] == [True, True, True, False]
    ones = np.ones(8, np.float32)
    assert np.asarray(manager.get("double", 8, unexpected)(ones, ones)).tolist() == [3] * 8
    manager.stop()


def test_stopping_waits_for_the_program_at_hand_and_no_more():
    manager, entered, leave = CompilationManager(strict=True), threading.Event(), threading.Event()

    def slow(x, y):
        entered.set()
        assert leave.wait(30)
        return x

    manager.warm_up_in_background([case(2, "slow", slow), case(4)])
    assert entered.wait(30)
    stopper = threading.Thread(target=manager.stop)
    stopper.start()
    stopper.join(0.2)
    assert stopper.is_alive()
    leave.set()
    stopper.join(30)
    assert not stopper.is_alive()
    assert manager.has("slow", 2) and not manager.has("double", 4)


def test_a_failure_in_the_background_is_logged_and_the_rest_goes_on(monkeypatch):
    logged = []
    monkeypatch.setattr(compilation_manager.logger, "exception", lambda message, *args: logged.append(message % args))

    def broken(x, y):
        return x @ jnp.ones((99, 2))

    manager = CompilationManager(strict=True)
    manager.warm_up_in_background([case(3, "broken", broken), case(4)])
    manager.wait()
    assert len(logged) == 1 and "broken[3]" in logged[0]
    assert manager.has("double", 4) and not manager.has("broken", 3)
    manager.stop()
