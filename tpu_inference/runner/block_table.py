# SPDX-License-Identifier: Apache-2.0
"""Block tables: which KV cache blocks each slot owns, per KV cache group."""

from collections.abc import Sequence

import numpy as np


class BlockTables:
    """int32 [groups, slots, blocks] of block ids, with the number of valid ones; 0 is vLLM's null block."""

    def __init__(self, num_groups: int, num_slots: int, max_blocks: int) -> None:
        self.ids = np.zeros((num_groups, num_slots, max_blocks), np.int32)
        self.lengths = np.zeros((num_groups, num_slots), np.int32)

    def assign(self, slot: int, block_ids: Sequence[Sequence[int]]) -> None:
        """Replace the blocks of `slot` (a new or resumed request)."""
        self.lengths[:, slot] = 0
        self.append(slot, block_ids)

    def append(self, slot: int, block_ids: Sequence[Sequence[int]]) -> None:
        """Add blocks that the scheduler allocated to `slot`, one list per group."""
        for group, new in enumerate(block_ids):
            if new:
                start = self.lengths[group, slot]
                self.ids[group, slot, start : start + len(new)] = new
                self.lengths[group, slot] = start + len(new)

    def gather(self, slots: np.ndarray, out: np.ndarray) -> None:
        """Copy the tables of `slots` into the leading rows of `out` [groups, rows, blocks], as far as any is filled."""
        width = int(self.lengths[:, slots].max(initial=0))
        out[:, : len(slots), :width] = self.ids[:, slots, :width]
