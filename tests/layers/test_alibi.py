# SPDX-License-Identifier: Apache-2.0
"""Scores of lengthened heads are those of ALiBi, up to a constant a query."""

import jax.numpy as jnp
import numpy as np
import pytest

from tpu_inference.layers.common.alibi import FEATURES, with_alibi


@pytest.mark.parametrize(("dtype", "error"), [(jnp.float32, 1e-3), (jnp.bfloat16, 0.05)])
def test_scores_gain_the_slope_times_the_distance(dtype, error):
    rng = np.random.default_rng(0)
    tokens, heads, kv_heads, dim, scale = 6, 4, 2, 64, 0.125
    positions = np.array([0, 1, 255, 256, 2047, 40000])
    slopes = np.array([0.5, 0.25, 0.125, 2.0**-8], np.float32)
    q, k, v = (jnp.asarray(rng.normal(size=(tokens, h, dim)), dtype) for h in (heads, kv_heads, kv_heads))
    long_q, long_k, long_v = with_alibi(q, k, v, jnp.asarray(positions), jnp.asarray(slopes), scale)
    assert long_q.shape == (tokens, heads, dim + FEATURES) and long_k.dtype == dtype
    np.testing.assert_array_equal(long_v[..., :dim], v)
    assert not np.asarray(long_v[..., dim:]).any()

    def scores(q, k):
        k = np.repeat(np.asarray(k, np.float64), heads // kv_heads, axis=1)
        return scale * np.einsum("qhd,khd->hqk", np.asarray(q, np.float64), k)

    distance = positions[None, :] - positions[:, None]
    expected = scores(q, k) + slopes[:, None, None] * distance
    found = scores(long_q, long_k)
    # A constant a query is nothing to a softmax.
    np.testing.assert_allclose(
        found - found[..., :1], expected - expected[..., :1], atol=error * 2**-8 * 40000 / 100, rtol=1e-3
    )
