# SPDX-License-Identifier: Apache-2.0
"""Products with stored weights, in each form that they take."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tpu_inference.layers.common.linear import matmul


@pytest.mark.parametrize("rows", [1, 2, 7])
@pytest.mark.parametrize(
    ("dtype", "accumulate", "tolerance"),
    [(jnp.float32, jnp.float32, 1e-5), (jnp.bfloat16, jnp.float32, 2**-7), (jnp.bfloat16, jnp.bfloat16, 2**-6)],
)
def test_products(rows, dtype, accumulate, tolerance):
    rng = np.random.default_rng(rows)
    x, weight = (jnp.asarray(rng.normal(size=(n, 96)), dtype) for n in (rows, 50))
    out = jax.jit(matmul, static_argnums=2)(x, weight, accumulate)
    exact = np.asarray(x, np.float64) @ np.asarray(weight, np.float64).T
    assert out.shape == (rows, 50) and out.dtype == dtype
    np.testing.assert_allclose(np.asarray(out, np.float64), exact, atol=tolerance * np.abs(exact).max(), rtol=0)
