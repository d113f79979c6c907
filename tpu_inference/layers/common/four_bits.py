# SPDX-License-Identifier: Apache-2.0
"""Weights of four bits, two a byte on the device, as `kernels.quantized_matmul` takes them: from checkpoints, or from values of a byte each."""

from collections.abc import Callable
from dataclasses import dataclass, field

import ml_dtypes
import numpy as np

from tpu_inference.kernels.quantized_matmul import BLOCK, ZERO, Packed, pack, without_minus_zero
from tpu_inference.layers.common.mxfp4 import VALUES
from tpu_inference.layers.common.weights import Source

_CODE_OF_BYTE = np.zeros(256, np.uint8)
_CODE_OF_BYTE[VALUES.astype(ml_dtypes.float8_e4m3fn).view(np.uint8)] = without_minus_zero(np.arange(16, dtype=np.uint8))


def is_whole(columns: int, shards: int, group: int) -> bool:
    """Whether so many columns, in groups of `group`, can be packed on each of so many devices."""
    return columns % (BLOCK * shards) == 0 and (group % (BLOCK // 2) == 0 or (BLOCK // 2) % group == 0)


@dataclass(frozen=True)
class NibbleSource(Source):
    """Columns of `codes`, two a byte; whole blocks of them are read."""

    codes: Source = field(kw_only=True)

    @classmethod
    def of(cls, codes: Source) -> "NibbleSource":
        return cls(codes.name, codes.shape, codes.offset, codes=codes)

    @property
    def beside(self) -> tuple[Source, ...]:
        return self.codes.beside

    def accepts(self, shape: tuple[int, ...]) -> bool:
        return self.codes.accepts(shape)

    def read(self, read: Callable[..., np.ndarray], name: str, index: tuple[slice, ...]) -> np.ndarray:
        rows, columns = index
        return pack(self.codes.read(read, name, (rows, slice(2 * columns.start, 2 * columns.stop))))


def packed_values(values: np.ndarray, packed: Packed) -> np.ndarray:
    """uint8 [rows, columns / 2] of e4m3 values that e2m1 has, or of int8 ones from -8 to 7."""
    return pack(_CODE_OF_BYTE[values.view(np.uint8)] if packed == "e2m1" else (values + ZERO).astype(np.uint8))


def packed_with_zero_points(values: np.ndarray, groups: int) -> tuple[np.ndarray, np.ndarray]:
    """(uint8 [rows, columns / 2], zero points float32 [rows, groups]) of int8 values that span no more than 15 within a group."""
    of_group = values.reshape(len(values), groups, -1)
    least = of_group.min(axis=2, keepdims=True)
    return pack((of_group - least).astype(np.uint8).reshape(values.shape)), -least[..., 0].astype(np.float32)
