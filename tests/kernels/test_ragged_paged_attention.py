# SPDX-License-Identifier: Apache-2.0
"""The paged op against its reference, and the reference against dense attention."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.ragged_batches import MAX_ROWS, MAX_TOKENS, NUM_BLOCKS, TABLE, make_batch
from tpu_inference.kernels.ragged_paged_attention import kv_pages_shape, ragged_paged_attention, storage_dtype
from tpu_inference.kernels.ragged_paged_attention import pages as layout


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


class Device:
    def __init__(self, platform, device_kind):
        self.platform, self.device_kind = platform, device_kind


ROWS = [(20, 1), (0, 9), (5, 6)]


def both_forms(args, **options):
    """The op's output for the real tokens of ROWS, as XLA form and as reference."""
    return (ragged_paged_attention(*args, **options, implementation=i)[0][:16] for i in ("xla", "reference"))


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(3, 1, 80), (8, 8, 64), (6, 2, 256), (4, 4, 16)])
def test_head_shapes(heads, kv_heads, head_dim, platform):
    shape = dict(num_heads=heads, num_kv_heads=kv_heads, head_dim=head_dim)
    args = make_batch(ROWS, page_size=16, **shape, platform=platform)
    out, expected = both_forms(args, scale=0.1, sliding_window=7)
    np.testing.assert_allclose(out, expected, atol=2e-5)


def test_layouts_of_pages_give_the_same():
    q, k, v, _, *tables = make_batch([(0, 9), (0, 6)], page_size=16, num_heads=4, num_kv_heads=2, head_dim=80)
    apart, together = (
        ragged_paged_attention(q, k, v, jnp.zeros(kv_pages_shape(NUM_BLOCKS, 16, 2, 80, platform)), *tables, scale=0.1)
        for platform in ("cpu", "tpu")
    )
    np.testing.assert_array_equal(apart[0][:15], together[0][:15])
    assert together[1].shape[1:] == (1, 2, 16, 256), "K and V in one plane"


def test_sinks():
    args = make_batch(ROWS, page_size=16, num_heads=4, num_kv_heads=2, head_dim=16)
    plain, _ = both_forms(args, scale=0.1)
    for sinks in ([-3.0, 0.0, 2.0, 50.0], [-jnp.inf] * 4):
        out, expected = both_forms(args, scale=0.1, sinks=jnp.asarray(sinks))
        np.testing.assert_allclose(out, expected, atol=2e-5)
    np.testing.assert_allclose(out, plain, atol=1e-6, err_msg="sinks of -inf are none")
    assert np.abs(next(both_forms(args, scale=0.1, sinks=jnp.full(4, 60.0)))).max() < 1e-6, "sinks take it all"


@pytest.mark.parametrize(
    ("dtype", "kind", "storage"),
    [
        (jnp.float8_e4m3fn, "cpu", jnp.uint8),
        (jnp.float8_e4m3fn, "TPU v6 lite", jnp.float8_e4m3b11fnuz),
        (jnp.float8_e4m3fn, "TPU7x", jnp.float8_e4m3fn),
        (jnp.int8, "cpu", jnp.int8),
    ],
)
def test_pages_of_a_byte_a_number(dtype, kind, storage):
    """Within their precision of pages in full; what is out of range is clipped."""
    assert storage_dtype(dtype, Device("cpu" if kind == "cpu" else "tpu", kind)) == storage
    q, k, v, pages, *tables = make_batch([(0, 9), (0, 6)], page_size=16, num_heads=4, num_kv_heads=2, head_dim=16)
    v = v.at[0].set(1e9)
    limit = 448 if dtype == jnp.float8_e4m3fn else 127
    full, _ = ragged_paged_attention(q, k, v.at[0].set(0.03 * limit), pages, *tables, scale=0.1)
    short = jnp.zeros(pages.shape, storage)
    for form in ("xla", "reference"):
        out, written = ragged_paged_attention(
            q, k, v, short, *tables, scale=0.1, k_scale=0.03, v_scale=0.03, implementation=form
        )
        assert written.dtype == storage
        np.testing.assert_allclose(out[:15], full[:15], rtol=0.05, atol=0.06)


def test_formats_of_e4m3_hold_the_same_numbers():
    """Every value of e4m3fn, subnormal ones and -0 too, comes back alike from all of its storage dtypes."""
    values = jax.lax.bitcast_convert_type(jnp.arange(256, dtype=jnp.uint8), jnp.float8_e4m3fn).astype(jnp.float32)
    values = values[jnp.isfinite(values)]
    for storage in (jnp.uint8, jnp.float8_e4m3fn, jnp.float8_e4m3b11fnuz):
        storage = jnp.dtype(storage)
        stored = layout.encode(layout.quantize(values, layout.stored_scale(storage), storage), storage)
        np.testing.assert_array_equal(layout.decode(stored) * layout.stored_scale(storage), values)


def test_scales_are_for_short_pages():
    args = make_batch(ROWS, page_size=16, num_heads=4, num_kv_heads=2, head_dim=16)
    with pytest.raises(ValueError, match="one byte"):
        ragged_paged_attention(*args, scale=0.1, k_scale=2.0)


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
        (lambda a: {**a, "sinks": jnp.zeros(3)}, "each of 2 heads"),
    ],
)
def test_misfits_are_refused(change, message):
    names = ("q", "k", "v", "pages", "block_tables", "seq_lens", "query_start_loc")
    args = dict(zip(names, make_batch([(0, 1)], page_size=4, num_heads=2, num_kv_heads=2, head_dim=8), strict=True))
    with pytest.raises(ValueError, match=message):
        ragged_paged_attention(**change(args), scale=1.0)
