# SPDX-License-Identifier: Apache-2.0
"""Block tables: assigned, extended and gathered."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from tpu_inference.runner.block_table import BlockTables

GROUPS, SLOTS, BLOCKS = 2, 4, 12


def valid(tables, group, slot):
    return tables.ids[group, slot, : tables.lengths[group, slot]].tolist()


def test_append_after_assign():
    tables = BlockTables(GROUPS, SLOTS, BLOCKS)
    tables.assign(2, ([5, 6], [9]))
    tables.append(2, ([7], []))
    tables.append(2, ([], [1, 3]))
    assert valid(tables, 0, 2) == [5, 6, 7]
    assert valid(tables, 1, 2) == [9, 1, 3]
    assert not tables.lengths[:, [0, 1, 3]].any()


def test_assign_forgets_the_slots_last_request():
    tables = BlockTables(GROUPS, SLOTS, BLOCKS)
    tables.assign(1, ([5, 6, 7, 8], [4, 4, 4]))
    tables.assign(1, ([3], []))
    assert valid(tables, 0, 1) == [3]
    assert valid(tables, 1, 1) == []


def test_gather_takes_rows_in_the_order_asked_for_and_leaves_the_rest():
    tables = BlockTables(GROUPS, SLOTS, BLOCKS)
    for slot in range(SLOTS):
        tables.assign(slot, ([10 + slot] * (slot + 1), [20 + slot]))
    out = np.full((GROUPS, 3, BLOCKS), -1, np.int32)
    tables.gather(np.array([3, 0]), out)
    assert out[0, 0, :4].tolist() == [13] * 4
    assert out[0, 1, 0] == 10
    assert out[1, :2, 0].tolist() == [23, 20]
    assert (out[:, 2] == -1).all(), "rows beyond the batch are not its business"


def test_gather_of_no_slots():
    out = np.zeros((GROUPS, 2, BLOCKS), np.int32)
    BlockTables(GROUPS, SLOTS, BLOCKS).gather(np.array([], np.int32), out)
    assert not out.any()


blocks = st.lists(st.integers(1, 1000), max_size=4)
operations = st.lists(
    st.tuples(st.sampled_from(["assign", "append"]), st.integers(0, SLOTS - 1), st.tuples(blocks, blocks)), max_size=20
)


@given(operations)
def test_like_lists(operations):
    """Against one Python list a group and slot."""
    tables = BlockTables(GROUPS, SLOTS, 100)
    model = {(g, s): [] for g in range(GROUPS) for s in range(SLOTS)}
    for name, slot, ids in operations:
        getattr(tables, name)(slot, ids)
        for group in range(GROUPS):
            model[group, slot] = ids[group] if name == "assign" else model[group, slot] + ids[group]
    slots = np.arange(SLOTS)
    out = np.zeros((GROUPS, SLOTS, 100), np.int32)
    tables.gather(slots, out)
    for (group, slot), expected in model.items():
        assert valid(tables, group, slot) == expected
        assert out[group, slot, : len(expected)].tolist() == expected
