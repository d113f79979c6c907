# SPDX-License-Identifier: Apache-2.0
"""How the kernel is blocked."""

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp

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


def _even(length: int, largest: int) -> int:
    """The block that pads `length` least, of those that take as few blocks as `largest` does."""
    blocks = -(-length // largest)
    return -(-length // (blocks * LANES)) * LANES


def heuristic(q: Any, k: Any, *, causal: bool, masked: bool) -> Config:
    """Large blocks, since filling and draining the matrix units costs each some 400 cycles; smaller ones where VMEM or the compiler asks for it.

    Args:
        q, k: arrays of the op, or their shapes and dtypes.
        masked: whether there are segments or a window, of which small blocks skip more.
    """
    _, heads, num_queries, head_dim = q.shape
    num_keys, group = k.shape[2], heads // k.shape[1]
    scarce = jnp.dtype(q.dtype).itemsize // 2 * -(-head_dim // LANES)
    largest_q, largest_k = BLOCK_Q // scarce, BLOCK_K // min(scarce, 2)
    scores = largest_q * largest_k
    if masked:
        largest_q = largest_k = min(largest_q, MASKED_BLOCK)
    block_q, block_k = _even(num_queries, largest_q), _even(num_keys, largest_k)
    if causal:  # the diagonal goes through corners of blocks: half of what is above it is then left out
        block_k = min(block_k, block_q)
        pairs = largest_q > largest_k and -(-num_queries // block_k) % 2 == 0
        block_q = block_k * (2 if pairs else 1)
    # Small blocks make up for it by heads.
    wanted = scores // (block_q * block_k)
    fitting = [n for n in range(1, heads + 1) if heads % n == 0 and (group % n == 0 or n % group == 0) and n <= wanted]
    return Config(block_q, block_k, max(fitting, default=1))
