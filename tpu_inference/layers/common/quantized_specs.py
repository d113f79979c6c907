# SPDX-License-Identifier: Apache-2.0
"""The arrays that the device holds in place of a weight that is quantized."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import ml_dtypes
import numpy as np

from tpu_inference.errors import TpuInferenceError
from tpu_inference.kernels.quantized_matmul import BLOCK, Packed
from tpu_inference.layers.common.four_bits import NibbleSource
from tpu_inference.layers.common.quantization import Scheme, part_of_group
from tpu_inference.layers.common.weights import Piece, Source, WeightSpec


@dataclass(frozen=True)
class QuantizedSpecs:
    """What the device holds in place of a weight [out, in]."""

    values: WeightSpec
    scales: WeightSpec
    zero_points: WeightSpec | None = None
    packed: Packed | None = None
    """As `quantized_matmul` takes it."""

    @property
    def group(self) -> int:
        """Columns that share a scale."""
        return self.values.shape[1] * (2 if self.packed else 1) // self.scales.shape[1]


def quantized(spec: WeightSpec, scheme: Scheme, shards: int) -> QuantizedSpecs:
    """In place of a weight [out, in].

    Where a piece or a device has a part of a group of columns, the device's groups are smaller than the checkpoint's (not those of experts).

    Raises:
        TpuInferenceError: groups of columns that a piece or a device would have too small a part of.
    """
    groups, size, parts = scheme.groups(spec.shape[1]), spec.shape[1], 1
    if groups > 1:
        whole = scheme.block[1] or size
        size = _group_size(spec, whole, shards)
        groups, parts = spec.shape[1] // size, whole // size
    packed = _code(spec, scheme, groups, shards)
    per_byte = 2 if packed else 1

    def values_of(source: Source) -> Source:
        return NibbleSource.of(scheme.values(source, parts, codes=True)) if packed else scheme.values(source, parts)

    values = replace(
        spec,
        shape=(spec.shape[0], spec.shape[1] // per_byte),
        dtype=np.dtype(np.uint8 if packed else scheme.held_dtype),
        pieces=_pieces(spec, per_byte, values_of),
        init=packed or spec.init,
    )

    def of_groups(read_from: Callable[[Source, int], Source], init: Literal["scales", "zero_points"]) -> WeightSpec:
        return _of_groups(spec, groups, lambda source: read_from(source, parts), init)

    zero_points = of_groups(scheme.zero_points, "zero_points") if packed and scheme.zeros_name else None
    return QuantizedSpecs(values, of_groups(scheme.scales, "scales"), zero_points, packed)


def quantized_by_rows(spec: WeightSpec) -> QuantizedSpecs:
    """In place of a weight assembled from `Mxfp4RowsSource`s."""
    return QuantizedSpecs(
        replace(spec, dtype=np.dtype(ml_dtypes.float8_e4m3fn)),
        _of_groups(spec, 1, lambda source: source.row_scales, "scales"),
    )


def _pieces(spec: WeightSpec, per_entry: int, read_from: Callable[[Source], Source]) -> tuple[Piece, ...]:
    """Those of an array in place of the weight, each of whose columns is for so many of the weight's."""
    n = per_entry if spec.axis == 1 else 1
    return tuple(Piece(p.size // n, p.source and read_from(p.source), p.start // n) for p in spec.pieces)


def _of_groups(
    spec: WeightSpec, groups: int, read_from: Callable[[Source], Source], init: Literal["scales", "zero_points"]
) -> WeightSpec:
    """float32 [out, groups] beside the weight `spec`."""
    axis, pieces = spec.axis, _pieces(spec, spec.shape[1] // groups if groups > 1 else 1, read_from)
    if axis == 1 and groups == 1:
        source = next(piece.source for piece in pieces if piece.source is not None)
        axis, pieces = 0, (Piece(spec.shape[0], source),)
    axes, shape = (spec.axes[0], spec.axes[1] if groups > 1 else None), (spec.shape[0], groups)
    return replace(spec, shape=shape, dtype=np.float32, axes=axes, pieces=pieces, axis=axis, init=init)


def _code(spec: WeightSpec, scheme: Scheme, groups: int, shards: int) -> Packed | None:
    """How two values are in a byte; None where a device, or a piece, has no whole blocks of columns, and for experts."""
    code = scheme.code_on(spec.shape[1], _shards_of_columns(spec, shards))
    if code is None or spec.experts is not None:
        return None
    if spec.axis == 0:
        return code
    whole = all(n % BLOCK == 0 for piece in spec.pieces for n in (piece.size, piece.start))
    # With one scale a row, columns that are left empty would not be of zeros.
    return code if whole and (groups > 1 or all(piece.source for piece in spec.pieces)) else None


def _shards_of_columns(spec: WeightSpec, shards: int) -> int:
    return 1 if spec.axes[1] in (None, "embed") else shards


def _group_size(spec: WeightSpec, size: int, shards: int) -> int:
    """Columns that share a scale on the device, where `size` do in the checkpoint. Raises TpuInferenceError where groups would be cut too small."""
    name = next(piece.source.name for piece in spec.pieces if piece.source is not None)
    whole = [spec.shape[1], spec.shape[1] // _shards_of_columns(spec, shards)]
    if spec.axis == 1:
        whole += [n for piece in spec.pieces for n in (piece.size, piece.start)]
    part = part_of_group(size, whole)
    if part is None or (part < size and spec.experts is not None):
        raise TpuInferenceError(
            f"{name} is quantized in groups of {size} columns, which {spec.shape[1]} columns on {shards} devices are not divided into: "
            + (
                "use a smaller --tensor-parallel-size."
                if shards > 1
                else "use a checkpoint with groups that divide them."
            )
        )
    return part
