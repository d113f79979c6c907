# SPDX-License-Identifier: Apache-2.0
"""Weights of four or eight bits that checkpoints pack into int32 words."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from tpu_inference.layers.common.weights import Source

Layout = Literal["compressed-tensors", "gptq", "awq"]
"""Which way a weight [rows, columns] is stored: [rows, words of columns]; [words of columns, rows]; [columns, words of rows]."""
_AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)
"""The field, counted from the lowest bits, that each of eight neighbours is in. Others are in order."""


def unpack(words: np.ndarray, axis: int, bits: int, order: tuple[int, ...] | None = None) -> np.ndarray:
    """int16 fields of int32 `words` [a, b], unsigned: `axis` is 32 / bits times as long."""
    shifts = np.arange(0, 32, bits, dtype=np.uint32)
    if order is not None:
        shifts = shifts[list(order)]
    fields = (words.view(np.uint32)[..., None] >> shifts) & np.uint32(2**bits - 1)
    if axis == 0:
        fields = fields.swapaxes(1, 2)
    shape = list(words.shape)
    shape[axis] *= len(shifts)
    return fields.reshape(shape).astype(np.int16)


def _cover(part: slice, fit: int) -> tuple[slice, slice]:
    """The words that hold `part`, and where it is within their fields."""
    first = part.start // fit
    return slice(first, -(-part.stop // fit)), slice(part.start - first * fit, part.stop - first * fit)


@dataclass(frozen=True)
class PackedSource(Source):
    """Values of so many bits, counted from the middle of their range or from zero points; `shape` is that of the words."""

    bits: int = 4
    layout: Layout = "compressed-tensors"
    zeros: str | None = None
    """Name of the tensor of zero points, packed by rows: one for each row and group, of 4-bit values (differences fit into int8)."""
    group: int = 0
    """Columns that share a zero point."""
    codes: bool = False
    """Whether fields are read as they are, uint8, zero points aside."""

    @property
    def weight_shape(self) -> tuple[int, int]:
        """[rows, columns] of the values."""
        fit = 32 // self.bits
        first, second = self.shape
        return {
            "compressed-tensors": (first, second * fit),
            "gptq": (second, first * fit),
            "awq": (second * fit, first),
        }[self.layout]

    @property
    def beside(self) -> tuple[Source, ...]:
        return () if self.zeros is None or self.codes else (self.zero_points(),)

    def zero_points(self, parts: int = 1) -> "ZeroPointSource":
        """Those of its groups, each of which is cut into so many on the device."""
        assert self.zeros is not None
        rows, columns = self.weight_shape
        words, groups = rows * self.bits // 32, columns // self.group
        shape = (groups, words) if self.layout == "awq" else (words, groups)
        return ZeroPointSource(self.zeros, shape, self.offset, self.bits, self.layout == "awq", parts)

    def read(self, read: Callable[..., np.ndarray], name: str, index: tuple[slice, ...]) -> np.ndarray:
        rows, columns = index
        fit, bits = 32 // self.bits, self.bits
        if self.layout == "awq":
            words, part = _cover(rows, fit)
            values = unpack(read(name, (columns, words)), 1, bits, _AWQ_ORDER)[:, part].T
        elif self.layout == "gptq":
            words, part = _cover(columns, fit)
            values = unpack(read(name, (words, rows)), 0, bits)[part].T
        else:
            words, part = _cover(columns, fit)
            values = unpack(read(name, (rows, words)), 1, bits)[:, part]
        if self.codes:
            return values.astype(np.uint8)
        if self.zeros is None:
            return (values - 2 ** (bits - 1)).astype(np.int8)
        return (values - self._zeros(read, self._zeros_name(name), rows, columns)).astype(np.int8)

    def _zeros_name(self, name: str) -> str:
        """Of the layer whose values are `name`."""
        assert self.zeros is not None
        return f"{name.rpartition('.')[0]}.{self.zeros.rpartition('.')[2]}"

    def _zeros(self, read: Callable[..., np.ndarray], name: str, rows: slice, columns: slice) -> np.ndarray:
        """[rows, columns]."""
        first = columns.start // self.group
        points = self.zero_points().read(read, name, (rows, slice(first, -(-columns.stop // self.group))))
        start = columns.start - first * self.group
        return np.repeat(points, self.group, axis=1)[:, start : start + columns.stop - columns.start]


@dataclass(frozen=True)
class ZeroPointSource(Source):
    """Unsigned zero points [rows, groups], float32; `shape` is that of their words, which pack rows."""

    bits: int = 4
    awq: bool = False
    """Whether groups come first, and fields in AWQ's order."""
    parts: int = 1
    """Groups on the device that one of the checkpoint's is cut into."""

    def read(self, read: Callable[..., np.ndarray], name: str, index: tuple[slice, ...]) -> np.ndarray:
        rows, columns = index
        words, part = _cover(rows, 32 // self.bits)
        groups = slice(columns.start // self.parts, -(-columns.stop // self.parts))
        if self.awq:
            points = unpack(read(name, (groups, words)), 1, self.bits, _AWQ_ORDER)[:, part].T
        else:
            points = unpack(read(name, (words, groups)), 0, self.bits)[part]
        start = columns.start - groups.start * self.parts
        every = points.repeat(self.parts, axis=1)[:, start : start + columns.stop - columns.start]
        return every.astype(np.float32)
