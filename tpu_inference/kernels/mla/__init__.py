# SPDX-License-Identifier: Apache-2.0
"""Multi-head latent attention of a ragged batch over a paged cache of latents, with the cache write."""

from tpu_inference.kernels.mla.api import mla_attention
from tpu_inference.kernels.mla.pages import latent_pages_shape
from tpu_inference.kernels.mla.pallas import misfit

__all__ = ["latent_pages_shape", "misfit", "mla_attention"]
