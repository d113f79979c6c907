# SPDX-License-Identifier: Apache-2.0
"""How the kernels are blocked: a tuned entry for a layer's shape where there is one, else a heuristic."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp

from tpu_inference.kernels.tuned import lookup

OP = "collectives"
GATHER, SCATTER = "all_gather_matmul", "matmul_reduce_scatter"
"""Parts, as in tuned tables."""
LANES = 128
MIB = 2**20
VMEM_BYTES: Mapping[str | None, int] = {"v5e": 80 * MIB, "v6e": 80 * MIB, "v5p": 40 * MIB, "tpu7x": 40 * MIB}
"""For blocks, of what a core has; chips not named have `LEAST_VMEM_BYTES`."""
LEAST_VMEM_BYTES = 11 * MIB
SPARE_VMEM_BYTES = 6 * MIB
"""For what the compiler keeps beside the blocks."""
LEAST_VMEM_LIMIT = 16 * MIB
RIDGE_ROWS: Mapping[str | None, int] = {"v5e": 256, "v6e": 576, "v5p": 192, "tpu7x": 384}
"""Rows by which a weight is multiplied in the time that it takes to come from HBM."""
FEW_ROWS = 256
"""Of a product at a time."""
MOST_OUT = 1024
"""Of a block."""


def tile_rows(dtype: Any) -> int:
    """Rows that are put into memory together."""
    return 32 // jnp.dtype(dtype).itemsize


@dataclass(frozen=True)
class GatherConfig:
    """Of `all_gather_matmul`."""

    shards: int
    """Multiplied by one pass over the weights; divides the number of devices."""
    block_out: int
    slots: int = 2
    """Blocks of weights in VMEM, at least two unless there is but one block. As many as there are blocks, and weights are read once."""
    alone: bool = False
    """Whether the first pass is two: of the own share, while others are on their way, and of the others. Of two shards or more."""


@dataclass(frozen=True)
class ReduceScatterConfig:
    """Of `matmul_reduce_scatter`."""

    block_rows: int
    """Of one device's share; divides it."""
    block_out: int
    """A multiple of 256 that divides the outputs: half of it goes each way."""


@dataclass(frozen=True)
class ShapeKey:
    """One device's arrays."""

    devices: int
    rows: int
    """Of one device's share."""
    out: int
    columns: int
    dtype: str

    @classmethod
    def of(cls, x: Any, weight: Any, devices: int, *, gathers: bool = False) -> "ShapeKey":
        """From the arrays of a call, or their shapes and dtypes. `gathers`: x is one share, not all."""
        rows = x.shape[0] if gathers else x.shape[0] // devices
        return cls(devices, rows, *weight.shape, jnp.dtype(x.dtype).name)

    @property
    def itemsize(self) -> int:
        return jnp.dtype(self.dtype).itemsize

    def __str__(self) -> str:
        """As in tuned tables."""
        return f"n{self.devices}_{self.rows}_{self.out}x{self.columns}_{self.dtype}"

    def gather_bytes(self, config: GatherConfig) -> int:
        """VMEM: two of rows, weights and outputs each, and a product in float32."""
        rows = config.shards * self.rows
        blocks = 2 * rows * (self.columns + config.block_out) + config.slots * config.block_out * self.columns
        return blocks * self.itemsize + 4 * min(rows, FEW_ROWS) * config.block_out

    def reduce_scatter_bytes(self, config: ReduceScatterConfig, sum_bytes: int = 4) -> int:
        """VMEM: two of rows, weights and outputs each, the blocks whose sums are under way, and those sums."""
        n, rows, out = self.devices, config.block_rows, config.block_out
        # Half a tile takes a whole one.
        padded = max(rows, tile_rows(self.dtype))
        blocks = n * padded * self.columns + out * self.columns + padded * out
        sums = 4 * (n - 1) * max(rows, 32 // sum_bytes) * out * sum_bytes
        return 2 * blocks * self.itemsize + n * n * rows * out * 4 + sums + 4 * FEW_ROWS * out


def misfit(key: ShapeKey, part: str) -> str | None:
    """Why a kernel does not serve a shape; None where it does."""
    if key.columns % LANES:
        return f"{key.columns} columns are not a multiple of {LANES}"
    lanes = LANES if part == GATHER else 2 * LANES
    if key.out % lanes:
        return f"{key.out} outputs are not a multiple of {lanes}"
    if key.rows % tile_rows(key.dtype):
        return f"{key.rows} rows a device are not a multiple of {tile_rows(key.dtype)}"
    return None


def _blocks(out: int, unit: int) -> list[int]:
    """Sizes that divide `out` in multiples of `unit`, largest first."""
    return [n for n in range(out, 0, -unit) if out % n == 0] if out % unit == 0 else []


def heuristic_gather(key: ShapeKey, chip: str | None) -> GatherConfig:
    """Weights that stay, and one share after the other, where VMEM holds them; else as few shares a pass as still hide the weights."""
    budget, ridge = VMEM_BYTES.get(chip, LEAST_VMEM_BYTES), RIDGE_ROWS.get(chip, FEW_ROWS)
    blocks = [n for n in _blocks(key.out, LANES) if n <= MOST_OUT]
    divisors = [d for d in range(1, key.devices + 1) if key.devices % d == 0]
    enough = next((d for d in divisors if d * key.rows >= FEW_ROWS // 2), key.devices)
    for block in blocks[:1]:
        stays = GatherConfig(enough, block, key.out // block)
        if key.gather_bytes(stays) <= budget:
            return stays
    wanted = next((d for d in divisors if d * key.rows >= ridge), key.devices)
    for shards in reversed([d for d in divisors if d <= wanted]):
        for block in blocks:
            config = GatherConfig(shards, block, min(2, key.out // block), shards > 1 and key.rows >= FEW_ROWS // 2)
            if key.gather_bytes(config) <= budget:
                return config
    return GatherConfig(1, LANES)


def heuristic_reduce_scatter(key: ShapeKey, chip: str | None) -> ReduceScatterConfig:
    """All rows at once where VMEM holds them, since weights are read once for each block of them."""
    budget, tile = VMEM_BYTES.get(chip, LEAST_VMEM_BYTES), tile_rows(key.dtype)
    for rows in [n for n in range(key.rows, 0, -tile) if key.rows % n == 0]:
        # Hops without products begin and end it: there are to be many blocks, but none so small that its hops cost more than its product.
        for block in (512, 256):
            config = ReduceScatterConfig(rows, block)
            if key.out % block == 0 and key.reduce_scatter_bytes(config) <= budget:
                return config
    return ReduceScatterConfig(tile, 2 * LANES)


@dataclass(frozen=True)
class Config:
    """Of both, as the tuner takes it."""

    gather: GatherConfig
    scatter: ReduceScatterConfig


def heuristic(key: ShapeKey, chip: str | None) -> Config:
    """`chip` is a name of a tuned table, None for any."""
    return Config(heuristic_gather(key, chip), heuristic_reduce_scatter(key, chip))


def config_for(key: ShapeKey, part: str, chip: str | None) -> Any:
    """What a kernel runs with on a chip: the tuned entry where there is one, else the heuristic's."""
    kind, heuristic = {
        GATHER: (GatherConfig, heuristic_gather),
        SCATTER: (ReduceScatterConfig, heuristic_reduce_scatter),
    }[part]
    tuned = lookup(OP, chip, str(key), part)
    return kind(**tuned) if tuned else heuristic(key, chip)
