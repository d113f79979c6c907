# SPDX-License-Identifier: Apache-2.0
"""Scales of a KV cache of one byte a number: of each layer one for K and one for V, from the checkpoint where it has them, else 1."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from tpu_inference.layers.common.weights import Piece, Source, WeightSpec


@dataclass(frozen=True)
class CacheScaleSource(Source):
    """One number, which checkpoints have by several names or not at all. `name` is MODULE.k_scale or MODULE.v_scale."""

    default: float = 1.0

    @staticmethod
    def names(name: str) -> tuple[str, ...]:
        """Where checkpoints may have it, best first."""
        base, _, last = name.rpartition(".")
        places = ("", f".{last[0]}_proj", ".qkv_proj", ".attn")
        return (*(f"{base}{place}.{last}" for place in places), f"{base}.kv_scale")

    def accepts(self, shape: tuple[int, ...]) -> bool:
        return shape in ((), (1,))

    def read(self, read: Callable[..., np.ndarray], name: str, index: tuple[slice, ...]) -> np.ndarray:
        for found in self.names(name):
            try:
                return read(found).astype(np.float32).reshape(1)
            except KeyError:
                continue
        return np.full(1, self.default, np.float32)


def cache_scales(attention: str, names: tuple[str, ...] = ("k_scale", "v_scale")) -> WeightSpec:
    """float32 [len(names)] of the attention module of that name: K's and V's, or K's alone of latents."""
    pieces = tuple(Piece(1, CacheScaleSource(f"{attention}.{name}", ())) for name in names)
    return WeightSpec((len(names),), np.float32, (None,), pieces, init="ones")
