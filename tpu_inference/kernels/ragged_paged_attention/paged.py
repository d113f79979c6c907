# SPDX-License-Identifier: Apache-2.0
"""What the Pallas kernels share: constants, the static part of a call, and the copies of a row's pages."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

MASKED = -1e30
FLOOR = -1e29
"""Of a running maximum: far above MASKED, so that exp(MASKED - maximum) is 0 even where all is masked."""
NO_WINDOW = 2**30
LANES = 128


def sublanes(dtype: Any) -> int:
    """Rows of a tile of memory: the least that a DMA can write."""
    return 8 * 4 // jnp.dtype(dtype).itemsize


@dataclass(frozen=True)
class PagedShape:
    """What is static about a call."""

    num_heads: int
    num_kv_heads: int
    page_size: int
    head_dim: int
    num_rows: int
    table_width: int
    scale: float
    soft_cap: float | None
    config: Any
    """DecodeConfig or PrefillConfig."""
    dtype: Any

    @classmethod
    def of(cls, num_heads: int, pages: Any, block_tables: Any, scale: float, soft_cap: float | None, config: Any):
        """From the arrays of a call."""
        _, _, num_kv_heads, page_size, head_dim = pages.shape
        return cls(
            num_heads, num_kv_heads, page_size, head_dim, *block_tables.shape, scale, soft_cap, config, pages.dtype
        )

    @property
    def group(self) -> int:
        """Query heads of a KV head."""
        return self.num_heads // self.num_kv_heads

    @property
    def precision(self) -> Any:
        """Of the matrix products."""
        return jax.lax.Precision.HIGHEST if self.dtype == jnp.float32 else None

    def table_index(self, row: Any, index: Any) -> Any:
        """Where the flat table holds a row's page; somewhere in it past the end of rows or of a row's pages."""
        return jnp.minimum(row * self.table_width + index, self.num_rows * self.table_width - 1)


def page_copies(kernel: Any, row: Any, chunk: Any, count: int, end: Any, slot: Any) -> list[tuple[Any, Any]]:
    """(whether it is there, its copy into `kernel.kv[slot]`) of the `count` pages of a row's chunk; no page starts at position `end` or after."""
    shape, out = kernel.shape, []
    for j in range(count):
        index = chunk * count + j
        page = kernel.tables[shape.table_index(row, index)] + kernel.page_offset
        target = kernel.kv.at[slot, :, :, pl.ds(j * shape.page_size, shape.page_size)]
        copy = pltpu.make_async_copy(kernel.pages.at[page], target, kernel.kv_sem.at[slot])
        out.append((index * shape.page_size < end, copy))
    return out
