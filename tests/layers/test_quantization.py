# SPDX-License-Identifier: Apache-2.0
"""What quantized checkpoints hold, read part by part."""

import ml_dtypes
import numpy as np
import pytest
import torch
from compressed_tensors.compressors import pack_to_int32
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.quantized_models import AWQ_ORDER, words_of
from tpu_inference.errors import TpuInferenceError
from tpu_inference.layers.common.quantization import (
    PackedSource,
    Quantization,
    Scheme,
    dequantized,
    quantized,
    rounded,
    scales_of_rows,
    without_minus_zero,
)
from tpu_inference.layers.common.weights import Piece, Source, WeightSpec

ROWS, COLUMNS = 13, 24


def reader(tensor):
    return lambda name, index=(): tensor[index] if index else tensor


@st.composite
def boxes(draw, rows=ROWS, columns=COLUMNS):
    def part(size):
        start = draw(st.integers(0, size - 1))
        return slice(start, draw(st.integers(start + 1, size)))

    return part(rows), part(columns)


@settings(deadline=None)
@given(boxes(), st.sampled_from([4, 8]))
def test_any_part_of_packed_values(box, bits):
    values = np.random.default_rng(0).integers(-(2 ** (bits - 1)), 2 ** (bits - 1), (ROWS, COLUMNS))
    fit = 32 // bits
    fields = (values + 2 ** (bits - 1)).astype(np.uint64).reshape(ROWS, -1, fit)
    words = (fields << np.arange(0, 32, bits, dtype=np.uint64)).sum(-1).astype(np.uint32).view(np.int32)
    source = PackedSource("w", words.shape, bits=bits)
    assert (source.read(reader(words), "w", box) == values[box]).all()


