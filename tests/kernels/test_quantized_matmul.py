# SPDX-License-Identifier: Apache-2.0
"""The product with quantized weights, against the readable one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tpu_inference.kernels.forms import Form
from tpu_inference.kernels.quantized_matmul import quantized_matmul
from tpu_inference.kernels.quantized_matmul.api import form_of


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


def test_rounded_activations_are_summed_exactly():
    arguments = case(5, 33, 64, 1, "int8", "float32")
    expected = quantized_matmul(*arguments, activations="int8", implementation="reference")
    found = quantized_matmul(*arguments, activations="int8")
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-4)
    exact = quantized_matmul(*arguments)
    assert 0 < np.abs(found - exact).max() < 0.02 * np.abs(exact).max()


@pytest.mark.interpret
@pytest.mark.parametrize(("rows", "out", "columns"), [(5, 300, 128), (8, 64, 1152)])
def test_kernel_against_the_reference(rows, out, columns):
    x, values, scales = case(rows, out, columns, 1, "float8_e4m3fn")
    codes = np.arange(256, dtype=np.uint8)
    codes = jnp.asarray(codes[(codes & 0x7F) != 0x7F].view("float8_e4m3fn"))  # every value, subnormal ones too
    values = values.at[:2, :127].set(codes.reshape(2, 127))
    expected = quantized_matmul(x, values, scales, implementation="reference").astype(jnp.float32)
    found = quantized_matmul(x, values, scales, implementation="pallas_interpret").astype(jnp.float32)
    for i in range(out):
        np.testing.assert_allclose(found[:, i], expected[:, i], atol=2**-7 * np.abs(expected[:, i]).max())


def test_where_the_kernel_runs():
    def form(rows=8, columns=4096, values="float8_e4m3fn", activations=None, chip="v6e"):
        arrays = ((rows, columns), "bfloat16"), ((64, columns), values), ((64, 1), "float32")
        abstract = [jax.ShapeDtypeStruct(*array) for array in arrays]
        return form_of(*abstract, activations=activations, implementation=Form("pallas", chip))

    assert form() == "pallas"
    others = (dict(chip="v5e"), dict(rows=129), dict(columns=1792), dict(values="int8", activations="int8"))
    assert [form(**other) for other in others] == ["xla"] * 4


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (dict(x=jnp.zeros((2, 9))), "not .T, in. and .out, in."),
        (dict(scales=jnp.zeros((4, 3))), "groups must divide"),
        (dict(values=jnp.zeros((4, 8), jnp.bfloat16)), "served are int8"),
        (dict(activations="int4"), "none of"),
        (dict(activations="int8", scales=jnp.zeros((4, 2))), "one group"),
        (dict(implementation="fast"), "none of"),
    ],
)
def test_what_does_not_fit(change, said):
    arguments = dict(x=jnp.zeros((2, 8)), values=jnp.zeros((4, 8), jnp.int8), scales=jnp.zeros((4, 1)))
    with pytest.raises(ValueError, match=said):
        quantized_matmul(**{**arguments, **change})
