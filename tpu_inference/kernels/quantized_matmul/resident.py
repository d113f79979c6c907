# SPDX-License-Identifier: Apache-2.0
"""The Pallas kernel for many rows: a layer's weight comes into VMEM once and stays there, and rows go past it in blocks.

The first rows are multiplied by the weight as it arrives. Where rows are rounded to int8, the next block is rounded between the products of one,
which leave the vector units idle: it takes two buffers by name, since the compiler would not move stores past loads of one.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from tpu_inference.kernels.quantized_matmul.config import LANES, MIB
from tpu_inference.kernels.quantized_matmul.kernel import call

BLOCK_ROWS = 512
BLOCKS_OUT = (512, 256)
"""Rows of the weight at a time; the widest that divides them all."""
AHEAD, SLOTS = 3, 3
"""Blocks of the weight that are in flight, and blocks of products that are written at a time."""
FIRST_PARTS = 8
"""Of the first rows, each rounded as it arrives."""
PRODUCTS = 256
"""Outputs between which rows are rounded."""
ROUNDED_ROWS = 32
"""At a time: a tile of int8."""
MOST_VMEM_BYTES = 96 * MIB
SPARE_VMEM_BYTES = 8 * MIB
_WHOLE = 1.5 * 2**23
"""Added to a float32, leaves it rounded to a whole number, in the low bits."""


@dataclass(frozen=True)
class Resident:
    """What is static about the kernel."""

    rows: int
    out: int
    columns: int
    rounds: bool
    direct: bool
    """Whether values go into the matrix units as they are."""

    @property
    def block_out(self) -> int:
        """0 where none divides the outputs."""
        return next((block for block in BLOCKS_OUT if self.out % block == 0), 0)

    @property
    def row_blocks(self) -> int:
        return self.rows // BLOCK_ROWS

    @property
    def blocks(self) -> int:
        return self.out // self.block_out

    @property
    def piece(self) -> int:
        """Rows that are rounded beside one block of the weight."""
        return self.block_out // PRODUCTS * ROUNDED_ROWS * 2

    @property
    def pieces(self) -> int:
        return BLOCK_ROWS // self.piece if self.rounds else 0

    @property
    def plain(self) -> int:
        """Blocks of the weight before the next rows are rounded: they come last, and have until then to arrive."""
        return self.blocks - self.pieces

    @property
    def vmem_bytes(self) -> int:
        rows = 2 * BLOCK_ROWS * (3 if self.rounds else 2) * self.columns
        return self.out * (self.columns + 32) + rows + (2 * SLOTS + 4) * BLOCK_ROWS * self.block_out

    @property
    def serves(self) -> bool:
        """Whether the kernel takes such arrays: pairs of row blocks, and more whole blocks of the weight than rows are rounded beside."""
        shaped = self.rows > 0 and self.rows % (2 * BLOCK_ROWS) == 0 and self.columns % LANES == 0
        return shaped and self.block_out > 0 and self.plain > 0 and self.vmem_bytes <= MOST_VMEM_BYTES


class _Refs:
    """The kernel's references by name, and the DMAs between them."""

    def __init__(self, static: Resident, layer: Any, x: Any, values: Any, scales: Any, out: Any, *scratch: Any) -> None:
        self.static, self.layer, self.hbm = static, layer[0], (x, values, scales, out)
        self.x, self.weight, self.scales, self.out = scratch[:4]
        self.first_come, self.x_come, self.weight_come, self.scales_come, self.written = scratch[4:9]
        self.rounded = scratch[9:]

    def fetch_first(self, part: Any) -> Any:
        """A part of the first block of rows."""
        size = BLOCK_ROWS // FIRST_PARTS
        rows = pl.ds(pl.multiple_of(part * size, size), size)
        return pltpu.make_async_copy(self.hbm[0].at[rows], self.x.at[0, rows], self.first_come.at[part])

    def fetch_rows(self, i: Any) -> Any:
        rows = pl.ds(pl.multiple_of(i * BLOCK_ROWS, BLOCK_ROWS), BLOCK_ROWS)
        slot = jax.lax.rem(i, 2)
        return pltpu.make_async_copy(self.hbm[0].at[rows], self.x.at[slot], self.x_come.at[slot])

    def outputs(self, j: Any) -> Any:
        block = self.static.block_out
        return pl.ds(pl.multiple_of(j * block, block), block)

    def fetch_weight(self, j: Any) -> Any:
        source = self.hbm[1].at[self.layer, self.outputs(j)]
        return pltpu.make_async_copy(source, self.weight.at[self.outputs(j)], self.weight_come.at[j])

    def fetch_scales(self) -> Any:
        return pltpu.make_async_copy(self.hbm[2].at[self.layer], self.scales, self.scales_come)

    def write(self, i: Any, j: Any, slot: Any) -> Any:
        rows = pl.ds(pl.multiple_of(i * BLOCK_ROWS, BLOCK_ROWS), BLOCK_ROWS)
        return pltpu.make_async_copy(self.out.at[slot], self.hbm[3].at[rows, self.outputs(j)], self.written.at[slot])


