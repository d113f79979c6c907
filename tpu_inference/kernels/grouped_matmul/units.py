# SPDX-License-Identifier: Apache-2.0
"""The list of (group, block of rows) pairs that have rows in common: what the kernel walks."""

from typing import Any

import jax.numpy as jnp


def num_units(num_groups: int, num_blocks: int) -> int:
    """The most pairs that there may be: every group begins one, and so does every block but the first."""
    return num_groups + num_blocks - 1


def units(group_sizes: Any, num_blocks: int, block_rows: int, xp: Any = jnp) -> tuple[Any, Any, Any, Any]:
    """In order of groups; `xp` is jnp or np.

    Returns:
        int32: groups [U] and blocks [U] of the pairs, of which those after the last are the last one again; the first row of each group, and
        where the last one ends [E + 1]; the number of pairs [1].
    """
    sizes = xp.asarray(group_sizes, xp.int32)
    ends = xp.cumsum(sizes).astype(xp.int32)
    starts = ends - sizes
    first = starts // block_rows
    counts = xp.where(sizes > 0, (ends - 1) // block_rows - first + 1, 0)
    until = xp.cumsum(counts).astype(xp.int32)
    total = until[-1:]
    unit = xp.minimum(xp.arange(num_units(len(sizes), num_blocks), dtype=xp.int32), xp.maximum(total - 1, 0))
    group = (until[None] <= unit[:, None]).sum(1).astype(xp.int32)
    group = xp.minimum(group, len(sizes) - 1)  # where there are no rows at all
    one_hot = group[:, None] == xp.arange(len(sizes), dtype=xp.int32)[None]
    # A look-up by comparison: gathers of scalars are slow on TPU.
    offset = xp.where(one_hot, (first - (until - counts))[None], 0).sum(1)
    block = xp.clip(offset + unit, 0, num_blocks - 1).astype(xp.int32)
    return group, block, xp.concatenate([starts, ends[-1:]]).astype(xp.int32), total.astype(xp.int32)
