# SPDX-License-Identifier: Apache-2.0
"""What the Pallas kernels share: constants, the static part of a call, and the copies of a row's pages."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from tpu_inference.kernels.ragged_paged_attention.pages import LANES

MASKED = -1e30
FLOOR = -1e29
"""Of a running maximum: far above MASKED, so that exp(MASKED - maximum) is 0 even where all is masked."""
NO_WINDOW = 2**30


def sublanes(dtype: Any) -> int:
    """Rows of a tile of memory: the least that a DMA can write."""
    return 8 * 4 // jnp.dtype(dtype).itemsize


@dataclass(frozen=True)
class PagedShape:
    """What is static about a call."""

    num_heads: int
    num_kv_heads: int
    page_size: int
    planes: int
    width: int
    """Lanes of a plane."""
    head_dim: int
    num_rows: int
    table_width: int
    soft_cap: float | None
    config: Any
    """DecodeConfig or PrefillConfig."""
    dtype: Any
    """Of the pages."""
    compute_dtype: Any
    """Of the operands of matrix products."""
    latent: int | None = None
    """Where every head shares one latent a token: V is the first `latent` lanes of K. None where V is its own."""

    @classmethod
    def of(
        cls, num_heads: int, head_dim: int, q_dtype: Any, pages: Any, block_tables: Any,
        soft_cap: float | None, config: Any, latent: int | None = None, head_blocks: int = 1,
    ):  # fmt: skip
        """From the arrays of a call. With `latent`, heads go in `head_blocks` groups, each as if it had a KV head of its own."""
        _, planes, num_kv_heads, page_size, width = pages.shape
        num_kv_heads *= head_blocks
        compute = q_dtype if pages.dtype.itemsize == 1 else pages.dtype
        return cls(
            num_heads, num_kv_heads, page_size, planes, width, head_dim, *block_tables.shape,
            soft_cap, config, pages.dtype, compute, latent,
        )  # fmt: skip

    @property
    def group(self) -> int:
        """Query heads of a KV head."""
        return self.num_heads // self.num_kv_heads

    @property
    def precision(self) -> Any:
        """Of the matrix products."""
        return jax.lax.Precision.HIGHEST if self.compute_dtype == jnp.float32 else None

    # Where K and V share a plane, K is its first `head_dim` lanes and V those after it. Reads begin and end with whole tiles of lanes: a query is 0
    # where it meets V, and an output is turned to the front, away from what it made of K.

    @property
    def q_width(self) -> int:
        """Lanes of a query, and of an output."""
        return -(-self.head_dim // LANES) * LANES

    @property
    def v_start(self) -> int:
        """First lane read for V."""
        return 0 if self.planes == 2 or self.latent else self.head_dim // LANES * LANES

    @property
    def v_width(self) -> int:
        """Lanes read for V."""
        return self.latent or self.width - self.v_start

    def keys(self, kv: Any, slot: Any, head: Any, tokens: Any = slice(None)) -> jax.Array:
        """[tokens, q_width] of `kv[slot]` of one head."""
        return kv[slot, 0, head, tokens, : self.q_width].astype(self.compute_dtype)

    def values(self, kv: Any, slot: Any, head: Any, tokens: Any = slice(None)) -> jax.Array:
        """[tokens, v_width] of `kv[slot]` of one head."""
        return kv[slot, self.planes - 1, head, tokens, pl.ds(self.v_start, self.v_width)].astype(self.compute_dtype)

    @property
    def value_lane(self) -> int:
        """Where V begins, of the lanes read for it."""
        return 0 if self.planes == 2 or self.latent else self.head_dim - self.v_start

    @property
    def value_dim(self) -> int:
        """Numbers of V."""
        return self.latent or self.head_dim

    @property
    def value_rows(self) -> int:
        """Of V transposed, with at least one of ones."""
        return (self.value_dim // 16 + 1) * 16

    def output(self, values: jax.Array) -> jax.Array:
        """[N, q_width] with the output of a head in front, of [N, v_width]."""
        if self.value_lane:
            values = pltpu.roll(values, self.v_width - self.value_lane, 1)
        if self.v_width < self.q_width:
            padding = jnp.zeros((values.shape[0], self.q_width - self.v_width), values.dtype)
            values = jnp.concatenate([values, padding], axis=1)
        return values[:, : self.q_width]

    def table_index(self, row: Any, index: Any) -> Any:
        """Where the flat table holds a row's page; somewhere in it past the end of rows or of a row's pages."""
        return jnp.minimum(row * self.table_width + index, self.num_rows * self.table_width - 1)


def pieces_between(starts: list[Callable[[], None]], pieces: int) -> Callable[[Callable], Any]:
    """Makes pieces of arithmetic one by one, and calls some of `starts` before each of the `pieces` of them."""
    left = iter(range(pieces, 0, -1))

    def piece(make: Callable[[], Any]) -> Any:
        for _ in range(-(-len(starts) // next(left))):
            starts.pop(0)()
        return make()

    return piece


def page_starts(
    kernel: Any, row: Any, chunk: Any, count: int, end: Any, slot: Any, head: Any = None
) -> list[Callable[[], None]]:
    """What starts the copies of the `count` pages of a row's chunk into `kernel.kv[slot]`, one by one; no page starts at position `end` or after.

    All KV heads, or `head` alone.
    """
    shape = kernel.shape
    heads = pl.ds(0, shape.num_kv_heads) if head is None else pl.ds(0 if shape.latent else head, 1)

    def start(j: int) -> None:
        index = chunk * count + j

        @pl.when(index * shape.page_size < end)
        def _() -> None:
            page = kernel.tables[shape.table_index(row, index)] + kernel.page_offset
            target = kernel.kv.at[slot, :, :, pl.ds(j * shape.page_size, shape.page_size)]
            pltpu.make_async_copy(kernel.pages.at[page, :, heads], target, kernel.kv_sem.at[slot]).start()

    return [partial(start, j) for j in range(count)]


def wait_for_pages(kernel: Any, chunk: Any, count: int, end: Any, slot: Any) -> None:
    """Wait for what `page_starts` started. A wait counts bytes: a few of them, by powers of two, are enough."""
    size = kernel.shape.page_size
    there = jnp.clip(jax.lax.div(end + size - 1, size) - chunk * count, 0, count)
    bit = 1
    while bit <= count:
        some = kernel.kv.at[slot, :, :, pl.ds(0, bit * size)]
        pl.when((there & bit) != 0)(pltpu.make_async_copy(some, some, kernel.kv_sem.at[slot]).wait)
        bit *= 2
