# SPDX-License-Identifier: Apache-2.0
"""The order in which the tokens of a batch go to experts."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp


@dataclass(frozen=True)
class Dispatch:
    """T tokens with k experts each are M = T k rows, which are sorted by expert."""

    order: jax.Array
    """int32 [M]: which of the (token, choice) pairs, counted token by token, each row is."""
    token: jax.Array
    """int32 [M]: of each row."""
    expert: jax.Array
    """int32 [M]: of each row; of rows of experts elsewhere any."""
    group_sizes: jax.Array
    """int32 [E]: rows of each expert here."""
    place: jax.Array
    """int32 [T, k]: the row of each pair."""
    here: jax.Array
    """bool [T, k]: whether the expert is one of those here."""

    @classmethod
    def of(cls, ids: jax.Array, num_experts: int) -> "Dispatch":
        """ids: int32 [T, k]; those outside of [0, num_experts) are experts elsewhere, whose rows come last."""
        here = (ids >= 0) & (ids < num_experts)
        flat = jnp.where(here, ids, num_experts).reshape(-1).astype(jnp.int32)
        index = jnp.arange(flat.size, dtype=jnp.int32)
        expert, order = jax.lax.sort((flat, index), num_keys=1)
        _, place = jax.lax.sort((order, index), num_keys=1)  # scatters are slow on TPU
        sizes = (flat[:, None] == jnp.arange(num_experts, dtype=jnp.int32)[None]).sum(0, dtype=jnp.int32)
        return cls(
            order, order // ids.shape[1], jnp.minimum(expert, num_experts - 1), sizes, place.reshape(ids.shape), here
        )
