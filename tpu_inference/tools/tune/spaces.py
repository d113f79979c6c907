# SPDX-License-Identifier: Apache-2.0
"""What there is to search: of each op the kernels that are blocked on their own, and the values that their parameters may take."""

import importlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax.numpy as jnp

from tpu_inference.kernels.collectives import config as collectives
from tpu_inference.kernels.flash_attention import config as flash
from tpu_inference.kernels.grouped_matmul import config as grouped
from tpu_inference.kernels.mla import config as mla
from tpu_inference.kernels.quantized_matmul import config as quantized
from tpu_inference.kernels.ragged_paged_attention import config as paged

Axes = Mapping[str, Iterable[Any]]
POWERS = tuple(2**n for n in range(13))


@dataclass(frozen=True)
class Part:
    """A kernel of an op, or a few that share their blocks."""

    op: str
    name: str
    """As in tuned tables."""
    axes: Callable[[Any, Any], Axes]
    """(shape key, the heuristic's fields) -> parameter -> values to try, those that gain most first."""
    possible: Callable[[Any, Any], bool]
    """(shape key, fields of the part): whether the kernel takes it at all."""
    concerns: Callable[[Any], bool]
    """Whether a shape is one to measure the part on."""
    effective: Callable[[Any, Any], Any]
    """(shape, fields): what is left of it for that shape; the same for the same program."""
    read: Callable[[Any], Any] = lambda config: config
    """The part's fields of the op's config."""
    make: Callable[[Any, Any], Any] = lambda config, fields: fields
    """The op's config with those fields, and with what compiles fastest elsewhere."""

    def heuristic(self, key: Any, chip: str) -> Any:
        """The op's config by arithmetic alone."""
        return importlib.import_module(f"tpu_inference.kernels.{self.op}.config").heuristic(key, chip)


# Paged attention.

_OTHERS = paged.Config(paged.DecodeConfig(1, 3), paged.PrefillConfig(paged.MIN_BLOCK_TOKENS, 1, ahead=1))


def _decode_axes(key: paged.ShapeKey, start: Any) -> Axes:
    pages = sorted({key.pages_within(tokens) for tokens in (256, 512, 1024, 2048, 4096)})
    return {"slots": (3, 4, 5, 6, 8, 10, 12), "pages_per_item": pages, "piece": (256, 512, 1024)}


def _decode_fits(key: paged.ShapeKey, fields: paged.DecodeConfig) -> bool:
    return fields.slots * fields.pages_per_item * key.page_size * key.token_bytes <= paged.VMEM_BYTES


def _decode_of(shape: Any, fields: paged.DecodeConfig) -> paged.DecodeConfig:
    """A piece is no longer than an item, and no shorter than a page."""
    fields = fields.within(shape.table_width)
    return replace(fields, piece=min(max(fields.piece, shape.page_size), fields.pages_per_item * shape.page_size))


def _prefill_axes(key: paged.ShapeKey, start: Any) -> Axes:
    chunks = sorted({key.pages_within(tokens) for tokens in (256, 512, 1024, 2048)})
    blocks = [n for n in POWERS if paged.MIN_BLOCK_TOKENS <= n <= 1024 and 128 <= n * key.group <= 4096]
    return {"block_tokens": blocks, "pages_per_chunk": chunks, "ahead": (2, 4, 6, 8, 12), "tile": (128, 256, 512)}


# Latent attention.


def _mla_axes(key: mla.ShapeKey, start: Any) -> Axes:
    pages = sorted({key.pages_within(tokens) for tokens in (256, 512, 1024, 2048)})
    return {"pages_per_item": pages, "slots": (3, 4, 5, 6), "piece": (256, 512, 1024)}


def _mla_fits(key: mla.ShapeKey, fields: mla.DecodeConfig) -> bool:
    return fields.slots * fields.pages_per_item * key.page_size * key.token_bytes <= paged.VMEM_BYTES


def _mla_of(shape: Any, fields: mla.DecodeConfig) -> mla.DecodeConfig:
    """A piece that does not divide an item is all of it."""
    fields = fields.within(shape.table_width, shape.page_size)
    tokens = fields.pages_per_item * shape.page_size
    return replace(fields, piece=tokens if tokens % fields.piece else fields.piece)


def _mla_prefill_axes(key: mla.ShapeKey, start: Any) -> Axes:
    chunks = sorted({key.pages_within(tokens) for tokens in (256, 512, 1024, 2048)})
    return {"block_tokens": (16, 32, 64, 128), "pages_per_chunk": chunks}


# Flash attention.


def _flash_axes(key: flash.ShapeKey, start: Any) -> Axes:
    def blocks(length: int) -> list[int]:
        return sorted({flash.even(length, largest) for largest in (256, 512, 1024, 2048, 4096)})

    group = key.num_heads // key.num_kv_heads
    heads = [n for n in POWERS if key.num_heads % n == 0 and (group % n == 0 or n % group == 0) and n <= 8]
    return {
        "block_q": blocks(key.num_queries),
        "block_k": blocks(key.num_keys),
        "heads": heads,
        "ahead": (2, 4, 6, 8, 12),
    }


