# SPDX-License-Identifier: Apache-2.0
"""The compiled programs of a step: forward, sampling, logprobs; each as a `CompileCase` per bucket."""

from collections.abc import Sequence
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from tpu_inference.layers.common.attention import KVCache
from tpu_inference.layers.common.attention_metadata import AttentionMetadata
from tpu_inference.layers.common.sampling import Logprobs, gather_logprobs, sample
from tpu_inference.layers.common.sharding import named_sharding
from tpu_inference.models.common.interface import ModelFunctions
from tpu_inference.runner.buckets import Bucket, BucketPlan
from tpu_inference.runner.compilation_manager import CompilationManager, CompileCase
from tpu_inference.runner.input_batch import sampling_sizes
from tpu_inference.runner.step_inputs import SamplingInputs, Sizes, StepInputs

PROMPT_CHUNK = 256
"""Prompt positions whose logprobs are computed at a time: logits of a whole prompt would not fit."""


def _forward(model: ModelFunctions, sizes: Sizes, params, kv_cache, last_tokens, buffer):
    """One step up to the logits. Returns (hidden [T, d], logits [R, V], sample_slots [R], kv_cache)."""
    inputs = StepInputs.unpack(buffer, sizes)
    on_device = jnp.maximum(inputs.token_slots, 0)
    token_ids = jnp.where(inputs.token_slots >= 0, last_tokens[on_device], inputs.token_ids)
    meta = AttentionMetadata(inputs.positions, inputs.query_start_loc, inputs.seq_lens, inputs.block_tables)
    hidden, kv_cache = model.forward(params, kv_cache, token_ids, meta)
    logits = model.logits(params, hidden[inputs.logits_indices])
    return hidden, logits, inputs.sample_slots, kv_cache


def _remember(tokens: jax.Array, sample_slots: jax.Array, last_tokens: jax.Array):
    return tokens, last_tokens.at[sample_slots].set(tokens, mode="drop")


def _sample_greedy(logits, sample_slots, last_tokens):
    return _remember(jnp.argmax(logits, axis=-1).astype(jnp.int32), sample_slots, last_tokens)


def _sample(sizes: Sizes, logits, sample_slots, last_tokens, buffer):
    inputs = SamplingInputs.unpack(buffer, sizes)
    tokens = sample(
        logits,
        temperature=inputs.temperature,
        top_k=inputs.top_k,
        top_p=inputs.top_p,
        min_p=inputs.min_p,
        seeds=inputs.seed,
        steps=inputs.step,
        masked_ids=inputs.masked_ids,
    )
    return _remember(tokens, sample_slots, last_tokens)


def _prompt_logprobs(model: ModelFunctions, num_logprobs: int, params, hidden, targets) -> Logprobs:
    return gather_logprobs(model.logits(params, hidden), targets, num_logprobs)