def with_zeros(layout, rows=16, columns=24, group=8):
    """(words, words of zero points, values minus zero points)."""
    rng = np.random.default_rng(1)
    values, zeros = (
        torch.from_numpy(rng.integers(0, 16, (rows, columns))),
        torch.from_numpy(rng.integers(0, 16, (rows, columns // group))),
    )
    if layout == "awq":
        words = (words_of(values.T, 1, AWQ_ORDER), words_of(zeros.T, 1, AWQ_ORDER))
    elif layout == "gptq":
        zeros[:] = 8
        words = (words_of(values.T, 0), None)
    else:  # as the library packs them, which counts from the middle of the range
        words = tuple(pack_to_int32((t - 8).to(torch.int8), 4, packed_dim=dim) for t, dim in ((values, 1), (zeros, 0)))
    return *words, (values - zeros.repeat_interleave(group, 1)).numpy()


@settings(deadline=None)
@given(boxes(16, 24), st.sampled_from(["awq", "gptq", "compressed-tensors"]))
def test_any_part_of_values_with_zero_points(box, layout):
    words, zeros, meant = with_zeros(layout)
    scheme = Scheme(
        "int8", (1, 8), packed=4, layout=layout, zeros_name=None if zeros is None else "zeros", values_name="words"
    )
    source = scheme.values(Source("l.weight", meant.shape))
    assert source.accepts(tuple(words.shape)) and scheme.weight_shape(tuple(words.shape)) == meant.shape
    assert [(s.name, s.shape) for s in source.beside] == ([] if zeros is None else [("l.zeros", tuple(zeros.shape))])
    tensors = {"l.words": words.numpy(), "l.zeros": None if zeros is None else zeros.numpy()}
    assert (source.read(lambda name, index: tensors[name][index], "l.words", box) == meant[box]).all()


@settings(deadline=None)
@given(boxes(columns=3), st.sampled_from([(1, 8), (4, 8), (None, 8)]))
def test_any_part_of_scales_is_repeated_for_rows(box, block):
    source = Scheme("int8", block).scales(Source("w.weight", (ROWS, COLUMNS)))
    entries = np.random.default_rng(0).random(source.shape)
    every = np.repeat(entries, block[0] or ROWS, axis=0)[:ROWS]
    assert source.name == "w.weight_scale" and source.accepts(entries.shape)
    assert (source.read(reader(entries), "w", box) == every[box].astype(np.float32)).all()


@settings(deadline=None)
@given(boxes(), st.sampled_from(["int8", "float8_e4m3fn"]))
def test_a_part_is_rounded_by_the_scale_of_its_whole_row(box, dtype):
    weight = np.random.default_rng(0).normal(size=(ROWS, COLUMNS)).astype(ml_dtypes.bfloat16)
    weight[3] = 0
    scheme, source = Scheme(dtype, at_load=True), Source("w.weight", weight.shape)
    values = scheme.values(source).read(reader(weight), "w.weight", box)
    scales = scheme.scales(source).read(reader(weight), "w.weight", (box[0], slice(0, 1)))
    assert (scales == scales_of_rows(weight, dtype)[box[0]]).all()
    assert (values == rounded(weight, scales_of_rows(weight, dtype), dtype)[box]).all()
    error = np.abs(values.astype(np.float32) * scales - weight[box].astype(np.float32))
    assert (error <= {"int8": 0.51, "float8_e4m3fn": 16.1}[dtype] * scales).all()


@settings(deadline=None)
@given(boxes(columns=64), st.sampled_from([1, 2]))
def test_a_part_is_rounded_by_the_scales_of_its_groups(box, parts):
    weight = np.random.default_rng(0).normal(size=(ROWS, 64)).astype(ml_dtypes.bfloat16)
    scheme, source = Scheme("int8", (1, 32), at_load=True), Source("w.weight", weight.shape)
    values, scales = scheme.values(source, parts), scheme.scales(source, parts)
    rows, columns = box
    every = scales.read(reader(weight), "w.weight", (rows, slice(0, 2 * parts)))
    groups = np.abs(weight.astype(np.float32)).reshape(ROWS, 2 * parts, -1).max(2) / 127
    np.testing.assert_array_equal(every, groups[rows])
    meant = values.read(reader(weight), "w.weight", box) * every.repeat(32 // parts, axis=1)[:, columns]
    assert (
        np.abs(meant - weight[box].astype(np.float32)) <= 0.51 * every.repeat(32 // parts, axis=1)[:, columns]
    ).all()


@settings(deadline=None)
@given(boxes(columns=64), st.booleans(), st.sampled_from([1, 2]))
def test_any_part_of_nvfp4_is_what_the_format_says(box, divides, parts):
    rng = np.random.default_rng(3)
    codes = rng.integers(0, 16, (ROWS, 64), dtype=np.uint8)
    scales, whole = rng.random((ROWS, 4)).astype(ml_dtypes.float8_e4m3fn), np.float32(0.3)
    values_of = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
    meant = values_of[codes] * scales.astype(np.float32).repeat(16, axis=1) * whole
    tensors = {
        "l.weight_packed": codes[:, ::2] | codes[:, 1::2] << 4,
        "l.weight_scale": scales,
        "l.of_tensor": np.array([1 / whole if divides else whole], np.float32),
    }
    scheme = Scheme(
        "int8", (1, 16), packed=4, layout="nvfp4", values_name="weight_packed", tensor_scale_name="of_tensor", divides=divides
    )  # fmt: skip
    weight = Source("l.weight", (ROWS, 64))
    values, grid = scheme.values(weight), scheme.scales(weight, parts)
    assert scheme.weight_shape((ROWS, 32)) == (ROWS, 64) and {s.name for s in grid.beside} == {"l.of_tensor"}
    assert all(source.accepts(tensors[source.name].shape) for source in (values, grid, *grid.beside))

    def read(name, index=()):
        return tensors[name][index] if index else tensors[name]

    rows, columns = box
    found = values.read(read, values.name, box)
    assert found.dtype == np.int8
    every = grid.read(read, grid.name, (rows, slice(0, 4 * parts))).repeat(16 // parts, axis=1)[:, columns]
    np.testing.assert_allclose(found * every, meant[box], rtol=1e-6)
    group = slice(columns.start * parts // 16, -(-columns.stop * parts // 16))
    some = grid.read(read, grid.name, (rows, group))
    np.testing.assert_array_equal(some, grid.read(read, grid.name, (rows, slice(0, 4 * parts)))[:, group])


@settings(deadline=None)
@given(boxes(columns=64), st.sampled_from([1, 2]))
def test_any_part_of_mxfp4_is_what_the_format_says(box, parts):
    rng = np.random.default_rng(4)
    codes, exponents = (
        rng.integers(0, 16, (ROWS, 64), dtype=np.uint8),
        rng.integers(100, 150, (ROWS, 2), dtype=np.uint8),
    )
    values_of = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
    meant = values_of[codes] * np.exp2(exponents.astype(np.float32) - 127).repeat(32, axis=1)
    tensors = {"l.weight_packed": codes[:, ::2] | codes[:, 1::2] << 4, "l.weight_scale": exponents}
    scheme = Scheme("int8", (1, 32), packed=4, layout="mxfp4", values_name="weight_packed")
    weight = Source("l.weight", (ROWS, 64))
    values, grid = scheme.values(weight), scheme.scales(weight, parts)
    assert scheme.weight_shape((ROWS, 32)) == (ROWS, 64) and scheme.stored_dtype == "uint8"
    assert all(source.accepts(tensors[source.name].shape) for source in (values, grid))

    def read(name, index=()):
        return tensors[name][index] if index else tensors[name]

    rows, columns = box
    every = grid.read(read, grid.name, (rows, slice(0, 2 * parts)))
    np.testing.assert_array_equal(
        values.read(read, values.name, box) * every.repeat(32 // parts, axis=1)[:, columns], meant[box]
    )
    group = slice(columns.start * parts // 32, -(-columns.stop * parts // 32))
    np.testing.assert_array_equal(grid.read(read, grid.name, (rows, group)), every[:, group])


def spec_of(columns, axis, pieces):
    return WeightSpec((ROWS, columns), "bfloat16", ("embed", "mlp"), pieces, axis)


def test_scales_of_padded_columns():
    source = Source("w.weight", (ROWS, 16))
    spec = spec_of(24, 1, (source.piece(0, 16), Piece(8)))
    values, scales = quantized(spec, Scheme("int8", (1, 8)), shards=1)
    assert values.shape == (ROWS, 24) and scales.shape == (ROWS, 3)
    assert [(p.size, p.start, p.source is None) for p in scales.pieces] == [(2, 0, False), (1, 0, True)]
    assert quantized(spec, Scheme("int8"), shards=1)[1].shape == (ROWS, 1)


@settings(deadline=None)
@given(st.sampled_from([(576, 2, 32), (576, 1, 64), (512, 4, 128)]), st.integers(1, 18), st.integers(1, 18))
def test_blocks_that_devices_cut_are_scaled_in_parts(case, start, length):
    columns, shards, size = case
    source = Source("w.weight", (ROWS, columns))
    values, scales = quantized(spec_of(columns, 1, (source.piece(0, columns),)), Scheme("int8", (4, 128)), shards)
    groups = columns // size
    assert values.shape == (ROWS, columns) and scales.shape == (ROWS, groups)
    stored = np.random.default_rng(0).random((-(-ROWS // 4), -(-columns // 128))).astype(np.float32)
    (piece,) = scales.pieces
    assert piece.source.accepts(stored.shape)
    part = slice(min(start, groups) - 1, min(start - 1 + length, groups))
    read = piece.source.read(reader(stored), "w", (slice(2, 7), part))
    every = stored.repeat(4, axis=0).repeat(128, axis=1)[:ROWS, :columns]
    assert (read == every[2:7, ::size][:, part]).all()


@pytest.mark.parametrize(("columns", "shards"), [(24, 2), (20, 1)])
def test_groups_that_are_cut(columns, shards):
    spec = spec_of(columns, 1, (Source("w.weight", (ROWS, columns)).piece(0, columns),))
    with pytest.raises(TpuInferenceError, match="groups of 8 columns"):
        quantized(spec, Scheme("int8", (1, 8)), shards)


def test_a_dequantized_matrix_is_what_its_values_mean():
    rng = np.random.default_rng(3)
    values, stored = rng.integers(-9, 9, (ROWS, COLUMNS)).astype(np.int8), rng.normal(size=(4, 3)).astype(np.float32)
    source = dequantized(Source("l.weight", (ROWS, COLUMNS)), Scheme("int8", (4, 8), scales_name="weight_scale_inv"))
    assert [other.name for other in source.beside] == ["l.weight_scale_inv"] and source.accepts(values.shape)
    tensors = {"l.weight": values, "l.weight_scale_inv": stored}
    meant = values * np.repeat(np.repeat(stored, 4, 0)[:ROWS], 8, 1)
    for box in ((slice(0, ROWS), slice(0, COLUMNS)), (slice(3, 7), slice(5, 19))):
        found = source.read(lambda name, index=(): tensors[name][index] if index else tensors[name], "l.weight", box)
        np.testing.assert_allclose(found, meant[box], rtol=1e-6)


def test_minus_zero_of_e4m3_is_zero():
    every = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn)
    found = without_minus_zero(every)
    np.testing.assert_array_equal(found.astype(np.float32), every.astype(np.float32))
    assert (found.view(np.uint8) != 0x80).all()
    other = np.array([-0.0], np.float32)
    assert without_minus_zero(other) is other


def test_layers_that_are_not_alike():
    pieces = (Source("layers.{layer}.weight", (ROWS, 8)).piece(0, ROWS),)
    scheme = Scheme("int8")
    assert Quantization(lambda name: scheme, 3).of_weight(pieces) == scheme
    with pytest.raises(TpuInferenceError, match=r"layers\.2 by None|layers\.1 by int8"):
        Quantization(lambda name: None if name == "layers.2" else scheme, 3).of_weight(pieces)
