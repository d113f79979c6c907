# SPDX-License-Identifier: Apache-2.0
"""vLLM's PyTorch classes in this process, without an engine around them."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from vllm import EngineArgs
from vllm.config import VllmConfig

from tpu_inference.layers.common.attention import KVCacheLayout
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


class Stepper:
    """One request, step by step, by the functions that the runner compiles."""

    def __init__(self, functions: ModelFunctions, max_tokens: int) -> None:
        from tpu_inference.runner.kv_cache_manager import abstract_kv_cache, allocate_kv_cache

        layers, self._blocks = functions.layers, -(-max_tokens // BLOCK_SIZE)
        layout = KVCacheLayout(tuple(range(len(layers))), (0,) * len(layers), self._blocks + 1, functions.flat_kv)
        where = jax.tree.leaves(functions.params)[0].sharding.mesh
        self._params, self._length = functions.params, 0
        self._kv_cache = allocate_kv_cache(abstract_kv_cache(functions, layout, BLOCK_SIZE, functions.kv_dtype, where))

        def step(params, kv_cache, token_ids, meta):
            hidden, kv_cache = functions.forward(params, kv_cache, token_ids, meta)
            return functions.logits(params, hidden), kv_cache

        self._step = jax.jit(step, donate_argnums=1)

    def __call__(self, tokens: list[int]) -> np.ndarray:
        """float32 [len(tokens), vocab_size]: logits of the next tokens of the request."""
        before, self._length = self._length, self._length + len(tokens)
        meta = AttentionMetadata(
            jnp.arange(before, self._length, dtype=jnp.int32),
            jnp.asarray([0, len(tokens)], jnp.int32),
            jnp.asarray([self._length], jnp.int32),
            jnp.arange(1, self._blocks + 1, dtype=jnp.int32)[None, None],
        )
        logits, self._kv_cache = self._step(self._params, self._kv_cache, jnp.asarray(tokens, jnp.int32), meta)
        return np.asarray(logits)


def logits_of(functions: ModelFunctions, tokens: list[int]) -> np.ndarray:
    """float32 [len(tokens), vocab_size] of one prompt, by one step."""
    return Stepper(functions, len(tokens))(tokens)


def greedy_of(functions: ModelFunctions, prompt: list[int], count: int) -> tuple[np.ndarray, list[int]]:
    """(logits of the prompt, the `count` tokens that follow it)."""
    step = Stepper(functions, len(prompt) + count)
    logits = step(prompt)
    tokens = [int(logits[-1].argmax())]
    while len(tokens) < count:
        tokens.append(int(step(tokens[-1:])[-1].argmax()))
    return logits, tokens
