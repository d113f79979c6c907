# SPDX-License-Identifier: Apache-2.0
"""How the kernel for few rows is blocked: a tuned entry for the product's shape where there is one, else a heuristic."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax.numpy as jnp

from tpu_inference.kernels.quantized_matmul.packing import KINDS
from tpu_inference.kernels.tuned import lookup

OP, PART = "quantized_matmul", "blocks"
LANES = 128
MIB = 2**20
WIDTHS: Mapping[str | None, int] = {"v5e": 128}
"""Rows of the weight that go through the matrix units side by side, where that is not `WIDTH`: fewer leave some waiting."""
WIDTH = 256
BLOCK_BYTES: Mapping[str | None, int] = {"v5e": MIB // 2, "tpu7x": 2 * MIB}
"""Of weights at a time, where that is not a MiB: with less, what the first product takes to come out of the matrix units is not hidden; with more,
the last block's products are longer in coming after its bytes."""
CONVERTED_BLOCK_BYTES: Mapping[str | None, int] = {"tpu7x": MIB}
"""The same of int8 in groups, whose sums larger blocks do not leave in vector registers."""
LEAST_BLOCKS, LEAST_BLOCK_BYTES = 8, MIB // 4
LEAST_BLOCKS_OF: Mapping[str | None, int] = {"tpu7x": 4}
"""Of a small weight, whose last block would be much of it; and no smaller blocks for that."""
SLOTS = 6
MOST_VMEM_BYTES = 40 * MIB


@dataclass(frozen=True)
class Config:
    """Blocks of the kernel: `block_out` rows of the weight with all their columns."""

    block_out: int
    slots: int = SLOTS
    """Blocks in VMEM: one is multiplied by while the others are in flight."""

    def within(self, out: int) -> "Config":
        """No more rows than there are, and no more slots than blocks."""
        block_out = min(self.block_out, out)
        return replace(self, block_out=block_out, slots=max(2, min(self.slots, -(-out // block_out))))


@dataclass(frozen=True)
class ShapeKey:
    """A product of few rows: one device's share."""

    rows: int
    out: int
    columns: int
    dtype: str
    """Of values, or what packed ones are."""
    groups: int = 1
    activations: str | None = None

    @classmethod
    def of(cls, x: Any, values: Any, groups: int, activations: str | None, packed: str | None = None) -> "ShapeKey":
        """From the arrays of a call, or their shapes and dtypes. The rows count in powers of two."""
        rows = 1 << max(x.shape[0] - 1, 7).bit_length()
        dtype = packed or jnp.dtype(values.dtype).name
        return cls(rows, values.shape[-2], x.shape[1], dtype, groups, activations)

    @property
    def byte_columns(self) -> int:
        """Of a row of the weight."""
        return self.columns // 2 if self.dtype in KINDS else self.columns

    def __str__(self) -> str:
        """As in tuned tables."""
        parts = (f"{self.rows}x{self.out}x{self.columns}", self.dtype, f"g{self.groups}", self.activations or "")
        return "_".join(filter(None, parts))

    def vmem_bytes(self, config: Config) -> int:
        """Of the weights' slots, x and what is made of it, scales and zero points, and the output; all of them whole tiles."""
        rows, groups = -(-self.rows // 16) * 16, -(-self.groups // 8) * 8
        copies = LANES * self.groups // self.columns  # of x, for groups within a tile
        x = 2 * rows * self.columns * (1 + (copies if copies > 1 else self.activations is not None))
        if self.dtype == "int4":
            x += 4 * rows * -(-self.groups // LANES) * LANES
            groups *= 2  # zero points
        blocks = config.slots * config.block_out * self.byte_columns
        return blocks + x + (4 * groups + 2 * rows) * (self.out + config.block_out) + 4 * rows * config.block_out


def heuristic(key: ShapeKey, chip: str | None) -> Config:
    """Blocks of `BLOCK_BYTES`, of whole `WIDTHS`; fewer in flight, and narrower ones, where VMEM does not hold so much."""
    width, total = WIDTHS.get(chip, WIDTH), key.out * key.byte_columns
    least = LEAST_BLOCKS_OF.get(chip, LEAST_BLOCKS)
    most = CONVERTED_BLOCK_BYTES if key.dtype == "int8" and key.groups > 1 else BLOCK_BYTES
    size = min(most.get(chip, BLOCK_BYTES.get(chip, MIB)), max(total // least, LEAST_BLOCK_BYTES))
    widest = width if total >= least * width * key.byte_columns else LANES
    block = max(width * round(size / (width * key.byte_columns)), widest)
    several = [Config(rows, slots) for rows in (block, LANES) for slots in (SLOTS, 4, 3, 2)]
    fitting = (config for config in several if key.vmem_bytes(config.within(key.out)) <= MOST_VMEM_BYTES)
    return next(fitting, several[-1]).within(key.out)


def config_for(key: ShapeKey, chip: str | None) -> Config:
    """What the op runs with on a chip: the tuned entry where there is one, else the heuristic's."""
    tuned = lookup(OP, chip, str(key), PART)
    return Config(**tuned) if tuned else heuristic(key, chip)
