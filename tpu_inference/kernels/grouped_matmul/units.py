# SPDX-License-Identifier: Apache-2.0
"""The list of (group, block of rows) pairs that have rows in common: what the kernel walks."""

from typing import Any, NamedTuple

import jax.numpy as jnp


def num_units(num_groups: int, num_blocks: int) -> int:
    """The most pairs that there may be: every group begins one, and so does every block but the first."""
    return num_groups + num_blocks - 1


class Units(NamedTuple):
    """The kernel's scalar-prefetch arguments, int32."""

    groups: Any
    """[U]: of the pairs, in order of groups; those after the last pair are the last one again."""
    blocks: Any
    """[U]"""
    items: Any
    """[U]: how many groups with rows come before the pair's own."""
    item_groups: Any
    """[E]: the groups with rows, in order."""
    starts: Any
    """[E + 1]: the first row of each group, and where the last one ends."""
    totals: Any
    """[3]: how many pairs there are, how many groups with rows, and where the weights of the first group are."""


def units(group_sizes: Any, num_blocks: int, block_rows: int, xp: Any = jnp, first_group: Any = 0) -> Units:
    """The pairs of `num_blocks` blocks of `block_rows` rows; `xp` is jnp or np."""
    sizes = xp.asarray(group_sizes, xp.int32)
    index = xp.arange(len(sizes), dtype=xp.int32)
    ends = xp.cumsum(sizes).astype(xp.int32)
    starts = ends - sizes
    first = starts // block_rows
    counts = xp.where(sizes > 0, (ends - 1) // block_rows - first + 1, 0)
    until = xp.cumsum(counts).astype(xp.int32)
    with_rows = xp.cumsum(sizes > 0).astype(xp.int32)
    unit = xp.minimum(xp.arange(num_units(len(sizes), num_blocks), dtype=xp.int32), xp.maximum(until[-1] - 1, 0))
    group = xp.minimum(
        (until[None] <= unit[:, None]).sum(1), len(sizes) - 1
    )  # the last one where there are no rows at all
    # Look-ups by comparison: gathers of scalars are slow on TPU.
    chosen = group[:, None] == index[None]
    block = xp.where(chosen, (first - (until - counts))[None], 0).sum(1) + unit
    item = xp.where(chosen, with_rows[None] - 1, 0).sum(1)
    item_groups = xp.minimum((with_rows[None] <= index[:, None]).sum(1), len(sizes) - 1)
    return Units(
        *(
            x.astype(xp.int32)
            for x in (
                group, xp.clip(block, 0, num_blocks - 1), xp.maximum(item, 0), item_groups,
                xp.concatenate([starts, ends[-1:]]), xp.stack([until[-1], with_rows[-1], xp.asarray(first_group, until.dtype)]),
            )
        )
    )  # fmt: skip
