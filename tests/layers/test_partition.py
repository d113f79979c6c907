# SPDX-License-Identifier: Apache-2.0
"""Rows of fused matrices over shards: products come back in the order of the matrices, and each shard computes its own."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tpu_inference.layers.common.partition import Partition


@st.composite
def partitions(draw):
    shards = draw(st.sampled_from([1, 2, 3, 4]))
    units = draw(st.lists(st.integers(1, 12), min_size=1, max_size=4))
    width = draw(st.integers(1, 5))
    return Partition(tuple(unit * width for unit in units), tuple(units), shards)


@settings(deadline=None, max_examples=30)
@given(partitions())
def test_products_are_joined_in_order(partition):
    x = np.random.default_rng(0).normal(size=(3, 7)).astype(np.float32)
    weight = np.random.default_rng(1).normal(size=(sum(partition.sizes), 7)).astype(np.float32)
    parts = [x @ weight[rows].T if len(rows := partition.rows(divided)) else None for divided in (True, False)]
    joined = partition.join(*(None if part is None else jnp.asarray(part) for part in parts))
    np.testing.assert_allclose(joined, x @ weight.T, rtol=1e-5)


@given(partitions())
def test_every_row_is_somewhere_once(partition):
    rows = np.concatenate([partition.rows(True), partition.rows(False)])
    assert sorted(rows.tolist()) == list(range(sum(partition.sizes)))


@given(partitions())
def test_an_even_split_of_the_divided_rows_gives_each_shard_its_part_of_every_matrix(partition):
    starts = np.cumsum((0, *partition.sizes))
    for shard, rows in enumerate(np.split(partition.rows(True), partition.shards)):
        expected = [
            np.arange(start + shard * size // partition.shards, start + (shard + 1) * size // partition.shards)
            for start, size, divided in zip(starts, partition.sizes, partition.divided, strict=False)
            if divided
        ]
        assert rows.tolist() == (np.concatenate(expected).tolist() if expected else [])


@pytest.mark.parametrize(
    ("sizes", "units", "shards", "plain"),
    [((6, 6), (6, 6), 1, True), ((6,), (6,), 2, True), ((6, 6), (6, 6), 2, False), ((5,), (5,), 2, False)],
)
def test_what_stays_as_it_is(sizes, units, shards, plain):
    assert Partition(sizes, units, shards).is_plain is plain
