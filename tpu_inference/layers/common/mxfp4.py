# SPDX-License-Identifier: Apache-2.0
"""MXFP4: values of 4 bits (1 of sign, 2 of exponent, 1 of mantissa), and of every 32 neighbours of a row a power of two that scales them."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from tpu_inference.layers.common.weights import Source

GROUP = 32
"""Neighbours that share a scale."""
_VALUES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
VALUES = np.concatenate([_VALUES, -_VALUES])
"""By code."""
_EXPONENT_BIAS = 127


def dequantize(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """float32 [rows, 32 groups] of `blocks` uint8 [rows, groups, 16], the earlier value in the lower bits, and `scales` uint8 [rows, groups]."""
    codes = np.stack([blocks & 15, blocks >> 4], axis=-1)
    values = VALUES[codes].reshape(*scales.shape, GROUP)
    return np.ldexp(values, scales.astype(np.int32)[..., None] - _EXPONENT_BIAS).reshape(len(scales), -1)


@dataclass(frozen=True)
class Mxfp4Source(Source):
    """An expert's matrix [rows, columns], as gpt-oss's checkpoints store those of all experts: NAME_blocks [E, rows, groups, 16] and NAME_scales.

    It is read dequantized, the groups that are asked for alone.
    """

    @classmethod
    def of_experts(cls, name: str, experts: int, rows: int, columns: int) -> "Mxfp4Source":
        return cls(f"{name}_blocks", (experts, rows, -(-columns // GROUP), GROUP // 2))

    @property
    def beside(self) -> tuple[Source, ...]:
        return (Source(self._scales_of(self.name), self.shape[:-1]),)

    @staticmethod
    def _scales_of(name: str) -> str:
        return name.removesuffix("_blocks") + "_scales"

    def read(self, read: Callable[..., np.ndarray], name: str, index: tuple[slice, ...]) -> np.ndarray:
        rows, columns = index
        groups = slice(columns.start // GROUP, -(-columns.stop // GROUP))
        values = dequantize(read(name, (rows, groups)), read(self._scales_of(name), (rows, groups)))
        first = groups.start * GROUP
        return values[:, columns.start - first : columns.stop - first]


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
