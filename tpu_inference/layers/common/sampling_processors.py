# SPDX-License-Identifier: Apache-2.0
"""What a request makes of its logits before a token is drawn: biases, masks, penalties, forced tokens. Arrays in, arrays out.

What a request brings is dense, a row of the vocabulary for each slot that stays on the device: no list has a capacity to run over, a
step uploads nothing of it, and penalties cost one pass over the logits whatever the length of the text. The price is 8 bytes a slot
and vocabulary entry. Rows that ask for none of it carry neutral values, and a batch of such rows skips all of it.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

COUNT = (1 << 24) - 1
"""Bits of a `TokenTables.seen` entry: how often the token was generated."""
IN_PROMPT = 1 << 29
IS_STOP = 1 << 30

HAS_BIAS = 1
"""Flags of a row: its slot's row of `TokenTables.bias` holds."""
MASKS_STOPS = 2
"""Its stop tokens may not be sampled yet (`min_tokens`)."""
KEEPS_ONE = 4
"""A grammar masks it: stop tokens stay where they are all that the grammar allows."""

FORCED = 1e9
"""The logit of a forced token, which vLLM chose: beyond any model's, and finite."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TokenTables:
    """What requests say of each token, a row a slot; a row is valid from the time its request is given the slot."""

    seen: jax.Array
    """int32 [S, V]: COUNT | IN_PROMPT | IS_STOP"""
    bias: jax.Array
    """float32 [S, V]: added to the logits; -inf where a token is not allowed"""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class RowParameters:
    """Sampling parameters of R rows, neutral where a request has not asked."""

    slots: Any
    """int32 [R]: the row of `TokenTables`"""
    temperature: Any
    """float32 [R]; 0 for greedy rows"""
    top_p: Any
    """float32 [R]; 1: not limited"""
    min_p: Any
    """float32 [R]"""
    top_k: Any
    """int32 [R]; V or more: not limited"""
    seed: Any
    """uint32 [R]"""
    step: Any
    """int32 [R]: position of the token to be sampled; with the seed, all that its randomness depends on"""
    presence_penalty: Any
    """float32 [R]"""
    frequency_penalty: Any
    """float32 [R]"""
    repetition_penalty: Any
    """float32 [R]; 1: none"""
    flags: Any
    """int32 [R]: HAS_BIAS | MASKS_STOPS | KEEPS_ONE"""
    forced_ids: Any
    """int32 [R]: the only token to sample; -1: any"""

    def has(self, flag: int) -> jax.Array:
        """bool [R]"""
        return (self.flags & flag) != 0

    @property
    def penalised(self) -> jax.Array:
        """bool [R]"""
        return (self.presence_penalty != 0) | (self.frequency_penalty != 0) | (self.repetition_penalty != 1)


def apply_bitmask(logits: jax.Array, bitmask: jax.Array) -> jax.Array:
    """`logits` [R, V] with -inf where `bitmask`, int32 [R, ceil(V / 32)], lowest bit first, has a 0."""
    bits = (bitmask[:, :, None] >> jnp.arange(32, dtype=jnp.int32)) & 1
    allowed = bits.reshape(bitmask.shape[0], -1)[:, : logits.shape[1]]
    return jnp.where(allowed != 0, logits, -jnp.inf)


def add_bias(logits: jax.Array, tables: TokenTables, rows: RowParameters) -> jax.Array:
    """`logits` [R, V] with the biases, allowed tokens and bad words of one token of the rows that have any."""
    return jnp.where(rows.has(HAS_BIAS)[:, None], logits + tables.bias[rows.slots], logits)


def mask_stops(logits: jax.Array, tables: TokenTables, rows: RowParameters) -> jax.Array:
    """`logits` [R, V] with -inf at the stop tokens of rows that are too short to end."""
    stops = (tables.seen[rows.slots] & IS_STOP) != 0
    masked = jnp.where(rows.has(MASKS_STOPS)[:, None] & stops, -jnp.inf, logits)
    nothing_left = jnp.isneginf(masked).all(-1) & rows.has(KEEPS_ONE)
    return jnp.where(nothing_left[:, None], logits, masked)


def penalise(logits: jax.Array, tables: TokenTables, rows: RowParameters) -> jax.Array:
    """`logits` [R, V] with repetition (prompt and outputs), frequency and presence (outputs) penalties, in this order."""
    seen = tables.seen[rows.slots]
    counts = seen & COUNT
    generated = counts > 0
    repetition = jnp.where(generated | ((seen & IN_PROMPT) != 0), rows.repetition_penalty[:, None], 1.0)
    logits = jnp.where(logits > 0, logits / repetition, logits * repetition)
    logits = logits - rows.frequency_penalty[:, None] * counts
    return logits - rows.presence_penalty[:, None] * generated


def force(logits: jax.Array, rows: RowParameters) -> jax.Array:
    """`logits` [R, V] with FORCED at the forced token of the rows that have one."""
    vocab = jnp.arange(logits.shape[1], dtype=jnp.int32)
    return jnp.where(rows.forced_ids[:, None] == vocab, FORCED, logits)


def is_processed(rows: RowParameters) -> jax.Array:
    """Whether any row asks for what `process` does."""
    return ((rows.flags & (HAS_BIAS | MASKS_STOPS)) != 0).any() | rows.penalised.any() | (rows.forced_ids >= 0).any()


def process(logits: jax.Array, tables: TokenTables, rows: RowParameters) -> jax.Array:
    """`logits` float32 [R, V] as greedy rows sample from them, in vLLM's order; what no row asks for is skipped."""
    biased, stopped = rows.has(HAS_BIAS).any(), rows.has(MASKS_STOPS).any()
    penalised, forced = rows.penalised.any(), (rows.forced_ids >= 0).any()

    def each(x: jax.Array) -> jax.Array:
        x = jax.lax.cond(biased, lambda x: add_bias(x, tables, rows), lambda x: x, x)
        x = jax.lax.cond(stopped, lambda x: mask_stops(x, tables, rows), lambda x: x, x)
        x = jax.lax.cond(penalised, lambda x: penalise(x, tables, rows), lambda x: x, x)
        return jax.lax.cond(forced, lambda x: force(x, rows), lambda x: x, x)

    # One condition around them: a batch without any passes its logits on once.
    return jax.lax.cond(is_processed(rows), each, lambda x: x, logits)


def count_tokens(tables: TokenTables, slots: jax.Array, tokens: jax.Array) -> TokenTables:
    """The tables with one more of `tokens` [R] in the rows `slots` [R]; slots out of range are dropped."""
    return TokenTables(tables.seen.at[slots, tokens].add(1, mode="drop"), tables.bias)


def write_row(tables: TokenTables, slot: jax.Array, row: jax.Array) -> TokenTables:
    """The tables with the row of `slot` replaced by `row`, int32 [2, V]: `seen`, and the bits of `bias`."""
    bias = jax.lax.bitcast_convert_type(row[1], jnp.float32)
    return TokenTables(tables.seen.at[slot].set(row[0]), tables.bias.at[slot].set(bias))
