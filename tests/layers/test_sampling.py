# SPDX-License-Identifier: Apache-2.0
"""Sampling against a sort of the vocabulary in NumPy, and its statistics."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tpu_inference.layers.common import sampling
from tpu_inference.layers.common.sampling import BLOCK, draw, sample
from tpu_inference.layers.common.sampling_logprobs import gather_logprobs, gather_logprobs_of
from tpu_inference.layers.common.sampling_processors import (
    HAS_BIAS,
    IN_PROMPT,
    IS_STOP,
    KEEPS_ONE,
    MASKS_STOPS,
    RowParameters,
    TokenTables,
    apply_bitmask,
    count_tokens,
    process,
    write_row,
)

ROWS, VOCAB = 8, 331
NEUTRAL = dict(
    temperature=1.0, top_p=1.0, min_p=0.0, presence_penalty=0.0, frequency_penalty=0.0, repetition_penalty=1.0
)  # fmt: skip


@jax.jit
def compiled_sample(logits, rows):
    """Tokens of requests that say nothing of single tokens: their tables are empty."""
    return sample(logits, empty_tables(logits.shape[0], logits.shape[1]), rows)[0]


def empty_tables(slots, vocab):
    return TokenTables(jnp.zeros((slots, vocab), jnp.int32), jnp.zeros((slots, vocab), jnp.float32))


filters = {
    "top_k": jax.jit(sampling.filter_top_k),
    "top_p": jax.jit(sampling.filter_top_p),
    "min_p": jax.jit(sampling.filter_min_p),
}


def arguments(rows, *, seeds=None, steps=None, vocab=VOCAB, **parameters):
    """Parameters of `rows` alike, each in a slot of its own."""

    def column(value, dtype):
        return np.broadcast_to(np.asarray(value, dtype), rows)

    values = {name: column(parameters.pop(name, neutral), np.float32) for name, neutral in NEUTRAL.items()}
    integers = {**dict(slots=np.arange(rows), top_k=vocab, flags=0, forced_ids=-1), **parameters}
    return RowParameters(
        **values,
        **{name: column(value, np.int32) for name, value in integers.items()},
        seed=column(0 if seeds is None else seeds, np.uint32),
        step=column(np.arange(rows) if steps is None else steps, np.int32),
    )


def test_rows_that_pad_a_plain_batch_send_it_nowhere_else():
    """Drawn as the others, which nobody sees: the long way would have taken the likeliest token, which is the first here."""
    logits, temperature = jnp.zeros((ROWS, VOCAB)), np.where(np.arange(ROWS) < 5, 1.0, 0.0)

    def tokens(slots):
        return np.asarray(compiled_sample(logits, arguments(ROWS, temperature=temperature, slots=slots)))

    slots = np.arange(ROWS)
    greedy, padded = tokens(slots), tokens(np.where(slots < 5, slots, ROWS))
    assert (greedy[:5] == padded[:5]).all()
    assert (greedy[5:] == 0).all() and padded[5:].all()


def softmax(x):
    weights = np.exp(x.astype(np.float64) - x.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


# vLLM's order and conditions (v1/sample/logits_processor/builtin.py and ops/topk_topp_sampler.py), by sorting.


def oracle_min_p(x, min_p):
    probs = softmax(x)
    return np.where(probs < min_p * probs.max(), -np.inf, x)


def oracle_top_k(x, k):
    return np.where(x < np.sort(x)[-k], -np.inf, x) if k < len(x) else x


def oracle_top_p(x, p):
    order = np.argsort(x)
    drop = np.cumsum(softmax(x)[order]) <= 1 - p
    drop[-1] = False
    out = x.copy()
    out[order[drop]] = -np.inf
    return out if p < 1 else x


def allowed(x, temperature=1.0, top_k=VOCAB, top_p=1.0, min_p=0.0):
    """Ids that may be sampled."""
    return set(
        np.flatnonzero(np.isfinite(oracle_top_p(oracle_top_k(oracle_min_p(x / temperature, min_p), top_k), top_p)))
    )


def logits_of(seed, rows=ROWS, vocab=VOCAB, scale=2.0):
    return (scale * np.random.default_rng(seed).normal(size=(rows, vocab))).astype(np.float32)


@pytest.mark.parametrize(
    ("name", "oracle", "values"),
    [
        ("top_k", oracle_top_k, [1, 2, 5, 17, 100, VOCAB - 1, VOCAB, VOCAB]),
        ("top_p", oracle_top_p, [1e-4, 0.1, 0.3, 0.5, 0.9, 0.99, 0.9999, 1.0]),
        ("min_p", oracle_min_p, [0.0, 1e-3, 0.01, 0.05, 0.2, 0.5, 0.9, 1.0]),
    ],
)
@pytest.mark.parametrize("seed", range(3))
def test_filters_keep_what_a_sort_keeps(name, oracle, values, seed):
    logits = logits_of(seed)
    values = np.asarray(values, np.int32 if name == "top_k" else np.float32)
    out = np.asarray(filters[name](logits, values))
    for row, value in enumerate(values):
        np.testing.assert_array_equal(out[row], oracle(logits[row], value), err_msg=f"{name}={value}")


@pytest.mark.parametrize(("name", "oracle", "neutral"), [("top_k", oracle_top_k, VOCAB), ("top_p", oracle_top_p, 1.0)])
@pytest.mark.parametrize("limited", [(), (6,), (1, 6), (0, 3, 7)])
def test_filters_of_few_rows_touch_no_other(name, oracle, neutral, limited):
    """Two rows of eight are searched by themselves, three among all; -inf, ties and equal logits among them."""
    logits = logits_of(4)
    logits[6, ::3] = -np.inf
    logits[1] = np.round(logits[1])
    logits[7] = 1.5
    values = np.full(ROWS, neutral, np.int32 if name == "top_k" else np.float32)
    values[list(limited)] = 7 if name == "top_k" else 0.6
    out = np.asarray(filters[name](logits, values))
    for row, value in enumerate(values):
        expected = oracle(logits[row], value)
        if row in (1, 7) and name == "top_p":  # a sort drops some of those tied with the last one kept
            expected = np.where(logits[row] >= expected[np.isfinite(expected)].min(), logits[row], -np.inf)
        np.testing.assert_array_equal(out[row], expected, err_msg=str(row))


def test_filters_see_what_was_masked_before():
    logits = np.array(logits_of(0))
    logits[:, 3::2] = -np.inf
    kept = np.isfinite(np.asarray(filters["top_k"](logits, np.full(ROWS, 10, np.int32))))
    assert (kept.sum(-1) == 10).all() and not kept[:, 3::2].any()
    everything = np.asarray(filters["top_p"](logits, np.full(ROWS, 0.9999999, np.float32)))
    assert not np.isfinite(everything[:, 3::2]).any()


def test_tokens_tied_with_the_last_one_stay():
    logits = np.array([[3, 1, 2, 2, 2, 0]], np.float32)
    assert np.isfinite(sampling.filter_top_k(logits, jnp.array([2]))).tolist() == [
        [True, False, True, True, True, False]
    ]
    assert np.isfinite(sampling.filter_top_p(logits, jnp.array([0.6]))).tolist() == [
        [True, False, True, True, True, False]
    ]


@pytest.mark.parametrize("scale", [1e-30, 1e-3, 50.0, 1e30])
def test_thresholds_are_exact_at_any_magnitude(scale):
    """Bisection is over the order of floats, not their values."""
    logits = logits_of(5, scale=scale)
    out = np.asarray(filters["top_k"](logits, np.full(ROWS, 7, np.int32)))
    assert (np.isfinite(out).sum(-1) == 7).all()
    for row in range(ROWS):
        assert set(np.flatnonzero(np.isfinite(out[row]))) == set(np.argsort(logits[row])[-7:])


parameters = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from([0.25, 0.5, 1.0, 1.5]),
        "top_k": st.sampled_from([1, 2, 5, 20, VOCAB]),
        "top_p": st.sampled_from([0.05, 0.3, 0.8, 1.0]),
        "min_p": st.sampled_from([0.0, 0.03, 0.3]),
    }
)


@settings(max_examples=30, deadline=None)
@given(st.lists(parameters, min_size=ROWS, max_size=ROWS), st.integers(0, 1000))
def test_samples_are_allowed_ones_in_a_batch_of_different_requests(rows, seed):
    logits = logits_of(seed)
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    for step in range(5):
        tokens = np.asarray(compiled_sample(logits, arguments(ROWS, seeds=seed, steps=step, **columns)))
        for row in range(ROWS):
            assert int(tokens[row]) in allowed(logits[row], **rows[row]), (row, rows[row])


def test_every_allowed_token_comes_up():
    logits = np.repeat(logits_of(1, rows=1), 512, axis=0)
    tokens = np.asarray(compiled_sample(logits, arguments(512, top_k=6, temperature=2.0)))
    assert set(tokens.tolist()) == allowed(logits[0], top_k=6)


def test_greedy_rows_among_random_ones():
    logits = logits_of(2)
    temperature = np.tile([0.0, 1.0], ROWS // 2)
    tokens = np.asarray(compiled_sample(logits, arguments(ROWS, temperature=temperature, top_k=VOCAB, top_p=0.9)))
    assert (tokens[::2] == logits[::2].argmax(-1)).all()
    assert (tokens[1::2] != logits[1::2].argmax(-1)).any()
    assert tokens.dtype == np.int32
    all_greedy = compiled_sample(logits, arguments(ROWS, temperature=0.0))
    assert (np.asarray(all_greedy) == logits.argmax(-1)).all()


@pytest.mark.parametrize("limit", [dict(top_k=1), dict(top_p=1e-6), dict(min_p=1.0), dict(temperature=1e-2)])
def test_limits_that_leave_one_token_are_greedy(limit):
    logits = logits_of(3)
    assert (np.asarray(compiled_sample(logits, arguments(ROWS, **limit))) == logits.argmax(-1)).all()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_stop_tokens_that_are_masked_never_come_up(temperature):
    logits = np.repeat(logits_of(4, rows=1), 512, axis=0)
    best = np.argsort(logits[0])[::-1]
    seen = np.zeros((512, VOCAB), np.int32)
    seen[:, best[[0, 2]]] = IS_STOP
    tables = TokenTables(jnp.asarray(seen), jnp.zeros((512, VOCAB)))
    rows = arguments(512, temperature=temperature, top_k=3, flags=np.where(np.arange(512) < 256, MASKS_STOPS, 0))
    tokens = np.asarray(jax.jit(sample)(logits, tables, rows)[0])
    # top-k counts what is left.
    if temperature == 0:
        assert set(tokens[:256]) == {best[1]} and set(tokens[256:]) == {best[0]}
    else:
        assert set(tokens[:256]) == {best[1], best[3], best[4]} and set(tokens[256:]) == set(best[:3])


def test_a_seed_and_a_step_decide_whatever_the_batch():
    one = logits_of(6, rows=1)
    others = dict(temperature=0.7, top_k=50, top_p=0.95)
    alone = [
        int(compiled_sample(one, arguments(1, seeds=123, steps=step, **others))[0]) for step in range(20)
    ]  # fmt: skip
    assert len(set(alone)) > 5
    for rows, row in ((8, 0), (8, 7), (16, 5)):
        logits = logits_of(7, rows=rows)
        logits[row] = one
        for step in range(0, 20, 5):
            seeds, steps = np.arange(rows) + 1000, np.arange(rows) * 3
            seeds[row], steps[row] = 123, step
            # Its neighbours differ in kind too.
            temperature = np.where(np.arange(rows) == row, 0.7, np.arange(rows) % 2)
            mixed = arguments(rows, seeds=seeds, steps=steps, **{**others, "temperature": temperature})
            assert int(compiled_sample(logits, mixed)[row]) == alone[step], (rows, row, step)


def test_seeds_and_steps_are_independent():
    logits = np.repeat(logits_of(8, rows=1), 512, axis=0)
    of_seeds = np.asarray(compiled_sample(logits, arguments(512, seeds=np.arange(512), steps=0)))
    of_steps = np.asarray(compiled_sample(logits, arguments(512, seeds=0, steps=np.arange(512))))
    assert len(set(of_seeds.tolist())) > 20 and len(set(of_steps.tolist())) > 20
    assert (of_seeds[1:] != of_steps[1:]).mean() > 0.7


@pytest.mark.parametrize("vocab", [10, BLOCK, 3 * BLOCK + 7])
@pytest.mark.parametrize("vary", ["steps", "seeds"])
def test_the_distribution_is_the_softmax(vocab, vary):
    """Chi-square over 20 bins of about equal probability: 19 degrees of freedom, 51 is beyond one in ten thousand."""
    logits, n = logits_of(9, rows=1, vocab=vocab, scale=1.0)[0], 20000
    fixed = {"seeds": np.full(n, 7, np.uint32), "steps": np.full(n, 3, np.int32)}
    fixed[vary] = np.arange(n, dtype=fixed[vary].dtype)
    tokens = np.asarray(jax.jit(draw)(np.broadcast_to(logits, (n, vocab)), fixed["seeds"], fixed["steps"]))
    probs = softmax(logits)
    bins = np.minimum((np.cumsum(probs) * 20).astype(int), 19)
    observed = np.bincount(bins[tokens], minlength=20)
    expected = n * np.bincount(bins, weights=probs, minlength=20)
    filled = expected > 0
    assert not observed[~filled].any()
    chi_square = ((observed - expected)[filled] ** 2 / expected[filled]).sum()
    assert chi_square < 51, chi_square


def test_every_token_of_positive_probability_can_be_drawn():
    """One token of each block is allowed, the first and the last of all among them."""
    vocab = 5 * BLOCK
    chosen = np.array([0, BLOCK + 5, 2 * BLOCK, 4 * BLOCK - 1, vocab - 1])
    logits = np.full(vocab, -np.inf, np.float32)
    logits[chosen] = 0
    tokens = np.asarray(
        jax.jit(draw)(np.broadcast_to(logits, (500, vocab)), np.zeros(500, np.uint32), np.arange(500, dtype=np.int32))
    )
    assert sorted(set(tokens.tolist())) == chosen.tolist()


def _row_with_the_draw_in_a_rounding_gap(seed, step):
    """Logits of 400 blocks whose draw falls where the running sum moves over a block of zero weight; None if nowhere does.

    XLA sums prefixes in a tree, so the sum of the blocks so far is rounded differently one block on, although that one adds nothing.
    """
    u = jax.random.uniform(jax.random.fold_in(jax.random.key(np.uint32(seed)), np.int32(step)), ())
    u, rng = np.float32(u), np.random.default_rng(0)
    blocks = 400
    run = jax.jit(partial(jnp.cumsum, axis=-1))
    for _ in range(200):
        weights = np.zeros((1, blocks, BLOCK), np.float32)
        weights[0, :300, 0] = np.exp(2 * rng.normal(size=300)) * (rng.random(300) < 0.3)
        weights[0, :, 0] /= weights.max()
        # The logits decide, so that the program sees these very weights.
        with np.errstate(divide="ignore"):
            logits = np.log(weights)
        sums = np.asarray(jnp.exp(logits)).sum(-1)
        ends = np.asarray(run(sums))[0]
        for block in np.flatnonzero((ends[1:300] > ends[:299]) & (sums[0, 1:300] == 0)) + 1:
            # A last block makes the total so large that the target is the end before the gap.
            with np.errstate(divide="ignore", invalid="ignore"):
                logits[0, 399, :64] = np.log(np.float32((ends[block - 1] / u - ends[299]) / 64))
            if not np.isfinite(logits[0, 399, 0]) or logits[0, 399, 0] > 0:
                continue
            sums = np.asarray(jnp.exp(logits)).sum(-1)
            now = np.asarray(run(sums))[0]
            target = u * now[-1]
            if now[block - 1] <= target < now[block]:
                return logits.reshape(1, -1)
    return None


def test_a_masked_token_is_not_drawn_from_a_rounding_gap():
    for seed in range(6):
        logits = _row_with_the_draw_in_a_rounding_gap(seed, 0)
        if logits is not None:
            break
    else:
        pytest.skip("this XLA's prefix sums leave no gap")
    token = int(jax.jit(draw)(logits, np.array([seed], np.uint32), np.array([0], np.int32))[0])
    assert np.isfinite(logits[0, token]), f"token {token} has no probability"


# ---------------------------------------------------------------------------------- what is done to logits; vLLM's: tests/runner


def test_apply_bitmask():
    allowed = np.random.default_rng(0).random((3, 67)) < 0.5
    bits = np.zeros((3, 96), bool)
    bits[:, :67] = allowed
    bitmask = np.packbits(bits, axis=1, bitorder="little").view(np.int32)
    out = np.asarray(jax.jit(apply_bitmask)(np.ones((3, 67), np.float32), bitmask))
    assert (out == np.where(allowed, 1, -np.inf)).all()


def test_each_row_reads_the_row_of_its_slot():
    tables = empty_tables(3, 4)
    for slot, (seen, bias) in {
        2: ([0, IS_STOP, IN_PROMPT, 1], [0, 0, 0, 5.0]),
        0: ([2, 0, 0, 0], [-np.inf] * 4),
    }.items():
        row = np.stack([np.array(seen, np.int32), np.array(bias, np.float32).view(np.int32)])
        tables = jax.jit(write_row)(tables, np.int32(slot), row)
    rows = arguments(
        3, vocab=4, slots=[2, 1, 0], flags=[HAS_BIAS | MASKS_STOPS, HAS_BIAS, 0], repetition_penalty=[2, 2, 1],
        presence_penalty=[0.5, 0.5, 0], frequency_penalty=[0, 0, 3],
    )  # fmt: skip
    out = np.asarray(process(jnp.full((3, 4), 2.0), tables, rows))
    np.testing.assert_allclose(out, [[2, -np.inf, 1, 7 / 2 - 0.5], [2, 2, 2, 2], [2 - 6, 2, 2, 2]])


def test_a_grammar_that_allows_stop_tokens_only_ends():
    seen = jnp.array([[IS_STOP, IS_STOP, 0]])
    for flags, left in ((MASKS_STOPS, [-np.inf] * 3), (MASKS_STOPS | KEEPS_ONE, [1, 2, -np.inf])):
        rows = arguments(1, vocab=3, flags=flags)
        out = process(jnp.array([[1.0, 2.0, -jnp.inf]]), TokenTables(seen, jnp.zeros((1, 3))), rows)
        assert out[0].tolist() == left


def test_a_forced_token_is_sampled():
    rows = arguments(ROWS, temperature=np.tile([0.0, 2.0], ROWS // 2), forced_ids=np.arange(ROWS) - 1)
    logits = logits_of(12)
    tokens = np.asarray(compiled_sample(logits, rows))
    assert tokens[1:].tolist() == list(range(ROWS - 1)) and tokens[0] == logits[0].argmax()


def test_tokens_are_counted_in_the_slots_that_sample():
    tables = count_tokens(empty_tables(3, 4), jnp.array([2, 0, 3, 2]), jnp.array([1, 3, 0, 1]))
    assert tables.seen.tolist() == [[0, 0, 0, 1], [0, 0, 0, 0], [0, 2, 0, 0]]


def test_a_row_that_allows_nothing_gives_a_token_of_the_vocabulary():
    tokens = compiled_sample(np.full((2, 200), -np.inf, np.float32), arguments(2, vocab=200))
    assert ((np.asarray(tokens) >= 0) & (np.asarray(tokens) < 200)).all()


# ------------------------------------------------------------------------------------------------------------------- logprobs


@pytest.mark.parametrize("count", [0, 1, 5])
def test_gather_logprobs(count):
    logits = logits_of(10)
    tokens = np.random.default_rng(0).integers(0, VOCAB, ROWS).astype(np.int32)
    tokens[0] = logits[0].argmax()
    out = jax.jit(partial(gather_logprobs, num_logprobs=count))(logits, tokens)
    expected = np.log(softmax(logits))
    order = np.argsort(-logits, axis=-1)
    assert out.token_ids.shape == out.logprobs.shape == (ROWS, count + 1)
    np.testing.assert_array_equal(out.token_ids[:, 0], tokens)
    np.testing.assert_array_equal(out.token_ids[:, 1:], order[:, :count])
    np.testing.assert_allclose(out.logprobs, np.take_along_axis(expected, np.asarray(out.token_ids), 1), atol=1e-5)
    ranks = [1 + np.flatnonzero(order[row] == tokens[row])[0] for row in range(ROWS)]
    assert out.ranks.tolist() == ranks and ranks[0] == 1


def test_more_logprobs_than_tokens():
    out = gather_logprobs(jnp.array([[1.0, 3.0, 2.0]]), jnp.array([0], jnp.int32), 20)
    assert out.token_ids.tolist() == [[0, 1, 2, 0]]


def test_logprobs_of_large_logits():
    """Softmax in float32 of logits far from zero does not overflow, and an excluded token is -inf."""
    out = gather_logprobs(jnp.array([[1e4, 1e4 - 1, -jnp.inf]]), jnp.array([1], jnp.int32), 3)
    np.testing.assert_allclose(out.logprobs[0, :3], np.log(softmax(np.array([[0.0, 1.0]])))[0][[0, 1, 0]], atol=1e-4)
    assert np.isneginf(out.logprobs[0, 3]) and out.ranks.tolist() == [2]


def test_logits_in_place_of_logprobs():
    logits = logits_of(11)
    out = gather_logprobs(logits, np.zeros(ROWS, np.int32), 2, normalised=False)
    np.testing.assert_array_equal(out.logprobs[:, 0], logits[:, 0])
    np.testing.assert_array_equal(out.logprobs[:, 1], logits.max(-1))


def test_logprobs_of_given_tokens():
    logits, tokens = logits_of(13), np.arange(ROWS, dtype=np.int32)
    others = np.tile(np.array([7, 0, VOCAB], np.int32), (ROWS, 1))
    out = jax.jit(gather_logprobs_of)(logits, tokens, others)
    expected = np.log(softmax(logits))
    np.testing.assert_allclose(out.logprobs[:, 0], expected[tokens, tokens], atol=1e-5)
    np.testing.assert_allclose(out.logprobs[:, 1:3], expected[:, [7, 0]], atol=1e-5)
    assert np.isneginf(out.logprobs[:, 3]).all()
    np.testing.assert_array_equal(out.ranks, gather_logprobs(logits, tokens, 0).ranks)
