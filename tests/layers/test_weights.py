# SPDX-License-Identifier: Apache-2.0
"""Declarations of weights, and how pieces are put together."""

from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import PartitionSpec

from tpu_inference.layers.common.sharding import make_mesh
from tpu_inference.layers.common.weights import (
    Piece,
    Source,
    WeightSpec,
    map_specs,
    merge_pieces,
    padded,
    slots,
)

DATA = {"a": np.arange(1, 31), "b": np.arange(101, 131)}
A, B = (Source(name, (30,)) for name in DATA)


def assemble(pieces):
    """What the loader makes of one-dimensional pieces."""
    return [
        value
        for piece in pieces
        for value in (
            [0] * piece.size
            if piece.source is None
            else DATA[piece.source.name][piece.start : piece.start + piece.size].tolist()
        )
    ]


pieces = st.lists(
    st.builds(Piece, st.integers(0, 5))
    | st.builds(
        lambda source, start, size: source.piece(start, size), st.sampled_from([A, B]), *[st.integers(0, 9)] * 2
    ),
    max_size=12,
)


@given(pieces)
def test_merging_changes_nothing_but_the_number_of_reads(pieces):
    merged = merge_pieces(pieces)
    assert assemble(merged) == assemble(pieces)
    assert all(piece.size for piece in merged)
    assert merge_pieces(merged) == merged
    for first, second in pairwise(merged):
        assert first.source != second.source or (first.source and first.start + first.size != second.start)


def test_neighbours_are_one_read():
    assert merge_pieces([A.piece(0, 3), A.piece(3, 4), Piece(1), Piece(2), B.piece(7, 1)]) == (
        A.piece(0, 7), Piece(3), B.piece(7, 1)
    )  # fmt: skip


def test_a_part_of_a_fused_tensor():
    part = Source("a", (30,), offset=10)
    assert assemble([part.piece(2, 3)]) == [13, 14, 15]


@given(st.integers(1, 30), st.integers(0, 10))
def test_padded(size, more):
    assert assemble(padded(A, size, size + more)) == DATA["a"][:size].tolist() + [0] * more


def test_slots():
    assert assemble(slots(A, [1, 1, None, 0], 2)) == [3, 4, 3, 4, 0, 0, 1, 2]
    assert len(slots(A, range(5), 6)) == 1, "heads in order are one read"


def spec_of(**changes):
    fields = dict(
        shape=(8, 6), dtype=jnp.bfloat16, axes=("mlp", "embed"), pieces=padded(Source("w.{layer}", (7, 6)), 7, 8)
    )
    return WeightSpec(**{**fields, **changes})


def test_pieces_must_fill_the_axis():
    with pytest.raises(AssertionError):
        spec_of(pieces=(Piece(7),))
    with pytest.raises(AssertionError):
        spec_of(axis=1)
    assert spec_of(axis=1, pieces=(Piece(6),)).shape == (8, 6)


def test_one_of_many_layers():
    spec = spec_of().of_layer(2)
    assert spec.device_shape == (8, 6) and list(spec.layer_indices) == [2]
    assert {name: source.shape for name, source in spec.sources().items()} == {"w.{layer}": (7, 6)}


def test_stacked_layers():
    spec = spec_of().stacked(3)
    assert spec.device_shape == (3, 8, 6) and list(spec.layer_indices) == [0, 1, 2]
    assert tuple(spec.device_axes) == ("layers", "mlp", "embed")


def test_a_weight_of_no_layer():
    assert list(spec_of().layer_indices) == [None]


def test_abstract():
    mesh = make_mesh(jax.devices(), 4)
    abstract = spec_of().stacked(3).abstract(mesh)
    assert (abstract.shape, abstract.dtype) == ((3, 8, 6), jnp.bfloat16)
    assert abstract.sharding.spec == PartitionSpec(None, "model", None)
    assert abstract.sharding.shard_shape(abstract.shape) == (3, 2, 6)


def test_map_specs_keeps_the_tree():
    tree = {"x": [spec_of(), spec_of(dtype=jnp.float32)], "y": (spec_of().stacked(3),), "z": None}
    assert map_specs(lambda spec: spec.device_shape, tree) == {"x": [(8, 6), (8, 6)], "y": ((3, 8, 6),), "z": None}
