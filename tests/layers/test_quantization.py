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
from tpu_inference.layers.common import mxfp4
from tpu_inference.layers.common.four_bits import packed_values, packed_with_zero_points
from tpu_inference.layers.common.quantization import (
    PackedSource,
    Quantization,
    Scheme,
    dequantized,
    rounded,
    scales_of_rows,
    without_minus_zero,
)
from tpu_inference.layers.common.quantized_specs import quantized
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
@given(boxes(), st.sampled_from(["int8", "int4", "float8_e4m3fn"]))
def test_a_part_is_rounded_by_the_scale_of_its_whole_row(box, dtype):
    weight = np.random.default_rng(0).normal(size=(ROWS, COLUMNS)).astype(ml_dtypes.bfloat16)
    weight[3] = 0
    scheme, source = Scheme(dtype, at_load=True), Source("w.weight", weight.shape)
    values = scheme.values(source).read(reader(weight), "w.weight", box)
    scales = scheme.scales(source).read(reader(weight), "w.weight", (box[0], slice(0, 1)))
    assert (scales == scales_of_rows(weight, dtype)[box[0]]).all()
    assert (values == rounded(weight, scales_of_rows(weight, dtype), dtype)[box]).all()
    error = np.abs(values.astype(np.float32) * scales - weight[box].astype(np.float32))
    assert (error <= {"int8": 0.51, "int4": 0.51, "float8_e4m3fn": 16.1}[dtype] * scales).all()
    if dtype == "int4":
        codes = scheme.values(source, codes=True).read(reader(weight), "w.weight", box)
        assert codes.dtype == np.uint8 and (codes.astype(np.int8) - 8 == values).all()


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
        "float8_e4m3fn", (1, 16), packed=4, layout="nvfp4", values_name="weight_packed", tensor_scale_name="of_tensor", divides=divides
    )  # fmt: skip
    weight = Source("l.weight", (ROWS, 64))
    values, grid = scheme.values(weight), scheme.scales(weight, parts)
    assert scheme.weight_shape((ROWS, 32)) == (ROWS, 64) and {s.name for s in grid.beside} == {"l.of_tensor"}
    assert all(source.accepts(tensors[source.name].shape) for source in (values, grid, *grid.beside))

    def read(name, index=()):
        return tensors[name][index] if index else tensors[name]

    rows, columns = box
    found = values.read(read, values.name, box)
    assert found.dtype == ml_dtypes.float8_e4m3fn
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
    scheme = Scheme("float8_e4m3fn", (1, 32), packed=4, layout="mxfp4", values_name="weight_packed")
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
    held = quantized(spec, Scheme("int8", (1, 8)), shards=1)
    values, scales = held.values, held.scales
    assert values.shape == (ROWS, 24) and scales.shape == (ROWS, 3)
    assert [(p.size, p.start, p.source is None) for p in scales.pieces] == [(2, 0, False), (1, 0, True)]
    assert quantized(spec, Scheme("int8"), shards=1).scales.shape == (ROWS, 1)


