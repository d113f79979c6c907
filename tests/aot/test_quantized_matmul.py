# SPDX-License-Identifier: Apache-2.0
"""The real TPU compiler takes the product with quantized weights: by the kernel where the matrix unit takes float8."""

import os
import re

os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")

import jax
import pytest
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from tpu_inference.kernels.quantized_matmul.shapes import Spec

pytestmark = [pytest.mark.slow, pytest.mark.aot]


@pytest.mark.parametrize("topology", ["v6e:2x2", "v5e:2x2", "tpu7x:2x2x1"])
@pytest.mark.parametrize(
    "spec",
    [
        Spec(64, 768, 4096, "float8_e4m3fn"),
        Spec(64, 640, 1792, "float8_e5m2"),
        Spec(8, 384, 1024, "int8", "int8"),
        Spec(32, 512, 1024, "float8_e4m3fn", groups=8),
        Spec(32, 512, 1024, "int8", groups=32),
        Spec(32, 512, 4096, "int8", groups=128),
        Spec(64, 640, 4096, "int4", groups=32),
        Spec(16, 512, 1024, "int4", groups=8, zero_points=True),
        Spec(64, 768, 4096, "int4", zero_points=True),
        Spec(32, 512, 1024, "e2m1", groups=32),
        Spec(8, 384, 1792, "e2m1"),
    ],
    ids=lambda spec: spec.about,
)
def test_every_generation(topology, spec):
    """By the kernel, which reads a layer where it lies: nothing is copied."""
    device = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices[0]
    sharding = SingleDeviceSharding(device)
    jitted = jax.jit(spec.function(device), in_shardings=sharding, out_shardings=sharding)
    compiled = jitted.lower(*spec.arguments(device)).compile()
    assert compiled.as_text().count("tpu_custom_call") == 1
    assert compiled.memory_analysis().temp_size_in_bytes < spec.out * spec.columns / 4


@pytest.mark.parametrize("topology", ["v4:2x2x1", "v5p:2x2x1"])
@pytest.mark.parametrize(
    "spec",
    [
        Spec(64, 768, 4096, "float8_e4m3fn", "float8_e4m3fn"),
        Spec(64, 768, 4096, "int8", "int8"),
        Spec(64, 768, 4096, "int4", groups=32, zero_points=True),
        Spec(64, 768, 4096, "e2m1", groups=128),
    ],
    ids=lambda spec: spec.about,
)
def test_chips_without_the_kernel(topology, spec):
    """XLA converts what their matrix units do not multiply."""
    device = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices[0]
    sharding = SingleDeviceSharding(device)
    jitted = jax.jit(spec.function(device), in_shardings=sharding, out_shardings=sharding)
    text = jitted.lower(*spec.arguments(device)).compile().as_text()
    assert "tpu_custom_call" not in text and spec.form(device) == "xla"


@pytest.mark.parametrize(("topology", "own"), [("tpu7x:2x2x1", True), ("v6e:2x2", False)])
def test_rounded_activations_of_float8(topology, own):
    """tpu7x multiplies float8 by float8, in the kernel for few rows and by XLA; products of the others are of bfloat16."""
    device = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices[0]
    sharding = SingleDeviceSharding(device)

    def lowered(rows):
        spec = Spec(rows, 1280, 1792, "float8_e4m3fn", "float8_e4m3fn")
        jitted = jax.jit(spec.function(device), in_shardings=sharding, out_shardings=sharding)
        return jitted.lower(*spec.arguments(device))

    assert lowered(64).compile().as_text().count("tpu_custom_call") == 1
    both = re.findall(r"dot_general.*xf8E4M3FN>, tensor<\S*xf8E4M3FN>\)", (many := lowered(2048)).as_text())
    assert bool(both) == own and many.compile().memory_analysis().temp_size_in_bytes < 2048 * (1280 + 1792) * 4


@pytest.mark.parametrize(
    "spec",
    [Spec(2048, 1280, 1792, "float8_e4m3fn"), Spec(1024, 512, 384, "int8"), Spec(1024, 2816, 4096, "int8", "int8")],
    ids=lambda spec: spec.about,
)
def test_many_rows(spec):
    """By the kernel that keeps the weight in VMEM."""
    device = topologies.get_topology_desc(platform="tpu", topology_name="v6e:2x2").devices[0]
    sharding = SingleDeviceSharding(device)
    jitted = jax.jit(spec.function(device), in_shardings=sharding, out_shardings=sharding)
    compiled = jitted.lower(*spec.arguments(device)).compile()
    assert compiled.as_text().count("tpu_custom_call") == 1
    assert compiled.memory_analysis().temp_size_in_bytes < spec.out * spec.columns / 4


def test_without_float8_in_the_matrix_unit():
    device = topologies.get_topology_desc(platform="tpu", topology_name="v4:2x2x1").devices[0]
    sharding, spec = SingleDeviceSharding(device), Spec(64, 768, 4096, "float8_e4m3fn")
    jitted = jax.jit(spec.function(device), in_shardings=sharding, out_shardings=sharding)
    assert "tpu_custom_call" not in jitted.lower(*spec.arguments(device)).compile().as_text()
