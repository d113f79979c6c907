# SPDX-License-Identifier: Apache-2.0
"""Attention of a ragged batch over a paged KV cache, with the cache write."""

from tpu_inference.kernels.forms import implementation_for
from tpu_inference.kernels.ragged_paged_attention.api import ragged_paged_attention
from tpu_inference.kernels.ragged_paged_attention.pages import KV_PAGES_AXES, kv_pages_shape, storage_dtype
from tpu_inference.kernels.ragged_paged_attention.pallas import misfit

__all__ = ["KV_PAGES_AXES", "implementation_for", "kv_pages_shape", "misfit", "ragged_paged_attention", "storage_dtype"]
