# SPDX-License-Identifier: Apache-2.0
"""The real TPU compiler takes the product with quantized weights: by the kernel on v6e, by XLA elsewhere."""

import os

os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")

import jax
import pytest
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from tpu_inference.kernels.quantized_matmul.shapes import Spec

pytestmark = [pytest.mark.slow, pytest.mark.aot]


@pytest.mark.parametrize(("topology", "kernels"), [("v6e:2x2", 1), ("v5e:2x2", 0), ("tpu7x:2x2x1", 0)])
def test_every_generation(topology, kernels):
    device = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices[0]
    sharding, spec = SingleDeviceSharding(device), Spec(64, 768, 4096, "float8_e4m3fn")
    jitted = jax.jit(spec.function(device), in_shardings=sharding, out_shardings=sharding)
    text = jitted.lower(*spec.arguments(device)).compile().as_text()
    assert text.count("tpu_custom_call") == kernels
