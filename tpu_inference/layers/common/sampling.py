# SPDX-License-Identifier: Apache-2.0
"""Sampling on the device: arrays in, arrays out, in vLLM's order of application (`vllm/v1/sample/sampler.py`).

Thresholds for top-k and top-p come from a bisection over the ordering of floats rather than from a sort of the vocabulary: exact, 32
reductions over [rows, vocab] at most, and friendly to a sharded vocabulary. Tokens tied with the last one kept are kept.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from tpu_inference.layers.common.sampling_processors import RowParameters, TokenTables, is_processed, process

BLOCK = 128
"""Vocabulary entries summed together by the inverse-CDF draw."""
FEW = 4
"""Where no more than one row in FEW asks for top-k (or top-p), the search for the threshold is in those rows alone."""


def _ordered(x: jax.Array) -> jax.Array:
    """Integers that sort as the float32 `x` do."""
    bits = jax.lax.bitcast_convert_type(x, jnp.int32)
    return jnp.where(bits < 0, bits ^ jnp.int32(0x7FFFFFFF), bits)


def _largest_key(
    keys: jax.Array, weigh: Callable[[jax.Array], jax.Array], target: jax.Array, limited: jax.Array
) -> jax.Array:
    """Per row, a key t that splits [R, V] as the largest one does for which `weigh(keys >= t)` [R, V] -> [R] reaches `target`.

    The row's smallest key must reach it. Rows that are not `limited` [R] are not looked at. The search ends where no two keys are left to
    tell apart, and, where whole numbers are weighed, at a t that meets the target.
    """

    def count(kept: jax.Array) -> jax.Array:
        return kept.sum(-1, dtype=jnp.int32)

    def undecided(state: tuple[jax.Array, ...]) -> jax.Array:
        low, high, weight, from_low, above_high = state
        met = jnp.issubdtype(weight.dtype, jnp.integer) & (weight == target)
        return limited & (low < high) & (from_low - above_high > 1) & ~met

    def halve(state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        low, high, weight, from_low, above_high = state
        # The ceiling of the mean, without overflow: low < mid <= high unless they have met.
        mid = (low | high) - ((low ^ high) >> 1)
        kept, going = keys >= mid[:, None], undecided(state)
        found, number = weigh(kept), count(kept)
        up = going & (found >= target)
        down = going & ~up
        return (
            jnp.where(up, mid, low), jnp.where(down, mid - 1, high), jnp.where(up, found, weight),
            jnp.where(up, number, from_low), jnp.where(down, number, above_high),
        )  # fmt: skip

    low = keys.min(-1)
    kept = keys >= low[:, None]
    state = low, keys.max(-1), weigh(kept), count(kept), jnp.zeros_like(low)
    return jax.lax.while_loop(lambda state: undecided(state).any(), halve, state)[0]


def _where_limited(
    keep: Callable[[jax.Array, jax.Array], jax.Array], logits: jax.Array, limit: jax.Array, neutral: float
) -> jax.Array:
    """`keep(logits, limit)` of `logits` [R, V]; where no more than FEW of the rows have a `limit` [R] below `neutral`, of those alone."""
    rows, limited = logits.shape[0], limit < neutral
    few = rows // FEW
    if not few:
        return keep(logits, limit)

    def of_few(logits: jax.Array) -> jax.Array:
        (index,) = jnp.nonzero(limited, size=few, fill_value=rows)
        kept = keep(
            logits.at[index].get(mode="fill", fill_value=0), limit.at[index].get(mode="fill", fill_value=neutral)
        )
        return logits.at[index].set(kept, mode="drop")

    return jax.lax.cond(limited.sum() <= few, of_few, lambda logits: keep(logits, limit), logits)


def _keep_top_k(logits: jax.Array, top_k: jax.Array) -> jax.Array:
    keys, limited = _ordered(logits), top_k < logits.shape[-1]
    limit = _largest_key(keys, lambda kept: kept.sum(-1, dtype=jnp.int32), top_k, limited)
    return jnp.where((keys >= limit[:, None]) | ~limited[:, None], logits, -jnp.inf)


def _keep_top_p(logits: jax.Array, top_p: jax.Array) -> jax.Array:
    probs = jax.nn.softmax(logits, axis=-1)
    keys, limited = _ordered(logits), top_p < 1
    # A rounding error of the sum must not ask for more than all of it.
    target = jnp.minimum(top_p, probs.sum(-1))
    limit = _largest_key(keys, lambda kept: jnp.where(kept, probs, 0).sum(-1), target, limited)
    return jnp.where((keys >= limit[:, None]) | ~limited[:, None], logits, -jnp.inf)


def filter_top_k(logits: jax.Array, top_k: jax.Array) -> jax.Array:
    """Keep the `top_k` [R] largest of `logits` [R, V], the others become -inf."""
    return _where_limited(_keep_top_k, logits, top_k, logits.shape[-1])


def filter_top_p(logits: jax.Array, top_p: jax.Array) -> jax.Array:
    """Keep the smallest set of likeliest tokens whose probability reaches `top_p` [R]; at least the likeliest."""
    return _where_limited(_keep_top_p, logits, top_p, 1)


def filter_min_p(logits: jax.Array, min_p: jax.Array) -> jax.Array:
    """Drop tokens less likely than `min_p` [R] times the likeliest one."""
    floor = logits.max(-1) + jnp.log(min_p)
    return jnp.where(logits >= floor[:, None], logits, -jnp.inf)


def draw(logits: jax.Array, seeds: jax.Array, steps: jax.Array) -> jax.Array:
    """One token a row, by inverting the distribution at one uniform number that only (seed, step) decide.

    Args:
        logits: float32 [R, V], -inf where not allowed.
        seeds, steps: [R] integers.

    Returns:
        int32 [R].
    """
    keys = jax.vmap(lambda seed, step: jax.random.fold_in(jax.random.key(seed), step))(seeds, steps)
    u = jax.vmap(lambda key: jax.random.uniform(key, ()))(keys)
    weights = jnp.exp(logits - logits.max(-1, keepdims=True))
    rows, vocab = logits.shape
    blocks = jnp.pad(weights, ((0, 0), (0, -vocab % BLOCK))).reshape(rows, -1, BLOCK)
    sums = blocks.sum(-1)
    block_ends = jnp.cumsum(sums, axis=-1)
    target = u * block_ends[:, -1]
    block = _first_beyond(sums, block_ends, target)
    before = jnp.where(block > 0, jnp.take_along_axis(block_ends, jnp.maximum(block - 1, 0)[:, None], 1)[:, 0], 0)
    inside = jnp.take_along_axis(blocks, block[:, None, None], 1)[:, 0]
    index = _first_beyond(inside, jnp.cumsum(inside, axis=-1), target - before)
    # A row that allows nothing has no weight anywhere; its token is still one of the vocabulary.
    return jnp.minimum(block * BLOCK + index, vocab - 1).astype(jnp.int32)


def _first_beyond(weights: jax.Array, ends: jax.Array, target: jax.Array) -> jax.Array:
    """Per row, the first index with any weight whose `ends` lies beyond `target`; the last with weight where none does.

    Sums of prefixes are rounded in an order of XLA's choice and need not increase, so an index without weight must be excluded.
    """
    found = (ends > target[:, None]) & (weights > 0)
    last = weights.shape[-1] - 1 - jnp.argmax(weights[:, ::-1] > 0, axis=-1)
    return jnp.where(found.any(-1), jnp.argmax(found, axis=-1), last)


def sample(
    logits: jax.Array, tables: TokenTables, rows: RowParameters, *, processed: bool = False
) -> tuple[jax.Array, jax.Array | None]:
    """Sample a token a row from float32 `logits` [R, V].

    Returns:
        The tokens, int32 [R], and, where `processed`, the float32 logits [R, V] they were drawn from, else None.
    """
    temperature, top_k, top_p, min_p = rows.temperature, rows.top_k, rows.top_p, rows.min_p
    drawn, there = temperature > 0, rows.slots < tables.seen.shape[0]  # rows that pad the batch have no slot
    limited_by_k, limited_by_p, floored = (top_k < logits.shape[-1]).any(), (top_p < 1).any(), (min_p > 0).any()

    def scale(logits: jax.Array) -> jax.Array:
        return logits / jnp.where(drawn, temperature, 1.0)[:, None]

    def plainly() -> tuple[jax.Array, jax.Array | None]:
        scaled = scale(logits)
        return draw(scaled, rows.seed, rows.step), scaled if processed else None

    def as_asked() -> tuple[jax.Array, jax.Array | None]:
        allowed = process(logits, tables, rows)
        greedy = jnp.argmax(allowed, axis=-1).astype(jnp.int32)

        def randomly() -> tuple[jax.Array, jax.Array | None]:
            scaled = scale(allowed)
            scaled = jax.lax.cond(floored, lambda x: filter_min_p(x, min_p), lambda x: x, scaled)
            scaled = jax.lax.cond(limited_by_k, lambda x: filter_top_k(x, top_k), lambda x: x, scaled)
            scaled = jax.lax.cond(limited_by_p, lambda x: filter_top_p(x, top_p), lambda x: x, scaled)
            tokens = jnp.where(drawn, draw(scaled, rows.seed, rows.step), greedy)
            return tokens, scaled if processed else None

        return jax.lax.cond(drawn.any(), randomly, lambda: (greedy, allowed if processed else None))

    # What is skipped by a condition is still copied around it: rows that ask for a temperature alone are drawn without any.
    asks = is_processed(rows) | limited_by_k | limited_by_p | floored | (there & ~drawn).any()
    return jax.lax.cond(asks, as_asked, plainly)
