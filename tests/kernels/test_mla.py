# SPDX-License-Identifier: Apache-2.0
"""Multi-head latent attention: its forms against the reference, and the reference against attention that is not absorbed."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental.pallas import tpu as pltpu

from tpu_inference.kernels.mla import api, latent_pages_shape, misfit, mla_attention
from tpu_inference.kernels.mla.config import Config, DecodeConfig, ShapeKey, config_for
from tpu_inference.kernels.ragged_paged_attention.config import PrefillConfig

MIXED = [(140, 1), (0, 1), (127, 1), (3, 7), (97, 40)]
SHORT = [(40, 1), (0, 1), (15, 1), (3, 7), (17, 20)]
SMALL = Config(DecodeConfig(pages_per_item=2, slots=4), PrefillConfig(block_tokens=16, pages_per_chunk=2))
TABLE = 4


def make_batch(rows, *, heads=4, rank=128, rope=64, page=64, platform="tpu", dtype=jnp.float32, cache=None, pad=2):
    """Positional arguments of the op for rows of (context before, new tokens), with pages of noise."""
    rng = np.random.default_rng(0)
    tokens = sum(new for _, new in rows) + pad
    shapes = ((tokens, heads, rank), (tokens, heads, rope), (tokens, rank), (tokens, rope))
    arrays = [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]
    pages = rng.normal(size=latent_pages_shape(len(rows) * TABLE, page, rank, rope, platform))
    pages[..., rank + rope :] = 0
    return (
        *arrays, jnp.asarray(pages).astype(cache or dtype),
        jnp.asarray(rng.permutation(len(rows) * TABLE).reshape(len(rows), TABLE), jnp.int32),
        jnp.asarray([before + new for before, new in rows], jnp.int32),
        jnp.asarray(np.cumsum([0, *(new for _, new in rows)]), jnp.int32),
    )  # fmt: skip


def compare(form, rows, *, atol=2e-5, kv_scale=None, offset=0, config=SMALL, **shape):
    """The form's output and pages equal the reference's."""
    args = make_batch(rows, **shape)
    (out, pages), (expected, expected_pages) = (
        mla_attention(
            *args, offset, scale=0.07, kv_scale=kv_scale, implementation=name, config=config if name == form else None
        )
        for name in (form, "reference")
    )
    real = sum(new for _, new in rows)
    assert np.isfinite(np.asarray(out, np.float32)).all()
    np.testing.assert_allclose(*(np.asarray(x[:real], np.float32) for x in (out, expected)), atol=atol)
    np.testing.assert_array_equal(*(np.asarray(x).astype(np.float32) for x in (pages, expected_pages)))


def test_the_xla_form():
    compare("xla", MIXED, platform="tpu", rank=24, rope=8, heads=3)


def test_absorbed_attention_is_attention():
    """Keys and values put up from the latents, one prompt: the same as the absorbed form, put up after it."""
    rows, heads, rank, rope, nope, value = [(0, 9)], 3, 16, 8, 12, 10
    rng = np.random.default_rng(1)
    k_up, v_up = (rng.normal(size=(heads, rank, dim)) for dim in (nope, value))
    q_nope, q_rope = (rng.normal(size=(9, heads, dim)) for dim in (nope, rope))
    latent, k_rope = (rng.normal(size=(9, dim)) for dim in (rank, rope))
    q_latent = np.einsum("thn,hrn->thr", q_nope, k_up)
    pages, *rest = make_batch(rows, heads=heads, rank=rank, rope=rope, platform="cpu", pad=0)[4:]
    absorbed = [jnp.asarray(x, jnp.float32) for x in (q_latent, q_rope, latent, k_rope)]
    out, _ = mla_attention(*absorbed, pages, *rest, scale=0.1, implementation="reference")
    keys, values = np.einsum("sr,hrn->hsn", latent, k_up), np.einsum("sr,hrv->hsv", latent, v_up)
    scores = 0.1 * (np.einsum("thn,hsn->hts", q_nope, keys) + np.einsum("thp,sp->hts", q_rope, k_rope))
    weights = np.exp(np.where(np.tri(9, dtype=bool), scores, -np.inf))
    weights /= weights.sum(-1, keepdims=True)
    expected = np.einsum("hts,hsv->thv", weights, values)
    np.testing.assert_allclose(np.einsum("thr,hrv->thv", out, v_up), expected, atol=1e-3, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.interpret
class TestInterpreted:
    """The kernels as a TPU would run them, watched for races."""

    @pytest.fixture(autouse=True)
    def no_race(self, monkeypatch):
        monkeypatch.setitem(api._INTERPRET, "pallas_interpret", pltpu.InterpretParams(detect_races=True))
        yield
        assert not interpret_pallas_call.races.races_found

    @pytest.mark.parametrize("rows", [MIXED, [(130, 1), (255, 1)]])
    def test_batches(self, rows):
        compare("pallas_interpret", rows)

    @pytest.mark.parametrize("heads", [5, 20])
    def test_small_pages_and_odd_heads(self, heads):
        compare("pallas_interpret", SHORT, page=16, heads=heads)

    def test_bfloat16(self):
        compare("pallas_interpret", MIXED, dtype=jnp.bfloat16, atol=0.03)

    def test_short_floats_as_they_are(self):
        config = replace(SMALL, decode=replace(SMALL.decode, mixed=True))
        cache = dict(dtype=jnp.bfloat16, cache=jnp.float8_e4m3b11fnuz, kv_scale=0.05)
        compare("pallas_interpret", MIXED[:3], config=config, atol=0.03, **cache)

    @pytest.mark.parametrize("cache", [jnp.float8_e4m3fn, jnp.float8_e4m3b11fnuz, jnp.int8])
    def test_pages_of_a_byte_a_number(self, cache):
        compare("pallas_interpret", MIXED, cache=cache, kv_scale=0.02 if cache == jnp.int8 else 0.05, atol=3e-4)


def test_one_layer_of_a_pool():
    args = list(make_batch(MIXED, platform="cpu"))
    expected, pages = mla_attention(*args, scale=0.1)
    args[4] = jnp.concatenate([jnp.zeros_like(args[4]), args[4]])
    out, pool = mla_attention(*args, len(pages), scale=0.1)
    np.testing.assert_array_equal(out, expected)
    np.testing.assert_array_equal(pool[len(pages) :], pages)
    assert not pool[: len(pages)].any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({1: lambda x: x[:, :1]}, "do not fit"),
        ({3: lambda x: x[:, :8]}, "as q_rope"),
        ({4: lambda x: x[..., :100]}, "do not hold"),
    ],
)
def test_shapes_that_do_not_fit(change, message):
    args = [change.get(i, lambda x: x)(x) for i, x in enumerate(make_batch(MIXED))]
    with pytest.raises(ValueError, match=message):
        mla_attention(*args, scale=0.1)


def test_options_that_are_not_served():
    args = make_batch(MIXED)
    with pytest.raises(ValueError, match="none of"):
        mla_attention(*args, scale=0.1, implementation="cuda")
    with pytest.raises(ValueError, match="one byte a number"):
        mla_attention(*args, scale=0.1, kv_scale=2.0)


def test_misfits():
    pages, tables = make_batch(MIXED, rank=96)[4:6]
    assert "kv_lora_rank 96" in misfit(pages, tables, 96)
    pages, tables = make_batch(MIXED)[4:6]
    assert misfit(pages, tables, 128) is None


def test_items_are_whole_registers_of_scores():
    pages = jax.ShapeDtypeStruct(latent_pages_shape(1, 16, 512, 64, "tpu"), jnp.bfloat16)
    decode = config_for(ShapeKey.of(16, 512, 64, jnp.bfloat16, pages), "v6e").decode
    assert decode.within(9, 16).pages_per_item == 16
    assert decode.within(10**6, 16) == decode


@pytest.mark.parametrize(
    ("chip", "cache", "mixed"),
    [
        ("v6e", "float8_e4m3b11fnuz", True), ("tpu7x", "float8_e4m3fn", True), ("v4", "float8_e4m3b11fnuz", False),
        ("v6e", "int8", False), (None, "float8_e4m3b11fnuz", False),
    ],
)  # fmt: skip
def test_which_chips_take_short_floats_as_they_are(chip, cache, mixed):
    pages = jax.ShapeDtypeStruct(latent_pages_shape(1, 64, 512, 64, "tpu"), cache)
    assert config_for(ShapeKey.of(16, 512, 64, jnp.bfloat16, pages), chip).decode.mixed is mixed
    assert not config_for(ShapeKey.of(16, 512, 64, jnp.float32, pages), chip).decode.mixed
