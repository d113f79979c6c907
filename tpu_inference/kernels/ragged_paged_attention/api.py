# SPDX-License-Identifier: Apache-2.0
"""The public op."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from tpu_inference.kernels.forms import Implementation, chip_of
from tpu_inference.kernels.ragged_paged_attention.config import Config, ShapeKey, config_for
from tpu_inference.kernels.ragged_paged_attention.pages import kv_pages_shape, quantize, stored_scale, write_kv
from tpu_inference.kernels.ragged_paged_attention.pallas import attention_pallas, misfit
from tpu_inference.kernels.ragged_paged_attention.reference import attend_reference
from tpu_inference.kernels.ragged_paged_attention.xla import attend_xla

_AFTER_WRITING = {"xla": attend_xla, "reference": attend_reference}
_INTERPRET = {"pallas": False, "pallas_interpret": pltpu.InterpretParams()}


def ragged_paged_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    pages: jax.Array,
    block_tables: jax.Array,
    seq_lens: jax.Array,
    query_start_loc: jax.Array,
    page_offset: int | jax.Array = 0,
    *,
    scale: float,
    soft_cap: float | None = None,
    sliding_window: int | jax.Array | None = None,
    sinks: jax.Array | None = None,
    k_scale: jax.Array | float | None = None,
    v_scale: jax.Array | float | None = None,
    implementation: Implementation = "xla",
    config: Config | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Write this step's K and V to their pages, then attend causally over each row's whole context.

    Args:
        q: [T, num_heads, head_dim]; tokens of R rows, flattened row by row, then padding.
        k, v: [T, num_kv_heads, head_dim]; num_heads is a multiple of num_kv_heads, and query heads of a group are neighbours.
        pages: `kv_pages_shape(...)`; updated in place where donated.
        block_tables: int32 [R, B], page ids of each row, before `page_offset` is added.
        seq_lens: int32 [R], tokens of the row up to and including this step's; 0 for rows without tokens, which come last.
        query_start_loc: int32 [R + 1]; row r owns tokens query_start_loc[r]:query_start_loc[r + 1].
        page_offset: where this layer's pages start in `pages`.
        scale: factor on the scores.
        soft_cap: scores become soft_cap * tanh(score / soft_cap).
        sliding_window: tokens that a query sees, itself included; None or <= 0 for all.
        sinks: [num_heads], of each head the score of one more key, which has no value and which neither scale nor soft cap touch.
        k_scale, v_scale: float32 scalars; pages of a byte a number (int8, or what `storage_dtype` makes of float8_e4m3fn) hold K / k_scale and
            V / v_scale, rounded and clipped. None for 1.
        implementation: "pallas" (TPU; rows of one token come before rows of more), "pallas_interpret" (the same kernels interpreted, on any
            device), "xla", "reference". "pallas" takes the XLA form for shapes that its kernels do not serve (`pallas.misfit`).
            `implementation_for` a device also tells the chip, for which the kernels are blocked.
        config: blocks of the Pallas kernels; None for those tuned for the shape and chip, else the heuristic's.

    Returns:
        (output [T, num_heads, head_dim] in q's dtype, the updated pages). Rows of padding are unspecified but finite.

    Raises:
        ValueError: shapes that do not fit, or an unknown implementation.
    """
    num_heads, num_kv_heads = q.shape[1], k.shape[1]
    if num_heads % num_kv_heads or k.shape != v.shape or q.shape[::2] != k.shape[::2]:
        raise ValueError(f"q {q.shape}, k {k.shape} and v {v.shape} are not tokens x heads x head_dim of one GQA layer")
    layouts = {kv_pages_shape(pages.shape[0], pages.shape[3], num_kv_heads, q.shape[2], p) for p in ("cpu", "tpu")}
    if pages.shape not in layouts:
        raise ValueError(f"pages {pages.shape} do not hold {num_kv_heads} KV heads of {q.shape[2]}")
    if sinks is not None and sinks.shape != (num_heads,):
        raise ValueError(f"sinks {sinks.shape} are not one for each of {num_heads} heads")
    if implementation not in (*_AFTER_WRITING, *_INTERPRET):
        raise ValueError(f"implementation={implementation!r} is none of {sorted((*_AFTER_WRITING, *_INTERPRET))}")
    if isinstance(sliding_window, int) and sliding_window <= 0:
        sliding_window = None
    short = pages.dtype.itemsize == 1
    if short:
        k_scale, v_scale = ((1.0 if s is None else s) * stored_scale(pages.dtype) for s in (k_scale, v_scale))
        k, v = quantize(k, k_scale, pages.dtype), quantize(v, v_scale, pages.dtype)
        q = (q.astype(jnp.float32) * k_scale).astype(q.dtype)
    elif k_scale is not None or v_scale is not None:
        raise ValueError(f"k_scale and v_scale are for pages of one byte a number, not of {pages.dtype}")
    options: dict[str, Any] = dict(scale=scale, soft_cap=soft_cap, sliding_window=sliding_window, sinks=sinks)
    tables = (block_tables, seq_lens, query_start_loc, page_offset)
    if implementation in _INTERPRET and misfit(pages, block_tables) is None:
        key = ShapeKey.of(num_heads, q.shape[2], q.dtype, pages)
        options |= dict(config=config or config_for(key, chip_of(implementation)), interpret=_INTERPRET[implementation])
        out, pages = attention_pallas(q, k, v, pages, *tables, **options)
    else:
        pages = write_kv(k, v, pages, *tables)
        out = _AFTER_WRITING.get(implementation, attend_xla)(q, pages, *tables, **options)
    if short:
        out = out.astype(jnp.float32) * v_scale
    return out.astype(q.dtype), pages
