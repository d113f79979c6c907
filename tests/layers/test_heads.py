# SPDX-License-Identifier: Apache-2.0
"""The layout of attention heads over any number of shards."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tpu_inference.layers.common.heads import plan_heads

KV_HEADS, GROUPS, SHARDS = st.integers(1, 40), st.integers(1, 40), st.integers(1, 32)


@given(KV_HEADS, GROUPS, SHARDS)
def test_every_query_head_is_once_and_finds_its_kv_head(kv_heads, group, shards):
    plan = plan_heads(kv_heads * group, kv_heads, shards)
    assert sorted(q for q in plan.q_slots if q is not None) == list(range(kv_heads * group))
    for slot, query in enumerate(plan.q_slots):
        if query is not None:
            assert plan.kv_slots[slot // plan.queries_per_slot] == query // group


@given(KV_HEADS, GROUPS, SHARDS)
def test_slots_divide_among_the_shards(kv_heads, group, shards):
    plan = plan_heads(kv_heads * group, kv_heads, shards)
    assert plan.num_kv_slots % shards == 0
    assert plan.num_q_slots == plan.num_kv_slots * plan.queries_per_slot
    # A shard's queries use the shard's KV slots.
    q_per, kv_per = plan.num_q_slots // shards, plan.num_kv_slots // shards
    for slot in range(plan.num_q_slots):
        assert slot // q_per == (slot // plan.queries_per_slot) // kv_per


@given(KV_HEADS, GROUPS, SHARDS)
def test_no_kv_slot_more_than_needed(kv_heads, group, shards):
    """The fewest that divide among the shards: a KV head has a copy only where a shard would be left without."""
    plan = plan_heads(kv_heads * group, kv_heads, shards)
    assert {head for head in plan.kv_slots if head is not None} == set(range(kv_heads))
    assert plan.num_kv_slots == -(-kv_heads // shards) * shards
    # Among plans of that many KV slots, none has fewer query slots.
    copies = plan.num_kv_slots // kv_heads
    assert plan.queries_per_slot == -(-group // copies)


@given(st.integers(1, 8), GROUPS, st.integers(1, 8))
def test_nothing_is_padded_where_it_divides(per_shard, group, shards):
    plan = plan_heads(per_shard * shards * group, per_shard * shards, shards)
    assert plan.kv_slots == tuple(range(per_shard * shards))
    assert plan.q_slots == tuple(range(per_shard * shards * group))


@pytest.mark.parametrize(
    ("heads", "kv_heads", "shards", "kv_slots", "q_slots"),
    [
        (32, 8, 4, 8, 32),  # Llama 3 8B
        (32, 8, 16, 16, 32),  # each KV head twice
        (14, 2, 4, 4, 16),  # Qwen2.5 0.5B: 7 queries a KV head, on 2 copies of 4
        (4, 1, 8, 8, 8),  # Gemma 3 1B: more shards than heads
        (28, 4, 8, 8, 32),  # Qwen2.5 7B
        (3, 3, 2, 4, 4),
    ],
)
def test_models(heads, kv_heads, shards, kv_slots, q_slots):
    plan = plan_heads(heads, kv_heads, shards)
    assert (plan.num_kv_slots, plan.num_q_slots) == (kv_slots, q_slots)


@pytest.mark.parametrize(("heads", "kv_heads", "shards"), [(7, 2, 1), (2, 4, 1), (0, 1, 1), (4, 0, 1), (4, 2, 0)])
def test_impossible_counts_are_refused(heads, kv_heads, shards):
    with pytest.raises(
        ValueError, match=f"num_attention_heads={heads} .*num_key_value_heads={kv_heads}, and shards={shards}"
    ):
        plan_heads(heads, kv_heads, shards)
