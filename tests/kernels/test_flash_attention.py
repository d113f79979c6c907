# SPDX-License-Identifier: Apache-2.0
"""Dense attention: the reference against JAX's own, the XLA form and the interpreted kernel against the reference, and what is refused."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental.pallas import tpu as pltpu

from tpu_inference.kernels.flash_attention import api, flash_attention, implementation_for, xla
from tpu_inference.kernels.flash_attention.blocks import Blocks
from tpu_inference.kernels.flash_attention.config import LANES, Config, heuristic
from tpu_inference.kernels.flash_attention.reference import visible_keys
from tpu_inference.kernels.flash_attention.shapes import SPECS


def arrays(batch=1, heads=2, kv_heads=2, queries=20, keys=20, head_dim=16, dtype=jnp.float32):
    rng = np.random.default_rng(0)
    shapes = (batch, heads, queries, head_dim), *[(batch, kv_heads, keys, head_dim)] * 2
    return [rng.standard_normal(shape, np.float32).astype(dtype) for shape in shapes]


def segments_of(lengths, total):
    """Ids [1, total] of segments of those lengths; the rest is padding, a segment of its own."""
    return np.repeat(np.arange(len(lengths) + 1, dtype=np.int32), [*lengths, total - sum(lengths)])[None]


def run(form, args, *, scale=0.3, **options):
    return jax.jit(partial(flash_attention, scale=scale, implementation=form, **options))(*args)


def compare(form, args, *, atol=2e-5, **options):
    out, expected = (run(i, args, **options) for i in (form, "reference"))
    assert out.shape == args[0].shape and out.dtype == args[0].dtype
    np.testing.assert_allclose(*(np.asarray(x, np.float32) for x in (out, expected)), atol=atol)


# ------------------------------------------------------------------------------------------------------- the reference


@pytest.mark.parametrize("causal", [False, True])
def test_reference_equals_jax(causal):
    q, k, v = arrays(batch=2, heads=4, kv_heads=2)
    out = run("reference", (q, k, v), causal=causal)
    theirs = jax.jit(partial(jax.nn.dot_product_attention, scale=0.3, is_causal=causal))
    expected = theirs(*(x.swapaxes(1, 2) for x in (q, k, v)))
    np.testing.assert_allclose(out.swapaxes(1, 2), expected, atol=1e-5)


def test_a_segment_attends_as_if_alone():
    args, ids = arrays(keys=20), segments_of([10, 10], 20)
    out = run("reference", (*args, ids, ids), soft_cap=2.0)
    for part in (slice(0, 10), slice(10, 20)):
        expected = run("reference", [x[:, :, part] for x in args], soft_cap=2.0)
        np.testing.assert_allclose(out[:, :, part], expected, atol=1e-5)


@pytest.mark.parametrize("form", ["reference", "xla"])
def test_a_query_that_sees_no_key_returns_zeros(form):
    # The last key is in the window of query 5.
    out = np.asarray(run(form, arrays(queries=20, keys=4), causal=True, sliding_window=3))
    assert (out[:, :, 6:] == 0).all() and (out[:, :, :6] != 0).any(axis=-1).all()


# ------------------------------------------------------------------------------------------------------------- the XLA form


@pytest.mark.parametrize(
    ("options", "segmented"),
    [
        ({}, True),
        (dict(causal=True), False),
        (dict(sliding_window=3), False),
        (dict(causal=True, sliding_window=5, soft_cap=2.0), True),
        (dict(sliding_window=-1), False),
    ],
)
def test_xla_form_equals_reference(monkeypatch, options, segmented):
    monkeypatch.setattr(xla, "SCORES", 200)  # several chunks of queries, the last one ragged
    args = arrays(heads=6, queries=23, keys=11)
    ids = (segments_of([8, 12], 23), segments_of([4, 3], 11)) if segmented else ()
    compare("xla", (*args, *ids), **options)


def test_xla_form_in_bfloat16():
    compare("xla", arrays(dtype=jnp.bfloat16), atol=2e-2)


# ------------------------------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(heads=3), "3 query heads are not a multiple of 2"),
        (dict(queries=0), "is empty"),
        (dict(dtype=np.float16), "not all bfloat16 or all float32"),
        (dict(implementation="cuda"), "implementation='cuda' is none of"),
        (dict(implementation="pallas", head_dim=20), "head_dim 20 is not a multiple of 8"),
        (dict(implementation="pallas", head_dim=512), "head_dim 512"),
        (dict(ids=(np.zeros((1, 20), int),)), "one is missing"),
        (dict(ids=(np.zeros((1, 20), int), np.zeros((1, 19), int))), r"kv_segment_ids .* are not integers \[1, 20\]"),
        (dict(ids=(np.zeros((1, 20)),) * 2), "q_segment_ids .* are not integers"),
    ],
)
def test_refused(change, message):
    options = dict(implementation="xla") | {name: change.pop(name) for name in ("implementation",) if name in change}
    ids = change.pop("ids", ())
    with pytest.raises(ValueError, match=message):
        flash_attention(*arrays(**change), *ids, scale=1.0, **options)


def test_refused_shapes():
    q, k, v = arrays()
    for args in ((q[0], k, v), (q, k[..., :8], v[..., :8]), (q, k, v[:, :, :5]), (np.concatenate([q, q]), k, v)):
        with pytest.raises(ValueError, match="are not batch x heads x tokens x head_dim"):
            flash_attention(*args, scale=1.0)
    with pytest.raises(ValueError, match="not all bfloat16 or all float32"):
        flash_attention(q, k.astype(jnp.bfloat16), v, scale=1.0)


def test_cpu_runs_the_xla_form():
    assert implementation_for(jax.devices("cpu")[0]) == "xla"


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_blocks_pad_little_and_divide_heads(spec):
    config = heuristic(spec.key(), None)
    for block in (config.block_q, config.block_k):
        blocks = -(-spec.tokens // block)
        assert block % LANES == 0 and blocks * block - spec.tokens < blocks * LANES
    assert spec.heads % config.heads == 0


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window", [None, 1, 40, 300])
@pytest.mark.parametrize(("queries", "keys", "block_q"), [(700, 700, 256), (900, 300, 128), (300, 900, 384)])
def test_each_block_with_a_visible_key_is_visited_once(queries, keys, block_q, causal, window):
    blocks = Blocks(queries, keys, block_q, LANES, causal, window, segmented=False)
    rows, columns = blocks.grid
    i, j = np.indices((rows, columns), dtype=np.int32)
    visited, fetched = (np.asarray(f(i, j)) for f in (blocks.key_block, blocks.fetched_block))
    assert ((fetched >= 0) & (fetched < columns)).all() and (fetched == visited)[visited >= 0].all()
    kinds = [
        (kind, np.broadcast_to(on, i.shape)) for kind, on in blocks.kinds(i * block_q, visited * LANES, False, False)
    ]
    assert sum(on.astype(int) for _, on in kinds).max() == 1
    here = np.zeros((rows * block_q, columns * LANES), bool)
    for kind, on in kinds:
        for row, step in zip(*np.nonzero(on), strict=True):
            q, k = np.indices((block_q, LANES))
            first_q, first_k = row * block_q, visited[row, step] * LANES
            if kind is None:
                first, stop = (np.asarray(x) for x in blocks.seen(first_q + q))
                seen = (first_k + k >= first) & (first_k + k < stop)
            else:
                seen = k + kind <= q
            block = here[first_q : first_q + block_q, first_k : first_k + LANES]
            assert not block.any()
            block[:] = seen
    expected = visible_keys(jnp.arange(queries), keys, None, causal=causal, sliding_window=window)[0]
    np.testing.assert_array_equal(here[:queries, :keys], expected)
    assert not here[:queries, keys:].any()


# ----------------------------------------------------------------------------------------------- the kernel, interpreted

slow = [pytest.mark.slow, pytest.mark.interpret]


@pytest.fixture
def kernel(monkeypatch):
    """Compares the interpreted kernel, in blocks of a tile, with the reference; and no test passes with a race."""
    monkeypatch.setitem(api._INTERPRET, "pallas_interpret", pltpu.InterpretParams(detect_races=True))

    def check(args, config=None, **options):
        monkeypatch.setattr(api, "config_for", lambda *_: config or Config(LANES, LANES, ahead=2))
        atol = 2e-2 if args[0].dtype == jnp.bfloat16 else 2e-4
        compare("pallas_interpret", args, atol=atol, **options)
        assert not interpret_pallas_call.races.races_found

    return check


LENGTHS = st.sampled_from([1, 100, LANES, 150, 2 * LANES])


class TestKernel:
    pytestmark = slow

    @settings(
        max_examples=3,
        deadline=None,
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=[HealthCheck.function_scoped_fixture],
    )
    @example(queries=150, keys=100, causal=True, window=20, segmented=False)
    @example(queries=100, keys=150, causal=False, window=20, segmented=True)
    @given(
        queries=LENGTHS,
        keys=LENGTHS,
        causal=st.booleans(),
        window=st.sampled_from([None, 1, 40, 200]),
        segmented=st.booleans(),
    )
    def test_who_sees_whom(self, kernel, queries, keys, causal, window, segmented):
        ids = [segments_of([n // 3, n // 3], n) for n in (queries, keys)] if segmented else []
        args = arrays(heads=1, kv_heads=1, queries=queries, keys=keys, head_dim=64)
        kernel((*args, *ids), causal=causal, sliding_window=window)

    def test_corners_of_wide_blocks(self, kernel):
        """Blocks of queries twice those of keys, and tiles twice as wide as long."""
        args = arrays(heads=1, kv_heads=1, queries=500, keys=500, head_dim=128, dtype=jnp.bfloat16)
        kernel(args, Config(256, 128, ahead=3), causal=True)

    @pytest.mark.parametrize(("heads", "kv_heads", "block"), [(4, 2, 1), (4, 1, 2), (4, 2, 4)])
    def test_heads(self, kernel, heads, kv_heads, block):
        args = arrays(heads=heads, kv_heads=kv_heads, queries=40, keys=50, head_dim=64, dtype=jnp.bfloat16)
        kernel(args, Config(LANES, LANES, block, ahead=2))

    @pytest.mark.parametrize(("head_dim", "dtype"), [(72, jnp.bfloat16), (256, jnp.float32)])
    def test_head_dims(self, kernel, head_dim, dtype):
        kernel(arrays(heads=1, kv_heads=1, queries=40, keys=50, head_dim=head_dim, dtype=dtype), soft_cap=2.0)

    def test_batch_of_segments_and_scores_of_any_size(self, kernel):
        ids = np.concatenate([segments_of([130, 20], 200), segments_of([200], 200)])
        q, k, v = arrays(batch=2, heads=1, kv_heads=1, queries=200, keys=200, head_dim=128)
        kernel((q * 20, k, v, ids, ids))
        kernel((q * 1e-3, k, v, ids, ids), causal=True)
