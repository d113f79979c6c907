# SPDX-License-Identifier: Apache-2.0
"""The real TPU compiler takes the attention kernels, for every generation, without a TPU."""

import os

os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")

from functools import partial

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from tpu_inference.kernels.ragged_paged_attention import (
    implementation_for,
    kv_pages_shape,
    ragged_paged_attention,
    storage_dtype,
)

pytestmark = [pytest.mark.slow, pytest.mark.aot]
GENERATIONS = ["v6e:2x2", "v5e:2x2", "tpu7x:2x2x1", "v5p:2x2x1", "v4:2x2x1"]


def compile_op(
    topology, *, tokens, rows, heads, kv_heads, head_dim, page_size, context=2048, dtype=jnp.bfloat16, kv_dtype=None,
    form=None,
):  # fmt: skip
    """The op's executable, and the bytes of its pages."""
    device = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices[0]
    table = context // page_size + 1
    pages = jax.ShapeDtypeStruct(
        kv_pages_shape(rows * table, page_size, kv_heads, head_dim, "tpu"), storage_dtype(kv_dtype or dtype, device)
    )
    new = jax.ShapeDtypeStruct((tokens, kv_heads, head_dim), dtype)
    args = (
        jax.ShapeDtypeStruct((tokens, heads, head_dim), dtype), new, new, pages,
        *(jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((rows, table), (rows,), (rows + 1,))),
    )  # fmt: skip
    fn = partial(ragged_paged_attention, scale=0.1, implementation=form or implementation_for(device))
    sharding = SingleDeviceSharding(device)
    jitted = jax.jit(fn, in_shardings=sharding, out_shardings=sharding, donate_argnums=3)
    return jitted.lower(*args).compile(), pages.size * pages.dtype.itemsize


def check(topology, **shape):
    compiled, num_bytes = compile_op(topology, **shape)
    assert compiled.as_text().count("tpu_custom_call") == 3, "decode, write, prefill"
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes >= num_bytes, "pages are updated in place"
    assert memory.temp_size_in_bytes < num_bytes / 2, "a temporary as large as the pages is a copy of them"


@pytest.mark.parametrize("topology", GENERATIONS)
@pytest.mark.parametrize(("heads", "kv_heads"), [(32, 8), (4, 1)])
def test_every_generation(topology, heads, kv_heads):
    check(topology, tokens=256, rows=64, heads=heads, kv_heads=kv_heads, head_dim=128, page_size=128)


@pytest.mark.parametrize("page_size", [16, 64, 256])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim"), [(5, 1, 128), (12, 12, 64), (16, 2, 256), (3, 3, 96), (6, 2, 192), (4, 2, 80)]
)
def test_shapes(page_size, heads, kv_heads, head_dim):
    shape = dict(heads=heads, kv_heads=kv_heads, head_dim=head_dim, page_size=page_size)
    check("v5e:2x2", tokens=128, rows=32, **shape)


@pytest.mark.parametrize("topology", ["v6e:2x2", "tpu7x:2x2x1"])
@pytest.mark.parametrize("kv_dtype", [jnp.float8_e4m3fn, jnp.int8])
def test_pages_of_a_byte_a_number(topology, kv_dtype):
    for head_dim in (64, 128):
        shape = dict(heads=8, kv_heads=2, head_dim=head_dim, page_size=64, kv_dtype=kv_dtype)
        check(topology, tokens=128, rows=32, **shape)


def test_few_tokens_and_many():
    for tokens, rows in ((16, 16), (2048, 8)):
        check("v6e:2x2", tokens=tokens, rows=rows, heads=8, kv_heads=2, head_dim=128, page_size=32)


def test_float32_pages():
    check("v6e:2x2", tokens=64, rows=32, heads=8, kv_heads=2, head_dim=128, page_size=16, dtype=jnp.float32)


@pytest.mark.parametrize("topology", ["TPU v3:2x2", "v6e:2x2"])
def test_the_xla_form_copies_no_pages(topology):
    compiled, num_bytes = compile_op(
        topology, tokens=64, rows=16, heads=8, kv_heads=2, head_dim=128, page_size=64, form="xla"
    )
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes >= num_bytes
    assert memory.temp_size_in_bytes < num_bytes / 2
