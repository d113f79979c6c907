# SPDX-License-Identifier: Apache-2.0
"""A step's ragged batch, as the device sees it."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm.sampling_params import SamplingParams
from vllm.v1.core.sched.output import NewRequestData

from tpu_inference.layers.common.sampling_processors import HAS_BIAS, MASKS_STOPS
from tpu_inference.runner.buckets import Bucket
from tpu_inference.runner.input_batch import InputBatch, sampling_sizes
from tpu_inference.runner.requests import RequestStates
from tpu_inference.runner.step_inputs import SamplingInputs, StepInputs

SLOTS, VOCAB, BLOCKS, MAX_LEN = 6, 100, 5, 64


def states_of(**requests):
    """Requests of (prompt, tokens computed, params), in slots 0, 1, …; the scheduler's own calls are in test_requests.py."""
    states = RequestStates(
        max_num_seqs=SLOTS, max_model_len=MAX_LEN, vocab_size=VOCAB, num_groups=1, max_blocks=BLOCKS, seed=0
    )
    for i, (req_id, (prompt, computed, params)) in enumerate(requests.items()):
        data = NewRequestData(
            req_id=req_id, prompt_token_ids=prompt, mm_features=[], sampling_params=SamplingParams(**params),
            pooling_params=None, block_ids=([10 * i + 1, 10 * i + 2],), num_computed_tokens=computed, lora_request=None,
        )  # fmt: skip
        states._add(data)
        assert states.slots[req_id] == i
    return states


def unpacked(batch, states, bucket):
    """The views of a packed batch."""
    sizes = {"tokens": bucket.tokens, "rows": bucket.rows, "groups": 1, "blocks": BLOCKS}
    buffer, views = StepInputs.allocate(sizes)
    buffer[:] = batch.pack(states, bucket, sizes)
    return views


def test_decodes_come_first():
    states = states_of(a=([1, 2, 3], 0, {}), b=([4], 1, {}), c=([5, 6], 0, {}), d=([7], 3, {}))
    batch = InputBatch.build(states, {"a": 3, "b": 1, "c": 2, "d": 1})
    assert batch.req_ids == ["b", "d", "a", "c"]
    assert batch.slots.tolist() == [1, 3, 0, 2]
    assert batch.num_tokens.tolist() == [1, 1, 3, 2]
    assert batch.num_computed.tolist() == [1, 3, 0, 0]
    assert (batch.num_rows, batch.total_tokens) == (4, 7)


def test_a_partial_prefill_does_not_sample():
    states = states_of(first=([1] * 10, 0, {}), middle=([1] * 10, 4, {}), last=([1] * 10, 6, {}), decode=([1], 5, {}))
    batch = InputBatch.build(states, {"first": 4, "middle": 5, "last": 4, "decode": 1})
    assert dict(zip(batch.req_ids, batch.samples.tolist(), strict=True)) == {
        "first": False, "middle": False, "last": True, "decode": True
    }  # fmt: skip


def test_pack():
    states = states_of(prefill=([11, 12, 13, 14, 15], 2, {}), decode=([21, 22], 4, {}))
    batch = InputBatch.build(states, {"prefill": 2, "decode": 1})
    inputs = unpacked(batch, states, Bucket(8, 4))
    # decode's token 4 is its third output, which only the device knows; prefill's are in the prompt.
    assert inputs.token_slots.tolist() == [1, -1, -1] + [-1] * 5
    assert inputs.token_ids[1:3].tolist() == [13, 14]
    assert inputs.positions.tolist() == [4, 2, 3] + [0] * 5
    assert inputs.query_start_loc.tolist() == [0, 1, 3, 3, 3]
    assert inputs.seq_lens.tolist() == [5, 4, 0, 0]
    assert inputs.logits_indices[:2].tolist() == [0, 2]
    assert inputs.sample_slots.tolist() == [1, SLOTS, SLOTS, SLOTS]
    assert inputs.block_tables[0, :, :2].tolist() == [[11, 12], [1, 2], [0, 0], [0, 0]]


