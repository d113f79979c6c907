# SPDX-License-Identifier: Apache-2.0
"""Shapes drawn at random, as models and servers might have them."""

import random
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from tpu_inference.kernels.flash_attention.shapes import Spec
from tpu_inference.kernels.grouped_matmul.shapes import GroupedShape
from tpu_inference.kernels.mla.shapes import LatentShape
from tpu_inference.kernels.quantized_matmul.shapes import drawn
from tpu_inference.kernels.ragged_paged_attention.shapes import AttentionShape
from tpu_inference.tools.kernel_report.cases import device_of

Drawn = tuple[str, Any]


def _layer(draw: random.Random) -> dict[str, Any]:
    kv_heads = draw.choice((1, 1, 2, 4, 8))
    return dict(
        num_kv_heads=kv_heads,
        num_heads=kv_heads * draw.choice((1, 2, 3, 4, 5, 7, 8)),
        head_dim=draw.choice((64, 80, 96, 128, 128, 192, 256)),
        page_size=draw.choice((16, 32, 64, 128, 256)),
        cache_dtype=draw.choice(("bfloat16", "bfloat16", "float8_e4m3fn", "int8")),
    )


def _paged(draw: random.Random, index: int) -> Drawn:
    """Two of decodes, then a prompt."""
    layer = _layer(draw)
    if index % 3 == 2:
        tokens, before = draw.choice((256, 512, 1024)), draw.choice((0, 0, 1024))
        rows, what = ((before, tokens),), f"prompt of {tokens}" + f" after {before}" * bool(before)
    else:
        count, context = draw.choice((16, 32, 64, 128)), draw.choice((500, 1000, 2000, 4000))
        rows, what = ((context - 1, 1),) * count, f"{count} decodes at {context}"
    about = (
        f"{what}, {layer['num_heads']} heads on {layer['num_kv_heads']} of {layer['head_dim']}, "
        f"pages of {layer['page_size']} {layer['cache_dtype']}"
    )
    return about, AttentionShape(about, rows, **layer)


def _flash(draw: random.Random, index: int) -> Drawn:
    kv_heads = draw.choice((2, 4, 8))
    spec = Spec(
        batch=draw.choice((1, 2)),
        heads=kv_heads * draw.choice((1, 2, 4)),
        tokens=draw.choice((300, 577, 784, 1024, 1500, 2048, 4096)),
        head_dim=draw.choice((64, 72, 80, 96, 128, 256)),
        kv_heads=kv_heads,
        causal=draw.random() < 0.5,
        sliding_window=draw.choice((None, None, 512)),
    )
    return spec.about, spec


def _latent(draw: random.Random, index: int) -> Drawn:
    """Two of decodes, then a prompt."""
    heads, page = draw.choice((8, 16, 32, 64, 128)), draw.choice((64, 128, 256))
    cache = draw.choice(("bfloat16", "float8_e4m3fn"))
    if index % 3 == 2:
        tokens = draw.choice((256, 512, 1024))
        rows, what = ((0, tokens),), f"prompt of {tokens}"
    else:
        count, context = draw.choice((16, 32, 64)), draw.choice((500, 1000, 2000, 4000))
        rows, what = ((context - 1, 1),) * count, f"{count} decodes at {context}"
    about = f"{what}, {heads} heads, pages of {page} {cache}"
    return about, LatentShape(about, rows, heads, page_size=page, cache_dtype=cache)


def _grouped(draw: random.Random, index: int) -> Drawn:
    del index
    experts, top_k = draw.choice(((8, 2), (64, 6), (128, 4), (128, 8), (256, 8)))
    local = max(experts // draw.choice((1, 4, 16)), 1)
    columns, out = 128 * draw.randint(4, 48), 128 * draw.randint(4, 48)
    weights, scales = draw.choice((("bfloat16", None), ("float8_e4m3fn", (128, 128)), ("int8", (1, 0))))
    tokens = draw.choice((16, 64, 256))
    about = f"{tokens} tokens to {top_k} of {experts} experts, {local} here, {out} x {columns} of {weights}"
    return about, GroupedShape(about, tokens, top_k, experts, local, out, columns, weight_dtype=weights, scales=scales)


def _quantized(draw: random.Random, index: int) -> Drawn:
    del index
    spec = drawn(draw)
    return spec.about, spec


DRAW: Mapping[str, Callable[[random.Random, int], Drawn]] = {
    "ragged_paged_attention": _paged,
    "flash_attention": _flash,
    "grouped_matmul": _grouped,
    "mla": _latent,
    "quantized_matmul": _quantized,
}


CONTEXTS = (1024, 4096)


def with_other_contexts(shapes: Mapping[str, Any]) -> dict[str, Any]:
    """Decoding shapes of a layer, and the same at the `CONTEXTS` that none of them has.

    A table knows no contexts: items as long as one of 4096 tokens would make those of 1024 pay for it.
    """
    found = dict(shapes)
    name, shape = next(iter(shapes.items()))
    for context in CONTEXTS:
        if not any(max(other.lengths) == context for other in shapes.values()):
            # One row at the longest: the block tables of a server are as wide as the longest request.
            longest = max(*CONTEXTS, *shape.lengths)
            rows = (*(((context - 1, 1),) * (len(shape.rows) - 1)), (longest - 1, 1))
            found[f"{name} at {context}"] = replace(shape, rows=rows)
    return found


def draw(op: str, chip: str, count: int, seed: int, known: set[str]) -> dict[str, Any]:
    """`count` shapes that the kernels serve, by what they are; none whose key is one of `known`."""
    source, found, device = random.Random(seed), {}, device_of(chip)
    while len(found) < count:
        name, shape = DRAW[op](source, len(found))
        if name not in found and shape.form(device) == "pallas" and str(shape.key(device)) not in known:
            found[name] = shape
    return found
