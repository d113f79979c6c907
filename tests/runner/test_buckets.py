# SPDX-License-Identifier: Apache-2.0
"""Which shapes are compiled: every batch fits one, the smallest, and there are few."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tpu_inference.errors import TpuInferenceError
from tpu_inference.runner.buckets import (
    CPU_FIRST_TOKENS,
    CPU_GROWTH,
    PREFILL_ROWS,
    ROW_GROWTH,
    TPU_FIRST_TOKENS,
    TPU_GROWTH,
    Bucket,
    BucketPlan,
    geometric,
)


def plan_of(max_tokens, max_rows, on_tpu):
    return BucketPlan.build(max_tokens, max_rows, on_tpu=on_tpu)


@st.composite
def plans(draw):
    max_tokens, max_rows = draw(st.integers(1, 20000)), draw(st.integers(1, 2000))
    sizes = draw(st.none() | st.sets(st.integers(1, max_tokens), max_size=6))
    if sizes is not None:
        sizes = sorted(sizes | {max_tokens})
    return BucketPlan.build(max_tokens, max_rows, on_tpu=draw(st.booleans()), token_sizes=sizes)


@st.composite
def batches(draw):
    """A plan, and a batch within its budget; every row has a token."""
    plan = draw(plans())
    tokens = draw(st.integers(1, plan.token_sizes[-1]))
    return plan, tokens, draw(st.integers(1, min(tokens, plan.max_rows)))


def programs(plan):
    """`StepPrograms.cases()`: five kinds of program a row size, a row of the token tables, prompt logprobs, one forward a bucket."""
    return 5 * len(plan.row_sizes) + 2 + len(plan.buckets)


@given(batches())
def test_pick_is_the_smallest_bucket_that_holds_the_batch(case):
    plan, tokens, rows = case
    fitting = [b for b in plan.buckets if b.tokens >= tokens and b.rows >= rows]
    assert plan.pick(tokens, rows) == min(fitting)


@given(plans())
def test_buckets_stay_within_the_budget_and_cover_it(plan):
    assert max(b.tokens for b in plan.buckets) == plan.token_sizes[-1]
    assert max(plan.row_sizes) == plan.max_rows
    assert all(1 <= b.rows <= plan.max_rows for b in plan.buckets)
    assert list(plan.buckets) == sorted(plan.buckets)
    assert len(set(plan.buckets)) == len(plan.buckets)
    assert set(plan.row_sizes) == {b.rows for b in plan.buckets}


@given(plans(), st.integers(1, 50))
def test_pick_refuses_what_is_over_the_budget(plan, more):
    with pytest.raises(ValueError, match="over the budget"):
        plan.pick(plan.token_sizes[-1] + more, 1)
    with pytest.raises(ValueError, match="over the budget"):
        plan.pick(plan.token_sizes[-1], plan.max_rows + more)


@given(st.booleans(), st.integers(1, 20000), st.integers(1, 2000), st.data())
def test_padding_is_bounded_by_the_growth(on_tpu, max_tokens, max_rows, data):
    plan = plan_of(max_tokens, max_rows, on_tpu)
    first, growth = (TPU_FIRST_TOKENS, TPU_GROWTH) if on_tpu else (CPU_FIRST_TOKENS, CPU_GROWTH)
    tokens = data.draw(st.integers(1, max_tokens))
    rows = data.draw(st.integers(1, min(tokens, plan.max_rows)))
    bucket = plan.pick(tokens, rows)
    assert bucket.tokens < growth * tokens or bucket.tokens <= first
    # A batch of decodes only, where rows are what it pays for.
    decodes = plan.pick(rows, rows)
    assert decodes.rows < growth * ROW_GROWTH * rows or decodes.rows <= max(first, PREFILL_ROWS)


@pytest.mark.parametrize(("on_tpu", "mean"), [(True, 1.5), (False, 2.6)])
def test_mean_padding_of_a_server(on_tpu, mean):
    """Over all batch sizes alike, the share of padded tokens is far below the worst case."""
    plan = plan_of(2048, 256, on_tpu)
    sizes = range(1, 2049)
    ratios = [plan.pick(n, min(n, 256)).tokens / n for n in sizes]
    assert sum(ratios) / len(ratios) < mean


# vLLM's server starts with 2048 tokens of 256 requests.
@pytest.mark.parametrize(
    ("max_tokens", "max_rows", "on_tpu", "most"),
    [(2048, 256, True, 60), (2048, 256, False, 60), (8192, 1024, False, 60), (8192, 1024, True, 60)],
)
def test_few_programs_are_compiled(max_tokens, max_rows, on_tpu, most):
    assert programs(plan_of(max_tokens, max_rows, on_tpu)) <= most


@given(st.integers(1, 2**20), st.integers(1, 2**12), st.booleans())
def test_programs_grow_with_the_logarithm_of_the_budget(max_tokens, max_rows, on_tpu):
    plan = plan_of(max_tokens, max_rows, on_tpu)
    assert len(plan.token_sizes) <= max_tokens.bit_length() + 1
    assert len(plan.buckets) <= 2 * len(plan.token_sizes)
    assert len(plan.row_sizes) <= len(plan.token_sizes) + 1


def test_user_sizes_are_taken():
    plan = BucketPlan.build(100, 10, on_tpu=True, token_sizes=[4, 30, 100])
    assert plan.token_sizes == (4, 30, 100)
    assert plan.buckets == (Bucket(4, 10), Bucket(30, 8), Bucket(30, 10), Bucket(100, 8), Bucket(100, 10))
    assert plan.pick(5, 9) == Bucket(30, 10)
    assert plan.pick(5, 5) == Bucket(30, 8)


@pytest.mark.parametrize("sizes", [[0, 64], [-1, 64], [32], [128], [64, 32], [16, 16, 64], [16, 128], []])
def test_user_sizes_are_checked(sizes):
    with pytest.raises(TpuInferenceError, match=r"token_buckets=.*max_num_batched_tokens=64"):
        BucketPlan.build(64, 8, on_tpu=False, token_sizes=sizes)


def test_no_more_rows_than_tokens():
    assert BucketPlan.build(3, 256, on_tpu=True).max_rows == 3


@given(st.integers(1, 64), st.integers(2, 8), st.integers(0, 5000))
def test_geometric(first, growth, more):
    sizes = geometric(first, growth, first + more)
    assert sizes[0] == first and sizes[-1] == first + more
    assert all(a < b <= a * growth for a, b in pairwise(sizes))


def test_buckets_are_named_by_their_size():
    assert str(Bucket(64, 8)) == "64x8"


@given(batches())
def test_what_serving_starts_with_holds_any_batch(case):
    plan, tokens, rows = case
    ready = set(plan.first_needed)
    assert len(ready) <= 4
    bucket = plan.pick(tokens, rows, ready.__contains__)
    assert bucket == min(b for b in ready if b.tokens >= tokens and b.rows >= rows)


def test_a_server_starts_with_single_stream_decode_and_short_prompts():
    assert plan_of(2048, 256, False).first_needed == (Bucket(1, 1), Bucket(64, 8), Bucket(64, 64), Bucket(2048, 256))