def _round(x: Any, values: Any, scales: Any, start: Any, size: int) -> None:
    """Rows from `start` on, as `reference.round_rows` has them but for the last bit of a quotient."""
    columns = x.shape[1]
    width = next(n for n in (512, 256, LANES) if columns % n == 0)
    for offset in range(0, size, ROUNDED_ROWS):
        rows = pl.ds(pl.multiple_of(start + offset, ROUNDED_ROWS), ROUNDED_ROWS)
        greatest = jnp.abs(x[rows, :width])
        for column in range(width, columns, width):
            greatest = jnp.maximum(greatest, jnp.abs(x[rows, column : column + width]))
        row_scales = jnp.maximum(greatest.astype(jnp.float32).max(axis=1, keepdims=True), 1e-12) / 127
        scales[rows] = row_scales
        inverse = 1 / row_scales
        for column in range(0, columns, width):
            whole = x[rows, column : column + width].astype(jnp.float32) * inverse + _WHOLE
            values[rows, column : column + width] = jax.lax.bitcast_convert_type(whole, jnp.int32).astype(jnp.int8)


def _multiply(refs: _Refs, i: Any, j: Any, now: tuple[Any, Any], after: tuple[Any, Any], rounding: bool) -> None:
    """Rows i by block j of the weight; where `rounding`, with some of the rows after them rounded in between."""
    static, count = refs.static, i * refs.static.blocks + j
    slot, block = jax.lax.rem(count, SLOTS), static.block_out

    @pl.when(i == 0)
    def _() -> None:
        refs.fetch_weight(j).wait()

        @pl.when(j + AHEAD < static.blocks)
        def _() -> None:
            refs.fetch_weight(j + AHEAD).start()

        late = static.plain if static.rounds else static.blocks - 1

        @pl.when(j == max(late - 1 - AHEAD, 0))
        def _() -> None:
            refs.fetch_rows(jnp.int32(1)).start()

    @pl.when(count >= SLOTS)
    def _() -> None:
        refs.write(i, j, slot).wait()

    rows, row_scales = now
    size = PRODUCTS if rounding else block
    weight = refs.weight[refs.outputs(j)]
    if not static.direct and not static.rounds:
        weight = weight.astype(refs.x.dtype)
    rounded = static.piece // (block // size)
    for start in range(0, block, size):
        if rounding:
            first = (j - static.plain) * static.piece + start // size * rounded
            _round(refs.x.at[jax.lax.rem(i + 1, 2)], *after, first, rounded)
        product = jax.lax.dot_general(
            rows[...], weight[start : start + size], (((1,), (1,)), ((), ())),
            preferred_element_type=jnp.int32 if static.rounds else jnp.float32,
        ).astype(jnp.float32)  # fmt: skip
        if static.rounds:
            product = product * row_scales[...]
        scales = refs.scales[:, pl.ds(pl.multiple_of(j * block + start, LANES), size)]
        refs.out[slot, :, start : start + size] = (product * scales).astype(refs.out.dtype)
    refs.write(i, j, slot).start()


