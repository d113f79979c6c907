# SPDX-License-Identifier: Apache-2.0
"""The layout of pages of latents: that of paged attention, with one plane and one KV head."""

from tpu_inference.kernels.ragged_paged_attention.pages import LANES


def latent_pages_shape(
    num_pages: int, page_size: int, kv_lora_rank: int, rope_dim: int, platform: str
) -> tuple[int, int, int, int, int]:
    """[pages, 1, 1, page_size, width] on a platform: of each token its latent, then its rotated key, then, on a TPU, zeros up to whole lanes."""
    width = kv_lora_rank + rope_dim
    return (num_pages, 1, 1, page_size, -(-width // LANES) * LANES if platform == "tpu" else width)
