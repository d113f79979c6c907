# SPDX-License-Identifier: Apache-2.0
"""The paged op against its reference, and the reference against dense attention."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.ragged_batches import MAX_ROWS, MAX_TOKENS, NUM_BLOCKS, TABLE, make_batch
from tpu_inference.kernels.ragged_paged_attention import ragged_paged_attention


@st.composite
def cases(draw):
    page_size = draw(st.sampled_from([4, 16]))
    rows, left = [], MAX_TOKENS
    for _ in range(draw(st.integers(1, MAX_ROWS))):
        new = draw(st.sampled_from([1, 1, 2, page_size - 1, page_size, page_size + 1]))
        if new > left:
            break
        left -= new
        rows.append((draw(st.integers(0, TABLE * page_size - new)), new))
    return page_size, rows or [(0, 1)]


@pytest.fixture(scope="module")
def ops():
    """One compiled function a form and option set: shapes are fixed, so hypothesis does not compile."""

    def make(implementation, soft_cap, window):
        def fn(*args):
            return ragged_paged_attention(
                *args[:-1], 0, scale=0.3, soft_cap=soft_cap, implementation=implementation,
                sliding_window=args[-1] if window else None,
            )  # fmt: skip

        return jax.jit(fn)

    return {(i, c, w): make(i, c, w) for i in ("xla", "reference") for c in (None, 2.0) for w in (False, True)}


@settings(max_examples=40, deadline=None)
@given(case=cases(), soft_cap=st.sampled_from([None, 2.0]), window=st.sampled_from([None, -1, 1, 3, 17]))
def test_xla_form_equals_reference(ops, case, soft_cap, window):
    page_size, rows = case
    args = make_batch(rows, page_size=page_size, num_heads=4, num_kv_heads=2, head_dim=16)
    window_arg = jnp.int32(-1 if window is None else window)
    (out, pages), (expected, expected_pages) = (
        ops[i, soft_cap, window is not None](*args, window_arg) for i in ("xla", "reference")
    )
    real = sum(new for _, new in rows)
    np.testing.assert_allclose(out[:real], expected[:real], atol=2e-5)
    np.testing.assert_array_equal(pages, expected_pages)
    assert np.isfinite(np.asarray(out)).all()


@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(3, 1, 80), (8, 8, 64), (6, 2, 256), (4, 4, 16)])
def test_head_shapes(heads, kv_heads, head_dim):
    args = make_batch(
        [(20, 1), (0, 9), (5, 6)], page_size=16, num_heads=heads, num_kv_heads=kv_heads, head_dim=head_dim
    )
    out, expected = (
        ragged_paged_attention(*args, scale=0.1, implementation=i, sliding_window=7)[0] for i in ("xla", "reference")
    )
    np.testing.assert_allclose(out[:16], expected[:16], atol=2e-5)


def test_reference_equals_dense_attention():
    q, k, v, *rest = make_batch([(0, 12)], page_size=4, num_heads=4, num_kv_heads=2, head_dim=16)
    out, _ = ragged_paged_attention(q, k, v, *rest, scale=0.25, implementation="reference")
    dense = jax.nn.dot_product_attention(q[None, :12], k[None, :12], v[None, :12], scale=0.25, is_causal=True)[0]
    np.testing.assert_allclose(out[:12], dense, atol=2e-5)


def test_a_layer_of_a_flat_pool_touches_only_its_pages():
    q, k, v, pages, *rest = make_batch([(5, 1), (3, 4)], page_size=4, num_heads=2, num_kv_heads=2, head_dim=8)
    expected, expected_pages = ragged_paged_attention(q, k, v, pages, *rest, scale=1.0)
    pool = jnp.concatenate([jnp.zeros_like(pages), pages, jnp.ones_like(pages)])
    out, new_pool = ragged_paged_attention(q, k, v, pool, *rest, NUM_BLOCKS, scale=1.0)
    np.testing.assert_array_equal(out[:5], expected[:5])
    before, mine, after = np.split(np.asarray(new_pool), 3)
    np.testing.assert_array_equal(mine, expected_pages)
    assert (before == 0).all() and (after == 1).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: {**a, "k": a["k"][:, :, :4]}, "one GQA layer"),
        (lambda a: {**a, "pages": a["pages"][:, :, :1]}, "KV heads"),
        (lambda a: {**a, "implementation": "magic"}, "none of"),
    ],
)
def test_misfits_are_refused(change, message):
    names = ("q", "k", "v", "pages", "block_tables", "seq_lens", "query_start_loc")
    args = dict(zip(names, make_batch([(0, 1)], page_size=4, num_heads=2, num_kv_heads=2, head_dim=8), strict=True))
    with pytest.raises(ValueError, match=message):
        ragged_paged_attention(**change(args), scale=1.0)
