# SPDX-License-Identifier: Apache-2.0
"""The persistent state follows what the scheduler decides."""

import numpy as np
import pytest
from vllm.sampling_params import SamplingParams
from vllm.v1.core.sched.output import CachedRequestData, NewRequestData, SchedulerOutput

from tpu_inference.runner.requests import RequestStates

VOCAB = 100
MORE = dict(logit_bias={3: 1.0}, repetition_penalty=2.0)


def states(max_num_seqs=3, num_groups=1, seed=0):
    return RequestStates(
        max_num_seqs=max_num_seqs, max_model_len=32, vocab_size=VOCAB, num_groups=num_groups, max_blocks=8, seed=seed
    )


def new(req_id, prompt, blocks, computed=0, **params):
    return NewRequestData(
        req_id=req_id,
        prompt_token_ids=prompt,
        mm_features=[],
        sampling_params=SamplingParams(**params),
        pooling_params=None,
        block_ids=blocks,
        num_computed_tokens=computed,
        lora_request=None,
    )


def cached(*entries, resumed=None):
    """`entries`: (request, new blocks or None, computed tokens); `resumed`: request -> all of its tokens."""
    resumed = resumed or {}
    return CachedRequestData(
        req_ids=[entry[0] for entry in entries],
        resumed_req_ids=set(resumed),
        new_token_ids=[],
        all_token_ids=resumed,
        new_block_ids=[entry[1] for entry in entries],
        num_computed_tokens=[entry[2] for entry in entries],
        num_output_tokens=[0] * len(entries),
    )


def step(*new_requests, cached_requests=None, finished=(), preempted=None):
    return SchedulerOutput(
        scheduled_new_reqs=list(new_requests),
        scheduled_cached_reqs=cached_requests or cached(),
        num_scheduled_tokens={},
        total_num_scheduled_tokens=0,
        scheduled_spec_decode_tokens={},
        scheduled_encoder_inputs={},
        num_common_prefix_blocks=[],
        finished_req_ids=set(finished),
        free_encoder_mm_hashes=[],
        preempted_req_ids=preempted,
    )


def tokens_of(s, req_id):
    slot = s.slots[req_id]
    return s.token_ids[slot, : s.num_known[slot]].tolist()


def blocks_of(s, req_id, group=0):
    slot = s.slots[req_id]
    return s.block_tables.ids[group, slot, : s.block_tables.lengths[group, slot]].tolist()


def test_new_requests_take_slots():
    s = states(num_groups=2)
    s.apply(step(new("a", [7, 8, 9], ([1, 2], [3])), new("b", [4], ([5], [6]), computed=0)))
    assert sorted(s.slots.values()) == [0, 1]
    assert tokens_of(s, "a") == [7, 8, 9] and tokens_of(s, "b") == [4]
    assert (blocks_of(s, "a", 0), blocks_of(s, "a", 1)) == ([1, 2], [3])
    assert (blocks_of(s, "b", 0), blocks_of(s, "b", 1)) == ([5], [6])
    assert s.num_prompt[s.slots["a"]] == 3


def test_a_prefix_found_in_the_cache_counts_as_computed():
    s = states()
    s.apply(step(new("a", list(range(20)), ([1, 2],), computed=16)))
    assert s.num_computed[s.slots["a"]] == 16


def test_continued_requests_extend_their_blocks():
    s = states()
    s.apply(step(new("a", [7, 8, 9], ([1],)), new("b", [4], ([5],))))
    slots = dict(s.slots)
    s.apply(step(cached_requests=cached(("b", None, 1), ("a", ([2, 6],), 3))))
    assert s.slots == slots
    assert blocks_of(s, "a") == [1, 2, 6] and blocks_of(s, "b") == [5]
    assert s.num_computed[s.slots["a"]] == 3 and s.num_computed[s.slots["b"]] == 1
    assert tokens_of(s, "a") == [7, 8, 9], "sampled tokens are not known on the host"


def test_finished_requests_leave_and_their_slots_are_reused_clean():
    s = states(max_num_seqs=2)
    s.apply(
        step(new("a", [7] * 10, ([1, 2],), min_tokens=3, stop_token_ids=[5], logprobs=2, top_k=4, top_p=0.5, **MORE))
    )
    slot = s.slots["a"]
    s.apply(step(new("b", [1], ([4],))))
    s.apply(step(new("c", [2, 3], ([9],)), finished=["a"]))
    assert s.slots["c"] == slot
    assert "a" not in s.slots and "a" not in s.requests
    assert tokens_of(s, "c") == [2, 3] and blocks_of(s, "c") == [9]
    assert s.num_prompt[slot] == 2
    assert s.min_tokens[slot] == 0 and s.flags[slot] == 0 and s.repetition_penalty[slot] == 1
    assert s.num_logprobs[slot] == -1
    assert s.top_k[slot] == VOCAB and s.top_p[slot] == 1


def test_a_full_house_is_refilled_in_one_step():
    s = states(max_num_seqs=2)
    s.apply(step(new("a", [1], ([1],)), new("b", [2], ([2],))))
    s.apply(step(new("c", [3], ([3],)), new("d", [4], ([4],)), finished=["a", "b"]))
    assert sorted(s.slots) == ["c", "d"] and sorted(s.slots.values()) == [0, 1]


