# SPDX-License-Identifier: Apache-2.0
"""MXFP4: values of 4 bits (1 of sign, 2 of exponent, 1 of mantissa), and of every 32 neighbours of a row a power of two that scales them."""

from collections.abc import Callable
from dataclasses import dataclass

import ml_dtypes
import numpy as np

from tpu_inference.layers.common.weights import Source

GROUP = 32
"""Neighbours that share a scale."""
_VALUES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
VALUES = np.concatenate([_VALUES, -_VALUES])
"""By code."""
_EXPONENT_BIAS = 127


def dequantize(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """float32 [rows, 32 groups] of `blocks` uint8 [rows, groups, 16], the earlier value in the lower bits, and `scales` [rows, groups], as
    they are stored."""
    codes = np.stack([blocks & 15, blocks >> 4], axis=-1)
    values = VALUES[codes].reshape(*scales.shape, GROUP)
    return np.ldexp(values, scales.astype(np.int32)[..., None] - _EXPONENT_BIAS).reshape(len(scales), -1)


_BELOW_GREATEST = 6
"""Powers of two between the scale of a row and the greatest of its groups': 6 * 2**6 is the greatest value so made that e4m3 has."""


def row_exponents(scales: np.ndarray) -> np.ndarray:
    """int32 [rows, 1]: the power of two that scales a row whose groups have the stored exponents `scales` uint8 [rows, groups]."""
    return scales.astype(np.int32).max(axis=1, keepdims=True) - _EXPONENT_BIAS - _BELOW_GREATEST


@dataclass(frozen=True)
class Mxfp4RowsSource(Source):
    """An expert's matrix [rows, columns], as gpt-oss's checkpoints store those of all experts: NAME_blocks [E, rows, groups, 16] and NAME_scales.

    It is read as float8_e4m3fn with one scale a row, `row_scales`: exactly, where a group's scale is no less than 2**-14 of its row's greatest, and
    what is left out of smaller ones is less than that.
    """

    @classmethod
    def of_experts(cls, name: str, experts: int, rows: int, columns: int) -> "Mxfp4RowsSource":
        return cls(f"{name}_blocks", (experts, rows, -(-columns // GROUP), GROUP // 2))

    @property
    def row_scales(self) -> "Mxfp4RowScaleSource":
        return Mxfp4RowScaleSource(self._scales_of(self.name), self.shape[:-1], self.offset)

    @staticmethod
    def _scales_of(name: str) -> str:
        return name.removesuffix("_blocks") + "_scales"

    def read(self, read: Callable[..., np.ndarray], name: str, index: tuple[slice, ...]) -> np.ndarray:
        rows, columns = index
        groups = slice(columns.start // GROUP, -(-columns.stop // GROUP))
        scales = read(self._scales_of(name), (rows, slice(0, self.shape[2])))
        relative = scales[:, groups].astype(np.int32) - row_exponents(scales)
        first = groups.start * GROUP
        values = dequantize(read(name, (rows, groups)), relative)
        return values[:, columns.start - first : columns.stop - first].astype(ml_dtypes.float8_e4m3fn)


@dataclass(frozen=True)
class Mxfp4RowScaleSource(Source):
    """float32 [rows, 1]; `shape` is that of the scales of groups, of all experts."""

    def read(self, read: Callable[..., np.ndarray], name: str, index: tuple[slice, ...]) -> np.ndarray:
        rows, _ = index
        return np.ldexp(np.float32(1), row_exponents(read(name, (rows, slice(0, self.shape[2])))))


@dataclass(frozen=True)
class Mxfp4ScaleSource(Source):
    """Scales [rows, groups] stored as exponents of two."""

    parts: int = 1
    """Groups on the device that one of the checkpoint's is cut into."""

    def read(self, read: Callable[..., np.ndarray], name: str, index: tuple[slice, ...]) -> np.ndarray:
        rows, columns = index
        groups = slice(columns.start // self.parts, -(-columns.stop // self.parts))
        exponents = read(name, (rows, groups)).astype(np.int32) - _EXPONENT_BIAS
        start = columns.start - groups.start * self.parts
        scales = np.ldexp(np.float32(1), exponents).repeat(self.parts, axis=1)
        return scales[:, start : start + columns.stop - columns.start]
