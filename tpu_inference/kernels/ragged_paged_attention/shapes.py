# SPDX-License-Identifier: Apache-2.0
"""Named shapes of the op: what it is measured on, as one device of a tensor-parallel group sees it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tpu_inference.kernels.forms import implementation_for
from tpu_inference.kernels.ragged_paged_attention.api import ragged_paged_attention
from tpu_inference.kernels.ragged_paged_attention.config import Config, ShapeKey
from tpu_inference.kernels.ragged_paged_attention.paged import NO_WINDOW
from tpu_inference.kernels.ragged_paged_attention.pages import kv_pages_shape, storage_dtype
from tpu_inference.kernels.ragged_paged_attention.pallas import misfit

SPARE_PAGES = 1000
"""In the pool beside those of the rows: XLA would place a small pool in VMEM, where no server has it."""


def _integers(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.int32)


class PagedBatch:
    """What follows from `rows`, (tokens before this step, tokens of this step) each, and `page_size`."""

    rows: tuple[tuple[int, int], ...]
    page_size: int

    @property
    def lengths(self) -> list[int]:
        return [before + new for before, new in self.rows]

    @property
    def table_width(self) -> int:
        """Pages of a row, with one to grow into."""
        return -(-max(self.lengths) // self.page_size) + 1

    @property
    def pairs(self) -> int:
        """Of a token and a key that causal attention lets it see."""
        return sum(new * before + new * (new + 1) // 2 for before, new in self.rows)

    def scalar_arguments(self) -> Mapping[str, Mapping[int, Any]]:
        """The kernels' scalar-prefetch arguments: their `name=` -> index -> values. Pages lie anywhere in the pool."""
        rows = len(self.rows)
        decodes = sum(new == 1 for _, new in self.rows)
        scalars = np.array([decodes, rows, 0, NO_WINDOW])
        tables = np.random.default_rng(0).permutation(rows * self.table_width)
        starts = np.concatenate([[0], np.cumsum([new for _, new in self.rows])])
        decode = (scalars, np.array(self.lengths), tables)
        prefill = (scalars, np.array(self.lengths), starts, tables)
        named = {"paged_decode": decode, "paged_write": prefill, "paged_prefill": prefill}
        return {name: dict(enumerate(values)) for name, values in named.items()}


@dataclass(frozen=True)
class AttentionShape(PagedBatch):
    """A batch, and the layer that it meets."""

    about: str
    rows: tuple[tuple[int, int], ...]
    """(tokens before this step, tokens of this step) of each row; rows of one token first."""
    num_heads: int
    num_kv_heads: int
    head_dim: int = 128
    page_size: int = 128
    dtype: str = "bfloat16"
    cache_dtype: str = "bfloat16"
    chips: tuple[str, ...] = ()
    """Those that the shape is of interest for; all where empty."""

    @property
    def useful_bytes(self) -> int:
        """K and V of every row's context, once."""
        return sum(self.lengths) * 2 * self.num_kv_heads * self.head_dim * jnp.dtype(self.cache_dtype).itemsize

    @property
    def useful_flops(self) -> int:
        """Of both products."""
        return 4 * self.num_heads * self.head_dim * self.pairs

    def arguments(self, device: jax.Device) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Of `function`, by position: q, k and v as projections make them, [tokens, heads x head_dim]; then those of `ragged_paged_attention`."""
        tokens, rows = sum(new for _, new in self.rows), len(self.rows)
        new = jax.ShapeDtypeStruct((tokens, self.num_kv_heads * self.head_dim), self.dtype)
        num_pages = rows * self.table_width + SPARE_PAGES
        pages = kv_pages_shape(num_pages, self.page_size, self.num_kv_heads, self.head_dim, "tpu")
        return (
            jax.ShapeDtypeStruct((tokens, self.num_heads * self.head_dim), self.dtype), new, new,
            jax.ShapeDtypeStruct(pages, storage_dtype(self.cache_dtype, device)),
            _integers(rows, self.table_width), _integers(rows), _integers(rows + 1),
        )  # fmt: skip

    donated = (3,)
    """Positions of arguments that are updated in place."""

    def function(self, device: jax.Device, config: Config | None = None) -> Callable:
        """The op as a device runs it, between projections: their arrays are not cut into heads."""
        options = dict(scale=self.head_dim**-0.5, implementation=implementation_for(device), config=config)
        op = partial(ragged_paged_attention, **options)

        def layer(q: jax.Array, k: jax.Array, v: jax.Array, *rest: jax.Array) -> tuple[jax.Array, jax.Array]:
            out, pages = op(*(x.reshape(x.shape[0], -1, self.head_dim) for x in (q, k, v)), *rest)
            return out.reshape(q.shape), pages

        return layer

    def key(self, device: jax.Device) -> ShapeKey:
        """Of tuned tables."""
        return ShapeKey.of(self.num_heads, self.head_dim, self.dtype, self.arguments(device)[3])

    def form(self, device: jax.Device) -> str:
        """The form that the device runs, and why where that is not "pallas"."""
        if (form := implementation_for(device)) != "pallas":
            return str(form)
        pages, tables = self.arguments(device)[3:5]
        reason = misfit(pages, tables)
        return str(form) if reason is None else f"xla ({reason})"

    def workload(self, device: jax.Device) -> Mapping[str, Mapping[int, Any]]:
        """As `schedule.workload` takes it."""
        if self.form(device) != "pallas":
            return {}
        return self.scalar_arguments()


def _decodes(rows: int, context: int) -> tuple[tuple[int, int], ...]:
    return ((context - 1, 1),) * rows


_TP1, _TP8 = dict(num_heads=32, num_kv_heads=8), dict(num_heads=4, num_kv_heads=1)
_MIXED = (*_decodes(63, 1024), (0, 512))
_BASE = {
    "decode_tp1_64x1k": AttentionShape("64 decodes at 1024", _decodes(64, 1024), **_TP1),
    "decode_tp8_64x1k": AttentionShape("64 decodes at 1024", _decodes(64, 1024), **_TP8),
    "decode_tp8_256x1k": AttentionShape("256 decodes at 1024", _decodes(256, 1024), **_TP8),
    "decode_tp8_256x4k": AttentionShape("256 decodes at 4096", _decodes(256, 4096), **_TP8),
    "decode_d64_tp8_64x4k": AttentionShape(
        "64 decodes at 4096, head dim 64", _decodes(64, 4096), num_heads=8, num_kv_heads=1, head_dim=64
    ),
    "decode_fp8_tp1_64x8k": AttentionShape(
        "64 decodes at 8192, fp8 cache", _decodes(64, 8192), **_TP1, cache_dtype="float8_e4m3fn"
    ),
    "prefill_tp1_2048": AttentionShape("a prompt of 2048", ((0, 2048),), **_TP1),
    "prefill_tp8_2048": AttentionShape("a prompt of 2048", ((0, 2048),), **_TP8),
    "mixed_tp1": AttentionShape("63 decodes at 1024 and a prompt of 512", _MIXED, **_TP1),
    "mixed_tp8": AttentionShape("63 decodes at 1024 and a prompt of 512", _MIXED, **_TP8),
}
SHAPES: Mapping[str, AttentionShape] = {
    **_BASE,
    # Twice the bandwidth a core: pages of 128 tokens of one KV head are too small for it.
    **{f"{name}_page256": replace(shape, page_size=256, chips=("tpu7x",)) for name, shape in _BASE.items()},
}
