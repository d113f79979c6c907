# SPDX-License-Identifier: Apache-2.0
"""Logprobs of chosen and of likely tokens. Arrays in, arrays out."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Logprobs:
    """For each of N rows the token looked at, then K others: the likeliest, or those asked for."""

    token_ids: jax.Array
    """int32 [N, K + 1]"""
    logprobs: jax.Array
    """float32 [N, K + 1]"""
    ranks: jax.Array
    """int32 [N]: rank of the first column's token, the likeliest being 1"""


def _scores(logits: jax.Array, normalised: bool) -> jax.Array:
    return jax.nn.log_softmax(logits, axis=-1) if normalised else logits


def gather_logprobs(logits: jax.Array, token_ids: jax.Array, num_logprobs: int, *, normalised: bool = True) -> Logprobs:
    """Logprobs of `token_ids` [N] and of the `num_logprobs` likeliest tokens under float32 `logits` [N, V].

    Not `normalised`: the logits themselves, which `logprobs_mode` may ask for.
    """
    scores = _scores(logits, normalised)
    chosen = jnp.take_along_axis(scores, token_ids[:, None], axis=-1)
    top, top_ids = jax.lax.top_k(scores, min(num_logprobs, logits.shape[-1]))
    return Logprobs(
        token_ids=jnp.concatenate([token_ids[:, None], top_ids.astype(jnp.int32)], axis=-1),
        logprobs=jnp.concatenate([chosen, top], axis=-1),
        ranks=(scores >= chosen).sum(-1, dtype=jnp.int32),
    )


def gather_logprobs_of(
    logits: jax.Array, token_ids: jax.Array, others: jax.Array, *, normalised: bool = True
) -> Logprobs:
    """Logprobs of `token_ids` [N] and of `others` [N, K] under float32 `logits` [N, V]; ids past the vocabulary give -inf."""
    scores = _scores(logits, normalised)
    ids = jnp.concatenate([token_ids[:, None], others], axis=-1)
    inside = ids < logits.shape[-1]
    found = jnp.where(inside, jnp.take_along_axis(scores, jnp.where(inside, ids, 0), axis=-1), -jnp.inf)
    return Logprobs(ids, found, (scores >= found[:, :1]).sum(-1, dtype=jnp.int32))
