# SPDX-License-Identifier: Apache-2.0
"""Programs between logits and tokens give the same on logits that are sharded over the vocabulary as on whole ones."""

from types import SimpleNamespace

import jax
import numpy as np
import pytest

from tpu_inference.layers.common.sharding import make_mesh
from tpu_inference.runner.buckets import BucketPlan
from tpu_inference.runner.compilation_manager import CompilationManager
from tpu_inference.runner.input_batch import sampling_sizes
from tpu_inference.runner.programs import StepPrograms
from tpu_inference.runner.step_inputs import SamplingInputs

ROWS, VOCAB, SLOTS = 8, 336, 8


def make_programs(shards):
    return StepPrograms(
        SimpleNamespace(vocab_size=VOCAB), BucketPlan.build(ROWS, ROWS, on_tpu=True), make_mesh(jax.devices("cpu"), shards),
        CompilationManager(strict=False), kv_cache=None, num_groups=1, max_blocks=8, num_slots=SLOTS, max_logprobs=5,
        hidden=None, logprobs_mode="processed_logits",
    )  # fmt: skip


def parameters():
    """Greedy and drawn rows, with every filter and penalty somewhere among them."""
    sizes = sampling_sizes(ROWS)
    buffer = SamplingInputs.abstract(sizes)
    words = np.zeros(buffer.shape, buffer.dtype)
    rows = SamplingInputs.views(words, sizes)
    rows.slots[:], rows.seed[:], rows.step[:] = np.arange(ROWS), 7 + np.arange(ROWS), 11
    rows.temperature[:] = [0, 1, 0.7, 1.5, 1, 0, 1, 1]
    rows.top_k[:] = [VOCAB, 5, VOCAB, 40, VOCAB, VOCAB, VOCAB, 3]
    rows.top_p[:] = [1, 1, 0.8, 0.9, 1, 1, 1, 1]
    rows.min_p[:] = [0, 0, 0, 0, 0.1, 0, 0, 0]
    rows.repetition_penalty[:] = [1.5, 1, 1, 1.2, 1, 1, 1, 1]
    rows.presence_penalty[:] = [0, 0, 0, 0, 0.5, 1, 0, 0]
    rows.flags[:], rows.forced_ids[:] = 1, -1
    rows.forced_ids[6] = VOCAB - 1
    return words


def run(shards):
    """All that the programs return, as NumPy arrays."""
    programs, random = make_programs(shards), np.random.default_rng(0)
    # `jax.device_put` lays whole logits out as the forward program leaves them.
    logits = jax.device_put(
        random.normal(size=(ROWS, VOCAB)).astype(np.float32) * 3, programs.greedy_case(ROWS).args[0].sharding
    )
    tables, last, slots = programs.make_tables(), programs.make_last_tokens(), np.arange(ROWS, dtype=np.int32)
    row = np.stack(
        [random.integers(0, 3, VOCAB, np.int32), random.normal(size=VOCAB).astype(np.float32).view(np.int32)]
    )
    for slot in range(SLOTS):
        tables = programs.write_row(tables, np.int32(slot), np.roll(row, slot, 1))
    bits = random.integers(-(2**31), 2**31, (ROWS, programs.mask_words), dtype=np.int64).astype(np.int32)
    masked = programs.mask(ROWS, logits, bits)
    greedy, last = programs.sample_greedy(ROWS, masked, slots, last)
    tokens, last, tables, drawn_from = programs.sample(ROWS, logits, slots, last, tables, parameters())
    logprobs = programs.logprobs(ROWS, 5, drawn_from, tokens)
    results = (masked, greedy, tokens, last, tables.seen, tables.bias, drawn_from, logprobs)
    return [np.asarray(leaf) for leaf in jax.tree.leaves(results)], logits, tables


def test_the_vocabulary_may_be_sharded():
    whole, _, _ = run(1)
    parts, logits, tables = run(8)
    assert logits.sharding.shard_shape(logits.shape) == (ROWS, VOCAB // 8)
    assert {table.sharding.shard_shape(table.shape) for table in jax.tree.leaves(tables)} == {(SLOTS, VOCAB // 8)}
    for one, other in zip(whole, parts, strict=True):
        np.testing.assert_allclose(other, one, rtol=1e-6)


@pytest.mark.parametrize("shards", [1, 8])
def test_what_the_sampler_keeps_is_counted_a_device(shards):
    assert make_programs(shards).tables_bytes == 8 * SLOTS * VOCAB // shards
    assert make_programs(shards).logits_bytes(ROWS) == 4 * ROWS * VOCAB // shards
