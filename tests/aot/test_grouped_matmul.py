# SPDX-License-Identifier: Apache-2.0
"""The real TPU compiler takes the grouped product, for every generation, without a TPU."""

import os

os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")

from functools import partial

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from tpu_inference.kernels.grouped_matmul import grouped_matmul, implementation_for

pytestmark = [pytest.mark.slow, pytest.mark.aot]


def check(topology, rows, groups, out, columns, *, weights=jnp.bfloat16, scales=None):
    """It compiles, to the kernel and without a copy of weights."""
    device = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices[0]
    sharding = SingleDeviceSharding(device)
    op = partial(grouped_matmul, implementation=implementation_for(device))
    if scales is not None:
        op = lambda x, w, sizes, s: grouped_matmul(x, w, sizes, scales=s, implementation=implementation_for(device))  # noqa: E731
    args = [
        jax.ShapeDtypeStruct((rows, columns), jnp.bfloat16),
        jax.ShapeDtypeStruct((groups, out, columns), weights),
        jax.ShapeDtypeStruct((groups,), jnp.int32),
        *([jax.ShapeDtypeStruct((groups, *scales), jnp.float32)] if scales is not None else []),
    ]
    compiled = jax.jit(op, in_shardings=sharding, out_shardings=sharding).lower(*args).compile()
    assert compiled.as_text().count("tpu_custom_call") == 1
    assert compiled.memory_analysis().temp_size_in_bytes < 2**20 + rows * columns * 4


@pytest.mark.parametrize("topology", ["v6e:2x2", "v5e:2x2", "tpu7x:2x2x1", "v5p:2x2x1", "v4:2x2x1"])
def test_every_generation(topology):
    check(topology, 64, 16, 768, 512)


@pytest.mark.parametrize(
    ("rows", "groups", "out", "columns"),
    [(16, 384, 256, 7168), (24, 32, 2880, 360), (32, 8, 192, 96)],
    ids=["kimi", "odd", "small"],
)
def test_shapes(rows, groups, out, columns):
    check("v6e:2x2", rows, groups, out, columns)


@pytest.mark.parametrize("topology", ["v6e:2x2", "v5e:2x2", "tpu7x:2x2x1", "v5p:2x2x1", "v4:2x2x1"])
def test_float8_with_a_scale_a_row(topology):
    """Multiplied as it is, or converted where the matrix unit does not take it."""
    check(topology, 32, 8, 3072, 4096, weights=jnp.float8_e4m3fn, scales=(3072, 1))


@pytest.mark.parametrize("topology", ["v6e:2x2", "tpu7x:2x2x1"])
@pytest.mark.parametrize("scales", [(512, 1), (4, 4)], ids=["channel", "block128"])
def test_scales(topology, scales):
    check(topology, 32, 8, 512, 512, weights=jnp.int8, scales=scales)
