# SPDX-License-Identifier: Apache-2.0
"""A KV cache that is zero, takes no memory yet, and is updated in place."""

import jax
import jax.numpy as jnp
import numpy as np
import psutil
import pytest

from tpu_inference.layers.common.attention import KVCache, KVCacheLayout
from tpu_inference.layers.common.sharding import make_mesh, named_sharding
from tpu_inference.runner import kv_cache_manager
from tpu_inference.runner.untouched_zeros import MIN_BYTES, can_leave_untouched, untouched_zeros

AXES = ("pages", None, "kv_heads", None)


def abstract(*shape, dtype=jnp.uint16, devices=1):
    mesh = make_mesh(jax.devices("cpu"), devices)
    return jax.ShapeDtypeStruct(shape, dtype, sharding=named_sharding(mesh, AXES[: len(shape)]))


def resident():
    return psutil.Process().memory_info().rss


@pytest.mark.parametrize("devices", [1, 2, 8])
def test_zero_sharded_and_not_resident(devices):
    wanted = abstract(4096, 2, 8, 1024, devices=devices)  # 128 MiB
    before = resident()
    array = untouched_zeros(wanted)
    assert resident() - before < 64 * 2**20  # what compiling takes, not the array's 128 MiB
    assert (array.shape, array.dtype, array.sharding) == (wanted.shape, wanted.dtype, wanted.sharding)
    assert not np.asarray(array).any()


@pytest.mark.parametrize("size", [MIN_BYTES, MIN_BYTES + 1, 3 * MIN_BYTES + 4095])
def test_zero_where_memory_was_used_before(size):
    used = jax.block_until_ready(jnp.full((size,), 7, jnp.uint8))
    del used
    assert not np.asarray(untouched_zeros(abstract(size, dtype=jnp.uint8))).any()


def test_updated_in_place():
    array = untouched_zeros(abstract(4096, 2, 8, 1024))
    address = array.unsafe_buffer_pointer()
    array = jax.jit(lambda pages: pages.at[5].set(3), donate_argnums=0)(array)
    assert array.unsafe_buffer_pointer() == address
    assert np.asarray(array[5]).min() == 3 and np.asarray(array[4]).max() == 0


def test_small_arrays_are_left_to_jax():
    assert can_leave_untouched(abstract(MIN_BYTES, dtype=jnp.uint8))
    assert not can_leave_untouched(abstract(MIN_BYTES - 1, dtype=jnp.uint8))
    assert not can_leave_untouched(abstract(4, 1, 8, MIN_BYTES // 8, dtype=jnp.uint8, devices=8))


def test_where_it_fails_the_cache_is_written_and_a_warning_says_so(monkeypatch):
    def fail(_):
        raise OSError(22, "madvise")

    logged = []
    monkeypatch.setattr(kv_cache_manager, "untouched_zeros", fail)
    monkeypatch.setattr(kv_cache_manager, "log_once", lambda _, level, message, *args: logged.append(message % args))
    wanted = abstract(2 * MIN_BYTES, dtype=jnp.uint8)
    (array,) = kv_cache_manager.allocate_kv_cache(KVCache((wanted,), KVCacheLayout((0,), (0,), 1, False))).pages
    assert array.shape == wanted.shape and not np.asarray(array).any()
    assert len(logged) == 1 and "madvise" in logged[0]
