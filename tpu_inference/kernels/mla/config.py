# SPDX-License-Identifier: Apache-2.0
"""How the kernels are blocked: a tuned entry for the layer's shape where there is one, else a heuristic."""

from dataclasses import dataclass, replace
from typing import Any

import jax.numpy as jnp

from tpu_inference.kernels.ragged_paged_attention.config import VMEM_BYTES, DecodeConfig, PrefillConfig
from tpu_inference.kernels.ragged_paged_attention.pages import LANES
from tpu_inference.kernels.tuned import lookup

OP = "mla"
ITEM_TOKENS, SLOTS = 1024, 5
"""Of an item of decoding: fewer tokens are more passes over the sums of all heads."""
BLOCK_QUERIES, CHUNK_TOKENS, MIN_BLOCK_TOKENS, MAX_GROUP = 1024, 512, 16, 16


@dataclass(frozen=True)
class Config:
    """Of both kernels."""

    decode: DecodeConfig
    prefill: PrefillConfig
    heads: int
    """That a block of queries of prefill has; a block visits the context once for each so many."""


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
    """Blocks from arithmetic alone; the same for every chip."""
    heads = max(n for n in range(1, MAX_GROUP + 1) if key.num_heads % n == 0)
    block = MIN_BLOCK_TOKENS
    while 2 * block * heads <= BLOCK_QUERIES:
        block *= 2
    pages = key.pages_within(ITEM_TOKENS)
    slots = min(SLOTS, VMEM_BYTES // (pages * key.page_size * key.token_bytes))
    return Config(DecodeConfig(pages, slots), PrefillConfig(block, key.pages_within(CHUNK_TOKENS)), heads)


def config_for(key: ShapeKey, chip: str | None) -> Config:
    """What the op runs with on a chip: of each kernel the tuned entry where there is one, else the heuristic's."""
    config = heuristic(key, chip)
    found = lookup(OP, chip, str(key), "decode")
    return replace(config, decode=replace(config.decode, **found)) if found else config
