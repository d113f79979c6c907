# SPDX-License-Identifier: Apache-2.0
"""Which keys the queries of a block see."""

from dataclasses import dataclass
from functools import reduce
from operator import or_
from typing import Any

import jax
import jax.numpy as jnp

Kind = int | None
"""Of a block of scores: the distance of its first key from its first query, where nothing but the diagonal masks it; None where only a mask tells."""
FULL = -(2**30)
"""Every query sees every key."""


@dataclass(frozen=True)
class Blocks:
    """A call's scores, and who sees whom."""

    num_queries: int
    num_keys: int
    block_q: int
    block_k: int
    causal: bool
    window: int | None
    segmented: bool

    @property
    def grid(self) -> tuple[int, int]:
        """Blocks of queries, and of keys."""
        return -(-self.num_queries // self.block_q), -(-self.num_keys // self.block_k)

    @property
    def ragged(self) -> bool:
        """Whether the last block has keys past the end."""
        return self.num_keys % self.block_k > 0

    @property
    def triangular(self) -> bool:
        """Whether the diagonal alone masks, through corners of tiles. Keys past the end are then seen by queries past the end alone."""
        alone = self.causal and self.window is None and not self.segmented
        return alone and self.block_q % self.block_k == 0 and self.num_queries <= self.num_keys

    @property
    def bounded(self) -> bool:
        """Whether queries see some keys only, by position."""
        return self.causal or self.window is not None

    def _step(self, i: Any, j: Any) -> tuple[Any, Any, Any]:
        """(the first block of keys that queries of block i see any of, that of step j > 0, the last one seen)."""
        first, last = 0, self.grid[1] - 1
        reach = 0 if self.causal else self.window - 1
        end = jnp.minimum(jax.lax.div((i + 1) * self.block_q - 1 + reach, self.block_k), last)
        if self.window is not None:
            first = jax.lax.div(jnp.maximum(i * self.block_q - self.window + 1, 0), self.block_k)
        return jnp.minimum(first, last), end - last + j, end

    def key_block(self, i: Any, j: Any) -> Any:
        """The block of keys at step j of block i of queries; below 0 for steps too many.

        These come after the first one: it hides the fetching of the second, and the last one that of the next queries and the storing of the output.
        """
        if not self.bounded:
            return j
        first, block, _ = self._step(i, j)
        return jnp.where(j == 0, first, jnp.where(block > first, block, -1))

    def fetched_block(self, i: Any, j: Any) -> Any:
        """As `key_block`, and the next one that is used for steps too many."""
        if not self.bounded:
            return j
        first, block, last = self._step(i, j)
        return jnp.where(j == 0, first, jnp.minimum(jnp.maximum(block, first + 1), last))

    def kinds(self, first_q: Any, first_k: Any, apart: Any, several: Any) -> list[tuple[Kind, Any]]:
        """(kind, whether the block from those on is of it), of those that a call can have; of none where no query sees a key.

        Args:
            apart: whether no query is of a segment of the keys.
            several: whether there is more than one segment, or may be.
        """
        last_q, last_k = first_q + self.block_q - 1, first_k + self.block_k - 1
        if self.triangular:
            corners = range(0, self.block_q, self.block_k)
            full = (first_k >= 0) & (last_k < first_q)
            return [(FULL, full), *((corner, first_k - first_q == corner) for corner in corners)]
        none, mixed = [], []
        if self.bounded:
            none.append(first_k < 0)
        if self.causal:
            mixed.append(last_k > first_q)
        if self.window is not None:
            none.append(last_k <= first_q - self.window)
            mixed.append(first_k <= last_q - self.window)
            if not self.causal:
                mixed.append(last_k >= first_q + self.window)
        if self.segmented:
            none.append(apart)
            mixed.append(several)
        if self.ragged:
            mixed.append(last_k >= self.num_keys)
        if not mixed:
            return [(FULL, True)]
        seen, masked = ~reduce(or_, none, jnp.bool_(False)), reduce(or_, mixed)
        return [(FULL, seen & ~masked), (None, seen & masked)]

    def seen(self, query: Any) -> tuple[Any, Any]:
        """(the first key, the key after the last) that a query sees by position."""
        first, stop = jnp.zeros_like(query), jnp.full_like(query, self.num_keys)
        if self.causal:
            stop = jnp.minimum(stop, query + 1)
        if self.window is not None:
            first = jnp.maximum(first, query - self.window + 1)
            stop = jnp.minimum(stop, query + self.window)
        return first, stop


def ranges(segments: jax.Array, block: int) -> tuple[jax.Array, jax.Array]:
    """The least and the greatest segment of each block, one batch row after the other."""
    padded = jnp.pad(segments, ((0, 0), (0, -segments.shape[1] % block)), mode="edge").reshape(-1, block)
    return padded.min(axis=1), padded.max(axis=1)