def test_a_resumed_request_recomputes_its_outputs_from_the_host():
    states = states_of(a=([1, 2], 0, {}))
    request = states.requests["a"]
    states._release("a")
    states._occupy(request, np.array([1, 2, 50, 51]), 0, ([1],))
    batch = InputBatch.build(states, {"a": 4})
    inputs = unpacked(batch, states, Bucket(4, 1))
    assert inputs.token_ids.tolist() == [1, 2, 50, 51]
    assert inputs.token_slots.tolist() == [-1] * 4
    assert batch.samples.tolist() == [True]


@st.composite
def schedules(draw):
    """Requests part way through, and tokens scheduled for each: within the prompt, or the one token after what is computed."""
    requests, scheduled = {}, {}
    for i in range(draw(st.integers(1, SLOTS))):
        prompt = draw(st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=12))
        computed = draw(st.integers(0, 20))
        left = len(prompt) - computed
        requests[f"r{i}"] = (prompt, computed, {})
        scheduled[f"r{i}"] = draw(st.integers(1, left)) if left > 0 else 1
    chosen = draw(st.sets(st.sampled_from(sorted(scheduled)), min_size=1))
    return requests, {r: n for r, n in scheduled.items() if r in chosen}


@settings(deadline=None)
@given(schedules(), st.integers(0, 5), st.integers(0, 3))
def test_every_row_reads_its_own_request(case, more_tokens, more_rows):
    requests, scheduled = case
    states = states_of(**requests)
    batch = InputBatch.build(states, scheduled)
    bucket = Bucket(batch.total_tokens + more_tokens, batch.num_rows + more_rows)
    inputs = unpacked(batch, states, bucket)
    assert sorted(batch.req_ids) == sorted(scheduled)
    assert (np.diff(batch.num_tokens > 1) >= 0).all() if batch.num_rows > 1 else True
    for row, req_id in enumerate(batch.req_ids):
        prompt, computed, _ = requests[req_id]
        start, stop = inputs.query_start_loc[row : row + 2]
        assert stop - start == scheduled[req_id]
        positions = list(range(computed, computed + scheduled[req_id]))
        assert inputs.positions[start:stop].tolist() == positions
        for token, position in zip(range(start, stop), positions, strict=True):
            if position < len(prompt):
                assert (inputs.token_slots[token], inputs.token_ids[token]) == (-1, prompt[position])
            else:
                assert inputs.token_slots[token] == states.slots[req_id]
        assert inputs.seq_lens[row] == positions[-1] + 1
        assert inputs.logits_indices[row] == stop - 1
        samples = positions[-1] + 1 >= len(prompt)
        assert inputs.sample_slots[row] == (states.slots[req_id] if samples else SLOTS)
    padding = slice(batch.num_rows, None)
    assert not inputs.seq_lens[padding].any() and (inputs.sample_slots[padding] == SLOTS).all()
    assert (inputs.query_start_loc[batch.num_rows :] == batch.total_tokens).all()
    assert (inputs.token_slots[batch.total_tokens :] == -1).all()


@pytest.mark.parametrize(
    ("params", "computed", "needs"),
    [
        (dict(temperature=0), 3, False),
        (dict(temperature=1), 3, True),
        (dict(temperature=0, min_tokens=2, stop_token_ids=[9]), 2, True),  # samples its first output
        (dict(temperature=0, min_tokens=2, stop_token_ids=[9]), 3, True),  # its second
        (dict(temperature=0, min_tokens=2, stop_token_ids=[9]), 4, False),  # its third may stop
        (dict(temperature=0, repetition_penalty=1.1), 3, True),
        (dict(temperature=0, logit_bias={1: 1.0}), 3, True),
        (dict(temperature=0, allowed_token_ids=[1]), 3, True),
        (dict(temperature=0, logprobs=3), 3, False),
    ],
)
def test_only_batches_that_need_it_carry_sampling_parameters(params, computed, needs):
    states = states_of(a=([1, 2, 3], computed, params), b=([1], 4, dict(temperature=0)))
    assert InputBatch.build(states, {"a": 1, "b": 1}).needs_sampling_inputs(states) is needs


