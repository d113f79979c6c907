# SPDX-License-Identifier: Apache-2.0
"""The public op."""

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from tpu_inference.kernels.forms import Implementation, chip_of
from tpu_inference.kernels.mla.config import Config, ShapeKey, config_for
from tpu_inference.kernels.mla.pages import latent_pages_shape
from tpu_inference.kernels.mla.pallas import attend_pallas, misfit
from tpu_inference.kernels.mla.reference import attend_reference
from tpu_inference.kernels.mla.xla import attend_xla
from tpu_inference.kernels.ragged_paged_attention.pages import quantize, stored_scale, write_kv

_AFTER_WRITING = {"xla": attend_xla, "reference": attend_reference}
_INTERPRET = {"pallas": False, "pallas_interpret": pltpu.InterpretParams()}


def mla_attention(
    q_latent: jax.Array,
    q_rope: jax.Array,
    kv_latent: jax.Array,
    k_rope: jax.Array,
    pages: jax.Array,
    block_tables: jax.Array,
    seq_lens: jax.Array,
    query_start_loc: jax.Array,
    page_offset: int | jax.Array = 0,
    *,
    scale: float,
    kv_scale: jax.Array | float | None = None,
    implementation: Implementation = "xla",
    config: Config | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Write this step's latents to their pages, then attend causally over each row's whole context, in absorbed form.

    The key of a token is its latent and its rotated key, one after the other, and its value is its latent; every head has the same.

    Args:
        q_latent: [T, num_heads, kv_lora_rank], queries times the up-projection of keys; tokens of R rows, row by row, then padding.
        q_rope: [T, num_heads, rope_dim], rotated.
        kv_latent: [T, kv_lora_rank], normalized.
        k_rope: [T, rope_dim], rotated.
        pages: `latent_pages_shape(...)`; updated in place where donated.
        block_tables: int32 [R, B], page ids of each row, before `page_offset` is added.
        seq_lens: int32 [R], tokens of the row up to and including this step's; 0 for rows without tokens, which come last.
        query_start_loc: int32 [R + 1]; row r owns tokens query_start_loc[r]:query_start_loc[r + 1].
        page_offset: where this layer's pages start in `pages`.
        scale: factor on the scores.
        kv_scale: float32 scalar; pages of a byte a number (int8, or what `storage_dtype` makes of float8_e4m3fn) hold numbers / kv_scale,
            rounded and clipped. None for 1.
        implementation: "pallas" (TPU; rows of one token come before rows of more), "pallas_interpret" (the same kernels interpreted, on any
            device), "xla", "reference". "pallas" takes the XLA form for shapes that its kernels do not serve (`pallas.misfit`).
        config: blocks of the Pallas kernels; None for those tuned for the shape and chip, else the heuristic's.

    Returns:
        (outputs as latents [T, num_heads, kv_lora_rank] in q_latent's dtype, the updated pages). Rows of padding are unspecified but finite.

    Raises:
        ValueError: shapes that do not fit, or an unknown implementation.
    """
    (num_tokens, num_heads, rank), rope_dim = q_latent.shape, q_rope.shape[-1]
    if q_rope.shape[:2] != (num_tokens, num_heads) or kv_latent.shape != (num_tokens, rank):
        raise ValueError(f"q_latent {q_latent.shape}, q_rope {q_rope.shape} and kv_latent {kv_latent.shape} do not fit")
    if k_rope.shape != (num_tokens, rope_dim):
        raise ValueError(f"k_rope {k_rope.shape} is not {num_tokens} tokens x {rope_dim}, as q_rope {q_rope.shape} is")
    layouts = {latent_pages_shape(pages.shape[0], pages.shape[3], rank, rope_dim, p) for p in ("cpu", "tpu")}
    if pages.shape not in layouts:
        raise ValueError(f"pages {pages.shape} do not hold latents of {rank} and rotated keys of {rope_dim}")
    if implementation not in (*_AFTER_WRITING, *_INTERPRET):
        raise ValueError(f"implementation={implementation!r} is none of {sorted((*_AFTER_WRITING, *_INTERPRET))}")
    short = pages.dtype.itemsize == 1
    if kv_scale is not None and not short:
        raise ValueError(f"kv_scale is for pages of one byte a number, not of {pages.dtype}")
    kv_scale = (1.0 if kv_scale is None else kv_scale) * stored_scale(pages.dtype)
    new = jnp.concatenate([kv_latent, k_rope], axis=-1)
    if short:
        new = quantize(new, kv_scale, pages.dtype)
    tables = (block_tables, seq_lens, query_start_loc, page_offset)
    if implementation in _INTERPRET and misfit(pages, block_tables, rank) is None:
        key = ShapeKey.of(num_heads, rank, rope_dim, q_latent.dtype, pages)
        config = config or config_for(key, chip_of(implementation))
        new = jnp.pad(new, ((0, 0), (0, pages.shape[-1] - new.shape[-1])))
        return attend_pallas(
            q_latent, q_rope, new, pages, *tables,
            scale=scale, kv_scale=kv_scale, config=config, interpret=_INTERPRET[implementation],
        )  # fmt: skip
    q = jnp.concatenate([q_latent, q_rope], axis=-1)
    if short:
        q = (q.astype(jnp.float32) * kv_scale).astype(q.dtype)
    pages = write_kv(new[:, None], new[:, None, :0], pages, *tables)
    out = _AFTER_WRITING.get(implementation, attend_xla)(q, pages, *tables, scale=scale, kv_lora_rank=rank)
    if short:
        out = out.astype(jnp.float32) * kv_scale
    return out.astype(q_latent.dtype), pages
