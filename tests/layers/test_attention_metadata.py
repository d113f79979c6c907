# SPDX-License-Identifier: Apache-2.0
"""Attention within chunks is attention over rows that begin with them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.ragged_batches import MAX_ROWS, MAX_TOKENS, TABLE, make_batch
from tpu_inference.errors import TpuInferenceError
from tpu_inference.kernels.ragged_paged_attention import ragged_paged_attention
from tpu_inference.kernels.ragged_paged_attention.pages import from_planes
from tpu_inference.layers.common.attention_metadata import AttentionMetadata, in_chunks

PAGE, DIM, SCALE = 4, 16, 0.3


def meta_of(args):
    tables, seq_lens, starts = args[4:]
    return AttentionMetadata(jnp.zeros(MAX_TOKENS, jnp.int32), starts, seq_lens, tables[None])


@jax.jit
def everywhere(q, k, v, pages, meta):
    return ragged_paged_attention(
        q, k, v, pages, meta.block_tables[0], meta.seq_lens, meta.query_start_loc, scale=SCALE, implementation="xla"
    )


def dense(q, pages, rows, tables, chunk):
    """Token by token, over the keys of its chunk, in NumPy."""
    out, token = [], 0
    for r, (before, new) in enumerate(rows):
        kv = np.asarray(pages)[np.asarray(tables[r])].transpose(1, 2, 0, 3, 4)
        kv = kv.reshape(kv.shape[0], kv.shape[1], -1, kv.shape[-1])
        k, v = from_planes(kv, DIM)
        for position in range(before, before + new):
            seen = slice(position // chunk * chunk, position + 1)
            query = np.asarray(q[token]).reshape(k.shape[0], -1, DIM)
            scores = np.einsum("kgd,ksd->kgs", query, k[:, seen]) * SCALE
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            weights /= weights.sum(-1, keepdims=True)
            out.append(np.einsum("kgs,ksd->kgd", weights, v[:, seen]).reshape(-1, DIM))
            token += 1
    return np.asarray(out)


@st.composite
def batches(draw):
    """Decodes, then prompts' parts, which may be longer than a chunk."""
    rows, left = [(draw(st.integers(0, TABLE * PAGE - 1)), 1) for _ in range(draw(st.integers(0, 3)))], MAX_TOKENS - 3
    for _ in range(draw(st.integers(0 if rows else 1, MAX_ROWS - len(rows)))):
        new = draw(st.integers(2, min(left, TABLE * PAGE)))
        rows.append((draw(st.integers(0, TABLE * PAGE - new)), new))
        left -= new
        if left < 2:
            break
    return rows


@settings(max_examples=25, deadline=None)
@given(rows=batches(), chunk=st.sampled_from([4, 8, 12]))
def test_a_token_sees_its_chunk_up_to_itself(rows, chunk):
    args = make_batch(rows, page_size=PAGE, num_heads=4, num_kv_heads=2, head_dim=DIM)
    meta = meta_of(args)
    full, local = in_chunks(meta, chunk, PAGE)
    real = sum(new for _, new in rows)
    out, pages = everywhere(*args[:4], local)
    np.testing.assert_allclose(out[:real], dense(args[0], pages, rows, args[4], chunk), atol=2e-5)
    # Everything is written where it always is, and attention over everything takes no notice of the rows that were added.
    (same, written), (expected, expected_pages) = everywhere(*args[:4], full), everywhere(*args[:4], meta)
    np.testing.assert_allclose(same[:real], expected[:real], atol=2e-5)
    for each in (pages, written):
        np.testing.assert_array_equal(each, expected_pages)
    lengths = np.diff(local.query_start_loc)
    assert lengths.sum() == real and len(local.seq_lens) == len(full.seq_lens)
    assert ((np.asarray(local.seq_lens) > 0) == (lengths > 0)).all(), "rows without tokens come last"


def test_chunks_are_whole_pages():
    args = make_batch([(0, 3)], page_size=PAGE, num_heads=4, num_kv_heads=2, head_dim=DIM)
    with pytest.raises(TpuInferenceError, match=r"chunks of 6 tokens.*--block-size that divides 6"):
        in_chunks(meta_of(args), 6, PAGE)
