# SPDX-License-Identifier: Apache-2.0
"""How attention heads are laid out so that any head counts run on any number of shards.

The device sees `num_kv_slots` KV heads with `queries_per_slot` query heads each, and both counts
divide among the shards. A KV head is copied into several slots where there are fewer KV heads than
shards; slots without a head hold zero weights, whose output meets zero columns of the output
projection and adds nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp


@dataclass(frozen=True)
class HeadPlan:
    """Physical slots for `num_heads` query and `num_kv_heads` KV heads."""

    num_heads: int
    num_kv_heads: int
    queries_per_slot: int
    """Query slots of each KV slot (G)."""
    kv_slots: tuple[int | None, ...]
    """For every KV slot the KV head it holds, None for a padding slot."""
    q_slots: tuple[int | None, ...]
    """For every query slot the query head it holds, None for padding. Slot i uses KV slot i // G."""

    @property
    def num_kv_slots(self) -> int:
        return len(self.kv_slots)

    @property
    def num_q_slots(self) -> int:
        return len(self.q_slots)


def plan_heads(num_heads: int, num_kv_heads: int, shards: int) -> HeadPlan:
    """The plan with the fewest KV slots (cache memory), then the fewest query slots (work).

    Raises ValueError unless `num_heads` is a positive multiple of `num_kv_heads` and `shards` >= 1.
    """
    if num_kv_heads < 1 or num_heads < num_kv_heads or num_heads % num_kv_heads or shards < 1:
        raise ValueError(
            f"num_attention_heads={num_heads} must be a positive multiple of "
            f"num_key_value_heads={num_kv_heads}, and shards={shards} at least 1"
        )
    group = num_heads // num_kv_heads

    def slots(queries_per_slot: int) -> int:
        copies = -(-group // queries_per_slot)
        return -(-num_kv_heads * copies // shards) * shards

    best = min(range(1, group + 1), key=lambda g: (slots(g), slots(g) * g))
    copies = -(-group // best)
    padding = slots(best) - num_kv_heads * copies
    kv_slots = [head for head in range(num_kv_heads) for _ in range(copies)] + [None] * padding
    q_slots: list[int | None] = []
    for head in range(num_kv_heads):
        queries: list[int | None] = list(range(head * group, (head + 1) * group))
        q_slots += queries + [None] * (copies * best - group)
    q_slots += [None] * (padding * best)
    return HeadPlan(num_heads, num_kv_heads, best, tuple(kv_slots), tuple(q_slots))


def take_slots(x: jax.Array, slots: Sequence[int | None]) -> jax.Array:
    """[T, heads, ...] -> [T, len(slots), ...]: the head of each slot, zeros where there is none."""
    if tuple(slots) == tuple(range(x.shape[1])):
        return x
    if None in slots:
        x = jnp.pad(x, [(0, 0), (0, 1), *[(0, 0)] * (x.ndim - 2)])
    return x[:, jnp.asarray([x.shape[1] - 1 if head is None else head for head in slots])]
