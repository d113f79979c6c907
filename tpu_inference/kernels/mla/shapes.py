# SPDX-License-Identifier: Apache-2.0
"""Named shapes of the op: DeepSeek V3's, whole and as one of eight devices sees it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from tpu_inference.kernels.forms import implementation_for
from tpu_inference.kernels.mla.api import mla_attention
from tpu_inference.kernels.mla.config import Config, ShapeKey
from tpu_inference.kernels.mla.pages import latent_pages_shape
from tpu_inference.kernels.mla.pallas import misfit
from tpu_inference.kernels.ragged_paged_attention.pages import storage_dtype
from tpu_inference.kernels.ragged_paged_attention.shapes import SPARE_PAGES, PagedBatch


@dataclass(frozen=True)
class LatentShape(PagedBatch):
    """A batch, and the layer that it meets."""

    about: str
    rows: tuple[tuple[int, int], ...]
    """(tokens before this step, tokens of this step) of each row; rows of one token first."""
    num_heads: int
    kv_lora_rank: int = 512
    rope_dim: int = 64
    page_size: int = 128
    dtype: str = "bfloat16"
    cache_dtype: str = "bfloat16"
    chips: tuple[str, ...] = ()
    """Those that the shape is of interest for; all where empty."""

    @property
    def useful_bytes(self) -> int:
        """The latent and the rotated key of every row's context, once, without padding."""
        return sum(self.lengths) * (self.kv_lora_rank + self.rope_dim) * jnp.dtype(self.cache_dtype).itemsize

    @property
    def useful_flops(self) -> int:
        """Of both products of the absorbed form."""
        return 2 * self.num_heads * (2 * self.kv_lora_rank + self.rope_dim) * self.pairs

    def arguments(self, device: jax.Device) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Of `function`, by position: those of `mla_attention`."""
        tokens, rows = sum(new for _, new in self.rows), len(self.rows)
        pages = latent_pages_shape(
            rows * self.table_width + SPARE_PAGES, self.page_size, self.kv_lora_rank, self.rope_dim, "tpu"
        )
        dims = (self.kv_lora_rank, self.rope_dim)
        return (
            *(jax.ShapeDtypeStruct((tokens, self.num_heads, dim), self.dtype) for dim in dims),
            *(jax.ShapeDtypeStruct((tokens, dim), self.dtype) for dim in dims),
            jax.ShapeDtypeStruct(pages, storage_dtype(self.cache_dtype, device)),
            *(jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((rows, self.table_width), (rows,), (rows + 1,))),
        )  # fmt: skip

    donated = (0, 4)
    """Positions of arguments that are updated in place: outputs replace queries, which in a layer are of no further use."""

    def function(self, device: jax.Device, config: Config | None = None) -> Callable:
        """The op as a device runs it."""
        scale = (self.kv_lora_rank + self.rope_dim) ** -0.5
        return partial(mla_attention, scale=scale, implementation=implementation_for(device), config=config)

    def key(self, device: jax.Device) -> ShapeKey:
        """Of tuned tables."""
        pages = self.arguments(device)[4]
        return ShapeKey.of(self.num_heads, self.kv_lora_rank, self.rope_dim, self.dtype, pages)

    def form(self, device: jax.Device) -> str:
        """The form that the device runs, and why where that is not "pallas"."""
        if (form := implementation_for(device)) != "pallas":
            return str(form)
        reason = misfit(*self.arguments(device)[4:6], self.kv_lora_rank)
        return str(form) if reason is None else f"xla ({reason})"

    def workload(self, device: jax.Device) -> Mapping[str, Mapping[int, Any]]:
        """As `schedule.workload` takes it."""
        if self.form(device) != "pallas":
            return {}
        return self.scalar_arguments()


_DECODES = ((4095, 1),) * 64
_FP8 = "float8_e4m3fn"
SHAPES: Mapping[str, LatentShape] = {
    "decode_64x4k": LatentShape("64 decodes at 4096, 128 heads", _DECODES, 128),
    "decode_fp8_64x4k": LatentShape("64 decodes at 4096, 128 heads, fp8 cache", _DECODES, 128, cache_dtype=_FP8),
    "decode_tp8_64x4k": LatentShape("64 decodes at 4096, 16 heads", _DECODES, 16),
    "decode_fp8_tp8_64x4k": LatentShape("64 decodes at 4096, 16 heads, fp8 cache", _DECODES, 16, cache_dtype=_FP8),
    "prefill_tp8_2048": LatentShape("a prompt of 2048, 16 heads", ((0, 2048),), 16),
}
