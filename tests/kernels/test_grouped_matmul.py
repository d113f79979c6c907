# SPDX-License-Identifier: Apache-2.0
"""The grouped product: the reference against NumPy, every other form against the reference, and what is refused."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental.pallas import tpu as pltpu

from tpu_inference.kernels.grouped_matmul import api, grouped_matmul, implementation_for, lies_transposed
from tpu_inference.kernels.grouped_matmul.config import Config, ShapeKey, heuristic
from tpu_inference.kernels.grouped_matmul.shapes import SHAPES
from tpu_inference.kernels.grouped_matmul.units import num_units, units
from tpu_inference.layers.common.quantization import without_minus_zero


def arrays(sizes, *, rows=None, out=40, columns=24, dtype=jnp.float32, seed=0):
    rng = np.random.default_rng(seed)
    rows = max(sum(sizes), 1) if rows is None else rows
    x, weights = (rng.standard_normal(s, np.float32) for s in ((rows, columns), (len(sizes), out, columns)))
    return jnp.asarray(x, dtype), jnp.asarray(weights, dtype), jnp.asarray(sizes, jnp.int32)


def run(form, args, **options):
    return np.asarray(jax.jit(partial(grouped_matmul, implementation=form, **options))(*args), np.float32)


def compare(form, args, *, config=None, atol=1e-4, **options):
    rows = int(args[2].sum())
    found, expected = run(form, args, config=config, **options), run("reference", args, **options)
    assert found.shape == expected.shape
    np.testing.assert_allclose(found[:rows], expected[:rows], atol=atol, rtol=1e-2 if atol > 1e-3 else 1e-4)


def quantized(args, block_out, block_in):
    """The same with weights of int8."""
    x, weights, sizes = args
    e, out, columns = weights.shape
    scales = np.random.default_rng(1).uniform(0.01, 0.1, (e, out // block_out, columns // block_in))
    values = np.random.default_rng(2).integers(-127, 128, weights.shape)
    return (x, jnp.asarray(values, jnp.int8), sizes), jnp.asarray(scales, jnp.float32)


def test_reference():
    x, weights, sizes = arrays([3, 0, 2], rows=7)
    found = run("reference", (x, weights, sizes))
    np.testing.assert_allclose(found[:3], x[:3] @ weights[0].T, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(found[3:5], x[3:5] @ weights[2].T, rtol=1e-5, atol=1e-5)
    assert (found[5:] == 0).all()


SIZES = st.lists(st.sampled_from([0, 0, 1, 2, 5, 17, 40]), min_size=1, max_size=9)


@settings(deadline=None, max_examples=15)
@given(sizes=SIZES, spare=st.integers(0, 3), dtype=st.sampled_from([jnp.float32, jnp.bfloat16]))
def test_xla_form_equals_reference(sizes, spare, dtype):
    args = arrays(sizes, rows=max(sum(sizes) + spare, 1), dtype=dtype)
    compare("xla", args, atol=0.1 if dtype == jnp.bfloat16 else 1e-4)


@pytest.mark.parametrize("blocks", [(40, 24), (1, 24), (8, 8)])
def test_xla_form_with_scales(blocks):
    args, scales = quantized(arrays([3, 0, 20]), *blocks)
    compare("xla", args, scales=scales, atol=1e-3)


def within_stack(args, scales=None):
    """The same product, of weights that lie in the middle of more."""
    x, weights, sizes = args
    put = lambda array: jnp.concatenate([array[:1] + 1, array, array[:2] - 1])  # noqa: E731
    return (x, put(weights), sizes), None if scales is None else put(scales)


@pytest.mark.parametrize("form", ["xla", "reference"])
def test_weights_within_a_stack(form):
    args, scales = quantized(arrays([3, 0, 20]), 8, 8)
    stacked, stacked_scales = within_stack(args, scales)
    found = run(form, stacked, scales=stacked_scales, first_group=1)
    np.testing.assert_allclose(found, run(form, args, scales=scales), rtol=1e-5)


@pytest.mark.parametrize("form", ["xla", "reference"])
def test_transposed_weights(form):
    x, weights, sizes = args = arrays([3, 0, 20])
    found = run(form, (x, weights.swapaxes(1, 2), sizes), transposed=True)
    np.testing.assert_allclose(found, run(form, args), rtol=1e-5)


@settings(deadline=None, max_examples=200)
@given(sizes=SIZES, spare=st.integers(0, 40), block=st.sampled_from([8, 16]))
def test_units_cover_every_row_once_and_in_order(sizes, spare, block):
    blocks = -(-max(sum(sizes) + spare, 1) // block)
    found = units(sizes, blocks, block, np)
    assert all(np.array_equal(a, b) for a, b in zip(found, units(jnp.asarray(sizes), blocks, block), strict=True))
    starts = np.concatenate([[0], np.cumsum(sizes)])
    total, items, first = found.totals
    assert first == 0
    expected = [
        (g, b) for g, size in enumerate(sizes) if size for b in range(starts[g] // block, -(-starts[g + 1] // block))
    ]
    assert list(zip(found.groups[:total], found.blocks[:total], strict=True)) == expected
    assert len(found.groups) == num_units(len(sizes), blocks) >= total
    with_rows = [g for g, size in enumerate(sizes) if size]
    assert found.item_groups[:items].tolist() == with_rows
    assert all(with_rows[i] == g for i, g in zip(found.items[:total], found.groups[:total], strict=True))
    # What comes after changes no index, so that nothing is fetched for it.
    assert (found.groups[total:] == found.groups[max(total - 1, 0)]).all()
    assert (found.blocks[total:] == found.blocks[max(total - 1, 0)]).all()


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("chip", ["v4", "v5e", "v5p", "v6e", "tpu7x"])
def test_blocks_cover_the_outputs(shape, chip):
    config = heuristic(shape.key(), chip)
    blocks = -(-shape.out // config.block_out)
    assert config.block_out % 128 == 0 and (blocks - 1) * config.block_out < shape.out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(x=jnp.zeros((0, 24))), r"are not \[M, in\]"),
        (dict(x=jnp.zeros((3, 23))), r"are not \[M, in\]"),
        (dict(x=jnp.zeros((3, 24), jnp.float16)), "neither bfloat16 nor float32"),
        (dict(sizes=jnp.zeros(2, jnp.int32)), "an integer for each of 1 groups, or of some"),
        (dict(sizes=jnp.zeros(1)), "an integer for each of 1 groups"),
        (dict(weights=jnp.zeros((1, 40, 24), jnp.int8)), "need scales"),
        (dict(scales=jnp.ones((1, 3, 1))), "are not those of blocks"),
        (dict(scales=jnp.ones((1, 40))), "are not those of blocks"),
        (dict(implementation="cuda"), "implementation='cuda' is none of"),
        (dict(implementation="pallas", scales=jnp.ones((1, 1, 3))), "scales of 8 columns"),
    ],
)
def test_refused(change, message):
    x, weights, sizes = arrays([3])
    args = [change.pop(name, value) for name, value in (("x", x), ("weights", weights), ("sizes", sizes))]
    with pytest.raises(ValueError, match=message):
        grouped_matmul(*args, **change)


@pytest.mark.parametrize(
    ("out", "columns", "transposed"),
    [(2048, 96, True), (2880, 360, True), (200, 72, True), (720, 2880, False), (96, 360, False), (4096, 1536, False)],
)
def test_stacks_lie_with_the_least_padding(out, columns, transposed):
    """As libtpu lays arguments out; tests/aot/test_step.py finds a copy where it does not."""
    assert lies_transposed(out, columns) == transposed


def test_outputs_along_lanes_are_cut_at_whole_lanes():
    key = ShapeKey(16, 2880, 360, "bfloat16", "float8_e4m3fn")
    assert Config(256, 1536).within(key, 32).block_out == 1536
    assert Config(256, 1536).within(key, 32, transposed=True).block_out == 2880


def test_cpu_runs_the_xla_form():
    assert implementation_for(jax.devices("cpu")[0]) == "xla"


# ----------------------------------------------------------------------------------------------- the kernel, interpreted


@pytest.mark.slow
@pytest.mark.interpret
class TestKernel:
    @pytest.fixture(autouse=True)
    def races(self, monkeypatch):
        monkeypatch.setitem(api._INTERPRET, "pallas_interpret", pltpu.InterpretParams(detect_races=True))
        yield
        assert not interpret_pallas_call.races.races_found

    @pytest.mark.parametrize(
        "sizes",
        [[3, 0, 40, 1, 0, 20], [0, 0, 0], [0, 64, 0], [1] * 5, [16, 16, 32]],
        ids=["ragged", "empty", "hot", "single", "even"],
    )
    @pytest.mark.parametrize("slots", [2, 3])
    def test_groups(self, sizes, slots):
        compare("pallas_interpret", arrays(sizes, rows=70, out=320), config=Config(16, 128, slots))

    @pytest.mark.parametrize("out", [256, 200])
    def test_transposed_and_within_a_stack(self, out):
        args, scales = quantized(arrays([5, 0, 20], out=out, columns=40), out // 2, 40)
        (x, weights, sizes), stacked_scales = within_stack(args, scales)
        found = run(
            "pallas_interpret", (x, weights.swapaxes(1, 2), sizes), scales=stacked_scales,
            first_group=1, transposed=True, config=Config(16, 128),
        )  # fmt: skip
        np.testing.assert_allclose(found[:25], run("reference", args, scales=scales)[:25], atol=1e-2)

    def test_bfloat16_in_one_block(self):
        compare("pallas_interpret", arrays([3, 20, 0, 9], out=100, dtype=jnp.bfloat16), atol=0.1)

    @pytest.mark.parametrize("blocks", [(256, 256), (1, 256), (128, 128)])
    def test_scales(self, blocks):
        args, scales = quantized(arrays([5, 0, 20], out=256, columns=256), *blocks)
        compare("pallas_interpret", args, scales=scales, config=Config(16, 128), atol=1e-2)

    @pytest.mark.parametrize("chip", ["v6e", "tpu7x"])
    @pytest.mark.parametrize("blocks", [(1, 256), (128, 128)])
    def test_e4m3(self, chip, blocks, monkeypatch):
        """Before tpu7x, in blocks, its bits are read with another bias."""
        monkeypatch.setattr(api, "chip_of", lambda implementation: chip)
        args, scales = quantized(arrays([5, 0, 20], out=256, columns=256, dtype=jnp.bfloat16), *blocks)
        values = without_minus_zero(np.asarray(args[1], np.float32).astype(jnp.float8_e4m3fn) / 8)
        compare(
            "pallas_interpret", (args[0], jnp.asarray(values), args[2]), scales=scales, config=Config(16, 128), atol=1.0
        )


def test_key_names_the_layer():
    assert str(ShapeKey.of(*arrays([1, 2])[:2])) == "e2_40x24_float32_float32"
