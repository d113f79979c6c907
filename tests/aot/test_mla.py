# SPDX-License-Identifier: Apache-2.0
"""The real TPU compiler takes latent attention, for the three main generations, without a TPU."""

import os

os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")

from dataclasses import replace

import pytest
from jax.experimental import topologies

from tpu_inference.kernels.mla.shapes import SHAPES
from tpu_inference.tools.kernel_report.cases import lower

pytestmark = [pytest.mark.slow, pytest.mark.aot]
CASES = [
    ("v6e:2x2", "decode_fp8_64x4k"), ("v5e:2x2", "decode_tp8_64x4k"), ("tpu7x:2x2x1", "decode_fp8_tp8_64x4k"),
]  # fmt: skip


@pytest.mark.parametrize(("topology", "name"), CASES)
def test_generations(topology, name):
    device = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices[0]
    shape = replace(SHAPES[name], rows=((1023, 1),) * 31 + ((0, 64),))
    compiled = lower(shape, device).compile()
    assert compiled.as_text().count("tpu_custom_call") == 3, "decode, write, prefill"
    pages = shape.arguments(device)[4]
    num_bytes = pages.size * pages.dtype.itemsize
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes >= num_bytes, "pages are updated in place"
    assert memory.temp_size_in_bytes < num_bytes / 2, "a temporary as large as the pages is a copy of them"
