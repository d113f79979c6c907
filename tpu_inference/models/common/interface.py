# SPDX-License-Identifier: Apache-2.0
"""What the runner knows of a model, whatever it was written in."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax


@dataclass(frozen=True)
class AttentionLayer:
    """A layer with a KV cache."""

    name: str
    """vLLM's key of the layer's cache."""
    sliding_window: int | None
    num_kv_heads: int
    """KV heads in the cache over all devices, copies and padding included."""
    head_dim: int
    latent: int | None = None
    """Of latent attention, the leading numbers of `head_dim` that are values too; `num_kv_heads` is then the devices, each of which has all."""
    chunk: int | None = None
    """Tokens of a chunk that attention stays within."""


@dataclass(frozen=True, eq=False)
class ModelFunctions:
    """Parameters, and pure functions of them."""

    params: Any
    """Pytree of arrays (or ShapeDtypeStructs, to compile without weights)."""
    forward: Callable
    """(params, kv_cache, token_ids [T], AttentionMetadata) -> (hidden [T, d], kv_cache)"""
    logits: Callable
    """(params, hidden [N, d]) -> float32 [N, vocab_size]"""
    layers: tuple[AttentionLayer, ...]
    platform: str
    """Of the devices: "tpu" or "cpu"; with a layer's head_dim it decides the layout of its pages."""
    kv_dtype: Any
    """What the pages are stored as; see `storage_dtype`."""
    flat_kv: bool
    """One pool of pages for all layers, as scanned layers need, instead of an array per layer."""
    vocab_size: int
    hidden: jax.ShapeDtypeStruct
    """[1, d]: width and dtype of the hidden states."""
