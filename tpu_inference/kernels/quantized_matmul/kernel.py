# SPDX-License-Identifier: Apache-2.0
"""The Pallas kernel for few rows: a stream of weights through VMEM, from where they lie in a stack of layers.

Nothing is left to Pallas's own pipeline, which would wait for small operands before the first weights are asked for. The last block is multiplied in
two parts of its columns, so that little is left to be done once the last bytes have come.

The matrix units of v5e, v6e and tpu7x take float8 weights beside bfloat16 rows as they are; int8 is converted before. Those of v5e and v6e read
e4m3fn as e4m3b11fnuz, sixteen times smaller and with NaN for -0: the compiler multiplies every product by 16 and looks for -0 in every byte. Codes of
four bits, which never mean -0, become bytes of the format that the matrix unit has, by bits alone, and numbers `UNIT` times what is meant, for which
the products make up: a code of int4 is such a byte as it is, since the first sixteen numbers of e4m3 are as far apart as its subnormal ones.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from tpu_inference.kernels.quantized_matmul.config import LANES, MIB, WIDTH, Config, ShapeKey
from tpu_inference.kernels.quantized_matmul.packing import BLOCK, ZERO
from tpu_inference.kernels.quantized_matmul.reference import round_rows

NAME = "quantized_matmul"
SPARE_VMEM_BYTES = 4 * MIB
"""For what the compiler keeps beside the buffers."""
LAST_PARTS = 2
UNIT = {
    ("int4", "float8_e4m3fn"): 2.0**-9, ("int4", "float8_e4m3b11fnuz"): 2.0**-13,
    ("e2m1", "float8_e4m3fn"): 2.0**-6, ("e2m1", "float8_e4m3b11fnuz"): 2.0**-10,
}  # fmt: skip
"""What 1 of packed values is in a format."""
SUMMED_COLUMNS = 1024
"""Of x, whose sums over groups are made at a time."""


@dataclass(frozen=True)
class Blocked:
    """What is static about the kernel."""

    rows: int
    out: int
    columns: int
    groups: int
    block: int
    slots: int
    rounds: str | None
    """dtype of the rounded rows; None where rows stay as they are."""
    direct: bool
    """Whether values go into the matrix units as they are."""
    packed: str | None = None
    offsets: bool = False
    """Whether they are given."""
    unpacked: str = "float8_e4m3fn"
    """What packed values become."""

    @property
    def byte_columns(self) -> int:
        return self.columns // 2 if self.packed else self.columns

    @property
    def num_blocks(self) -> int:
        return -(-self.out // self.block)

    @property
    def last(self) -> int:
        """Rows of the last block."""
        return self.out - (self.num_blocks - 1) * self.block

    @property
    def per_group(self) -> int:
        return self.columns // self.groups

    @property
    def sliced(self) -> bool:
        """Whether scales are this layer's alone: [..., groups] of whole lanes would be laid out anew for all layers."""
        return self.groups % LANES == 0

    @property
    def copies(self) -> int:
        """Groups within the lanes of a tile: x is multiplied once for each, with the other groups' columns zero."""
        return max(1, LANES // self.per_group)

    def pieces(self, size: int) -> list[slice]:
        """Rows of a block that are multiplied at a time. Packed blocks have twice as many, whose sums over groups vector registers do not hold."""
        step = WIDTH if self.packed and self.groups > 1 else size
        return [slice(start, min(start + step, size)) for start in range(0, size, step)]

    def parts(self) -> list[slice]:
        """Columns of the parts of the last block; whole groups."""
        unit = max(self.per_group, LANES) if self.groups > 1 else LANES
        unit = math.lcm(unit, BLOCK) if self.packed else unit
        middle = self.columns // unit // LAST_PARTS * unit
        return [slice(0, middle), slice(middle, self.columns)] if middle else [slice(0, self.columns)]

    def in_bytes(self, columns: slice) -> slice:
        """Where the codes of whole blocks of columns are."""
        return slice(columns.start // 2, columns.stop // 2) if self.packed else columns


class _Refs:
    """The kernel's references by name, and the DMAs between them."""

    def __init__(self, blocked: Blocked, layer: Any, x: Any, values: Any, *others: Any) -> None:
        self.blocked, self.layer = blocked, layer[0]
        of_groups, (out, *scratch) = others[: 1 + blocked.offsets], others[1 + blocked.offsets :]
        self.hbm = (x, values, of_groups, out)
        self.x, self.ring, self.out, self.arrived, self.last_arrived, self.small, self.written = scratch[:7]
        self.of_groups, self.prepared = scratch[7 : 7 + len(of_groups)], scratch[7 + len(of_groups) :]
        self.scales = self.of_groups[0]

    def fetch_small(self) -> tuple[Any, list[Any]]:
        """x; scales and offsets."""
        layer, pairs = 0 if self.blocked.sliced else self.layer, zip(self.hbm[2], self.of_groups, strict=True)
        return pltpu.make_async_copy(self.hbm[0], self.x, self.small.at[0]), [
            pltpu.make_async_copy(source.at[layer], target, self.small.at[1 + i])
            for i, (source, target) in enumerate(pairs)
        ]

    def fetch(self, block: Any) -> Any:
        """A block that is not the last one."""
        slot, start = jax.lax.rem(block, self.blocked.slots), pl.multiple_of(block * self.blocked.block, LANES)
        source = self.hbm[1].at[self.layer, pl.ds(start, self.blocked.block)]
        return pltpu.make_async_copy(source, self.ring.at[slot], self.arrived.at[slot])

    def fetch_last(self) -> Iterator[Any]:
        """The parts of the last block."""
        blocked = self.blocked
        slot, rows = (
            (blocked.num_blocks - 1) % blocked.slots,
            pl.ds((blocked.num_blocks - 1) * blocked.block, blocked.last),
        )
        for i, columns in enumerate(map(blocked.in_bytes, blocked.parts())):
            source = self.hbm[1].at[self.layer, rows, columns]
            target = self.ring.at[slot, pl.ds(0, blocked.last), columns]
            yield pltpu.make_async_copy(source, target, self.last_arrived.at[i])

    def write(self, block: Any, size: int) -> Any:
        """The products of a block to where they belong."""
        target = self.hbm[3].at[:, pl.ds(pl.multiple_of(block * self.blocked.block, LANES), size)]
        return pltpu.make_async_copy(self.out.at[block, :, pl.ds(0, size)], target, self.written)

    def all_written(self) -> Any:
        """To wait for: as many bytes as all blocks have."""
        return pltpu.make_async_copy(self.hbm[3], self.hbm[3], self.written)


def _prepare(refs: _Refs) -> None:
    """Rounded rows, or a copy of x for each of the groups within a tile; of int4, sums of x over each group."""
    blocked = refs.blocked
    if blocked.rounds:
        values, row_scales = refs.prepared
        rounded, row_scales[...] = round_rows(refs.x[...])
        values[...] = rounded.astype(values.dtype)
    elif blocked.copies > 1:
        copies = refs.prepared[0]
        column = jax.lax.broadcasted_iota(jnp.int32, (1, blocked.columns), 1)
        of_group = jax.lax.rem(jax.lax.div(column, blocked.per_group), blocked.copies)
        for i in range(blocked.copies):
            copies[i] = jnp.where(of_group == i, refs.x[...], 0)
    if blocked.packed == "int4":
        sums = _sums(refs)
        if blocked.groups > 1:
            high, low = _parts(sums)
            sums = jnp.concatenate([high, high, low], axis=1).astype(jnp.bfloat16)
        refs.prepared[-1][...] = sums


def _sums(refs: _Refs) -> Any:
    """float32 [rows, groups] of x, exact but for the order: the matrix unit adds up what ones tell it to."""
    blocked, total = refs.blocked, None
    if blocked.groups == 1:
        return refs.x[...].astype(jnp.float32).sum(axis=1, keepdims=True)
    for start in range(0, blocked.columns, SUMMED_COLUMNS):
        size = min(SUMMED_COLUMNS, blocked.columns - start)
        column = start + jax.lax.broadcasted_iota(jnp.int32, (blocked.groups, size), 1)
        group = jax.lax.broadcasted_iota(jnp.int32, (blocked.groups, size), 0)
        ones = jnp.where(jax.lax.div(column, blocked.per_group) == group, 1.0, 0.0).astype(refs.x.dtype)
        sums = _dot(refs.x[:, start : start + size], ones, True)
        total = sums if total is None else total + sums
    return total


def _unpacked(weight: Any, columns: range, blocked: Blocked) -> Any:
    """[outputs, columns] of packed weights, `UNIT` times what they mean; columns are whole tiles."""
    tiles = []
    for start in columns[::LANES]:
        first = start // BLOCK * LANES
        words = pltpu.bitcast(weight[:, first : first + LANES], jnp.uint32)
        tiles.append(_BYTES[blocked.packed][start // LANES % 2](words))
    return pltpu.bitcast(jnp.concatenate(tiles, axis=1), blocked.unpacked)


_EACH = np.uint32(0x01010101)
_BYTES: dict[str, tuple[Callable, Callable]] = {
    "int4": (lambda words: words & 15 * _EACH, lambda words: words >> 4 & 15 * _EACH),
    "e2m1": (
        lambda words: (words & 8 * _EACH) << 4 | (words & 7 * _EACH) << 2,
        lambda words: words & 128 * _EACH | words >> 2 & 28 * _EACH,
    ),
}
"""Four codes from the low nibbles and from the high ones of a word, as bytes of e4m3: e2m1's sign goes to the top, the rest beside the middle."""


def _dot(x: Any, weight: Any, direct: bool) -> Any:
    exact = x.dtype == jnp.int8
    weight = weight if direct or exact else weight.astype(x.dtype)
    return jax.lax.dot_general(
        x, weight, (((1,), (1,)), ((), ())), preferred_element_type=jnp.int32 if exact else jnp.float32
    )


def _product(refs: _Refs, weight: Any, columns: slice, outputs: Any) -> Any:
    """[rows, outputs] of some columns of x and of the weights [outputs, columns], scaled where there are groups."""
    blocked = refs.blocked

    def of(start: int, stop: int) -> Any:
        if blocked.packed:
            return _unpacked(weight, range(start - columns.start, stop - columns.start), blocked)
        return weight[:, start - columns.start : stop - columns.start]

    if blocked.groups == 1:
        x = refs.prepared[0] if blocked.rounds else refs.x
        return _dot(x[:, columns], of(columns.start, columns.stop), blocked.direct)
    size, total = max(blocked.per_group, LANES), None
    for start in range(columns.start, columns.stop, size):
        part = slice(start, start + size)
        tile = of(part.start, part.stop)
        for i in range(blocked.copies):
            x = refs.prepared[0][i, :, part] if blocked.copies > 1 else refs.x[:, part]
            scale = refs.scales[pl.ds(start // blocked.per_group + i, 1), outputs]
            product = _dot(x, tile, blocked.direct) * scale
            total = product if total is None else total + product
    return total


def _finish(refs: _Refs, product: Any, outputs: Any) -> Any:
    """Scaled by what all columns share, less offsets, in the output's dtype."""
    blocked, product = refs.blocked, product.astype(jnp.float32)
    if blocked.rounds:
        product = product * refs.prepared[1][...]
    if blocked.packed:
        product = product * (1 / UNIT[blocked.packed, blocked.unpacked])
    if blocked.groups == 1:
        product = product * refs.scales[:, outputs]
    if blocked.packed == "int4":
        offsets = refs.of_groups[1][:, outputs] if blocked.offsets else ZERO * refs.scales[:, outputs]
        product = product - _corrections(refs.prepared[-1][...], offsets)
    return product.astype(refs.out.dtype)


def _corrections(sums: Any, offsets: Any) -> Any:
    """float32 [rows, outputs], but for 2^-16: the products of both numbers' high parts, and of high and low ones, in a single one of bfloat16."""
    if offsets.shape[0] == 1:
        return sums * offsets
    high, low = _parts(offsets)
    stacked = jnp.concatenate([high, low, high], axis=0).astype(jnp.bfloat16)
    return jnp.dot(sums, stacked, preferred_element_type=jnp.float32)


def _parts(numbers: Any) -> tuple[Any, Any]:
    """float32 numbers that bfloat16 has, which make up all but 2^-16 of these."""
    high = numbers.astype(jnp.bfloat16).astype(jnp.float32)
    return high, numbers - high


def _body(*arguments: Any, blocked: Blocked) -> None:
    refs, last = _Refs(blocked, *arguments), blocked.num_blocks - 1
    x, of_groups = refs.fetch_small()
    ahead = blocked.slots - 1
    x.start()
    for block in range(min(ahead, last)):
        refs.fetch(block).start()
    if last <= ahead:
        for copy in refs.fetch_last():
            copy.start()
    for copy in of_groups:
        copy.start()
    x.wait()
    _prepare(refs)
    for copy in of_groups:
        copy.wait()

    @pl.loop(0, last)
    def _(block: Any) -> None:
        if last > ahead:

            @pl.when(block + ahead < last)
            def _() -> None:
                refs.fetch(block + ahead).start()

            @pl.when(block + ahead == last)
            def _() -> None:
                for copy in refs.fetch_last():
                    copy.start()

        refs.fetch(block).wait()
        for piece in blocked.pieces(blocked.block):
            size = piece.stop - piece.start
            outputs = pl.ds(pl.multiple_of(block * blocked.block + piece.start, LANES), size)
            weight = refs.ring[jax.lax.rem(block, blocked.slots), piece]
            product = _product(refs, weight, slice(0, blocked.columns), outputs)
            refs.out[block, :, piece] = _finish(refs, product, outputs)
        refs.write(block, blocked.block).start()

    outputs, total = pl.ds(last * blocked.block, blocked.last), None
    for copy, columns in zip(refs.fetch_last(), blocked.parts(), strict=True):
        copy.wait()
        weight = refs.ring[last % blocked.slots, : blocked.last, blocked.in_bytes(columns)]
        product = _product(refs, weight, columns, outputs)
        total = product if total is None else total + product
    refs.out[last, :, : blocked.last] = _finish(refs, total, outputs)
    refs.write(last, blocked.last).start()

    refs.all_written().wait()


@partial(jax.jit, static_argnames=("activations", "direct", "exact", "config", "packed", "unpacked", "interpret"))
def quantized_matmul_pallas(
    x: jax.Array,
    values: jax.Array,
    scales: jax.Array,
    layer: jax.Array,
    *,
    activations: str | None,
    direct: bool,
    exact: bool,
    config: Config,
    packed: str | None = None,
    unpacked: str = "float8_e4m3fn",
    offsets: jax.Array | None = None,
    interpret: Any = False,
) -> jax.Array:
    """As the op, with values [layers, out, in] and scales [layers, out, groups], packed ones and offsets likewise.

    Args:
        direct: whether values go into the matrix units as they are, or unpacked; not int8.
        exact: whether rounded rows are multiplied as int8; else in x's dtype, which has their numbers, and summed in float32.
        unpacked: the format of float8 that the matrix unit has, which packed values become.
    """
    (rows, columns), (_, out, groups) = x.shape, scales.shape
    config = config.within(out)
    rounds = activations and ("int8" if exact else x.dtype.name)
    blocked = Blocked(
        rows,
        out,
        columns,
        groups,
        config.block_out,
        config.slots,
        rounds,
        direct,
        packed,
        offsets is not None,
        unpacked,
    )
    key = ShapeKey.of(x, values, groups, activations, packed)
    of_groups = (scales,) if offsets is None else (scales, offsets)
    if blocked.sliced:
        of_groups = tuple(jax.lax.dynamic_index_in_dim(array, layer, keepdims=True) for array in of_groups)
    scratch = [
        pltpu.VMEM((rows, columns), x.dtype),
        pltpu.VMEM((blocked.slots, blocked.block, blocked.byte_columns), values.dtype),
        pltpu.VMEM((blocked.num_blocks, rows, blocked.block), x.dtype),
        pltpu.SemaphoreType.DMA((blocked.slots,)),
        pltpu.SemaphoreType.DMA((LAST_PARTS,)),
        pltpu.SemaphoreType.DMA((1 + len(of_groups),)),
        pltpu.SemaphoreType.DMA,
        *[pltpu.VMEM((groups, out), jnp.float32)] * len(of_groups),
        *_prepared(blocked, x.dtype),
    ]
    vmem_bytes = max(key.vmem_bytes(config) + SPARE_VMEM_BYTES, 16 * MIB)
    return call(partial(_body, blocked=blocked), x, values, of_groups, layer, scratch, vmem_bytes, interpret)


def _prepared(blocked: Blocked, dtype: Any) -> list[Any]:
    """What `_prepare` fills."""
    rows = blocked.rows
    found = (
        [pltpu.VMEM((rows, blocked.columns), blocked.rounds), pltpu.VMEM((rows, 1), jnp.float32)]
        if blocked.rounds
        else []
    )
    if blocked.copies > 1:
        found.append(pltpu.VMEM((blocked.copies, rows, blocked.columns), dtype))
    if blocked.packed == "int4":
        sums = ((rows, 3 * blocked.groups), jnp.bfloat16) if blocked.groups > 1 else ((rows, 1), jnp.float32)
        found.append(pltpu.VMEM(*sums))
    return found


def call(
    body: Callable[..., None], x: jax.Array, values: jax.Array, of_groups: tuple[jax.Array, ...], layer: jax.Array, scratch: list[Any],
    vmem_bytes: int, interpret: Any,
) -> jax.Array:  # fmt: skip
    """[rows, out] of a kernel that moves everything itself: its references are the layer, x, values and what there is of groups
    [layers, groups, out], scales first, all in HBM, the result, and `scratch`."""
    stacks = (values, *(array.swapaxes(1, 2) for array in of_groups))
    if not interpret:  # else XLA would bring all of a stack that is small enough into VMEM, anew for each layer
        stacks = tuple(pltpu.with_memory_space_constraint(stack, pltpu.HBM) for stack in stacks)
    return pl.pallas_call(
        body,
        out_shape=jax.ShapeDtypeStruct((x.shape[0], values.shape[1]), x.dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(),
            in_specs=[pl.BlockSpec(memory_space=pl.ANY)] * (1 + len(stacks)),
            out_specs=pl.BlockSpec(memory_space=pl.ANY),
            scratch_shapes=scratch,
        ),
        compiler_params=pltpu.CompilerParams(vmem_limit_bytes=vmem_bytes),
        name=NAME,
        interpret=interpret,
    )(layer.reshape(1), x, *stacks)