def _row_block(refs: _Refs, i: Any, now: tuple[Any, Any], after: tuple[Any, Any]) -> None:
    static = refs.static

    @pl.loop(0, static.plain)
    def _(j: Any) -> None:
        _multiply(refs, i, j, now, after, False)

    @pl.when(i + 1 < static.row_blocks)
    def _() -> None:
        refs.fetch_rows(i + 1).wait()

    if static.rounds:

        @pl.loop(static.plain, static.blocks)
        def _(j: Any) -> None:  # of the last rows too: what is rounded then is old, and not read
            _multiply(refs, i, j, now, after, True)

    @pl.when(i + 2 < static.row_blocks)
    def _() -> None:
        refs.fetch_rows(i + 2).start()


def _body(*arguments: Any, static: Resident) -> None:
    refs = _Refs(static, *arguments)
    for part in range(FIRST_PARTS):
        refs.fetch_first(part).start()
    for j in range(min(AHEAD, static.blocks)):
        refs.fetch_weight(j).start()
    refs.fetch_scales().start()

    @pl.loop(0, FIRST_PARTS)
    def _(part: Any) -> None:
        refs.fetch_first(part).wait()
        if static.rounds:
            size = BLOCK_ROWS // FIRST_PARTS
            _round(refs.x.at[0], refs.rounded[0], refs.rounded[2], part * size, size)

    refs.fetch_scales().wait()
    if static.rounds:
        pair = ((refs.rounded[0], refs.rounded[2]), (refs.rounded[1], refs.rounded[3]))

        @pl.loop(0, static.row_blocks // 2)
        def _(half: Any) -> None:
            _row_block(refs, 2 * half, *pair)
            _row_block(refs, 2 * half + 1, *reversed(pair))

    else:

        @pl.loop(0, static.row_blocks)
        def _(i: Any) -> None:
            _row_block(refs, i, (refs.x.at[jax.lax.rem(i, 2)], None), (None, None))

    for slot in range(min(SLOTS, static.row_blocks * static.blocks)):
        refs.write(0, 0, slot).wait()


@partial(jax.jit, static_argnames=("activations", "interpret"))
def quantized_matmul_resident(
    x: jax.Array, values: jax.Array, scales: jax.Array, layer: jax.Array, *, activations: str | None, interpret: Any = False
) -> jax.Array:  # fmt: skip
    """As the op, with values [layers, out, in] and scales [layers, out, 1] of shapes that `Resident.serves`."""
    (rows, columns), (_, out, _) = x.shape, scales.shape
    static = Resident(rows, out, columns, activations is not None, values.dtype != jnp.int8)
    rounded = [pltpu.VMEM((BLOCK_ROWS, columns), jnp.int8)] * 2 + [pltpu.VMEM((BLOCK_ROWS, 1), jnp.float32)] * 2
    scratch = [
        pltpu.VMEM((2, BLOCK_ROWS, columns), x.dtype),
        pltpu.VMEM((out, columns), values.dtype),
        pltpu.VMEM((1, out), jnp.float32),
        pltpu.VMEM((SLOTS, BLOCK_ROWS, static.block_out), x.dtype),
        pltpu.SemaphoreType.DMA((FIRST_PARTS,)),
        pltpu.SemaphoreType.DMA((2,)),
        pltpu.SemaphoreType.DMA((static.blocks,)),
        pltpu.SemaphoreType.DMA,
        pltpu.SemaphoreType.DMA((SLOTS,)),
        *(rounded if activations else ()),
    ]
    vmem_bytes = static.vmem_bytes + SPARE_VMEM_BYTES
    return call(partial(_body, static=static), x, values, (scales,), layer, scratch, vmem_bytes, interpret)