def test_requests_that_are_not_scheduled_do_not_count():
    states = states_of(a=([1], 3, dict(temperature=1)), b=([1], 4, dict(temperature=0)))
    assert not InputBatch.build(states, {"b": 1}).needs_sampling_inputs(states)


def test_pack_sampling():
    states = states_of(
        prefill=([1, 2, 3, 4], 0, dict(temperature=0.5, top_k=3, top_p=0.25, min_p=0.125, seed=77)),
        decode=([1, 2], 5, dict(temperature=0, min_tokens=6, stop_token_ids=[8, 9])),
        done=([1, 2], 5, dict(temperature=0, min_tokens=3, stop_token_ids=[8, 9])),
    )
    batch = InputBatch.build(states, {"prefill": 4, "decode": 1, "done": 1})
    assert batch.req_ids == ["decode", "done", "prefill"]
    buffer, inputs = SamplingInputs.allocate(sampling_sizes(5))
    buffer[:] = batch.pack_sampling(states, 5)
    assert inputs.temperature.tolist() == [0, 0, 0.5, 0, 0], "padding is greedy"
    assert inputs.top_k.tolist() == [VOCAB, VOCAB, 3, VOCAB, VOCAB]
    assert inputs.top_p.tolist() == [1, 1, 0.25, 1, 1]
    assert inputs.min_p.tolist() == [0, 0, 0.125, 0, 0]
    assert inputs.seed[2] == 77
    # The position that the sampled token will have.
    assert inputs.step[:3].tolist() == [6, 6, 4]
    assert inputs.flags.tolist() == [MASKS_STOPS, 0, 0, 0, 0]
    nowhere = states.max_num_seqs
    assert inputs.slots.tolist() == [1, 2, 0, nowhere, nowhere]
    assert inputs.forced_ids.tolist() == [-1] * 5
    for name, neutral in (("presence_penalty", 0), ("frequency_penalty", 0), ("repetition_penalty", 1)):
        assert getattr(inputs, name).tolist() == [neutral] * 5


def test_pack_penalties_biases_and_forced_tokens():
    penalties = dict(presence_penalty=0.5, frequency_penalty=-1, repetition_penalty=2)
    states = states_of(a=([1], 3, dict(temperature=0, **penalties)), b=([1], 3, dict(logit_bias={4: 1.0})))
    batch = InputBatch.build(states, {"a": 1, "b": 1})
    inputs = SamplingInputs.views(batch.pack_sampling(states, 3, {1: 42}), sampling_sizes(3))
    assert {name: getattr(inputs, name).tolist() for name in penalties} == {
        name: [value, 1 if name.startswith("repetition") else 0, 1 if name.startswith("repetition") else 0]
        for name, value in penalties.items()
    }
    assert inputs.flags.tolist() == [0, HAS_BIAS, 0]
    assert inputs.forced_ids.tolist() == [-1, 42, -1]


def test_the_randomness_of_a_request_does_not_depend_on_how_its_prompt_was_cut():
    def seed_and_step(computed, scheduled):
        states = states_of(other=([1], 1, {}), a=([1] * 8, computed, dict(seed=5)))
        batch = InputBatch.build(states, {"other": 1, "a": scheduled})
        buffer, inputs = SamplingInputs.allocate(sampling_sizes(2))
        buffer[:] = batch.pack_sampling(states, 2)
        row = batch.req_ids.index("a")
        return inputs.seed[row], inputs.step[row]

    assert seed_and_step(0, 8) == seed_and_step(5, 3) == seed_and_step(7, 1) == (5, 8)
