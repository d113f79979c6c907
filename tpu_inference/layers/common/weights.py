# SPDX-License-Identifier: Apache-2.0
"""A weight, declared once.

One `WeightSpec` says what the device holds (shape, dtype, logical axes), where it comes from in the
checkpoint and how it is put together. The abstract tree, shardings, dummy weights and the loader all
derive from it.

A device weight is assembled along ONE axis from `Piece`s: slices of checkpoint tensors, or zeros.
That covers padding heads, vocabulary and MLP columns, copying KV heads, fusing q, k and v into one
matrix, and taking them apart from checkpoints that store them fused.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import jax
import numpy as np

from tpu_inference.layers.common.sharding import LogicalAxes, named_sharding


@dataclass(frozen=True)
class Source:
    """A tensor of the checkpoint, or the part of one that starts at `offset` of the pieced axis."""

    name: str
    """May contain "{layer}" and "{expert}"."""
    shape: tuple[int, ...]
    """Shape of the whole tensor in the checkpoint. Of an expert's weight whose name has no "{expert}", experts come first."""
    offset: int = 0

    @property
    def beside(self) -> "tuple[Source, ...]":
        """Other tensors that are read with it."""
        return ()

    def piece(self, start: int, size: int) -> "Piece":
        """Indices start:start + size of this source, counted from its offset."""
        return Piece(size, self, self.offset + start)

    def accepts(self, shape: tuple[int, ...]) -> bool:
        """Whether a checkpoint's tensor of that shape is this one."""
        return shape == self.shape

    def read(self, read: Callable[..., np.ndarray], name: str, index: tuple[slice, ...]) -> np.ndarray:
        """The part `index` of what the device holds of it; `read(name, index)` reads of the checkpoint's tensor of that name."""
        return read(name, index)


@dataclass(frozen=True)
class TransposedSource(Source):
    """A matrix that the checkpoint stores as [in, out]."""

    def read(self, read: Callable[..., np.ndarray], name: str, index: tuple[slice, ...]) -> np.ndarray:
        rows, columns = index
        return read(name, (columns, rows)).T


@dataclass(frozen=True)
class Piece:
    """`size` indices of the assembled axis: a slice of a checkpoint tensor, or zeros."""

    size: int
    source: Source | None = None
    start: int = 0


@dataclass(frozen=True)
class WeightSpec:
    """One array on the device and how it is made. See the module docstring."""

    shape: tuple[int, ...]
    """Physical shape of one layer's weight in the checkpoint's orientation (out, in)."""
    dtype: Any
    axes: tuple[str | None, ...]
    """Logical axis of each dimension of `shape`."""
    pieces: tuple[Piece, ...]
    axis: int = 0
    """The dimension the pieces are laid along; the others equal the checkpoint's."""
    layers: int | None = None
    """Layers stacked in front, for scanned layers; the source names then contain "{layer}"."""
    layer: int | None = None
    """The one layer this is, for looped layers."""
    first_layer: int = 0
    """Which of the model's layers is the first of those stacked."""
    experts: int | None = None
    """Experts stacked in front of `shape`, behind the layers; `shape`, `axes` and `axis` are of one expert's weight."""
    spare_experts: int = 0
    """Of `experts`, the last ones, which no checkpoint has and no token goes to: zeros."""
    experts_axis: str | None = None
    """Logical axis of that dimension."""
    init: Literal["normal", "zeros", "ones", "scales", "zero_points", "int4", "e2m1"] = field(default="normal")
    """Dummy value: N(0, 0.02), or whole numbers where the dtype has no others; a constant, which for scales is one that makes 0.02 of those; codes
    of four bits, two a byte."""

    def __post_init__(self) -> None:
        total = sum(piece.size for piece in self.pieces)
        assert total == self.shape[self.axis], (total, self.shape, self.axis)

    @property
    def device_shape(self) -> tuple[int, ...]:
        return tuple(n for n in (self.layers, self.experts) if n is not None) + self.shape

    @property
    def device_axes(self) -> LogicalAxes:
        layers = () if self.layers is None else ("layers",)
        experts = () if self.experts is None else (self.experts_axis,)
        return layers + experts + self.axes

    @property
    def layer_indices(self) -> Sequence[int | None]:
        """The layers whose checkpoint tensors this array holds; [None] for a weight of no layer."""
        return [self.layer] if self.layers is None else range(self.first_layer, self.first_layer + self.layers)

    @property
    def expert_indices(self) -> Sequence[int | None]:
        """The experts whose checkpoint tensors this array holds; [None] for a weight of no expert."""
        return [None] if self.experts is None else range(self.experts - self.spare_experts)

    def sources(self) -> dict[str, Source]:
        """By name template, every tensor of the checkpoint that this weight reads."""
        found = [p.source for p in self.pieces if p.source is not None]
        return {source.name: source for first in found for source in (first, *first.beside)}

    def abstract(self, mesh: jax.sharding.Mesh) -> jax.ShapeDtypeStruct:
        """Shape, dtype and sharding of the array on the device."""
        sharding = named_sharding(mesh, self.device_axes)
        return jax.ShapeDtypeStruct(self.device_shape, self.dtype, sharding=sharding)

    def stacked(self, layers: int, first: int = 0) -> "WeightSpec":
        return replace(self, layers=layers, first_layer=first)

    def of_layer(self, layer: int) -> "WeightSpec":
        return replace(self, layer=layer)


def merge_pieces(pieces: Sequence[Piece]) -> tuple[Piece, ...]:
    """The same pieces with neighbours joined where they continue each other: fewer, larger reads."""
    merged: list[Piece] = []
    for piece in pieces:
        if piece.size == 0:
            continue
        last = merged[-1] if merged else None
        continues = (
            last is not None
            and last.source == piece.source
            and (piece.source is None or last.start + last.size == piece.start)
        )
        if continues:
            merged[-1] = replace(last, size=last.size + piece.size)
        else:
            merged.append(piece)
    return tuple(merged)


def padded(source: Source, size: int, to: int) -> tuple[Piece, ...]:
    """`size` indices of `source`, then zeros up to `to`."""
    return merge_pieces([source.piece(0, size), Piece(to - size)])


def slots(source: Source, heads: Sequence[int | None], head_dim: int) -> tuple[Piece, ...]:
    """One block of `head_dim` indices for every entry of `heads`, zeros for None."""
    return merge_pieces([Piece(head_dim) if h is None else source.piece(h * head_dim, head_dim) for h in heads])


def map_specs(fn: Callable[[WeightSpec], Any], tree: Any) -> Any:
    """`tree` with every WeightSpec leaf replaced by `fn(spec)`."""
    return jax.tree.map(fn, tree, is_leaf=lambda leaf: isinstance(leaf, WeightSpec))


def leaves(tree: Any) -> list[WeightSpec]:
    """All specs of a tree."""
    return jax.tree.leaves(tree, is_leaf=lambda leaf: isinstance(leaf, WeightSpec))
