# SPDX-License-Identifier: Apache-2.0
"""NVFP4: values of 4 bits as MXFP4 has them, of every 16 neighbours of a row a scale of e4m3, and one scale of the whole tensor.

The device holds values as float8, which has all of them, or as their codes, and the product of both scales.
"""

from collections.abc import Callable
from dataclasses import dataclass

import ml_dtypes
import numpy as np

from tpu_inference.kernels.quantized_matmul import without_minus_zero
from tpu_inference.layers.common.mxfp4 import VALUES
from tpu_inference.layers.common.weights import Source

GROUP = 16
"""Neighbours that share a scale."""
_FLOAT8 = VALUES.astype(ml_dtypes.float8_e4m3fn)


@dataclass(frozen=True)
class ScalarSource(Source):
    """One number."""

    def accepts(self, shape: tuple[int, ...]) -> bool:
        return shape in ((), (1,))


@dataclass(frozen=True)
class Nvfp4Source(Source):
    """Values [rows, columns] of a weight stored as bytes [rows, columns / 2], the earlier value in the lower bits."""

    codes: bool = False
    """Whether codes are read, in place of values in e4m3."""

    @classmethod
    def of(cls, weight: Source, name: str, codes: bool) -> "Nvfp4Source":
        rows, columns = weight.shape
        return cls(name, (rows, -(-columns // 2)), weight.offset, codes)

    def read(self, read: Callable[..., np.ndarray], name: str, index: tuple[slice, ...]) -> np.ndarray:
        rows, columns = index
        first = columns.start // 2
        packed = read(name, (rows, slice(first, -(-columns.stop // 2))))
        codes = np.stack([packed & 15, packed >> 4], axis=-1).reshape(len(packed), -1)
        codes = codes[:, columns.start - 2 * first : columns.stop - 2 * first]
        return without_minus_zero(codes) if self.codes else _FLOAT8[codes]


@dataclass(frozen=True)
class Nvfp4ScaleSource(Source):
    """Scales [rows, groups], what stored ones and the tensor's make together."""

    of_tensor: str = ""
    """Name of the tensor's scale."""
    divides: bool = False
    """Whether that is divided by."""
    parts: int = 1
    """Groups on the device that one of the checkpoint's is cut into."""

    @property
    def beside(self) -> tuple[Source, ...]:
        return (ScalarSource(self.of_tensor, ()),)

    def read(self, read: Callable[..., np.ndarray], name: str, index: tuple[slice, ...]) -> np.ndarray:
        rows, columns = index
        groups = slice(columns.start // self.parts, -(-columns.stop // self.parts))
        whole = read(f"{name.rpartition('.')[0]}.{self.of_tensor.rpartition('.')[2]}").astype(np.float32).reshape(())
        scales = read(name, (rows, groups)).astype(np.float32) * (1 / whole if self.divides else whole)
        start = columns.start - groups.start * self.parts
        return scales.repeat(self.parts, axis=1)[:, start : start + columns.stop - columns.start]
