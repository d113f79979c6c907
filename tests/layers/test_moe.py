# SPDX-License-Identifier: Apache-2.0
"""Routing and experts against loops in NumPy, and over shards."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tpu_inference.errors import TpuInferenceError
from tpu_inference.layers.common.moe import (
    ACTIVATIONS,
    INTERLEAVED,
    ExpertWeights,
    Routing,
    experts,
    refuse_small_groups,
    refuse_uneven_experts,
    route,
)
from tpu_inference.layers.common.partition import Partition
from tpu_inference.layers.common.sharding import make_mesh

TOKENS, EXPERTS, DIM, WIDTH = 5, 8, 12, 6


def routed_by_loops(logits, routing, bias):
    """(weights, ids) of one token, ties aside."""
    exps = np.exp(logits - logits.max())
    scores = exps / exps.sum() if routing.scoring == "softmax" else 1 / (1 + np.exp(-logits))
    choice = scores + (0 if bias is None else bias)
    allowed = set(range(len(logits)))
    if routing.groups > 1:
        groups = np.split(np.arange(len(logits)), routing.groups)
        worth = [np.sort(choice[g])[-(2 if bias is not None else 1) :].sum() for g in groups]
        allowed = {e for g in np.argsort(worth)[-routing.top_groups :] for e in groups[g]}
    ids = sorted(allowed, key=lambda e: -choice[e])[: routing.top_k]
    weights = scores[ids]
    return (weights / weights.sum() if routing.renormalize else weights) * routing.scale, ids


@settings(deadline=None, max_examples=40)
@given(
    scoring=st.sampled_from(["softmax", "sigmoid"]),
    grouped=st.sampled_from([(1, 1), (4, 2), (2, 1)]),
    top_k=st.integers(1, 3),
    renormalize=st.booleans(),
    biased=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_routing(scoring, grouped, top_k, renormalize, biased, seed):
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(TOKENS, EXPERTS)).astype(np.float32)
    bias = rng.normal(size=EXPERTS).astype(np.float32) if biased else None
    routing = Routing(top_k, renormalize, scoring, *grouped, scale=2.5)
    weights, ids = route(jnp.asarray(logits), routing, None if bias is None else jnp.asarray(bias))
    for token in range(TOKENS):
        expected, expected_ids = routed_by_loops(logits[token], routing, bias)
        assert ids[token].tolist() == [int(e) for e in expected_ids]
        np.testing.assert_allclose(weights[token], expected, rtol=1e-5)


def random_experts(activation, *, biased):
    rng = np.random.default_rng(3)
    fused = WIDTH if activation.endswith("_no_mul") else 2 * WIDTH
    shapes = [(EXPERTS, fused, DIM), (EXPERTS, DIM, WIDTH)] + [(EXPERTS, fused), (EXPERTS, DIM)] * biased
    return ExpertWeights(*(jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes))


def by_loops(x, weights, ids, p, activation, weigh_input):
    out = np.zeros_like(x)
    for t in range(len(x)):
        for weight, e in zip(weights[t], ids[t], strict=True):
            h = p.w13[e] @ (x[t] * weight if weigh_input else x[t]) + (0 if p.b13 is None else p.b13[e])
            y = p.w2[e] @ np.asarray(ACTIVATIONS[activation](jnp.asarray(h)[None])[0])
            out[t] += (y + (0 if p.b2 is None else p.b2[e])) * (1 if weigh_input else weight)
    return out


def check(activation, *, biased=False, sharding="whole", weigh_input=False, ids=None, form=None):
    p = random_experts(activation, biased=biased)
    rng = np.random.default_rng(4)
    if ids is None:
        ids = np.stack([rng.permutation(EXPERTS)[:2] for _ in range(TOKENS)])
    x = rng.normal(size=(len(ids), DIM)).astype(np.float32)
    weights = rng.uniform(0.1, 1, size=ids.shape).astype(np.float32)
    placed = p
    if sharding == "width" and not activation.endswith("_no_mul") and activation not in INTERLEAVED:
        rows = Partition((WIDTH, WIDTH), (WIDTH, WIDTH), 2).rows(True)
        placed = ExpertWeights(p.w13[:, rows], p.w2, None if p.b13 is None else p.b13[:, rows], p.b2)
    mesh = make_mesh(jax.devices(), 1 if sharding == "whole" else 2)
    layer = partial(
        experts, activation=activation, mesh=mesh, sharding=sharding, accumulate_dtype=jnp.float32,
        weigh_input=weigh_input, implementation=form,
    )  # fmt: skip
    found = jax.jit(lambda x, weights, ids: layer(x, weights, ids, placed))(x, weights, jnp.asarray(ids, jnp.int32))
    np.testing.assert_allclose(found, by_loops(x, weights, ids, p, activation, weigh_input), rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
def test_experts(activation):
    check(activation, biased=True)


@pytest.mark.parametrize("activation", ["silu", "swigluoai"])
@pytest.mark.parametrize("sharding", ["width", "experts"])
def test_experts_on_two_devices(activation, sharding):
    check(activation, biased=True, sharding=sharding)


@pytest.mark.parametrize("sharding", ["whole", "width", "experts"])
def test_experts_that_take_weighed_inputs(sharding):
    check("swigluoai", biased=True, sharding=sharding, weigh_input=True)
    check("silu", sharding=sharding, weigh_input=True)


@settings(deadline=None, max_examples=12)
@given(
    sharding=st.sampled_from(["whole", "experts"]),
    # Every expert, one that all tokens choose, and none of the second device.
    chosen=st.sampled_from([range(EXPERTS), (3,), range(EXPERTS // 2)]),
    tokens=st.sampled_from([1, 9]),
    top_k=st.integers(1, 3),
    seed=st.integers(0, 1000),
)
def test_any_choice(sharding, chosen, tokens, top_k, seed):
    rng = np.random.default_rng(seed)
    ids = [rng.permutation(chosen)[: min(top_k, len(chosen))] for _ in range(tokens)]
    check("silu", ids=np.stack(ids), sharding=sharding)


@pytest.mark.slow
@pytest.mark.interpret
@pytest.mark.parametrize("sharding", ["whole", "experts"])
def test_by_the_kernel(sharding):
    check("silu", biased=True, form="pallas_interpret", sharding=sharding)


def test_groups_that_the_kernel_has_no_product_with_are_refused_on_tpu():
    refuse_small_groups("w13", 256, "tpu")
    refuse_small_groups("w13", 16, "cpu")
    with pytest.raises(TpuInferenceError, match=r"w13 is quantized in groups of 64 columns.*128 columns or a multiple"):
        refuse_small_groups("w13", 64, "tpu")


def test_experts_that_do_not_divide_are_refused():
    refuse_uneven_experts(8, 4)
    with pytest.raises(TpuInferenceError, match=r"8 experts on 3 devices: .* Use a --tensor-parallel-size"):
        refuse_uneven_experts(8, 3)
