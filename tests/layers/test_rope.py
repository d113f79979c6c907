# SPDX-License-Identifier: Apache-2.0
"""Rotary embeddings against transformers' own."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from transformers.models.gemma3.modeling_gemma3 import Gemma3RotaryEmbedding
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb
from transformers.models.phi3.modeling_phi3 import Phi3RotaryEmbedding

from tpu_inference.errors import TpuInferenceError
from tpu_inference.layers.common.rope import SERVED, Rope, apply_rope, rope_from_config, rotate, rotations

HEAD_DIM, TRAINED = 32, 128
LONG = dict(
    rope_type="longrope",
    rope_theta=10000.0,
    short_factor=[1.0 + 0.1 * i for i in range(HEAD_DIM // 2)],
    long_factor=[2.0 + 0.5 * i for i in range(HEAD_DIM // 2)],
    original_max_position_embeddings=64,
)
# Name -> (parameters, the longest request served); variants that depend on length are met on both sides of where they change.
VARIANTS = {
    "default": (dict(rope_type="default", rope_theta=10000.0), 100),
    "default-theta": (dict(rope_type="default", rope_theta=5e5), 100),
    "linear": (dict(rope_type="linear", rope_theta=10000.0, factor=4.0), 100),
    "dynamic-short": (dict(rope_type="dynamic", rope_theta=10000.0, factor=2.0), 100),
    "dynamic-long": (dict(rope_type="dynamic", rope_theta=10000.0, factor=2.0), 400),
    "yarn": (dict(rope_type="yarn", rope_theta=10000.0, factor=4.0, original_max_position_embeddings=32), 100),
    "yarn-mscale": (
        dict(
            rope_type="yarn", rope_theta=10000.0, factor=4.0, original_max_position_embeddings=32,
            beta_fast=16.0, beta_slow=2.0, attention_factor=1.5,
        ),
        100,
    ),
    "llama3": (
        dict(
            rope_type="llama3", rope_theta=5e5, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
            original_max_position_embeddings=32,
        ),
        100,
    ),
    "longrope-short": (LONG, 60),
    "longrope-long": (LONG, 128),
}  # fmt: skip


def config_of(parameters, kind="LlamaConfig", **fields):
    common = dict(
        hidden_size=4 * HEAD_DIM, num_attention_heads=4, num_key_value_heads=2, head_dim=HEAD_DIM, vocab_size=50,
        max_position_embeddings=TRAINED, pad_token_id=0, rope_parameters=dict(parameters),
    )  # fmt: skip
    return getattr(transformers, kind)(**{**common, **fields})


def theirs(module, length, *args):
    """cos and sin of positions 0…length-1, one column a pair."""
    x, positions = torch.zeros(1, length, 1), torch.arange(length)[None]
    return [table[0, :, : table.shape[-1] // 2].numpy() for table in module(x, positions, *args)]


def assert_tables(rope, expected):
    length = len(expected[0])
    for ours, other in zip(rope.cos_sin(jnp.arange(length, dtype=jnp.int32)), expected, strict=True):
        assert ours.dtype == jnp.float32
        np.testing.assert_allclose(np.asarray(ours), other, atol=2e-5)


@pytest.mark.parametrize("name", VARIANTS)
def test_like_transformers(name):
    parameters, length = VARIANTS[name]
    rope = rope_from_config(config_of(parameters), HEAD_DIM, length)
    assert len(rope.inv_freq) == HEAD_DIM // 2
    assert_tables(rope, theirs(LlamaRotaryEmbedding(config_of(parameters)), length))


def test_every_variant_is_tested():
    assert {parameters["rope_type"] for parameters, _ in VARIANTS.values()} == set(SERVED)


@pytest.mark.parametrize(("short", "long"), [("dynamic-short", "dynamic-long"), ("longrope-short", "longrope-long")])
def test_the_longest_request_chooses_the_table(short, long):
    ropes = [rope_from_config(config_of(VARIANTS[name][0]), HEAD_DIM, VARIANTS[name][1]) for name in (short, long)]
    assert ropes[0].inv_freq != ropes[1].inv_freq


@pytest.mark.parametrize(("kind", "length"), [("default", 100), ("longrope", 60), ("longrope", 128)])
def test_a_part_of_the_dimensions(kind, length):
    """Phi's kind: half of each head is rotated."""
    parameters = dict(rope_type=kind, rope_theta=10000.0, partial_rotary_factor=0.5)
    if kind == "longrope":
        short, long = ([factor * (1.0 + 0.1 * i) for i in range(HEAD_DIM // 4)] for factor in (1.0, 3.0))
        parameters |= dict(short_factor=short, long_factor=long, original_max_position_embeddings=64)
    config = config_of(parameters, "Phi3Config", original_max_position_embeddings=64)
    rope = rope_from_config(config, HEAD_DIM, length)
    assert len(rope.inv_freq) == HEAD_DIM // 4
    assert_tables(rope, theirs(Phi3RotaryEmbedding(config), length))


@pytest.mark.parametrize("layer_type", ["sliding_attention", "full_attention"])
def test_parameters_for_each_kind_of_layer(layer_type):
    parameters = {
        "sliding_attention": dict(rope_type="default", rope_theta=10000.0),
        "full_attention": dict(rope_type="linear", rope_theta=1e6, factor=8.0),
    }
    config = config_of(
        parameters, "Gemma3TextConfig", layer_types=["sliding_attention", "full_attention"], num_hidden_layers=2
    )
    rope = rope_from_config(config, HEAD_DIM, 100, layer_type)
    assert_tables(rope, theirs(Gemma3RotaryEmbedding(config), 100, layer_type))


def test_an_unknown_variant_is_refused():
    config = config_of(VARIANTS["default"][0])
    config.rope_parameters = {"rope_type": "spiral", "rope_theta": 1.0}
    with pytest.raises(TpuInferenceError, match="rope_type='spiral' is not served; served are default, linear"):
        rope_from_config(config, HEAD_DIM, 100)


def test_rotation_is_transformers_own():
    rng = np.random.default_rng(0)
    q, k = (rng.normal(size=(7, heads, HEAD_DIM)).astype(np.float32) for heads in (4, 2))
    config = config_of(VARIANTS["yarn"][0])
    cos, sin = LlamaRotaryEmbedding(config)(torch.zeros(1, 7, 1), torch.arange(7)[None])
    expected = apply_rotary_pos_emb(*(torch.tensor(x).transpose(0, 1)[None] for x in (q, k)), cos, sin)
    tables = rope_from_config(config, HEAD_DIM, 100).cos_sin(jnp.arange(7))
    for x, other in zip((q, k), expected, strict=True):
        np.testing.assert_allclose(np.asarray(apply_rope(x, *tables)), other[0].transpose(0, 1).numpy(), atol=1e-5)


def test_interleaved_is_llama_4s_own():
    from transformers.models.llama4.modeling_llama4 import Llama4TextRotaryEmbedding, apply_rotary_emb

    rng = np.random.default_rng(0)
    q, k = (rng.normal(size=(7, heads, HEAD_DIM)).astype(np.float32) for heads in (4, 2))
    config = config_of(VARIANTS["llama3"][0], "Llama4TextConfig")
    freqs = Llama4TextRotaryEmbedding(config)(torch.zeros(1, 7, 1), torch.arange(7)[None])
    expected = apply_rotary_emb(torch.tensor(q)[None], torch.tensor(k)[None], freqs)
    tables = rope_from_config(config, HEAD_DIM, 100).cos_sin(jnp.arange(7))
    for x, other in zip((q, k), expected, strict=True):
        np.testing.assert_allclose(np.asarray(apply_rope(x, *tables, interleaved=True)), other[0].numpy(), atol=1e-5)


def test_a_kind_of_layer_norms_or_scales():
    """Where one rope does, all have the arrays for it, so that a traced index may choose."""
    rng = np.random.default_rng(0)
    q, k = (jnp.asarray(rng.normal(size=(5, heads, 8)), jnp.float32) for heads in (4, 2))
    positions = jnp.asarray([0, 6, 7, 8, 30])
    turning, still = rotations([Rope((1.0,) * 4, normed=True), Rope((0.0,) * 4, temperature=(0.1, 8))], positions)
    q_turned, k_turned = rotate(q, k, turning, interleaved=True, eps=0.0)
    for x in (q_turned, k_turned):
        np.testing.assert_allclose(np.square(x).mean(-1), 1.0, rtol=1e-5)
    q_still, k_still = rotate(q, k, still, interleaved=True, eps=0.0)
    np.testing.assert_array_equal(k_still, k)
    scale = 1 + 0.1 * np.log1p([0, 0, 1, 1, 3])
    np.testing.assert_allclose(q_still, q * scale[:, None, None], rtol=1e-6)
    assert rotations([Rope((1.0,))], positions)[0][2:] == (None, None)


def test_dimensions_beyond_the_rotated_ones_pass_through():
    x = np.random.default_rng(0).normal(size=(5, 2, 10)).astype(np.float32)
    out = np.asarray(apply_rope(x, *Rope((1.0, 0.1, 0.01)).cos_sin(jnp.arange(5))))
    np.testing.assert_array_equal(out[..., 6:], x[..., 6:])
    assert (out[1:, :, :6] != x[1:, :, :6]).all()
    np.testing.assert_allclose(np.linalg.norm(out, axis=-1), np.linalg.norm(x, axis=-1), rtol=1e-6)


def test_the_dtype_is_kept():
    x = jnp.ones((3, 2, 4), jnp.bfloat16)
    assert apply_rope(x, *Rope((1.0, 0.1)).cos_sin(jnp.arange(3))).dtype == jnp.bfloat16


def test_scores_depend_on_distance_alone():
    rng = np.random.default_rng(0)
    q, k = rng.normal(size=(2, 1, 1, 8)).astype(np.float32)
    rope = Rope((1.0, 0.3, 0.1, 0.01))

    def score(at_q, at_k):
        q_at, k_at = (apply_rope(x, *rope.cos_sin(jnp.array([p]))) for x, p in ((q, at_q), (k, at_k)))
        return float((q_at * k_at).sum())

    np.testing.assert_allclose(score(9, 4), score(105, 100), rtol=1e-4)
    assert abs(score(9, 4) - score(9, 5)) > 1e-3


def test_neighbours_are_turned_as_halves_are():
    """The same rotation of the same numbers, in another order."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(5, 3, 10)), jnp.float32)
    rope = Rope((1.0, 0.5, 0.2, 0.1, 0.05), factor=1.5).cos_sin(jnp.arange(5) * 7)
    order = [0, 2, 4, 6, 8, 1, 3, 5, 7, 9]
    np.testing.assert_allclose(
        apply_rope(x, *rope, interleaved=True)[..., order], apply_rope(x[..., order], *rope), rtol=1e-6
    )
