# SPDX-License-Identifier: Apache-2.0
"""How the kernels are blocked: a tuned entry for the layer's shape where there is one, else a heuristic."""

from dataclasses import dataclass, replace
from typing import Any

import jax.numpy as jnp

from tpu_inference.kernels.tuned import with_tuned

OP = "ragged_paged_attention"
VMEM_BYTES = 12 * 2**20
"""Of the 16 MiB that a kernel gets by default on the smallest chip; the rest is for what the compiler keeps."""
# Bytes in flight hide the latency of HBM: an item is large enough that its DMAs take longer than its scalar work, and small enough for a ring.
MIN_ITEM_BYTES, ITEM_TOKENS = 2**19, 1024
MIN_SLOTS = 5
"""A page that leaves no room for so many is not served."""
CHUNK_TOKENS, BLOCK_QUERIES, MAX_BLOCK_TOKENS, MIN_BLOCK_TOKENS = 1024, 1280, 512, 16


@dataclass(frozen=True)
class DecodeConfig:
    """How the kernel of rows with one token is blocked."""

    pages_per_item: int
    slots: int = MIN_SLOTS
    """Items in VMEM: two are computed with while the DMAs of the others are in flight."""
    piece: int = 512
    """Tokens of a matrix product: fewer leave columns of the matrix unit empty, and more leave it waiting for the first of them."""

    def within(self, table_width: int) -> "DecodeConfig":
        """The same for rows of up to `table_width` pages."""
        return replace(self, pages_per_item=min(self.pages_per_item, table_width))


@dataclass(frozen=True)
class PrefillConfig:
    """How the kernel of rows with more tokens is blocked."""

    block_tokens: int
    """Tokens of a block of queries."""
    pages_per_chunk: int
    tile: int = 256
    """Keys and queries of a tile of scores: as wide and deep as a matrix unit of v6e."""
    ahead: int = 6
    """Tiles by which scores precede their softmax: hides the latency of the matrix units, and costs registers."""

    def within(self, table_width: int, num_tokens: int) -> "PrefillConfig":
        """The same for rows of up to `table_width` pages, and `num_tokens` tokens in all."""
        block = self.block_tokens
        while block > MIN_BLOCK_TOKENS and block >= 2 * num_tokens:
            block //= 2
        return replace(self, block_tokens=block, pages_per_chunk=min(self.pages_per_chunk, table_width))


@dataclass(frozen=True)
class Config:
    """Of both kernels."""

    decode: DecodeConfig
    prefill: PrefillConfig


@dataclass(frozen=True)
class _Ring:
    """How a chip's decode kernel keeps HBM busy."""

    slots: int = MIN_SLOTS
    max_item_bytes: int = 2**20
    max_short_item_bytes: int = 2**20
    """Of pages of a byte a number, which are as much arithmetic as twice their bytes."""


_RINGS = {"tpu7x": _Ring(6, max_short_item_bytes=2**21)}
"""A core of tpu7x takes half a MiB in the time of 300 cycles: with one more item in flight, a DMA may take 1000. Chips not named have the default."""


@dataclass(frozen=True)
class ShapeKey:
    """What is known of a layer before its batches are: one device's share."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    page_size: int
    dtype: str
    """Of queries."""
    cache_dtype: str
    """Of pages."""
    planes: int
    width: int

    @classmethod
    def of(cls, num_heads: int, head_dim: int, dtype: Any, pages: Any) -> "ShapeKey":
        """From the arrays of a call, or their shapes and dtypes."""
        _, planes, num_kv_heads, page_size, width = pages.shape
        names = (jnp.dtype(dtype).name, jnp.dtype(pages.dtype).name)
        return cls(num_heads, num_kv_heads, head_dim, page_size, *names, planes, width)

    def __str__(self) -> str:
        """As in tuned tables; planes and width follow from the head dim."""
        sizes = f"q{self.num_heads}_kv{self.num_kv_heads}_d{self.head_dim}_page{self.page_size}"
        return f"{sizes}_{self.dtype}_{self.cache_dtype}"

    @property
    def group(self) -> int:
        """Query heads of a KV head."""
        return self.num_heads // self.num_kv_heads

    @property
    def token_bytes(self) -> int:
        """Of all KV heads in the pages."""
        return self.planes * self.num_kv_heads * self.width * jnp.dtype(self.cache_dtype).itemsize

    def pages_within(self, tokens: int) -> int:
        """At least one."""
        return max(tokens // self.page_size, 1)


def heuristic(key: ShapeKey, chip: str | None) -> Config:
    """Blocks from arithmetic alone; `chip` is a name of a tuned table, None for any."""
    ring = _RINGS.get(chip, _Ring())
    short = jnp.dtype(key.cache_dtype).itemsize == 1
    most_bytes = ring.max_short_item_bytes if short else ring.max_item_bytes
    tokens = min(max(ITEM_TOKENS, MIN_ITEM_BYTES // key.token_bytes), most_bytes // key.token_bytes)
    block = MAX_BLOCK_TOKENS
    while block > MIN_BLOCK_TOKENS and block * key.group > BLOCK_QUERIES:
        block //= 2
    pages = key.pages_within(tokens)
    most = VMEM_BYTES // (pages * key.page_size * key.token_bytes)
    return Config(
        DecodeConfig(pages, min(ring.slots, most)),
        PrefillConfig(block, key.pages_within(CHUNK_TOKENS)),
    )


def config_for(key: ShapeKey, chip: str | None) -> Config:
    """What the op runs with on a chip: of each kernel the tuned entry where there is one, else the heuristic's."""
    return with_tuned(heuristic(key, chip), OP, chip, str(key), ("decode", "prefill"))
