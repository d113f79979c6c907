# SPDX-License-Identifier: Apache-2.0
"""What a step holds, for vLLM's layers to find while their module is traced: torch modules pass no such arguments down."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import jax
from jax.sharding import Mesh

from tpu_inference.errors import TpuInferenceError
from tpu_inference.layers.common.attention import KVCache
from tpu_inference.layers.common.attention_metadata import AttentionMetadata


@dataclass
class StepContext:
    """One trace of one module."""

    mesh: Mesh
    kv_cache: KVCache
    """Replaced by each attention layer."""
    meta: AttentionMetadata
    index_of_layer: dict[str, int]
    """vLLM's name of an attention layer -> its index in the KV cache."""
    layer_offset: int | jax.Array = 0
    """Layers that a scanned layer lies beyond the one whose code is traced."""
    written: dict[str, tuple[jax.Array, jax.Array, jax.Array | None]] = field(default_factory=dict)
    """K, V and the cache's scales of the layers traced so far, for layers that share a cache."""
    stacks: dict[str, Any] = field(default_factory=dict)
    """Stacked parameters of the layers that are scanned, by the name of their list; without, every layer is traced."""


_current: ContextVar[StepContext | None] = ContextVar("step", default=None)


@contextmanager
def step_context(step: StepContext) -> Iterator[StepContext]:
    """`step` is what the layers find inside."""
    token = _current.set(step)
    try:
        yield step
    finally:
        _current.reset(token)


def current_step() -> StepContext:
    """Raises TpuInferenceError outside of a trace."""
    step = _current.get()
    if step is None:
        raise TpuInferenceError("a layer of a PyTorch model was called outside of a traced step")
    return step
