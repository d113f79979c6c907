# SPDX-License-Identifier: Apache-2.0
"""The public op."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from tpu_inference.kernels.flash_attention.config import Config, ShapeKey, config_for
from tpu_inference.kernels.flash_attention.kernel import flash_attention_pallas
from tpu_inference.kernels.flash_attention.reference import flash_attention_reference
from tpu_inference.kernels.flash_attention.xla import flash_attention_xla
from tpu_inference.kernels.forms import Implementation, chip_of

_JNP = {"xla": flash_attention_xla, "reference": flash_attention_reference}
_INTERPRET = {"pallas": False, "pallas_interpret": pltpu.InterpretParams()}
MAX_HEAD_DIM = 256


def flash_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    q_segment_ids: jax.Array | None = None,
    kv_segment_ids: jax.Array | None = None,
    *,
    scale: float,
    causal: bool = False,
    sliding_window: int | None = None,
    soft_cap: float | None = None,
    implementation: Implementation = "xla",
    config: Config | None = None,
) -> jax.Array:
    """softmax(scale * q k^T) v, over the keys that each query sees.

    Args:
        q: [B, num_heads, Tq, head_dim], bfloat16 or float32.
        k, v: [B, num_kv_heads, Tk, head_dim] of q's dtype; num_heads is a multiple of num_kv_heads, and query heads of a group are neighbours. Tq and
            Tk are whatever they are: no multiple of anything.
        q_segment_ids, kv_segment_ids: int32 [B, Tq] and [B, Tk], both or neither: a query sees keys of its own segment alone. Padding is a segment
            of its own. Blocks are left out, or not masked, by the least and greatest id in each, so sorted ids are the fast ones.
        scale: factor on the scores.
        causal: a query sees keys up to its own position; both count from 0.
        sliding_window: a query sees keys fewer positions away than this, on both sides unless causal; None or <= 0 for all.
        soft_cap: scores become soft_cap * tanh(score / soft_cap).
        implementation: "pallas" (TPU), "pallas_interpret" (the same kernel interpreted, on any device), "xla", "reference".
            `implementation_for` a device also tells the chip, for which the kernel is blocked.
        config: blocks of the Pallas kernel; None for those tuned for the shape and chip, else the heuristic's.

    Returns:
        [B, num_heads, Tq, head_dim] in q's dtype; zeros for a query that sees no key.

    Raises:
        ValueError: shapes or dtypes that do not fit, or an unknown implementation; for the Pallas forms also a head_dim that is not a multiple of 8
            or is over 256.
    """
    _check(q, k, v, q_segment_ids, kv_segment_ids, implementation)
    segments = None
    if q_segment_ids is not None:
        segments = (q_segment_ids.astype(jnp.int32), kv_segment_ids.astype(jnp.int32))
    if sliding_window is not None and sliding_window <= 0:
        sliding_window = None
    options: dict[str, Any] = dict(scale=scale, causal=causal, sliding_window=sliding_window, soft_cap=soft_cap)
    if implementation in _INTERPRET:
        key = ShapeKey.of(q, k, causal=causal, window=sliding_window, segmented=segments is not None)
        options["config"] = config or config_for(key, chip_of(implementation))
        return flash_attention_pallas(q, k, v, segments, **options, interpret=_INTERPRET[implementation])
    return _JNP[implementation](q, k, v, segments, **options).astype(q.dtype)


def _check(q: Any, k: Any, v: Any, q_segment_ids: Any, kv_segment_ids: Any, implementation: str) -> None:
    if implementation not in (*_JNP, *_INTERPRET):
        raise ValueError(f"implementation={implementation!r} is none of {sorted((*_JNP, *_INTERPRET))}")
    if q.ndim != 4 or k.ndim != 4 or k.shape != v.shape or (q.shape[0], q.shape[3]) != (k.shape[0], k.shape[3]):
        raise ValueError(
            f"q {q.shape}, k {k.shape} and v {v.shape} are not batch x heads x tokens x head_dim of one layer"
        )
    if 0 in q.shape or 0 in k.shape:
        raise ValueError(f"q {q.shape} or k {k.shape} is empty")
    if q.shape[1] % k.shape[1]:
        raise ValueError(f"{q.shape[1]} query heads are not a multiple of {k.shape[1]} KV heads")
    if not q.dtype == k.dtype == v.dtype or q.dtype not in (jnp.bfloat16, jnp.float32):
        raise ValueError(f"q {q.dtype}, k {k.dtype} and v {v.dtype} are not all bfloat16 or all float32")
    if (q_segment_ids is None) != (kv_segment_ids is None):
        raise ValueError("q_segment_ids and kv_segment_ids go together: one is missing")
    for name, ids, of in (("q_segment_ids", q_segment_ids, q), ("kv_segment_ids", kv_segment_ids, k)):
        if ids is not None and (ids.shape != (of.shape[0], of.shape[2]) or not jnp.issubdtype(ids.dtype, jnp.integer)):
            raise ValueError(f"{name} {ids.dtype}{ids.shape} are not integers [{of.shape[0]}, {of.shape[2]}]")
    if implementation in _INTERPRET and (q.shape[3] % 8 or q.shape[3] > MAX_HEAD_DIM):
        raise ValueError(
            f"head_dim {q.shape[3]} is not a multiple of 8 up to {MAX_HEAD_DIM}; implementation='xla' takes any"
        )