def test_preempted_requests_give_up_their_slot_and_come_back_with_all_their_tokens():
    s = states(max_num_seqs=2)
    s.apply(step(new("a", [7, 8], ([1],), seed=11, temperature=0.5), new("b", [4], ([5],))))
    s.apply(step(preempted={"a"}, cached_requests=cached(("b", None, 1))))
    assert "a" not in s.slots and "a" in s.requests
    s.apply(step(new("c", [3], ([6],)), cached_requests=cached(("b", None, 2))))
    assert len(set(s.slots.values())) == 2
    s.apply(step(finished=["c"], cached_requests=cached(("a", ([2, 3],), 0), resumed={"a": [7, 8, 50, 51, 52]})))
    slot = s.slots["a"]
    assert tokens_of(s, "a") == [7, 8, 50, 51, 52]
    assert blocks_of(s, "a") == [2, 3], "blocks of before are gone"
    assert (s.num_computed[slot], s.num_prompt[slot]) == (0, 2)
    assert s.temperature[slot] == np.float32(0.5) and s.seed[slot] == 11


def test_resumed_without_a_word_of_the_preemption():
    """vLLM names preempted requests for another runner's sake; this one must not lose a slot if it stops."""
    s = states(max_num_seqs=1)
    s.apply(step(new("a", [7, 8], ([1],))))
    s.apply(step(cached_requests=cached(("a", ([2],), 1), resumed={"a": [7, 8, 9]})))
    assert tokens_of(s, "a") == [7, 8, 9] and blocks_of(s, "a") == [2]
    s.apply(step(new("b", [1], ([3],)), finished=["a"]))
    assert s.slots == {"b": 0}


def test_finished_while_preempted():
    s = states(max_num_seqs=1)
    s.apply(step(new("a", [7], ([1],))))
    s.apply(step(preempted={"a"}))
    s.apply(step(finished=["a"]))
    assert not s.requests
    s.apply(step(new("b", [1], ([1],)), finished=["a"]))
    assert s.slots == {"b": 0}


def test_a_request_id_that_is_used_again():
    s = states(max_num_seqs=2)
    s.apply(step(new("a", [7], ([1],))))
    s.apply(step(new("a", [8, 9], ([2],)), finished=["a"]))
    assert tokens_of(s, "a") == [8, 9]
    s.apply(step(new("b", [1], ([3],))))
    assert sorted(s.slots.values()) == [0, 1]


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        ({}, dict(temperature=1, top_p=1, min_p=0, top_k=VOCAB, min_tokens=0, num_logprobs=-1)),
        (dict(temperature=0), dict(temperature=0)),
        (dict(top_k=5, top_p=0.25, min_p=0.125), dict(top_k=5, top_p=0.25, min_p=0.125)),
        (dict(top_k=-1), dict(top_k=VOCAB)),
        (dict(top_k=VOCAB + 5), dict(top_k=VOCAB)),
        (dict(logprobs=0), dict(num_logprobs=0)),
        (dict(logprobs=3), dict(num_logprobs=3)),
        (dict(logprobs=-1), dict(num_logprobs=VOCAB)),
        (dict(logprob_token_ids=[5]), dict(num_logprobs=-1)),
        (dict(presence_penalty=1, frequency_penalty=-1), dict(presence_penalty=1, frequency_penalty=-1)),
        (dict(seed=42), dict(seed=42)),
        (dict(seed=2**32 + 3), dict(seed=3)),
    ],
)
def test_sampling_parameters(params, expected):
    s = states()
    s.apply(step(new("a", [1], ([1],), **params)))
    assert {name: getattr(s, name)[s.slots["a"]] for name in expected} == expected


def test_only_who_depends_on_its_outputs_has_them_followed():
    s = states()
    asks = params_of(bad_words=[[7], [8, 9]])
    s.apply(step(new("a", [1], ([1],)), NewRequestData(**{**vars(new("b", [1, 2], ([2],))), "sampling_params": asks})))
    assert [r.follows_outputs for r in s.requests.values()] == [False, True]
    assert [r.req_id for r in s.admitted] == ["a", "b"]
    first = s.requests["b"].outputs
    s.apply(step(cached_requests=cached(("b", ([3],), 0), resumed={"b": [1, 2, 50, 51]}), preempted={"b"}))
    assert s.requests["b"].outputs == [50, 51] and s.requests["b"].outputs is not first


def params_of(bad_words):
    made = SamplingParams()
    made._bad_words_token_ids = bad_words
    return made


def test_seeds_follow_from_the_engines_seed():
    def seeds(seed):
        s = states(seed=seed)
        s.apply(step(new("a", [1], ([1],)), new("b", [1], ([2],))))
        return [s.requests[r].seed for r in "ab"]

    assert seeds(1) == seeds(1)
    assert len({*seeds(1), *seeds(2)}) == 4


def test_prompt_logprobs_are_wanted_once():
    s = states()
    s.apply(step(new("a", [1], ([1],), prompt_logprobs=0), new("b", [1], ([2],))))
    assert not s.requests["a"].prompt_logprobs_done
    assert s.requests["b"].prompt_logprobs_done