def _flash_fits(key: flash.ShapeKey, fields: flash.Config) -> bool:
    """A stretch of code of so many tiles that it still compiles in seconds."""
    tiles = fields.heads * -(-fields.block_q // flash.TILE) * -(-fields.block_k // flash.TILE)
    size = jnp.dtype(key.dtype).itemsize * fields.heads * (2 * fields.block_q + 2 * fields.block_k) * key.head_dim
    return tiles <= 64 and size <= paged.VMEM_BYTES


# Grouped products.


def _grouped_axes(key: grouped.ShapeKey, start: Any) -> Axes:
    """Not rows of a block: which pairs the kernel walks, and so what it is measured on, is counted in them."""
    outs = sorted({grouped.even(key.out, blocks) for blocks in (1, 2, 3, 4, 6, 8)})
    return {"block_out": outs, "slots": (2, 3, 4, 6)}


# Products with quantized weights.


def _quantized_axes(key: quantized.ShapeKey, start: quantized.Config) -> Axes:
    """Blocks about as large as the heuristic's, and one that differs by little, of which the last is cut elsewhere."""
    half = start.block_out // (2 * quantized.LANES) * quantized.LANES
    outs = (half, start.block_out + quantized.LANES, 2 * start.block_out)
    return {"block_out": [n for n in outs if quantized.LANES <= n <= key.out], "slots": (2, 3, 4, 6, 8)}


# Products over devices. What they send each other takes no time here, so that how many shares a pass has, which hides that, is not searched.


def _gather_axes(key: collectives.ShapeKey, start: Any) -> Axes:
    outs = [n for n in range(128, min(key.out, 2048) + 1, 128) if key.out % n == 0]
    return {"block_out": outs, "slots": (2, 3, 4, 8)}


def _gather_fits(key: collectives.ShapeKey, fields: collectives.GatherConfig) -> bool:
    enough = fields.slots <= key.out // fields.block_out
    return enough and key.gather_bytes(fields) <= max(collectives.VMEM_BYTES.values())


def _scatter_axes(key: collectives.ShapeKey, start: Any) -> Axes:
    rows = [n for n in range(key.rows, 0, -16) if key.rows % n == 0]
    return {"block_rows": rows, "block_out": [n for n in (256, 512, 1024) if key.out % n == 0]}


PARTS: tuple[Part, ...] = (
    Part(
        paged.OP, "decode", _decode_axes, _decode_fits,
        lambda shape: all(new == 1 for _, new in shape.rows),
        _decode_of,
        lambda config: config.decode, lambda config, fields: replace(_OTHERS, decode=fields),
    ),
    Part(
        paged.OP, "prefill", _prefill_axes, lambda key, fields: True,
        lambda shape: all(new > 1 for _, new in shape.rows),
        lambda shape, fields: fields.within(shape.table_width, sum(new for _, new in shape.rows)),
        lambda config: config.prefill, lambda config, fields: replace(_OTHERS, prefill=fields),
    ),
    Part(
        mla.OP, "decode", _mla_axes, _mla_fits,
        lambda shape: all(new == 1 for _, new in shape.rows),
        _mla_of,
        lambda config: config.decode, lambda config, fields: mla.Config(fields, _OTHERS.prefill),
    ),
    Part(
        mla.OP, "prefill", _mla_prefill_axes, lambda key, fields: True,
        lambda shape: all(new > 1 for _, new in shape.rows),
        lambda shape, fields: fields.within(shape.table_width, sum(new for _, new in shape.rows)),
        lambda config: config.prefill, lambda config, fields: mla.Config(mla.DecodeConfig(1, 3), fields),
    ),
    Part(flash.OP, flash.PART, _flash_axes, _flash_fits, lambda shape: True, lambda shape, fields: fields),
    Part(
        grouped.OP, grouped.PART, _grouped_axes,
        lambda key, fields: key.vmem_bytes(fields) <= max(grouped.VMEM_BYTES.values()),
        lambda shape: True,
        lambda shape, fields: fields.within(shape.key(), shape.rows),
    ),
    Part(
        quantized.OP, quantized.PART, _quantized_axes,
        lambda key, fields: key.vmem_bytes(fields.within(key.out)) <= quantized.MOST_VMEM_BYTES,
        lambda shape: shape.few,
        lambda shape, fields: fields.within(shape.out),
    ),
    Part(
        collectives.OP, collectives.GATHER, _gather_axes, _gather_fits,
        lambda shape: shape.part == collectives.GATHER,
        lambda shape, fields: fields,
        lambda config: config.gather,
    ),
    Part(
        collectives.OP, collectives.SCATTER, _scatter_axes,
        lambda key, fields: key.reduce_scatter_bytes(fields) <= max(collectives.VMEM_BYTES.values()),
        lambda shape: shape.part == collectives.SCATTER,
        lambda shape, fields: fields,
        lambda config: config.scatter,
    ),
)  # fmt: skip


def parts_of(op: str) -> tuple[Part, ...]:
    """Empty for an op that has nothing to tune."""
    return tuple(part for part in PARTS if part.op == op)
