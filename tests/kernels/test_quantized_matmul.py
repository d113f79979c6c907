# SPDX-License-Identifier: Apache-2.0
"""The product with quantized weights, against the readable one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax._src.pallas.mosaic.interpret import interpret_pallas_call as mosaic_interpret
from jax.experimental.pallas import tpu as pltpu

from tpu_inference.kernels.forms import Form
from tpu_inference.kernels.quantized_matmul import KINDS, pack, quantized_matmul, unpack, without_minus_zero
from tpu_inference.kernels.quantized_matmul.api import KERNEL_CHIPS, form_of, most_rows
from tpu_inference.kernels.quantized_matmul.config import MOST_VMEM_BYTES, Config, ShapeKey, heuristic
from tpu_inference.kernels.quantized_matmul.kernel import Blocked, quantized_matmul_pallas
from tpu_inference.kernels.quantized_matmul.resident import quantized_matmul_resident

E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
"""By code."""


def case(rows, out, columns, groups, dtype, x_dtype="bfloat16"):
    keys = jax.random.split(jax.random.key(rows + out), 3)
    x = jax.random.normal(keys[0], (rows, columns), x_dtype)
    values = (40 * jax.random.normal(keys[1], (out, columns))).clip(-127, 127).astype(dtype)
    return x, values, 0.01 + jax.random.uniform(keys[2], (out, groups))


@pytest.mark.parametrize("x_dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn", "float8_e5m2"])
@pytest.mark.parametrize(
    ("rows", "out", "columns", "groups"), [(1, 33, 64, 1), (7, 33, 64, 1), (7, 32, 96, 3), (7, 33, 384, 3)]
)
def test_against_the_reference(rows, out, columns, groups, dtype, x_dtype):
    arguments = case(rows, out, columns, groups, dtype, x_dtype)
    expected = quantized_matmul(*arguments, implementation="reference").astype(jnp.float32)
    found = quantized_matmul(*arguments).astype(jnp.float32)
    assert found.dtype == jnp.float32 and found.shape == (rows, out)
    bound = {"bfloat16": 2**-7, "float32": 1e-5}[x_dtype] * np.abs(expected).max()
    np.testing.assert_allclose(found, expected, atol=bound)


@pytest.mark.parametrize("implementation", ["xla", "reference"])
@pytest.mark.parametrize(("rows", "columns", "groups"), [(7, 96, 3), (7, 384, 3), (300, 256, 2), (7, 64, 1)])
def test_one_of_several_layers(rows, columns, groups, implementation):
    x, values, scales = case(rows, 33, columns, groups, "int8")
    stacked = (jnp.stack([values + 1, values]), jnp.stack([scales * 2, scales]))
    found = jax.jit(quantized_matmul, static_argnames="implementation")(
        x, *stacked, layer=jnp.int32(1), implementation=implementation
    )
    expected = quantized_matmul(x, values, scales, implementation=implementation)
    np.testing.assert_allclose(found.astype(jnp.float32), expected.astype(jnp.float32), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("rows", [1, 5])
def test_activations_of_float8(rows):
    """Rounded as the reference rounds them, and not as they were."""
    arguments = case(rows, 33, 64, 1, "float8_e4m3fn", "float32")
    expected = quantized_matmul(*arguments, activations="float8_e4m3fn", implementation="reference")
    found = quantized_matmul(*arguments, activations="float8_e4m3fn")
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())
    unrounded = quantized_matmul(*arguments)
    difference = np.abs(found - unrounded).max()
    assert 1e-3 * np.abs(unrounded).max() < difference < 0.1 * np.abs(unrounded).max()


def test_rounded_activations_are_summed_exactly():
    arguments = case(5, 33, 64, 1, "int8", "float32")
    expected = quantized_matmul(*arguments, activations="int8", implementation="reference")
    found = quantized_matmul(*arguments, activations="int8")
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-4)
    exact = quantized_matmul(*arguments)
    assert 0 < np.abs(found - exact).max() < 0.02 * np.abs(exact).max()


def agrees(arguments, found, bound=2**-7):
    """Each column of outputs, by its own greatest value."""
    expected = quantized_matmul(*arguments, implementation="reference").astype(jnp.float32)
    scale = np.abs(expected).max(axis=0, keepdims=True)
    np.testing.assert_allclose(found.astype(jnp.float32) / scale, expected / scale, atol=bound)


@pytest.mark.interpret
@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn", "float8_e5m2"])
@pytest.mark.parametrize(
    ("rows", "out", "columns", "groups", "config"),
    [
        (5, 384, 256, 1, Config(256, 2)),  # a last block that is shorter
        (8, 768, 384, 1, Config(128, 3)),  # more blocks than slots
        (8, 256, 256, 1, Config(256, 4)),  # one block
        (16, 256, 512, 4, Config(128, 2)),
        (8, 128, 256, 4, Config(128, 2)),  # two groups within the lanes
        (8, 128, 128, 4, Config(128, 2)),  # a tile of columns
    ],
)
def test_kernel_against_the_reference(rows, out, columns, groups, config, dtype):
    arguments = case(rows, out, columns, groups, dtype)
    found = quantized_matmul(*arguments, implementation="pallas_interpret", config=config)
    agrees(arguments, found)


@pytest.mark.interpret
def test_every_value_is_multiplied_as_it_is():
    codes = np.arange(256, dtype=np.uint8)
    finite = jnp.asarray(codes[(codes & 0x7F) != 0x7F].view("float8_e4m3fn"))  # subnormal ones and -0 too
    x = jnp.zeros((8, 128), jnp.bfloat16).at[0, 0].set(1)
    values = jnp.zeros((256, 128), jnp.float8_e4m3fn).at[:254, 0].set(finite)
    found = quantized_matmul(x, values, jnp.ones((256, 1)), implementation="pallas_interpret")
    np.testing.assert_array_equal(found[0, :254].astype(jnp.float32), finite.astype(jnp.float32))


@pytest.mark.interpret
@pytest.mark.parametrize("chip", ["v6e", "tpu7x"])
@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn"])
def test_kernel_rounds_rows(chip, dtype):
    """As they are, or as the same numbers of bfloat16 where the matrix unit does not take the dtype."""
    x, values, scales = case(8, 256, 256, 1, dtype)
    implementation = Form("pallas_interpret", chip)
    found = quantized_matmul(x, values, scales, activations=dtype, implementation=implementation)
    expected = quantized_matmul(x, values, scales, activations=dtype, implementation="reference")
    scale = np.abs(expected.astype(jnp.float32)).max()
    np.testing.assert_allclose(found.astype(jnp.float32), expected.astype(jnp.float32), atol=2**-7 * scale)


@pytest.mark.interpret
@pytest.mark.parametrize(("columns", "groups"), [(256, 1), (256, 2), (256, 8), (4096, 128)])
def test_kernel_reads_one_of_several_layers(columns, groups):
    arguments = case(8, 128, columns, groups, "float8_e4m3fn")
    x, values, scales = arguments
    stacked = (jnp.stack([-values, values]), jnp.stack([scales * 2, scales]))
    found = quantized_matmul(x, *stacked, layer=jnp.int32(1), implementation="pallas_interpret")
    agrees(arguments, found)


@pytest.mark.interpret
def test_kernel_has_no_races():
    arguments = case(8, 640, 256, 2, "int8")
    found = quantized_matmul_pallas(
        arguments[0], arguments[1][None], arguments[2][None], jnp.int32(0), activations=None, direct=False, exact=True,
        config=Config(128, 3), interpret=pltpu.InterpretParams(detect_races=True),
    )  # fmt: skip
    agrees(arguments, found)
    assert not mosaic_interpret.races.races_found


@pytest.mark.interpret
@pytest.mark.parametrize(
    ("rows", "out", "dtype", "activations"),
    [
        (1024, 512, "float8_e4m3fn", None),  # one block of the weight
        (2048, 768, "int8", None),  # narrow blocks
        (1024, 2560, "int8", "int8"),  # rows are rounded beside all blocks but one
        (2048, 4096, "int8", "int8"),
    ],
)
def test_kernel_for_many_rows(rows, out, dtype, activations):
    """Reads one of several layers, and has no races."""
    x, values, scales = case(rows, out, 384, 1, dtype)
    values, scales = jnp.stack([-values, values]), jnp.stack([scales * 2, scales])
    found = quantized_matmul_resident(
        x, values, scales, jnp.int32(1), activations=activations, interpret=pltpu.InterpretParams(detect_races=True)
    ).astype(jnp.float32)
    assert not mosaic_interpret.races.races_found
    expected = quantized_matmul(x, values[1], scales[1], activations=activations, implementation="reference")
    scale = np.abs(expected.astype(jnp.float32)).max(axis=0, keepdims=True)
    np.testing.assert_allclose(found / scale, expected.astype(jnp.float32) / scale, atol=2**-7)


@given(
    rows=st.integers(1, 256),
    out=st.integers(1, 250),
    columns=st.integers(1, 250),
    per_group=st.sampled_from([0, 32, 64, 128, 256]),
    values=st.sampled_from(["int8", "float8_e4m3fn", "float8_e5m2", "int4", "e2m1"]),
    activations=st.sampled_from([None, "int8"]),
    chip=st.sampled_from(KERNEL_CHIPS),
)
@settings(max_examples=200, deadline=None)
def test_the_heuristic_serves_any_shape(rows, out, columns, per_group, values, activations, chip):
    """Of whole lanes: what it says fits into VMEM, and the parts of the last block are whole groups."""
    packed = values if values in KINDS else None
    out, columns = 128 * out, 128 * (columns + columns % 2 if packed else columns)
    groups = columns // per_group if per_group and columns % per_group == 0 else 1
    activations = activations if groups == 1 and values == "int8" else None
    x = jax.ShapeDtypeStruct((rows, columns), "bfloat16")
    weights = jax.ShapeDtypeStruct(*(((out, columns // 2), "uint8") if packed else ((out, columns), values)))
    key = ShapeKey.of(x, weights, groups, activations, packed)
    config = heuristic(key, chip)
    assert config == config.within(out) and config.block_out % 128 == 0 and config.slots >= 2
    form = form_of(
        x, weights, jax.ShapeDtypeStruct((out, groups), "float32"), activations=activations, implementation=Form("pallas", chip), packed=packed,
    )  # fmt: skip
    assert (form == "pallas") == (
        rows <= most_rows(weights.dtype, groups) and key.vmem_bytes(config) <= MOST_VMEM_BYTES
    )
    largest = 2**28 if values == "int4" else 2**29  # which has room for zero_points too
    if rows <= 64 and groups <= columns // 128 and (groups == 1 or out * columns <= largest):
        assert form == "pallas", "no product of a model is too large"
    blocked = Blocked(rows, out, columns, groups, config.block_out, config.slots, None, True, packed)
    assert 0 < blocked.last <= config.block_out and blocked.last % 128 == 0
    parts = blocked.parts()
    assert [parts[0].start, parts[-1].stop] == [0, columns]
    assert all(
        part.stop > part.start and part.start % max(128, columns // groups if groups > 1 else 0) == 0 for part in parts
    )
    pieces = blocked.pieces(blocked.block)
    assert [row for piece in pieces for row in range(piece.start, piece.stop)] == list(range(blocked.block))
    assert not packed or all(part.start % 256 == 0 for part in parts), "no byte is cut"


def test_where_the_kernel_runs():
    def form(
        rows=8, columns=4096, out=256, groups=1, values="float8_e4m3fn", chip="v6e", x="bfloat16", activations=None, packed=None
    ):  # fmt: skip
        weight = ((out, columns // 2), "uint8") if packed else ((out, columns), values)
        arrays = ((rows, columns), x), weight, ((out, groups), "float32")
        abstract = [jax.ShapeDtypeStruct(*array) for array in arrays]
        return form_of(*abstract, activations=activations, implementation=Form("pallas", chip), packed=packed)

    ours = (
        dict(), dict(chip="v5e"), dict(chip="tpu7x"), dict(values="int8"), dict(values="int8", activations="int8"), dict(groups=32),
        dict(groups=128), dict(rows=1024), dict(rows=4096, out=2560, values="int8", activations="int8"),
    )  # fmt: skip
    assert {form(**mine) for mine in ours} == {"pallas"}
    assert {form(packed=kind, rows=256, groups=groups) for kind in KINDS for groups in (1, 32, 128)} == {"pallas"}
    others = (
        dict(chip="v4"), dict(chip=None), dict(rows=512), dict(rows=1536), dict(rows=1024, chip="v5e"), dict(rows=1024, groups=2),
        dict(rows=1024, out=384), dict(rows=1024, out=2048, values="int8", activations="int8"), dict(rows=1024, out=2**15),
        dict(columns=4160), dict(out=200), dict(x="float32"),
        dict(columns=3 * 128, groups=4), dict(columns=2**20), dict(packed="int4", rows=1024), dict(packed="e2m1", chip="v4"),
    )  # fmt: skip
    assert {form(**other) for other in others} == {"xla"}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (dict(x=jnp.zeros((2, 9))), "not .T, in. and .out, in."),
        (dict(scales=jnp.zeros((4, 3))), "groups must divide"),
        (dict(values=jnp.zeros((4, 8), jnp.bfloat16)), "served are int8"),
        (dict(activations="int4"), "none of"),
        (dict(activations="int8", scales=jnp.zeros((4, 2))), "one group"),
        (dict(activations="float8_e4m3fn"), "need float8_e4m3fn values"),
        (dict(implementation="fast"), "none of"),
    ],
)
def test_what_does_not_fit(change, said):
    arguments = dict(x=jnp.zeros((2, 8)), values=jnp.zeros((4, 8), jnp.int8), scales=jnp.zeros((4, 1)))
    with pytest.raises(ValueError, match=said):
        quantized_matmul(**{**arguments, **change})


def packed_case(rows, out, columns, groups, packed, zero_points=False, x_dtype="bfloat16"):
    """Arguments of the op, and the weight that they mean, by NumPy: float32 [out, in]."""
    source = np.random.default_rng(rows + out + columns + groups)
    codes = source.integers(0, 16, (out, columns), np.uint8)
    codes = without_minus_zero(codes) if packed == "e2m1" else codes
    scales = source.uniform(0.01, 1, (out, groups)).astype(np.float32)
    zeros = source.integers(0, 16, (out, groups)).astype(np.float32) if zero_points else np.float32(8)
    every = np.repeat(scales, columns // groups, axis=1)
    less = np.repeat(np.broadcast_to(zeros * scales, scales.shape), columns // groups, axis=1)
    weight = codes * every - less if packed == "int4" else E2M1[codes] * every
    x = jnp.asarray(source.standard_normal((rows, columns)), x_dtype)
    named = dict(packed=packed, zero_points=jnp.asarray(zeros) if zero_points else None)
    return (x, jnp.asarray(pack(codes)), jnp.asarray(scales)), named, weight


def means(weight, x, found, bound=2**-7):
    """`found` is the product with `weight`: each column of outputs, by its own greatest value, or what that is like where there are few."""
    expected = np.asarray(x, np.float32) @ weight.T
    scale = np.maximum(np.linalg.norm(weight, axis=1), np.abs(expected).max(axis=0))
    assert found.shape == expected.shape and found.dtype == x.dtype
    np.testing.assert_allclose(np.asarray(found, np.float32) / scale, expected / scale, atol=bound)


@given(blocks=st.integers(1, 4), lead=st.lists(st.integers(1, 3), max_size=2), seed=st.integers(0, 99))
@settings(deadline=None)
def test_codes_come_back(blocks, lead, seed):
    codes = np.random.default_rng(seed).integers(0, 16, (*lead, 256 * blocks), np.uint8)
    packed = pack(codes)
    assert packed.shape == (*lead, 128 * blocks)
    np.testing.assert_array_equal(unpack(jnp.asarray(packed)), codes)


def test_where_a_code_lies():
    codes = np.zeros((1, 512), np.uint8)
    codes[0, [256 + 5, 256 + 128 + 5]] = 3, 7
    assert np.flatnonzero(pack(codes)).tolist() == [128 + 5] and pack(codes)[0, 128 + 5] == 3 | 7 << 4


def test_minus_zero_is_zero():
    codes = np.arange(16, dtype=np.uint8)
    found = without_minus_zero(codes)
    np.testing.assert_array_equal(E2M1[found], E2M1)
    assert found.tolist() == [0 if code == 8 else code for code in codes] and found.dtype == np.uint8


@pytest.mark.parametrize(
    "codes", [np.zeros((2, 128), np.uint8), np.zeros((2, 256), np.int8), np.full((2, 256), 16, np.uint8)]
)
def test_codes_that_are_none(codes):
    with pytest.raises(ValueError, match="code"):
        pack(codes)


@pytest.mark.parametrize("x_dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize(("packed", "zero_points"), [("int4", False), ("int4", True), ("e2m1", False)])
@pytest.mark.parametrize("implementation", ["xla", "reference"])
@pytest.mark.parametrize(
    ("rows", "columns", "groups"),
    [
        (1, 512, 1), (1, 512, 16), (7, 512, 1), (7, 512, 32), (7, 512, 16), (7, 256, 4), (7, 512, 4), (7, 768, 3), (7, 768, 2), (7, 1024, 2),
        (300, 256, 2),
    ],
)  # fmt: skip
def test_packed_against_numpy(rows, columns, groups, implementation, packed, zero_points, x_dtype):
    arguments, named, weight = packed_case(rows, 33, columns, groups, packed, zero_points, x_dtype)
    found = quantized_matmul(*arguments, **named, implementation=implementation)
    means(weight, arguments[0], found, {"bfloat16": 2**-7, "float32": 1e-5}[x_dtype])


def of_two_layers(arguments, named):
    """The same with `layer`: weights of another layer lie before them."""
    (x, *stacked), zero_points = arguments, named["zero_points"]
    both = [
        jnp.stack([jnp.ones_like(array), array])
        for array in (*stacked, *(() if zero_points is None else (zero_points,)))
    ]
    return (x, *both[:2]), dict(named, layer=jnp.int32(1), zero_points=None if zero_points is None else both[2])


@pytest.mark.parametrize("implementation", ["xla", "reference"])
@pytest.mark.parametrize(("packed", "zero_points"), [("int4", False), ("int4", True), ("e2m1", False)])
@pytest.mark.parametrize(("rows", "groups"), [(1, 4), (7, 1), (7, 4), (7, 2), (7, 32)])
def test_packed_in_one_of_several_layers(rows, groups, packed, zero_points, implementation):
    arguments, named, weight = packed_case(rows, 33, 512, groups, packed, zero_points)
    stacked, how = of_two_layers(arguments, named)
    found = jax.jit(quantized_matmul, static_argnames=("implementation", "packed"))(
        *stacked, **how, implementation=implementation
    )
    means(weight, arguments[0], found)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (dict(packed="int3"), "none of"),
        (dict(activations="int8"), "not served with packed='int4'"),
        (dict(values=jnp.zeros((4, 128), jnp.int8)), "uint8, two codes a byte"),
        (dict(values=jnp.zeros((4, 256), jnp.uint8)), "out, in / 2"),
        (dict(x=jnp.zeros((2, 384)), values=jnp.zeros((4, 192), jnp.uint8)), "whole blocks of 256"),
        (dict(scales=jnp.zeros((4, 3))), "groups must divide"),
        (dict(zero_points=jnp.zeros((4, 1))), "shaped as scales"),
        (dict(zero_points=jnp.zeros((4, 2), jnp.bfloat16)), "are not float32"),
        (dict(packed="e2m1", zero_points=jnp.zeros((4, 2))), 'packed="int4" alone'),
        (dict(packed=None, values=jnp.zeros((4, 256), jnp.int8), zero_points=jnp.zeros((4, 2))), 'packed="int4" alone'),
        (dict(packed=None, values=jnp.zeros((4, 256), jnp.uint8)), "served are int8"),
    ],
)  # fmt: skip
def test_packed_that_does_not_fit(change, said):
    arguments = dict(
        x=jnp.zeros((2, 256)), values=jnp.zeros((4, 128), jnp.uint8), scales=jnp.zeros((4, 2)), packed="int4"
    )
    with pytest.raises(ValueError, match=said):
        quantized_matmul(**{**arguments, **change})


PACKED = [("int4", False), ("int4", True), ("e2m1", False)]


@pytest.mark.interpret
@pytest.mark.parametrize(("packed", "zero_points"), PACKED)
@pytest.mark.parametrize(
    ("rows", "out", "columns", "groups", "config"),
    [
        (5, 384, 512, 1, Config(256, 2)),  # a last block that is shorter
        (8, 768, 256, 1, Config(128, 3)),  # more blocks than slots
        (8, 256, 256, 2, Config(256, 4)),  # one block, of one block of columns
        (16, 256, 1280, 10, Config(128, 2)),  # parts of the last block that differ
        (8, 256, 1024, 2, Config(128, 2)),
        (8, 256, 768, 2, Config(128, 2)),  # groups of a block of columns and a half
        (8, 256, 512, 8, Config(128, 2)),  # two groups within the lanes
        (8, 128, 512, 32, Config(128, 2)),
        (8, 128, 256, 8, Config(128, 2)),
    ],
)
def test_packed_kernel_against_numpy(rows, out, columns, groups, config, packed, zero_points):
    arguments, named, weight = packed_case(rows, out, columns, groups, packed, zero_points)
    implementation = Form("pallas_interpret", "v6e" if groups % 2 else None)
    found = quantized_matmul(*arguments, **named, implementation=implementation, config=config)
    means(weight, arguments[0], found)


@pytest.mark.interpret
@pytest.mark.parametrize("zero_points", [False, True])
def test_zero_points_weigh_no_less_where_rows_have_a_mean(zero_points):
    """Codes are far from 0, and zero_points undo most of what they sum to."""
    (_, values, scales), named, weight = packed_case(8, 128, 2048, 16, "int4", zero_points)
    x = jnp.asarray(3 + np.random.default_rng(0).standard_normal((8, 2048)), jnp.bfloat16)
    found = quantized_matmul(x, values, scales, **named, implementation="pallas_interpret")
    expected = np.asarray(x, np.float32) @ weight.T
    np.testing.assert_allclose(
        np.asarray(found, np.float32), expected, rtol=2**-8, atol=np.abs(expected).mean() * 2**-9
    )


@pytest.mark.interpret
@pytest.mark.parametrize(("packed", "zero_points"), PACKED)
@pytest.mark.parametrize(("columns", "groups"), [(512, 1), (512, 4), (2048, 128)])
def test_packed_kernel_reads_one_of_several_layers(columns, groups, packed, zero_points):
    arguments, named, weight = packed_case(8, 128, columns, groups, packed, zero_points)
    stacked, how = of_two_layers(arguments, named)
    found = quantized_matmul(*stacked, **how, implementation="pallas_interpret")
    means(weight, arguments[0], found)


@pytest.mark.interpret
@pytest.mark.parametrize("packed", ["int4", "e2m1"])
@pytest.mark.parametrize("column", [3, 128 + 3])
@pytest.mark.parametrize("chip", ["v6e", "tpu7x"])
def test_every_code_is_multiplied_as_it_is(packed, column, chip):
    """From either nibble, in either format of float8."""
    codes = np.full((128, 256), {"int4": 8, "e2m1": 0}[packed], np.uint8)
    codes[:16, column] = np.arange(16)
    codes = without_minus_zero(codes) if packed == "e2m1" else codes
    x = jnp.zeros((8, 256), jnp.bfloat16).at[0, column].set(1)
    implementation = Form("pallas_interpret", chip)
    found = quantized_matmul(
        x, jnp.asarray(pack(codes)), jnp.ones((128, 1)), packed=packed, implementation=implementation
    )
    expected = {"int4": np.arange(16) - 8, "e2m1": E2M1}[packed]
    np.testing.assert_array_equal(found[0, :16].astype(jnp.float32), expected)
    assert not found[1:].any() and not found[0, 16:].any()


@pytest.mark.interpret
@pytest.mark.parametrize(("packed", "zero_points"), PACKED)
def test_packed_kernel_has_no_races(packed, zero_points):
    arguments, named, weight = packed_case(8, 640, 512, 4, packed, zero_points)
    if zero_points:
        named = dict(named, zero_points=named["zero_points"][None])
    found = quantized_matmul_pallas(
        arguments[0], arguments[1][None], arguments[2][None], jnp.int32(0), **named, activations=None, direct=True, exact=True,
        config=Config(128, 3), interpret=pltpu.InterpretParams(detect_races=True),
    )  # fmt: skip
    means(weight, arguments[0], found)
    assert not mosaic_interpret.races.races_found
