# SPDX-License-Identifier: Apache-2.0
"""One step's ragged batch as attention sees it."""

from dataclasses import dataclass

import jax


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class AttentionMetadata:
    """T tokens of R request rows, flattened row by row; G groups of layers that share a block table.

    Rows without tokens come last, with `seq_lens` 0 and a flat `query_start_loc`. Tokens from `query_start_loc[R]` on are padding.
    """

    positions: jax.Array
    """int32 [T]: position of each token in its request (0 for padding)."""
    query_start_loc: jax.Array
    """int32 [R + 1]: row r owns tokens query_start_loc[r]:query_start_loc[r + 1]."""
    seq_lens: jax.Array
    """int32 [R]: tokens of the request up to and including this step's."""
    block_tables: jax.Array
    """int32 [G, R, B]: ids of the KV cache blocks of each row, per KV cache group."""
