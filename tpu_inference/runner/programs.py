# SPDX-License-Identifier: Apache-2.0
"""The compiled programs of a step: forward, sampling, logprobs; each as a `CompileCase` per bucket."""

from collections.abc import Callable, Sequence
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from tpu_inference.layers.common.attention import KVCache
from tpu_inference.layers.common.attention_metadata import AttentionMetadata
from tpu_inference.layers.common.sampling import sample
from tpu_inference.layers.common.sampling_logprobs import Logprobs, gather_logprobs, gather_logprobs_of
from tpu_inference.layers.common.sampling_processors import (
    RowParameters,
    TokenTables,
    apply_bitmask,
    count_tokens,
    write_row,
)
from tpu_inference.layers.common.sharding import named_sharding, shard_bytes, sharding_where_it_divides
from tpu_inference.models.common.interface import ModelFunctions
from tpu_inference.runner.buckets import Bucket, BucketPlan
from tpu_inference.runner.compilation_manager import CompilationManager, CompileCase
from tpu_inference.runner.input_batch import sampling_sizes
from tpu_inference.runner.step_inputs import SamplingInputs, Sizes, StepInputs
from tpu_inference.runner.untouched_zeros import zeros

PROMPT_CHUNK = 256
"""Prompt positions whose logprobs are computed at a time: logits of a whole prompt would not fit."""
WIDE_PROMPT_CHUNK = 16
"""The same where more than WIDE logprobs of each are wanted, up to the whole vocabulary."""
WIDE = 1024
USUAL_LOGPROBS = 20
"""Where `max_logprobs` is higher there are two programs, so that a request for a few does not pay for a sort of the vocabulary."""
MAX_LOGPROB_TOKEN_IDS = 128
"""vLLM's bound on `logprob_token_ids`, which it checks."""

_COMPILER_OPTIONS = {"TPU7x": {"xla_tpu_control_large_2nd_minor_layout_for_x16": "0"}}
"""Device kind -> options of XLA. tpu7x: scans want 16-bit matrices in tiles of 16 rows, arrays lie in tiles of 8, and all
scanned weights would be copied before every scan. They are multiplied as they lie instead."""


def logprob_sizes(max_logprobs: int, vocab_size: int) -> tuple[int, ...]:
    """Numbers of likeliest tokens that programs are compiled for, increasing; -1 is the whole vocabulary."""
    most = vocab_size if max_logprobs == -1 else min(max_logprobs, vocab_size)
    return (most,) if most <= USUAL_LOGPROBS else (USUAL_LOGPROBS, most)


def prompt_chunk(num_logprobs: int) -> int:
    """Prompt positions scored at a time."""
    return PROMPT_CHUNK if num_logprobs <= WIDE else WIDE_PROMPT_CHUNK


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


def _sample(sizes: Sizes, processed: bool, logits, sample_slots, last_tokens, tables: TokenTables, buffer):
    """Returns (tokens [R], last_tokens, tables, logits [R, V] they were drawn from or None)."""
    rows = RowParameters(**vars(SamplingInputs.unpack(buffer, sizes)))
    tokens, drawn_from = sample(logits, tables, rows, processed=processed)
    tokens, last_tokens = _remember(tokens, sample_slots, last_tokens)
    return tokens, last_tokens, count_tokens(tables, sample_slots, tokens), drawn_from


def _prompt_logprobs(model: ModelFunctions, num_logprobs: int, normalised: bool, params, hidden, targets) -> Logprobs:
    return gather_logprobs(model.logits(params, hidden), targets, num_logprobs, normalised=normalised)


