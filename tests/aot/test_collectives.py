# SPDX-License-Identifier: Apache-2.0
"""The real TPU compiler takes the collectives, for every generation, without a TPU."""

import os

os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")

import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import PartitionSpec as P

from tpu_inference.kernels.collectives import ragged_all_to_all
from tpu_inference.kernels.collectives.config import GATHER, SCATTER
from tpu_inference.kernels.collectives.shapes import ProductShape
from tpu_inference.kernels.forms import implementation_for
from tpu_inference.tools.kernel_report.cases import TOPOLOGIES_OF_EIGHT, device_of, lower

pytestmark = [pytest.mark.slow, pytest.mark.aot]
CHIPS = ("v5e", "v6e", "tpu7x")
MOST_SECONDS = 20


def compile_of(lowered):
    started = time.process_time()
    compiled = lowered.compile()
    assert compiled.as_text().count("tpu_custom_call") == 1
    assert time.process_time() - started < MOST_SECONDS
    return compiled


@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("part", [GATHER, SCATTER])
def test_products(chip, part):
    """Of a server's size: weights that stay in VMEM or not, and rows that are many."""
    shape = ProductShape("", part, 1024, 28672, 8192) if part == GATHER else ProductShape("", part, 1024, 8192, 8192)
    compile_of(lower(shape, device_of(chip)))


@pytest.mark.parametrize("part", [GATHER, SCATTER])
def test_few_rows(part):
    compile_of(lower(ProductShape("", part, 128, 4096, 4096, sum_dtype="float32"), device_of("v6e")))


@pytest.mark.parametrize("chip", CHIPS)
def test_exchange_within_one_axis_of_two(chip):
    devices = topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGIES_OF_EIGHT[chip]).devices
    mesh = jax.sharding.Mesh(np.array(devices[:8]).reshape(2, 4), ("data", "model"))

    def op(x, sizes):
        return ragged_all_to_all(x, sizes, axis_name="model", implementation=implementation_for(devices[0]))

    rows = P(("data", "model"))
    function = jax.shard_map(op, mesh=mesh, in_specs=(rows, rows), out_specs=(rows, rows), check_vma=False)
    shapes = [jax.ShapeDtypeStruct((8 * 64, 2880), jnp.bfloat16), jax.ShapeDtypeStruct((8 * 4,), jnp.int32)]
    sharding = jax.sharding.NamedSharding(mesh, rows)
    compile_of(jax.jit(function, in_shardings=sharding).lower(*shapes))
