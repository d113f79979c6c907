# SPDX-License-Identifier: Apache-2.0
"""vLLM's PyTorch classes in this process, without an engine around them."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from vllm import EngineArgs
from vllm.config import VllmConfig

from tpu_inference.layers.common.attention import KVCache, KVCacheLayout
from tpu_inference.layers.common.attention_metadata import AttentionMetadata
from tpu_inference.layers.common.sharding import make_mesh
from tpu_inference.models.common.interface import ModelFunctions

BLOCK_SIZE = 16


def vllm_config(path: str, *, scan_layers: bool = True, **options: Any) -> VllmConfig:
    """What an engine that serves `path` by vLLM's class is configured with."""
    fields: dict[str, Any] = dict(
        dtype="float32", max_model_len=256, skip_tokenizer_init=True, block_size=BLOCK_SIZE, model_impl="vllm",
        additional_config={"scan_layers": scan_layers},
    )  # fmt: skip
    return EngineArgs(model=path, **{**fields, **options}).create_engine_config()


def mesh(shards: int = 1) -> jax.sharding.Mesh:
    return make_mesh(jax.devices("cpu"), shards)


def logits_of(functions: ModelFunctions, tokens: list[int]) -> np.ndarray:
    """float32 [len(tokens), vocab_size] of one prompt, by one step."""
    layers, blocks = functions.layers, -(-len(tokens) // BLOCK_SIZE) + 1
    layout = KVCacheLayout(tuple(range(len(layers))), (0,) * len(layers), blocks, functions.flat_kv)
    from tpu_inference.runner.kv_cache_manager import abstract_kv_cache, allocate_kv_cache

    some_mesh = jax.tree.leaves(functions.params)[0].sharding.mesh
    kv_cache: KVCache = allocate_kv_cache(
        abstract_kv_cache(functions, layout, BLOCK_SIZE, functions.kv_dtype, some_mesh)
    )
    meta = AttentionMetadata(
        jnp.arange(len(tokens), dtype=jnp.int32),
        jnp.asarray([0, len(tokens)], jnp.int32),
        jnp.asarray([len(tokens)], jnp.int32),
        jnp.arange(1, blocks, dtype=jnp.int32)[None, None],
    )

    def step(params, kv_cache, token_ids, meta):
        hidden, _ = functions.forward(params, kv_cache, token_ids, meta)
        return functions.logits(params, hidden)

    return np.asarray(jax.jit(step)(functions.params, kv_cache, jnp.asarray(tokens, jnp.int32), meta))