def _count_nans(logits: jax.Array) -> jax.Array:
    return jnp.isnan(logits).sum(axis=1, dtype=jnp.int32)


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
        logprobs_mode: str = "raw_logprobs",
        host_processors: bool = False,
        counts_nans: bool = False,
    ) -> None:
        """`kv_cache` is abstract, and so are the model's parameters; `hidden` gives width and dtype of the hidden states.

        `max_logprobs` and `logprobs_mode` are vLLM's. `host_processors`: some logits are changed on the host, which needs to see them.
        `counts_nans`: there is a program that counts NaNs among logits.
        """
        self._model, self._plan, self._compilation = model, plan, compilation
        self._kv_cache, self._hidden = kv_cache, hidden
        self._num_groups, self._max_blocks = num_groups, max_blocks
        self._num_slots = num_slots
        self.logprob_sizes = logprob_sizes(max_logprobs, model.vocab_size)
        self._counts_nans = counts_nans
        self._normalised = logprobs_mode.endswith("logprobs")
        self._processed = logprobs_mode.startswith("processed") or host_processors
        self._compiler_options = _COMPILER_OPTIONS.get(mesh.devices.flat[0].device_kind)
        self._everywhere = named_sharding(mesh, ())
        # Logits stay where the head's product leaves them: gathered, every device would hold and search all of them.
        self._by_vocab = sharding_where_it_divides(mesh, (None, "vocab"), (1, model.vocab_size))

    @property
    def abstract_params(self) -> Any:
        """Shapes and shardings of the parameters."""
        return self._model.params

    @property
    def abstract_kv_cache(self) -> KVCache:
        """Shapes and shardings of the cache."""
        return self._kv_cache

    def sizes(self, bucket: Bucket) -> Sizes:
        """Dimension sizes of `StepInputs` in a bucket."""
        return {
            "tokens": bucket.tokens, "rows": bucket.rows, "groups": self._num_groups, "blocks": self._max_blocks
        }  # fmt: skip

    def _array(self, shape: tuple[int, ...], dtype: Any, sharding: Any = None) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding or self._everywhere)

    def _jit(self, fn, donate: tuple[int, ...] = (), out: Any = None):
        out = self._everywhere if out is None else out
        return jax.jit(fn, donate_argnums=donate, out_shardings=out, compiler_options=self._compiler_options)

    @cached_property
    def _last_tokens(self) -> jax.ShapeDtypeStruct:
        return self._array((self._num_slots,), jnp.int32)

    def make_last_tokens(self) -> jax.Array:
        """The device's record of the last sampled token of every slot: int32 [slots]."""
        return jax.device_put(np.zeros(self._num_slots, np.int32), self._everywhere)

    def _logits(self, rows: int) -> jax.ShapeDtypeStruct:
        return self._array((rows, self._model.vocab_size), jnp.float32, self._by_vocab)

    def logits_bytes(self, rows: int) -> int:
        """Of each device: the logits of `rows`."""
        return shard_bytes(self._logits(rows))

    @property
    def mask_words(self) -> int:
        """int32 words of a row of a bitmask over the vocabulary."""
        return -(-self._model.vocab_size // 32)

    def _rows(self, rows: int) -> jax.ShapeDtypeStruct:
        return self._array((rows,), jnp.int32)

    def forward_case(self, bucket: Bucket) -> CompileCase:
        sizes, every = self.sizes(bucket), self._everywhere
        kv_shardings = jax.tree.map(lambda array: array.sharding, self._kv_cache)
        out = (every, self._by_vocab, every, kv_shardings)
        fn = self._jit(partial(_forward, self._model, sizes), (1,), out)
        buffer = StepInputs.abstract(sizes)
        args = (self._model.params, self._kv_cache, self._last_tokens, self._array(buffer.shape, buffer.dtype))
        return CompileCase("forward", bucket, fn, args)

    def greedy_case(self, rows: int) -> CompileCase:
        fn = self._jit(_sample_greedy, (2,))
        return CompileCase("sample_greedy", rows, fn, (self._logits(rows), self._rows(rows), self._last_tokens))

    @cached_property
    def _tables(self) -> TokenTables:
        shape = (self._num_slots, self._model.vocab_size)
        return TokenTables(*(self._array(shape, dtype, self._by_vocab) for dtype in (jnp.int32, jnp.float32)))

    @property
    def tables_bytes(self) -> int:
        """Of each device: what `make_tables` takes."""
        return sum(map(shard_bytes, jax.tree.leaves(self._tables)))

    def make_tables(self) -> TokenTables:
        """The device's record of what requests say of each token, all rows without a request yet."""
        return jax.tree.map(zeros, self._tables)

    def sample_case(self, rows: int) -> CompileCase:
        out = (self._everywhere, self._everywhere, self._by_vocab, self._by_vocab if self._processed else None)
        fn = self._jit(partial(_sample, sampling_sizes(rows), self._processed), (2, 3), out)
        buffer = SamplingInputs.abstract(sampling_sizes(rows))
        words = self._array(buffer.shape, buffer.dtype)
        args = (self._logits(rows), self._rows(rows), self._last_tokens, self._tables, words)
        return CompileCase("sample", rows, fn, args)

    def write_row_case(self) -> CompileCase:
        row = self._array((2, self._model.vocab_size), jnp.int32)
        args = (self._tables, self._array((), jnp.int32), row)
        return CompileCase("write_row", "slot", self._jit(write_row, (0,), self._by_vocab), args)

    def mask_case(self, rows: int) -> CompileCase:
        words = self._array((rows, self.mask_words), jnp.int32)
        return CompileCase("mask", rows, self._jit(apply_bitmask, out=self._by_vocab), (self._logits(rows), words))

    def nans_case(self, rows: int) -> CompileCase:
        return CompileCase("nans", rows, self._jit(_count_nans), (self._logits(rows),))

    def logprobs_case(self, rows: int, size: int | None = None) -> CompileCase:
        """Of the `size` likeliest tokens; default: the fewest there is a program for."""
        size = self.logprob_sizes[0] if size is None else size
        fn = self._jit(partial(gather_logprobs, num_logprobs=size, normalised=self._normalised))
        return CompileCase("logprobs", (rows, size), fn, (self._logits(rows), self._rows(rows)))

    def logprobs_of_case(self, rows: int) -> CompileCase:
        fn = self._jit(partial(gather_logprobs_of, normalised=self._normalised))
        others = self._array((rows, MAX_LOGPROB_TOKEN_IDS), jnp.int32)
        return CompileCase("logprobs_of", rows, fn, (self._logits(rows), self._rows(rows), others))

    def prompt_logprobs_case(self, size: int) -> CompileCase:
        chunk = prompt_chunk(size)
        fn = self._jit(partial(_prompt_logprobs, self._model, size, self._normalised))
        hidden = self._array((chunk, *self._hidden.shape[1:]), self._hidden.dtype)
        return CompileCase("prompt_logprobs", size, fn, (self._model.params, hidden, self._rows(chunk)))

    def row_cases(self, rows: int) -> list[CompileCase]:
        """The programs between logits and tokens of so many rows."""
        makers = (self.greedy_case, self.sample_case, self.mask_case, self.logprobs_of_case)
        makers += (self.nans_case,) * self._counts_nans
        return [*(make(rows) for make in makers), *(self.logprobs_case(rows, size) for size in self.logprob_sizes)]

    def cases(self, buckets: Sequence[Bucket] | None = None) -> list[CompileCase]:
        """All programs that `buckets` (default: every one) need, small to large."""
        buckets = self._plan.buckets if buckets is None else buckets
        return [
            *(case for rows in sorted({bucket.rows for bucket in buckets}) for case in self.row_cases(rows)),
            self.write_row_case(),
            *(self.prompt_logprobs_case(size) for size in self.logprob_sizes),
            *(self.forward_case(bucket) for bucket in buckets),
        ]

    def first_cases(self) -> list[CompileCase]:
        """What serving starts with."""
        return self.cases(self._plan.first_needed)

    def is_ready(self, bucket: Bucket) -> bool:
        """Whether a step in `bucket` finds all its programs compiled."""
        has, rows = self._compilation.has, bucket.rows
        return (
            has("forward", bucket)
            and all(has(name, rows) for name in ("sample_greedy", "sample", "mask", "logprobs_of"))
            and all(has("logprobs", (rows, size)) for size in self.logprob_sizes)
            and (not self._counts_nans or has("nans", rows))
        )

    # Run time. Each finds the executable of its bucket and calls it.

    def _get(self, name: str, bucket: Any, make: Callable[[], CompileCase]) -> Any:
        return self._compilation.get(name, bucket, make)

    def forward(self, bucket: Bucket, *args):
        return self._get("forward", bucket, lambda: self.forward_case(bucket))(*args)

    def sample_greedy(self, rows: int, *args):
        return self._get("sample_greedy", rows, lambda: self.greedy_case(rows))(*args)

    def sample(self, rows: int, *args):
        return self._get("sample", rows, lambda: self.sample_case(rows))(*args)

    def write_row(self, *args) -> TokenTables:
        return self._get("write_row", "slot", self.write_row_case)(*args)

    def mask(self, rows: int, *args) -> jax.Array:
        return self._get("mask", rows, lambda: self.mask_case(rows))(*args)

    def nans(self, rows: int, logits: jax.Array) -> jax.Array | None:
        """int32 [rows], where they are to be counted."""
        return self._get("nans", rows, lambda: self.nans_case(rows))(logits) if self._counts_nans else None

    def logprobs(self, rows: int, wanted: int, *args) -> Logprobs:
        """Of at least the `wanted` likeliest tokens."""
        size = self._size_for(wanted)
        return self._get("logprobs", (rows, size), lambda: self.logprobs_case(rows, size))(*args)

    def logprobs_of(self, rows: int, *args) -> Logprobs:
        return self._get("logprobs_of", rows, lambda: self.logprobs_of_case(rows))(*args)

    def prompt_logprobs(self, wanted: int, *args) -> Logprobs:
        """Of at least the `wanted` likeliest tokens, at `prompt_chunk_for(wanted)` positions."""
        size = self._size_for(wanted)
        return self._get("prompt_logprobs", size, lambda: self.prompt_logprobs_case(size))(*args)

    def prompt_chunk_for(self, wanted: int) -> int:
        """Positions that `prompt_logprobs` takes at a time."""
        return prompt_chunk(self._size_for(wanted))

    def _size_for(self, wanted: int) -> int:
        return next(size for size in self.logprob_sizes if size >= min(wanted, self.logprob_sizes[-1]))
