# SPDX-License-Identifier: Apache-2.0
"""The op in plain XLA: paged attention whose values are its keys."""

import jax

from tpu_inference.kernels.ragged_paged_attention import xla


def attend_xla(q: jax.Array, pages: jax.Array, *tables: jax.Array, scale: float, kv_lora_rank: int) -> jax.Array:
    """As `reference.attend_reference`, at a cost that follows the true lengths."""
    options = dict(scale=scale, soft_cap=None, sliding_window=None, sinks=None)
    return xla.attend_xla(q, pages, *tables, **options, shared=True)[..., :kv_lora_rank]
