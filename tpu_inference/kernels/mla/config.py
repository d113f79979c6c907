# SPDX-License-Identifier: Apache-2.0
"""How the kernels are blocked: a tuned entry for the layer's shape where there is one, else a heuristic."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax.numpy as jnp

from tpu_inference.kernels.ragged_paged_attention import config as paged
from tpu_inference.kernels.ragged_paged_attention.config import VMEM_BYTES, PrefillConfig
from tpu_inference.kernels.ragged_paged_attention.pages import LANES
from tpu_inference.kernels.tuned import with_tuned

OP = "mla"
ITEM_TOKENS, LONG_ITEM_TOKENS, SLOTS = 1024, 2048, 5
"""Of an item of decoding: fewer tokens are more passes over the sums of all heads."""
MANY_HEADS = 64
"""From so many on, products and not HBM bound a decode from pages of a byte a number: longer items empty the matrix units less often."""
BLOCK_TOKENS, CHUNK_TOKENS = 64, 512
HEADS = 16
"""That a block of queries of prefill has, which visits the context once for each so many; a tile of memory's rows, of 16 bits each."""
_MIXED: Mapping[str, str] = {
    "v5e": "float8_e4m3b11fnuz", "v5p": "float8_e4m3b11fnuz", "v6e": "float8_e4m3b11fnuz", "tpu7x": "float8_e4m3fn",
}  # fmt: skip
"""Short floats that a chip's matrix unit takes as weights beside bfloat16."""


@dataclass(frozen=True)
class DecodeConfig(paged.DecodeConfig):
    """How the kernel of rows with one token is blocked."""

    piece: int = 256
    """Tokens of a matrix product: the width of a matrix unit of v6e."""
    mixed: bool = False
    """Whether the matrix unit takes pages as they are, beside queries and weights of more bits."""

    def within(self, table_width: int, page_size: int = LANES) -> "DecodeConfig":
        """The same for rows of up to `table_width` pages: no more tokens an item than it takes, in whole registers of scores."""
        granule = LANES // math.gcd(LANES, page_size)
        pages = min(self.pages_per_item, table_width)
        return replace(self, pages_per_item=-(-pages // granule) * granule)


@dataclass(frozen=True)
class Config:
    """Of both kernels."""

    decode: DecodeConfig
    prefill: PrefillConfig


@dataclass(frozen=True)
class ShapeKey:
    """What is known of a layer before its batches are: one device's share."""

    num_heads: int
    kv_lora_rank: int
    rope_dim: int
    page_size: int
    dtype: str
    """Of queries."""
    cache_dtype: str
    """Of pages."""

    @classmethod
    def of(cls, num_heads: int, kv_lora_rank: int, rope_dim: int, dtype: Any, pages: Any) -> "ShapeKey":
        """From the arrays of a call, or their shapes and dtypes."""
        names = (jnp.dtype(dtype).name, jnp.dtype(pages.dtype).name)
        return cls(num_heads, kv_lora_rank, rope_dim, pages.shape[3], *names)

    def __str__(self) -> str:
        """As in tuned tables."""
        return f"q{self.num_heads}_r{self.kv_lora_rank}_p{self.rope_dim}_page{self.page_size}_{self.dtype}_{self.cache_dtype}"

    @property
    def token_bytes(self) -> int:
        """In the pages, with padding."""
        width = -(-(self.kv_lora_rank + self.rope_dim) // LANES) * LANES
        return width * jnp.dtype(self.cache_dtype).itemsize

    def pages_within(self, tokens: int) -> int:
        """At least one."""
        return max(tokens // self.page_size, 1)


def heuristic(key: ShapeKey, chip: str | None) -> Config:
    """Blocks from arithmetic alone; `chip` is a name of a tuned table, None for any."""
    bound = key.num_heads >= MANY_HEADS and jnp.dtype(key.cache_dtype).itemsize == 1
    pages = key.pages_within(LONG_ITEM_TOKENS if bound else ITEM_TOKENS)
    slots = min(SLOTS, VMEM_BYTES // (pages * key.page_size * key.token_bytes))
    mixed = key.dtype == "bfloat16" and _MIXED.get(chip or "") == key.cache_dtype
    prefill = PrefillConfig(BLOCK_TOKENS, key.pages_within(CHUNK_TOKENS))
    return Config(DecodeConfig(pages, slots, mixed=mixed), prefill)


def config_for(key: ShapeKey, chip: str | None) -> Config:
    """What the op runs with on a chip: of each kernel the tuned entry where there is one, else the heuristic's."""
    return with_tuned(heuristic(key, chip), OP, chip, str(key), ("decode", "prefill"))
