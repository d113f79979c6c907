# SPDX-License-Identifier: Apache-2.0
"""How the Pallas kernels are blocked."""

import math

import jax
import jax.numpy as jnp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tpu_inference.kernels.ragged_paged_attention import implementation_for, kv_pages_shape, pallas
from tpu_inference.kernels.ragged_paged_attention.config import BLOCK_QUERIES, VMEM_BYTES, ShapeKey, heuristic


class Device:
    def __init__(self, platform, device_kind):
        self.platform, self.device_kind = platform, device_kind


@pytest.mark.parametrize(
    ("platform", "kind", "form"),
    [("cpu", "cpu", "xla"), ("tpu", "TPU v6 lite", "pallas"), ("tpu", "TPU7x", "pallas"), ("tpu", "TPU v3", "xla")],
)
def test_the_device_decides_the_form(platform, kind, form):
    assert implementation_for(Device(platform, kind)) == form


@settings(deadline=None)
@given(
    kv_heads=st.integers(1, 64), group=st.integers(1, 16), head_dim=st.sampled_from([64, 80, 96, 128, 192, 256]),
    page_size=st.sampled_from([16, 32, 64, 128, 256]), table=st.integers(1, 600),
    tokens=st.sampled_from([16, 64, 575, 2048]),
    dtype=st.sampled_from([jnp.float8_e4m3fn, jnp.bfloat16, jnp.float32]),
    chip=st.sampled_from([None, "v5e", "v6e", "tpu7x"]),
)  # fmt: skip
def test_buffers_fit_wherever_the_kernels_serve(kv_heads, group, head_dim, page_size, table, tokens, dtype, chip):
    pages = jax.ShapeDtypeStruct(kv_pages_shape(8, page_size, kv_heads, head_dim, "tpu"), dtype)
    if pallas.misfit(pages, jax.ShapeDtypeStruct((8, table), jnp.int32)):
        return
    page = math.prod(pages.shape[1:]) * pages.dtype.itemsize
    key = ShapeKey.of(kv_heads * group, head_dim, jnp.bfloat16, pages)
    config = heuristic(key, chip)
    decode, prefill = config.decode.within(table), config.prefill.within(table, tokens)
    assert 1 <= decode.pages_per_item <= table
    assert decode.slots * decode.pages_per_item * page <= VMEM_BYTES
    assert 1 <= prefill.pages_per_chunk <= table
    assert prefill.block_tokens % 16 == 0
    assert prefill.block_tokens < 2 * max(tokens, 16)
    assert prefill.block_tokens * group <= max(BLOCK_QUERIES, 16 * group)


@pytest.mark.parametrize(
    ("head_dim", "page_size", "kv_heads", "table", "reason"),
    [
        (128, 8, 2, 10, "page_size 8"),
        (256, 256, 64, 10, "VMEM"),
        (128, 128, 2, 1025, "SMEM"),
        (128, 16, 2, 10, None),
        (80, 16, 2, 10, None),
    ],
)
def test_what_the_kernels_do_not_serve_is_said(head_dim, page_size, kv_heads, table, reason):
    shape = kv_pages_shape(4, page_size, kv_heads, head_dim, "tpu")
    said = pallas.misfit(jax.ShapeDtypeStruct(shape, jnp.bfloat16), jax.ShapeDtypeStruct((1024, table), jnp.int32))
    assert said is None if reason is None else reason in said
