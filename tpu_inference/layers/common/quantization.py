# SPDX-License-Identifier: Apache-2.0
"""Quantized weights of linear layers: how checkpoints store them, and what the device holds.

The device holds `values` [out, in] of one byte, or [out, in / 2] of two four-bit ones, and `scales` float32 [out, groups], whatever the
checkpoint's granularity is: scales of a tensor or of blocks of rows are repeated for each row. All are assembled from pieces, as any weight
is; the sources below turn what is read into rows.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Literal

import jax
import ml_dtypes
import numpy as np

from tpu_inference.errors import TpuInferenceError
from tpu_inference.kernels.forms import implementation_for
from tpu_inference.kernels.quantized_matmul import BLOCK, ZERO, Packed, multiplies
from tpu_inference.layers.common.four_bits import is_whole
from tpu_inference.layers.common.mxfp4 import Mxfp4ScaleSource
from tpu_inference.layers.common.nvfp4 import Nvfp4ScaleSource, Nvfp4Source
from tpu_inference.layers.common.packed import Layout, PackedSource
from tpu_inference.layers.common.weights import Piece, Source

Read = Callable[..., np.ndarray]
GREATEST = {"int8": 127.0, "float8_e4m3fn": 448.0, "int4": 7.0}
"""Of values that weights are rounded to at load."""
_WHOLE = ("int8", "int4")
LEAST_PART = 32
"""Columns of the smallest groups that larger ones are cut into where devices, or pieces of a weight, would have a part of one."""
_ROWS_AT_A_TIME = 1024
_E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)


@dataclass(frozen=True)
class ScaleSource(Source):
    """Scales of a weight [rows, columns]: `shape` is (entries, groups), and an entry is of `rows_of_entry` neighbouring rows."""

    rows_of_entry: int = 1
    transposed: bool = False
    """Whether the checkpoint has them as [groups, entries]."""
    parts: int = 1
    """Groups on the device that one of the checkpoint's is cut into."""

    def accepts(self, shape: tuple[int, ...]) -> bool:
        return shape == self.shape[::-1] if self.transposed else math.prod(shape) == math.prod(self.shape)

    def read(self, read: Read, name: str, index: tuple[slice, ...]) -> np.ndarray:
        entries = read(name).astype(np.float32)
        entries = entries.T if self.transposed else entries.reshape(self.shape)
        entries = entries.repeat(self.parts, axis=1)
        rows, columns = index
        first = rows.start // self.rows_of_entry
        wanted = entries[first : -(-rows.stop // self.rows_of_entry), columns]
        start = rows.start - first * self.rows_of_entry
        return np.repeat(wanted, self.rows_of_entry, axis=0)[start : start + rows.stop - rows.start]


def has_nan_bytes(values: np.ndarray) -> bool:
    """Whether values of e4m3 are no numbers: kernels read those bytes as numbers."""
    return values.dtype == _E4M3 and bool(((values.view(np.uint8) & 0x7F) == 0x7F).any())


def without_minus_zero(values: np.ndarray) -> np.ndarray:
    """The same numbers; e4m3 without -0, whose bits are NaN where chips before tpu7x read them with another bias (`kernels.grouped_matmul`)."""
    if values.dtype != _E4M3:
        return values
    bits = values.view(np.uint8)
    return np.where(bits == 0x80, np.uint8(0), bits).view(_E4M3)


def scales_of_rows(weight: np.ndarray, dtype: str) -> np.ndarray:
    """float32 [rows, 1]: what the greatest value of `dtype` means in each row."""
    return np.abs(weight.astype(np.float32)).max(axis=1, keepdims=True) / GREATEST[dtype]


def rounded(weight: np.ndarray, scales: np.ndarray, dtype: str) -> np.ndarray:
    """`weight / scales` in `dtype`, int8 for "int4"; rows of zeros stay so."""
    values = weight.astype(np.float32) / np.where(scales == 0, 1, scales)
    return np.rint(values).astype(np.int8) if dtype in _WHOLE else values.astype(np.dtype(dtype))


def rounded_rows(
    read: Callable[[slice], np.ndarray], rows: slice, dtype: str, group: int | None = None
) -> Iterator[tuple[slice, np.ndarray, np.ndarray]]:
    """(rows, scales [n, groups], values [n, columns]) of a weight that `read` reads whole rows of, so many at a time that little memory is taken.

    Groups are of so many columns, which divide a row; None for one.
    """
    for start in range(rows.start, rows.stop, _ROWS_AT_A_TIME):
        part = slice(start, min(start + _ROWS_AT_A_TIME, rows.stop))
        whole = read(part)
        groups = whole.reshape(-1, group or whole.shape[1])
        scales = scales_of_rows(groups, dtype)
        yield part, scales.reshape(len(whole), -1), rounded(groups, scales, dtype).reshape(whole.shape)


@dataclass(frozen=True)
class _RoundedAtLoad(Source):
    """Of a weight that the checkpoint has in full. A row's scales are those of the whole row, whichever part of it is asked for."""

    dtype: str = "int8"
    group: int | None = None
    wants: Literal["values", "codes", "scales"] = "values"

    def read(self, read: Read, name: str, index: tuple[slice, ...]) -> np.ndarray:
        rows, columns = index
        whole = slice(0, self.shape[1])
        parts = rounded_rows(lambda part: read(name, (part, whole)), rows, self.dtype, self.group)
        found = np.concatenate(
            [(scales if self.wants == "scales" else values)[:, columns] for _, scales, values in parts]
        )
        return (found + ZERO).astype(np.uint8) if self.wants == "codes" else found


FP4 = ("nvfp4", "mxfp4")
"""Layouts of e2m1 values, two a byte, which differ in their scales."""


@dataclass(frozen=True)
class Scheme:
    """One way of storing the weights of linear layers."""

    dtype: str
    """Of the values on the device, where each has a byte; or "int4", rounded at load, which are int8 there."""
    block: tuple[int | None, int | None] = (1, None)
    """Rows and columns of the weight that share a scale; None for all of them."""
    activations: str | None = None
    """As `quantized_matmul` takes it; see `activations_on`."""
    at_load: bool = False
    """Whether the checkpoint has the weights in full, and they are rounded at load, with a scale for each row or for groups of its columns."""
    packed: int = 0
    """Bits of a value where they are stored as `PackedSource` reads them, else 0."""
    layout: Layout | Literal["nvfp4", "mxfp4"] = "compressed-tensors"
    """Of packed values."""
    zeros_name: str | None = None
    """Last part of the name of packed values' zero points, where they have any."""
    values_name: str = "weight"
    scales_name: str = "weight_scale"
    tensor_scale_name: str | None = None
    """Last part of the name of the one scale of the whole tensor, which NVFP4 has besides."""
    divides: bool = False
    """Whether that is divided by."""

    def activations_on(self, device: jax.Device) -> str | None:
        """None for float8 that a checkpoint asks for where the matrix unit does not multiply it: rounding would cost accuracy and gain nothing."""
        of_checkpoint = self.activations == _E4M3.name and not self.at_load
        return None if of_checkpoint and not multiplies(_E4M3.name, implementation_for(device)) else self.activations

    @property
    def code(self) -> Packed | None:
        """How the device has two values in a byte; None where it never does."""
        if self.layout in FP4:
            return "e2m1"
        return "int4" if self.packed == 4 or self.dtype == "int4" else None

    @property
    def held_dtype(self) -> str:
        """Of the values on the device, where each has a byte."""
        return "int8" if self.dtype == "int4" else self.dtype

    def code_on(self, columns: int, shards: int) -> Packed | None:
        """The same for weights of so many columns on so many devices."""
        group = self.block[1] or columns
        return self.code if is_whole(columns, shards, group if group < columns else BLOCK) else None

    @property
    def stored_dtype(self) -> str:
        """Of the tensor `values_name`, where a weight in full may have that name."""
        return "uint8" if self.layout in FP4 else self.dtype

    @property
    def stored_names(self) -> tuple[str, ...]:
        """Last parts of the names of the tensors that the checkpoint has of each layer."""
        names = (self.values_name, self.scales_name, self.zeros_name, self.tensor_scale_name)
        return tuple(name for name in names if name is not None)

    def weight_shape(self, stored: tuple[int, ...]) -> tuple[int, int]:
        """[rows, columns] of a weight whose values are stored in that shape."""
        if not self.packed:
            return stored[0], stored[1]
        if self.layout in FP4:
            return stored[0], 2 * stored[1]
        return PackedSource("", stored, bits=self.packed, layout=self.layout).weight_shape

    def groups(self, columns: int) -> int:
        """Scales of a row."""
        return 1 if self.block[1] is None else -(-columns // self.block[1])

    def values(self, source: Source, parts: int = 1, *, codes: bool = False) -> Source:
        """What the checkpoint has in place of the weight `source`, or its codes of four bits; `parts` as for `scales`."""
        if self.at_load:
            group = self.block[1] and self.block[1] // parts
            wants: Literal["values", "codes"] = "codes" if codes else "values"
            return _RoundedAtLoad(source.name, source.shape, source.offset, self.dtype, group, wants)
        name = source.name.removesuffix("weight") + self.values_name
        if self.layout in FP4:
            return Nvfp4Source.of(source, name, codes)
        if self.packed:
            return self._packed(source, name, codes)
        return replace(source, name=name)

    def zero_points(self, source: Source, parts: int = 1) -> Source:
        """Its zero points, of groups as `scales` has them."""
        return self._packed(source, source.name.removesuffix("weight") + self.values_name).zero_points(parts)

    def _packed(self, source: Source, name: str, codes: bool = False) -> PackedSource:
        assert self.layout not in FP4
        (rows, columns), words = source.shape, lambda n: -(-n * self.packed // 32)
        shape = {
            "compressed-tensors": (rows, words(columns)),
            "gptq": (words(columns), rows),
            "awq": (columns, words(rows)),
        }[self.layout]
        zeros = self.zeros_name and source.name.removesuffix("weight") + self.zeros_name
        group = self.block[1] or columns
        return PackedSource(name, shape, source.offset, self.packed, self.layout, zeros, group, codes)

    def scales(self, source: Source, parts: int = 1) -> Source:
        """Its scales, of groups of columns each of which is cut into so many."""
        if self.at_load:
            group = self.block[1] and self.block[1] // parts
            return _RoundedAtLoad(source.name, source.shape, source.offset, self.dtype, group, "scales")
        rows_of_entry = self.block[0] or source.shape[0]
        shape = (-(-source.shape[0] // rows_of_entry), self.groups(source.shape[1]))
        base = source.name.removesuffix("weight")
        if self.layout == "mxfp4":
            return Mxfp4ScaleSource(base + self.scales_name, shape, source.offset, parts)
        if self.tensor_scale_name is not None:
            of_tensor = base + self.tensor_scale_name
            return Nvfp4ScaleSource(base + self.scales_name, shape, source.offset, of_tensor, self.divides, parts)
        return ScaleSource(
            base + self.scales_name,
            shape,
            source.offset,
            rows_of_entry,
            self.layout != "compressed-tensors",
            parts,
        )


@dataclass(frozen=True)
class Quantization:
    """Which linear layers are quantized, and how."""

    scheme_of: Callable[[str], Scheme | None]
    """Of a layer's name in the checkpoint."""
    num_layers: int
    unread: tuple[str, ...] = ()
    """Ends of names of tensors that such checkpoints have and nothing here reads."""
    experts: Literal["mxfp4"] | None = None
    """How those of gpt-oss are stored."""
    scheme_of_experts: Callable[[str], Scheme | None] | None = None
    """Of a matrix of an expert; None: as `scheme_of` says."""
    experts_alone: bool = False
    """Whether no other layer is quantized."""

    @property
    def of_experts(self) -> Callable[[str], Scheme | None]:
        """Of the name of an expert's matrix."""
        return self.scheme_of if self.scheme_of_experts is None else self.scheme_of_experts

    def of_weight(self, pieces: tuple[Piece, ...]) -> Scheme | None:
        """The one scheme of what a weight is assembled from, in every layer.

        Raises:
            TpuInferenceError: there are several.
        """
        names = {piece.source.name.removesuffix(".weight") for piece in pieces if piece.source is not None}
        of_expert = any("{expert}" in name for name in names)
        ask = self.of_experts if of_expert else self.scheme_of
        found = [name.format(layer=i, expert=0) for name in names for i in range(self.num_layers)]
        schemes = {name: ask(name) for name in found}
        if len(set(schemes.values())) > 1:
            by_scheme = {scheme: name for name, scheme in schemes.items()}
            raise TpuInferenceError(
                "Layers of one kind are quantized in different ways: "
                + ", ".join(f"{name} by {scheme and scheme.dtype}" for scheme, name in by_scheme.items())
                + ". Use a checkpoint in which all layers are alike."
            )
        return next(iter(schemes.values()), None)


@dataclass(frozen=True)
class DequantizedSource(Source):
    """A matrix that the checkpoint has quantized, read as what it means: float32."""

    values: Source = field(kw_only=True)
    scales: Source = field(kw_only=True)
    group: int = field(kw_only=True)
    """Columns that share a scale."""

    @property
    def beside(self) -> tuple[Source, ...]:
        return (*self.values.beside, self.scales)

    def accepts(self, shape: tuple[int, ...]) -> bool:
        return self.values.accepts(shape)

    def read(self, read: Read, name: str, index: tuple[slice, ...]) -> np.ndarray:
        rows, columns = index
        groups = slice(columns.start // self.group, -(-columns.stop // self.group))
        scales_name = name.removesuffix(_last(self.values.name)) + _last(self.scales.name)
        scales = np.repeat(self.scales.read(read, scales_name, (rows, groups)), self.group, axis=1)
        start = columns.start - groups.start * self.group
        values = self.values.read(read, name, index).astype(np.float32)
        return values * scales[:, start : start + values.shape[1]]


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def dequantized(source: Source, scheme: Scheme) -> Source:
    """The weight `source` as it is read from a checkpoint of `scheme`, in full."""
    if scheme.at_load:
        return source
    values = scheme.values(source)
    group = scheme.block[1] or source.shape[1]
    return DequantizedSource(
        values.name, values.shape, source.offset, values=values, scales=scheme.scales(source), group=group
    )


def part_of_group(size: int, whole: Iterable[int]) -> int | None:
    """Columns of groups that divide all of `whole`: `size`, or a part of it of `LEAST_PART` or a multiple; None where there is none."""
    part = math.gcd(size, *whole)
    return part if part == size or part % LEAST_PART == 0 else None
