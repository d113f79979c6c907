# SPDX-License-Identifier: Apache-2.0
"""How the kernel is blocked: a tuned entry for the call's shape where there is one, else a heuristic."""

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp

from tpu_inference.kernels.tuned import lookup

OP, PART = "flash_attention", "blocks"
LANES = 128
TILE = 256
"""Queries and keys of a tile of scores: the width and the depth of the matrix units of v6e and tpu7x, of which each takes a tile of its own."""
BLOCK_Q, BLOCK_K, MASKED_BLOCK = 2048, 1024, 512


@dataclass(frozen=True)
class Config:
    """Blocks are multiples of LANES; the kernel's body is straight-line code for one of queries and one of keys."""

    block_q: int
    block_k: int
    heads: int = 1
    """Of a block: query heads of one KV head, or all of those of some."""
    ahead: int = 8
    """Tiles by which the scores precede the softmax: hides the latency of the matrix units, and costs VMEM."""


@dataclass(frozen=True)
class ShapeKey:
    """What is static about a call, but for the scale."""

    num_heads: int
    num_kv_heads: int
    num_queries: int
    num_keys: int
    head_dim: int
    dtype: str
    causal: bool = False
    window: int | None = None
    segmented: bool = False

    @classmethod
    def of(cls, q: Any, k: Any, **masks: Any) -> "ShapeKey":
        """From arrays of the op, or their shapes and dtypes; `masks` are `causal`, `window` and `segmented`."""
        _, heads, num_queries, head_dim = q.shape
        return cls(heads, k.shape[1], num_queries, k.shape[2], head_dim, jnp.dtype(q.dtype).name, **masks)

    def __str__(self) -> str:
        """As in tuned tables."""
        sizes = (
            f"q{self.num_heads}_kv{self.num_kv_heads}_{self.num_queries}x{self.num_keys}_d{self.head_dim}_{self.dtype}"
        )
        masks = ("causal" * self.causal, f"window{self.window}" if self.window else "", "segmented" * self.segmented)
        return "_".join([sizes, *filter(None, masks)])

    @property
    def masked(self) -> bool:
        """Whether there are segments or a window, of which small blocks skip more."""
        return self.segmented or self.window is not None


def even(length: int, largest: int) -> int:
    """The block that pads `length` least, of those that take as few blocks as `largest` does."""
    blocks = -(-length // largest)
    return -(-length // (blocks * LANES)) * LANES


def heuristic(key: ShapeKey, chip: str | None) -> Config:
    """Large blocks, since filling and draining the matrix units costs each some 400 cycles; smaller ones where VMEM or the compiler asks for it.

    `chip` is a name of a tuned table, None for any.
    """
    del chip
    heads, group = key.num_heads, key.num_heads // key.num_kv_heads
    scarce = jnp.dtype(key.dtype).itemsize // 2 * -(-key.head_dim // LANES)
    largest_q, largest_k = BLOCK_Q // scarce, BLOCK_K // min(scarce, 2)
    scores = largest_q * largest_k
    if key.masked:
        largest_q = largest_k = min(largest_q, MASKED_BLOCK)
    block_q, block_k = even(key.num_queries, largest_q), even(key.num_keys, largest_k)
    if key.causal:  # the diagonal goes through corners of blocks: half of what is above it is then left out
        block_k = min(block_k, block_q)
        pairs = largest_q > largest_k and -(-key.num_queries // block_k) % 2 == 0
        block_q = block_k * (2 if pairs else 1)
    # Small blocks make up for it by heads.
    wanted = scores // (block_q * block_k)
    fitting = [n for n in range(1, heads + 1) if heads % n == 0 and (group % n == 0 or n % group == 0) and n <= wanted]
    return Config(block_q, block_k, max(fitting, default=1))


def config_for(key: ShapeKey, chip: str | None) -> Config:
    """What the op runs with on a chip: the tuned entry where there is one, else the heuristic's."""
    tuned = lookup(OP, chip, str(key), PART)
    return Config(**tuned) if tuned else heuristic(key, chip)
