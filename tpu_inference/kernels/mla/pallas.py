# SPDX-License-Identifier: Apache-2.0
"""The op on TPU: the kernels of paged attention, told that values are the first lanes of keys."""

from typing import Any

import jax
import jax.numpy as jnp

from tpu_inference.kernels.mla.config import Config
from tpu_inference.kernels.ragged_paged_attention import pallas as paged
from tpu_inference.kernels.ragged_paged_attention.paged import FLOOR, NO_WINDOW
from tpu_inference.kernels.ragged_paged_attention.pages import LANES


def misfit(pages: Any, block_tables: Any, kv_lora_rank: int) -> str | None:
    """Why the kernels do not serve these shapes; None where they do."""
    if kv_lora_rank % LANES:
        return f"kv_lora_rank {kv_lora_rank} is not a multiple of {LANES}, the lanes of a register"
    return paged.misfit(pages, block_tables)


def attend_pallas(
    q: jax.Array,
    new: jax.Array,
    pages: jax.Array,
    block_tables: jax.Array,
    seq_lens: jax.Array,
    query_start_loc: jax.Array,
    page_offset: int | jax.Array,
    *,
    scale: float,
    kv_lora_rank: int,
    config: Config,
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array]:
    """Writes `new` [T, width] and attends, for rows of one token before rows of more.

    Returns:
        ([T, H, kv_lora_rank] in the dtype of `q` [T, H, kv_lora_rank + rope_dim], the updated pages)
    """
    num_heads = q.shape[1]
    out, pages = paged.write_and_attend(
        q, (new[:, None],), pages, block_tables, seq_lens, query_start_loc, page_offset,
        NO_WINDOW, jnp.full((num_heads, LANES), FLOOR, jnp.float32),
        scale=scale, soft_cap=None, windowed=False, config=config, latent=kv_lora_rank, head_blocks=num_heads // config.heads,
        interpret=interpret,
    )  # fmt: skip
    return out[..., :kv_lora_rank], pages
