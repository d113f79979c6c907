# SPDX-License-Identifier: Apache-2.0
"""The real TPU compiler takes the flash attention kernel, for every generation, without a TPU."""

import os

os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")

from functools import partial

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from tpu_inference.kernels.flash_attention import flash_attention, implementation_for
from tpu_inference.kernels.flash_attention.shapes import SPECS, Spec

pytestmark = [pytest.mark.slow, pytest.mark.aot]
GENERATIONS = ["v6e:2x2", "v5e:2x2", "tpu7x:2x2x1", "v5p:2x2x1", "v4:2x2x1"]


def check(topology, spec):
    """It compiles, to the kernel and without a copy of q, k, v or the output."""
    device = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices[0]
    sharding = SingleDeviceSharding(device)
    fn = partial(flash_attention, implementation=implementation_for(device), **spec.options)
    compiled = jax.jit(fn, in_shardings=sharding, out_shardings=sharding).lower(*spec.arguments()).compile()
    text = compiled.as_text()
    assert text.count("tpu_custom_call") == 1
    assert spec.segmented or " copy(" not in text


@pytest.mark.parametrize("topology", GENERATIONS)
@pytest.mark.parametrize(
    "spec", [Spec(1, 2, 512, 128, causal=True), Spec(1, 2, 500, 72, segmented=True)], ids=["causal", "segments"]
)
def test_every_generation(topology, spec):
    check(topology, spec)


@pytest.mark.parametrize("name", ["flash_1x16x4096x128", "flash_1x16x4096x128_causal", "vit_8x16x577x64"])
def test_named_shapes(name):
    check("v6e:2x2", SPECS[name])


@pytest.mark.parametrize(
    ("head_dim", "dtype"),
    [*((head_dim, jnp.bfloat16) for head_dim in (64, 80, 96, 192, 256)), (72, jnp.float32), (256, jnp.float32)],
)
def test_head_dims(head_dim, dtype):
    check("v5e:2x2", Spec(1, 4, 512, head_dim, kv_heads=2, dtype=jnp.dtype(dtype).name))