class StepPrograms:
    """Makes, compiles and hands out the programs of one model on one mesh."""

    def __init__(
        self,
        model: ModelFunctions,
        plan: BucketPlan,
        mesh: Mesh,
        compilation: CompilationManager,
        *,
        kv_cache: KVCache,
        num_groups: int,
        max_blocks: int,
        num_slots: int,
        max_logprobs: int,
        hidden: jax.ShapeDtypeStruct,
    ) -> None:
        """`kv_cache` is abstract; `hidden` gives width and dtype of the hidden states."""
        self._model, self._plan, self._compilation = model, plan, compilation
        self._kv_cache, self._hidden = kv_cache, hidden
        self._num_groups, self._max_blocks = num_groups, max_blocks
        self._num_slots, self._max_logprobs = num_slots, max_logprobs
        self._everywhere = named_sharding(mesh, ())

    def sizes(self, bucket: Bucket) -> Sizes:
        """Dimension sizes of `StepInputs` in a bucket."""
        return {
            "tokens": bucket.tokens, "rows": bucket.rows, "groups": self._num_groups, "blocks": self._max_blocks
        }  # fmt: skip

    def _array(self, shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=self._everywhere)

    def _jit(self, fn, donate: tuple[int, ...] = (), out: Any = None):
        return jax.jit(fn, donate_argnums=donate, out_shardings=self._everywhere if out is None else out)

    @cached_property
    def _last_tokens(self) -> jax.ShapeDtypeStruct:
        return self._array((self._num_slots,), jnp.int32)

    def make_last_tokens(self) -> jax.Array:
        """The device's record of the last sampled token of every slot: int32 [slots]."""
        return jax.device_put(np.zeros(self._num_slots, np.int32), self._everywhere)

    def _logits(self, rows: int) -> jax.ShapeDtypeStruct:
        return self._array((rows, self._model.vocab_size), jnp.float32)

    def _rows(self, rows: int) -> jax.ShapeDtypeStruct:
        return self._array((rows,), jnp.int32)

    def forward_case(self, bucket: Bucket) -> CompileCase:
        sizes, every = self.sizes(bucket), self._everywhere
        kv_shardings = jax.tree.map(lambda array: array.sharding, self._kv_cache)
        fn = self._jit(partial(_forward, self._model, sizes), (1,), (every, every, every, kv_shardings))
        buffer = StepInputs.abstract(sizes)
        args = (self._model.params, self._kv_cache, self._last_tokens, self._array(buffer.shape, buffer.dtype))
        return CompileCase("forward", bucket, fn, args)

    def greedy_case(self, rows: int) -> CompileCase:
        fn = self._jit(_sample_greedy, (2,))
        return CompileCase("sample_greedy", rows, fn, (self._logits(rows), self._rows(rows), self._last_tokens))

    def sample_case(self, rows: int) -> CompileCase:
        fn = self._jit(partial(_sample, sampling_sizes(rows)), (2,))
        buffer = SamplingInputs.abstract(sampling_sizes(rows))
        args = (self._logits(rows), self._rows(rows), self._last_tokens, self._array(buffer.shape, buffer.dtype))
        return CompileCase("sample", rows, fn, args)

    def logprobs_case(self, rows: int) -> CompileCase:
        fn = self._jit(partial(gather_logprobs, num_logprobs=self._max_logprobs))
        return CompileCase("logprobs", rows, fn, (self._logits(rows), self._rows(rows)))

    def prompt_logprobs_case(self, chunk: int) -> CompileCase:
        fn = self._jit(partial(_prompt_logprobs, self._model, self._max_logprobs))
        hidden = self._array((chunk, *self._hidden.shape[1:]), self._hidden.dtype)
        return CompileCase("prompt_logprobs", chunk, fn, (self._model.params, hidden, self._rows(chunk)))

    def cases(self, buckets: Sequence[Bucket] | None = None) -> list[CompileCase]:
        """All programs that `buckets` (default: every one) need, small to large."""
        buckets = self._plan.buckets if buckets is None else buckets
        makers = (self.greedy_case, self.sample_case, self.logprobs_case)
        return [
            *(make(rows) for rows in sorted({bucket.rows for bucket in buckets}) for make in makers),
            self.prompt_logprobs_case(PROMPT_CHUNK),
            *(self.forward_case(bucket) for bucket in buckets),
        ]

    def first_cases(self) -> list[CompileCase]:
        """What serving starts with."""
        return self.cases(self._plan.first_needed)

    def is_ready(self, bucket: Bucket) -> bool:
        """Whether a step in `bucket` finds all its programs compiled."""
        has, rows = self._compilation.has, bucket.rows
        return has("forward", bucket) and has("sample_greedy", rows) and has("sample", rows) and has("logprobs", rows)

    # Run time. Each finds the executable of its bucket and calls it.

    def forward(self, bucket: Bucket, *args):
        return self._compilation.get("forward", bucket, lambda: self.forward_case(bucket))(*args)

    def sample_greedy(self, rows: int, *args):
        return self._compilation.get("sample_greedy", rows, lambda: self.greedy_case(rows))(*args)

    def sample(self, rows: int, *args):
        return self._compilation.get("sample", rows, lambda: self.sample_case(rows))(*args)

    def logprobs(self, rows: int, *args) -> Logprobs:
        return self._compilation.get("logprobs", rows, lambda: self.logprobs_case(rows))(*args)

    def prompt_logprobs(self, *args) -> Logprobs:
        make = partial(self.prompt_logprobs_case, PROMPT_CHUNK)
        return self._compilation.get("prompt_logprobs", PROMPT_CHUNK, make)(*args)
