# SPDX-License-Identifier: Apache-2.0
"""How the kernel is blocked: a tuned entry for the layer's shape where there is one, else a heuristic."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax.numpy as jnp

from tpu_inference.kernels.tuned import lookup

OP, PART = "grouped_matmul", "blocks"
LANES = 128
MIB = 2**20
VMEM_BYTES: Mapping[str | None, int] = {"v5e": 48 * MIB, "v6e": 48 * MIB, "v5p": 28 * MIB, "tpu7x": 32 * MIB}
"""For blocks, of what a core has; chips not named have `LEAST_VMEM_BYTES`."""
LEAST_VMEM_BYTES = 11 * MIB
NO_FLOAT8 = ("v4",)
"""Chips whose matrix units do not take it."""
BLOCK_ROWS = 256
"""Rows that go through the matrix units with one load of a weight: fewer leave them waiting for weights, more are wasted on groups of few rows."""

FEW_ROWS = 128
"""The same where each group has few, and weights of a byte arrive twice as fast as the matrix units would be done with more."""
FEWEST_FETCHES = 24
"""Of weights of a byte: nothing hides the first."""


@dataclass(frozen=True)
class Config:
    """Blocks of the kernel: `block_rows` x in of rows, and `block_out` x in of weights."""

    block_rows: int
    block_out: int
    slots: int = 3
    """Weights in VMEM: one is multiplied by while the others are in flight."""

    def within(self, key: "ShapeKey", rows: int, *, transposed: bool = False) -> "Config":
        """The same for `rows` rows of a layer: blocks of whole tiles, and no more of them than there are."""
        tile = 32 // jnp.dtype(key.dtype).itemsize
        # What is not whole tiles of any dtype, or lanes where outputs lie along them, is not cut.
        block_out = key.out if key.out % (LANES if transposed else 32) else min(self.block_out, key.out)
        most = self.block_rows
        if key.quantized and rows <= FEW_ROWS * key.num_groups:
            most = min(most, FEW_ROWS)
        return replace(self, block_rows=min(most, -(-rows // tile) * tile), block_out=block_out)


@dataclass(frozen=True)
class ShapeKey:
    """What is known of a layer before its batches are: one device's share."""

    num_groups: int
    out: int
    columns: int
    dtype: str
    """Of rows."""
    weight_dtype: str

    @classmethod
    def of(cls, x: Any, weights: Any, num_groups: int | None = None, *, transposed: bool = False) -> "ShapeKey":
        """From the arrays of a call, or their shapes and dtypes; `num_groups` where these are some of the weights' groups."""
        out, columns = weights.shape[:0:-1] if transposed else weights.shape[1:]
        groups = num_groups or weights.shape[0]
        return cls(groups, out, columns, jnp.dtype(x.dtype).name, jnp.dtype(weights.dtype).name)

    @property
    def quantized(self) -> bool:
        return self.weight_dtype != self.dtype

    def __str__(self) -> str:
        """As in tuned tables."""
        return f"e{self.num_groups}_{self.out}x{self.columns}_{self.dtype}_{self.weight_dtype}"

    def vmem_bytes(self, config: Config) -> int:
        """Of the weights' slots, of two buffers for each other block, and of the product in float32."""
        size, weight_size = jnp.dtype(self.dtype).itemsize, jnp.dtype(self.weight_dtype).itemsize
        columns = -(-self.columns // LANES) * LANES
        rows = config.block_rows * size * (columns + config.block_out)
        weights = config.slots * config.block_out * columns * weight_size
        return 2 * rows + weights + 4 * config.block_rows * config.block_out


def even(length: int, blocks: int) -> int:
    """Columns of each of `blocks` blocks, in whole lanes."""
    return -(-length // (blocks * LANES)) * LANES


def heuristic(key: ShapeKey, chip: str | None) -> Config:
    """As many outputs a block as VMEM holds: rows are read once for each. `chip` is a name of a tuned table, None for any."""
    budget = VMEM_BYTES.get(chip, LEAST_VMEM_BYTES)
    if chip in NO_FLOAT8 and key.weight_dtype.startswith("float8"):
        budget //= 2  # a block is converted beside the others
    fewest = -(-FEWEST_FETCHES // key.num_groups) if key.quantized else 1
    for blocks in range(fewest, -(-key.out // LANES) + 1):
        config = Config(BLOCK_ROWS, even(key.out, blocks))
        if key.vmem_bytes(config) <= budget:
            return config
    return Config(BLOCK_ROWS, LANES)


def config_for(key: ShapeKey, chip: str | None) -> Config:
    """What the op runs with on a chip: the tuned entry where there is one, else the heuristic's."""
    tuned = lookup(OP, chip, str(key), PART)
    return Config(**tuned) if tuned else heuristic(key, chip)
