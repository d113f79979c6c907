# SPDX-License-Identifier: Apache-2.0
"""A matrix whose rows are several matrices one after another (q, k, v; gate, up), divided so that each shard has its part of every one."""

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np


@dataclass(frozen=True)
class Partition:
    """How the rows of a fused matrix are laid out over `shards` devices."""

    sizes: tuple[int, ...]
    """Rows of each of the fused matrices."""
    units: tuple[int, ...]
    """Of each matrix the units (heads, or rows) that stay whole; a matrix is divided where its units divide among the shards."""
    shards: int

    @property
    def divided(self) -> tuple[bool, ...]:
        """Which of the matrices are divided; each device has all of the others."""
        return tuple(units % self.shards == 0 for units in self.units)

    @property
    def is_plain(self) -> bool:
        """Whether the rows stay in their order, all of them divided."""
        return self.shards == 1 or (len(self.sizes) == 1 and all(self.divided))

    def rows(self, divided: bool) -> np.ndarray:
        """The rows of the matrices that are (or are not) divided, in the order of the devices."""
        ends = np.cumsum(self.sizes)
        parts = [
            np.arange(end - size, end)
            for size, end, is_divided in zip(self.sizes, ends, self.divided, strict=True)
            if is_divided == divided
        ]
        if not parts:
            return np.arange(0)
        shards = self.shards if divided else 1
        return np.concatenate([part.reshape(shards, -1) for part in parts], axis=1).reshape(-1)

    def join(self, divided: jax.Array | None, whole: jax.Array | None) -> jax.Array:
        """Products [T, rows(True)] and [T, rows(False)] -> [T, sum(sizes)], the columns back in the order of the matrices."""
        products = {True: self._split(divided, True), False: self._split(whole, False)}
        return jnp.concatenate([next(products[is_divided]) for is_divided in self.divided], axis=1)

    def _split(self, product: jax.Array | None, divided: bool):
        if product is None:
            return
        shards = self.shards if divided else 1
        sizes: Sequence[int] = [s // shards for s, d in zip(self.sizes, self.divided, strict=True) if d == divided]
        product = product.reshape(product.shape[0], shards, sum(sizes))
        start = 0
        for size in sizes:
            yield product[:, :, start : start + size].reshape(product.shape[0], -1)
            start += size
