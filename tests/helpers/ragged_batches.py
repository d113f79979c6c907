# SPDX-License-Identifier: Apache-2.0
"""Ragged batches for the paged op, of fixed shapes so that few programs are compiled."""

import jax.numpy as jnp
import numpy as np

from tpu_inference.kernels.ragged_paged_attention import kv_pages_shape

NUM_BLOCKS, MAX_ROWS, MAX_TOKENS, TABLE = 40, 6, 48, 6


def make_batch(
    rows, *, page_size, num_heads, num_kv_heads, head_dim, dtype=jnp.float32, kv_dtype=None, seed=0, platform="tpu"
):
    """Inputs for `rows` of (context before the step, tokens of the step), padded to fixed sizes."""
    rng = np.random.default_rng(seed)
    ids = rng.permutation(np.arange(1, NUM_BLOCKS))
    tables, seq_lens, starts = np.zeros((MAX_ROWS, TABLE), np.int32), np.zeros(MAX_ROWS, np.int32), [0]
    for r, (before, new) in enumerate(rows):
        seq_lens[r] = before + new
        used = -(-(before + new) // page_size)
        tables[r, :used], ids = ids[:used], ids[used:]
        starts.append(starts[-1] + new)
    starts += [starts[-1]] * (MAX_ROWS + 1 - len(starts))

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape), dtype)

    q, k, v = (normal(MAX_TOKENS, h, head_dim) for h in (num_heads, num_kv_heads, num_kv_heads))
    shape = kv_pages_shape(NUM_BLOCKS, page_size, num_kv_heads, head_dim, platform)
    pages = normal(*shape) if kv_dtype is None else jnp.asarray(rng.normal(size=shape) * 4, kv_dtype)
    return q, k, v, pages, jnp.asarray(tables), jnp.asarray(seq_lens), jnp.asarray(starts, jnp.int32)