@settings(deadline=None)
@given(st.sampled_from([(576, 2, 32), (576, 1, 64), (512, 4, 128)]), st.integers(1, 18), st.integers(1, 18))
def test_blocks_that_devices_cut_are_scaled_in_parts(case, start, length):
    columns, shards, size = case
    source = Source("w.weight", (ROWS, columns))
    held = quantized(spec_of(columns, 1, (source.piece(0, columns),)), Scheme("int8", (4, 128)), shards)
    values, scales, groups = held.values, held.scales, columns // size
    assert values.shape == (ROWS, columns) and scales.shape == (ROWS, groups)
    stored = np.random.default_rng(0).random((-(-ROWS // 4), -(-columns // 128))).astype(np.float32)
    (piece,) = scales.pieces
    assert piece.source.accepts(stored.shape)
    part = slice(min(start, groups) - 1, min(start - 1 + length, groups))
    read = piece.source.read(reader(stored), "w", (slice(2, 7), part))
    every = stored.repeat(4, axis=0).repeat(128, axis=1)[:ROWS, :columns]
    assert (read == every[2:7, ::size][:, part]).all()


def codes_of(stored):
    """Codes [rows, columns] of what `pack` stores."""
    blocks = stored.reshape(len(stored), -1, 1, 128)
    return np.concatenate([blocks & 15, blocks >> 4], axis=2).reshape(len(stored), -1)


def meant_by(held, read):
    """float32 [rows, columns] of the one piece of each of its arrays."""

    def whole(spec):
        (piece,) = spec.pieces
        assert piece.size == spec.shape[spec.axis]
        return piece.source.read(read, piece.source.name, tuple(slice(0, n) for n in spec.shape))

    codes, scales = codes_of(whole(held.values)), whole(held.scales).repeat(held.group, axis=1)
    if held.packed == "e2m1":
        assert not (codes == 8).any(), "-0 is no number where the kernel reads it"
        return mxfp4.VALUES[codes] * scales
    points = 8 if held.zero_points is None else whole(held.zero_points).repeat(held.group, axis=1)
    return (codes.astype(np.float32) - points) * scales


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("layout", ["awq", "gptq", "compressed-tensors"])
def test_two_values_of_four_bits_are_in_a_byte(layout, axis):
    words, zeros, meant = with_zeros(layout, 16, 512, 64)
    scheme = Scheme(
        "int8", (1, 64), packed=4, layout=layout, zeros_name=None if zeros is None else "zeros", values_name="words", scales_name="scales"
    )  # fmt: skip
    source = Source("l.weight", meant.shape)
    spec = WeightSpec(meant.shape, "bfloat16", ("embed", "mlp"), (source.piece(0, meant.shape[axis]),), axis)
    held = quantized(spec, scheme, 2)
    assert held.packed == "int4" and held.values.shape == (16, 256) and held.group == 64
    scales = np.random.default_rng(2).random((16, 8)).astype(np.float32)
    stored = scales if layout == "compressed-tensors" else scales.T
    tensors = {"l.words": words.numpy(), "l.scales": stored, "l.zeros": None if zeros is None else zeros.numpy()}
    names = {name for part in (held.values, held.scales, held.zero_points) if part for name in part.sources()}
    assert names == {name for name, tensor in tensors.items() if tensor is not None}

    def read(name, index=()):
        return tensors[name][index] if index else tensors[name]

    np.testing.assert_allclose(meant_by(held, read), meant * scales.repeat(64, axis=1), rtol=1e-6)
    (piece,) = held.values.pieces
    part = piece.source.read(read, piece.source.name, (slice(3, 9), slice(128, 256)))
    np.testing.assert_array_equal(
        part, piece.source.read(read, piece.source.name, (slice(0, 16), slice(0, 256)))[3:9, 128:]
    )


def test_two_floats_of_four_bits_are_in_a_byte():
    rng = np.random.default_rng(4)
    codes, exponents = rng.integers(0, 16, (ROWS, 256), np.uint8), rng.integers(100, 150, (ROWS, 8), np.uint8)
    tensors = {"l.weight_packed": codes[:, ::2] | codes[:, 1::2] << 4, "l.weight_scale": exponents}
    scheme = Scheme("float8_e4m3fn", (1, 32), packed=4, layout="mxfp4", values_name="weight_packed")
    source = Source("l.weight", (ROWS, 256))
    held = quantized(WeightSpec((ROWS, 256), "bfloat16", ("mlp", "embed"), (source.piece(0, ROWS),)), scheme, 4)
    found = meant_by(held, lambda name, index=(): tensors[name][index] if index else tensors[name])
    scales = np.exp2(exponents.astype(np.float32) - 127).repeat(32, axis=1)
    np.testing.assert_array_equal(found, mxfp4.VALUES[codes] * scales)


@pytest.mark.parametrize(
    ("shape", "pieces", "group", "shards", "experts"),
    [
        pytest.param((8, 384), [(384, 0)], 32, 1, None, id="columns"),
        pytest.param((8, 768), [(768, 0)], 32, 2, None, id="columns of a device"),
        pytest.param((8, 512), [(384, 0), (128, 384)], 32, 1, None, id="pieces"),
        pytest.param((8, 512), [(256, 128), (256, 0)], 32, 1, None, id="starts of pieces"),
        pytest.param((8, 768), [(768, 0)], 96, 1, None, id="groups"),
        pytest.param((8, 512), [(512, 0)], 32, 1, 4, id="experts"),
        pytest.param((8, 512), [(256, 0), (256, None)], None, 1, None, id="empty columns without a scale of their own"),
    ],
)
def test_what_has_a_byte_for_each_value(shape, pieces, group, shards, experts):
    source = Source("l.weight", (8, 1024))
    made = tuple(Piece(size, None if start is None else source, start or 0) for size, start in pieces)
    spec = WeightSpec(shape, "bfloat16", ("embed", "mlp"), made, 1, experts=experts)
    held = quantized(spec, Scheme("int8", (1, group), packed=4, values_name="words"), shards)
    assert held.packed is None and held.values.dtype == np.int8 and held.values.shape == shape


@settings(deadline=None)
@given(st.integers(0, 2**32), st.sampled_from([1, 2, 4]), st.booleans())
def test_bytes_that_are_packed_afterwards(seed, groups, floats):
    """As vLLM's loaders have them."""
    rng, shape = np.random.default_rng(seed), (5, 256)
    if floats:
        values = mxfp4.VALUES[rng.integers(0, 16, shape)].astype(ml_dtypes.float8_e4m3fn)
        codes = codes_of(packed_values(values, "e2m1"))
        np.testing.assert_array_equal(mxfp4.VALUES[codes], values.astype(np.float32))
        assert not (codes == 8).any()
        return
    values = rng.integers(-8, 8, shape).astype(np.int8)
    np.testing.assert_array_equal(codes_of(packed_values(values, "int4")).astype(np.int8) - 8, values)
    values += rng.integers(-7, 8, (5, groups)).astype(np.int8).repeat(256 // groups, axis=1)
    stored, points = packed_with_zero_points(values, groups)
    found = codes_of(stored).astype(np.float32) - points.repeat(256 // groups, axis=1)
    np.testing.assert_array_equal(found, values)


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
