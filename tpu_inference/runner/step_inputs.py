# SPDX-License-Identifier: Apache-2.0
"""What a step sends to the device, each array declared once and all of them in ONE transfer.

Fields name their dimensions (`dim("tokens")`). From that one declaration come the layout of the packed buffer, the NumPy views that the
host fills, and the arrays that the compiled program sees.
"""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

Sizes = Mapping[str, int]
_T = TypeVar("_T", bound="PackedInputs")


def dim(*dims: str, dtype: Any = np.int32) -> Any:
    """Declare a field of the given 32-bit dtype and dimension names ("rows+1" is one more than "rows")."""
    assert np.dtype(dtype).itemsize == 4, "fields share one buffer of 32-bit words"
    return dataclasses.field(metadata={"dims": dims, "dtype": np.dtype(dtype)})


def _extent(name: str, sizes: Sizes) -> int:
    base, plus, more = name.partition("+")
    return sizes[base] + (int(more) if plus else 0)


@dataclass(frozen=True)
class PackedInputs:
    """Base of declarations; subclasses are dataclasses whose fields are made by `dim`."""

    @classmethod
    def _slices(cls, sizes: Sizes) -> list[tuple[str, slice, tuple[int, ...], np.dtype]]:
        """(field, range of words, shape, dtype) of every field, in order."""
        return cls._slices_of(tuple(sizes.items()))

    @classmethod
    @cache
    def _slices_of(cls, items: tuple[tuple[str, int], ...]) -> list[tuple[str, slice, tuple[int, ...], np.dtype]]:
        """Kept: a server has a few sizes, and each step asks."""
        out, start, sizes = [], 0, dict(items)
        for field in dataclasses.fields(cls):
            shape = tuple(_extent(name, sizes) for name in field.metadata["dims"])
            stop = start + math.prod(shape)
            out.append((field.name, slice(start, stop), shape, field.metadata["dtype"]))
            start = stop
        return out

    @classmethod
    def abstract(cls, sizes: Sizes) -> jax.ShapeDtypeStruct:
        """Shape and dtype of the packed buffer: int32 [words]."""
        return jax.ShapeDtypeStruct((cls._slices(sizes)[-1][1].stop,), np.int32)

    @classmethod
    def allocate(cls: type[_T], sizes: Sizes) -> tuple[np.ndarray, _T]:
        """A zeroed buffer and NumPy views into it. Fresh every step: JAX may still be reading the last one."""
        buffer = np.zeros(cls.abstract(sizes).shape, np.int32)
        return buffer, cls.views(buffer, sizes)

    @classmethod
    def views(cls: type[_T], buffer: np.ndarray, sizes: Sizes) -> _T:
        """NumPy views into a packed buffer."""
        views = {name: buffer[words].view(dtype).reshape(shape) for name, words, shape, dtype in cls._slices(sizes)}
        return cls(**views)

    @classmethod
    def unpack(cls: type[_T], buffer: jax.Array, sizes: Sizes) -> _T:
        """The fields as slices of a traced buffer."""
        fields = {}
        for name, words, shape, dtype in cls._slices(sizes):
            part = buffer[words]
            if dtype != np.int32:
                part = jax.lax.bitcast_convert_type(part, jnp.dtype(dtype))
            fields[name] = part.reshape(shape)
        return cls(**fields)


@dataclass(frozen=True)
class StepInputs(PackedInputs):
    """The ragged batch of one step. Rows: requests; slots: a request's place in the persistent state; groups: KV cache groups."""

    token_ids: Any = dim("tokens")
    token_slots: Any = dim("tokens")
    """Slot whose last sampled token, which only the device knows yet, is this token; -1: use `token_ids`."""
    positions: Any = dim("tokens")
    query_start_loc: Any = dim("rows+1")
    seq_lens: Any = dim("rows")
    logits_indices: Any = dim("rows")
    """Index of the token of each row whose hidden state is sampled from."""
    sample_slots: Any = dim("rows")
    """Slot that takes the sampled token; `slots` (out of range, dropped) for rows that do not sample."""
    block_tables: Any = dim("groups", "rows", "blocks")


@dataclass(frozen=True)
class SamplingInputs(PackedInputs):
    """`RowParameters` of a batch in which any row is more than a plain argmax; what they mean is said there."""

    slots: Any = dim("rows")
    temperature: Any = dim("rows", dtype=np.float32)
    top_p: Any = dim("rows", dtype=np.float32)
    min_p: Any = dim("rows", dtype=np.float32)
    top_k: Any = dim("rows")
    seed: Any = dim("rows", dtype=np.uint32)
    step: Any = dim("rows")
    presence_penalty: Any = dim("rows", dtype=np.float32)
    frequency_penalty: Any = dim("rows", dtype=np.float32)
    repetition_penalty: Any = dim("rows", dtype=np.float32)
    flags: Any = dim("rows")
    forced_ids: Any = dim("rows")
