# SPDX-License-Identifier: Apache-2.0
"""The Pallas kernels, interpreted as a TPU would run them and watched for races, against the reference."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental.pallas import tpu as pltpu

from helpers.ragged_batches import MAX_ROWS, MAX_TOKENS, NUM_BLOCKS, TABLE, make_batch
from tpu_inference.kernels.ragged_paged_attention import api, pallas, ragged_paged_attention
from tpu_inference.kernels.ragged_paged_attention.config import Config, DecodeConfig, PrefillConfig

pytestmark = [pytest.mark.slow, pytest.mark.interpret]
PAGE = 16


@cache
def op(form, scale, soft_cap, windowed, scales=None):
    """Compiled once for the batches of fixed shapes."""

    def fn(window, sinks, *args):
        options = dict(scale=scale, soft_cap=soft_cap, sliding_window=window if windowed else None, sinks=sinks)
        if scales:
            options.update(k_scale=scales[0], v_scale=scales[1])
        return ragged_paged_attention(*args, **options, implementation=form)

    return jax.jit(fn)


@pytest.fixture(autouse=True)
def small_blocks_and_no_race(monkeypatch):
    """Small batches take several blocks; and no test passes with a race."""
    small = Config(DecodeConfig(pages_per_item=2, slots=4), PrefillConfig(block_tokens=16, pages_per_chunk=2))
    monkeypatch.setattr(api, "config_for", lambda *_: small)
    monkeypatch.setitem(api._INTERPRET, "pallas_interpret", pltpu.InterpretParams(detect_races=True))
    yield
    assert not interpret_pallas_call.races.races_found


def compare(
    rows, *, heads=4, kv_heads=2, head_dim=128, page_size=PAGE, atol=2e-5, window=None, soft_cap=None, sinks=None, scales=None,
    **dtypes,
):  # fmt: skip
    """The kernels' output and pages for `rows` of (context before, new tokens) equal the reference's."""
    shape = dict(page_size=page_size, num_heads=heads, num_kv_heads=kv_heads, head_dim=head_dim)
    args = make_batch(rows, **shape, **dtypes)
    assert pallas.misfit(*args[3:5]) is None, "the reference would be compared with the XLA form"
    (out, pages), (expected, expected_pages) = (
        op(form, 0.1, soft_cap, window is not None, scales)(window, sinks, *args)
        for form in ("pallas_interpret", "reference")
    )
    real = sum(new for _, new in rows)
    assert np.isfinite(np.asarray(out, np.float32)).all()
    np.testing.assert_allclose(*(np.asarray(x[:real], np.float32) for x in (out, expected)), atol=atol)
    np.testing.assert_array_equal(np.asarray(pages), np.asarray(expected_pages))


@st.composite
def batches(draw):
    """Rows of one token, then rows of more; contexts around the edges of pages."""
    contexts = st.sampled_from([0, 1, PAGE - 1, PAGE, PAGE + 1, 2 * PAGE, 3 * PAGE + 5, TABLE * PAGE - 40])
    decodes = draw(st.lists(contexts, max_size=MAX_ROWS - 1))
    rows, left = [(before, 1) for before in decodes], MAX_TOKENS - len(decodes)
    for _ in range(draw(st.integers(0 if rows else 1, MAX_ROWS - len(rows)))):
        new = draw(st.sampled_from([2, PAGE - 1, PAGE, PAGE + 1, 33]))
        if new > left:
            break
        left -= new
        rows.append((draw(contexts), new))
    return rows or [(0, 1)]


@settings(
    max_examples=6,
    deadline=None,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@example(rows=[(TABLE * PAGE - 1, 1)] * MAX_ROWS, window=None, soft_cap=None)
@example(rows=[(TABLE * PAGE - 20, 20), (TABLE * PAGE - 17, 17)], window=None, soft_cap=None)
@given(rows=batches(), window=st.sampled_from([None, 1, 3, 17]), soft_cap=st.sampled_from([None, 2.0]))
def test_ragged_batches(rows, window, soft_cap):
    compare(rows, window=window, soft_cap=soft_cap)


MIXED = [(40, 1), (0, 1), (15, 1), (3, 7), (17, 20)]


@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (4, 1), (3, 3), (6, 2), (8, 8)])
def test_heads(heads, kv_heads):
    compare(MIXED, heads=heads, kv_heads=kv_heads)


@pytest.mark.parametrize("head_dim", [64, 72, 80, 96, 192, 256])
def test_head_dims(head_dim):
    compare(MIXED, head_dim=head_dim, heads=6, window=19)


def test_bfloat16():
    compare(MIXED, dtype=jnp.bfloat16, atol=0.02)


@pytest.mark.parametrize("kv_dtype", [jnp.float8_e4m3fn, jnp.float8_e4m3b11fnuz, jnp.int8])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_pages_of_a_byte_a_number(kv_dtype, head_dim):
    # Large enough values that some are clipped.
    scales = (0.01, 0.25) if kv_dtype == jnp.int8 else (0.004, 0.5)
    compare(MIXED, head_dim=head_dim, page_size=32, kv_dtype=kv_dtype, scales=scales, atol=3e-4)


@pytest.mark.parametrize("head_dim", [64, 128])
def test_sinks(head_dim):
    compare(MIXED, head_dim=head_dim, window=9, sinks=jnp.asarray([-2.0, 0.5, 3.0, 40.0]))


def test_a_window_that_is_none():
    compare(MIXED, window=-1)


def test_a_window_known_when_compiled():
    args = make_batch(MIXED, page_size=PAGE, num_heads=2, num_kv_heads=1, head_dim=128)
    out, expected = (
        ragged_paged_attention(*args, scale=0.1, sliding_window=9, implementation=form)[0]
        for form in ("pallas_interpret", "reference")
    )
    np.testing.assert_allclose(out[:30], expected[:30], atol=2e-5)


def test_one_token_behind_rows_of_more():
    """As the last part of a prompt in another chunk of local attention."""
    compare([(40, 1), (0, 1), (9, 7), (15, 1), (3, 20), (0, 1)])


def test_no_rows_at_all():
    args = make_batch([], page_size=PAGE, num_heads=2, num_kv_heads=1, head_dim=128)
    _, pages = ragged_paged_attention(*args, scale=0.1, implementation="pallas_interpret")
    np.testing.assert_array_equal(pages, args[3])


def test_a_layer_of_a_flat_pool_touches_only_its_pages():
    q, k, v, pages, *rest = make_batch([(5, 1), (3, 20)], page_size=PAGE, num_heads=2, num_kv_heads=1, head_dim=128)
    expected, expected_pages = ragged_paged_attention(q, k, v, pages, *rest, scale=0.1, implementation="reference")
    pool = jnp.concatenate([jnp.zeros_like(pages), pages, jnp.ones_like(pages)])
    out, pool = ragged_paged_attention(q, k, v, pool, *rest, NUM_BLOCKS, scale=0.1, implementation="pallas_interpret")
    np.testing.assert_allclose(out[:21], expected[:21], atol=2e-5)
    before, mine, after = np.split(np.asarray(pool), 3)
    np.testing.assert_array_equal(mine, expected_pages)
    assert (before == 0).all() and (after == 1).all()
