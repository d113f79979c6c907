# SPDX-License-Identifier: Apache-2.0
"""Self-attention: fused q, k, v with heads laid out per shard, rotary embedding, the paged op, output projection."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from tpu_inference.layers.common.attention import KVCache, attention
from tpu_inference.layers.common.attention_metadata import AttentionMetadata
from tpu_inference.layers.common.build import BuildContext
from tpu_inference.layers.common.cache_scales import cache_scales
from tpu_inference.layers.common.heads import plan_heads
from tpu_inference.layers.common.linear import before_split
from tpu_inference.layers.common.rope import Rotation, rotate
from tpu_inference.layers.common.weights import Piece, Source, WeightSpec, merge_pieces, slots
from tpu_inference.layers.jax.config import DecoderConfig
from tpu_inference.layers.jax.linear import Linear
from tpu_inference.layers.jax.norm import RMSNorm


class Attention(nnx.Module):
    """One layer's attention."""

    def __init__(self, cfg: DecoderConfig, ctx: BuildContext) -> None:
        self.cfg, self.mesh, self.shards = cfg, ctx.mesh, ctx.shards
        self.heads = plan = plan_heads(cfg.num_heads, cfg.num_kv_heads, ctx.shards)
        rows = (plan.num_q_slots + 2 * plan.num_kv_slots) * cfg.head_dim
        self.qkv = Linear(
            ctx, (rows, cfg.hidden_size), ("heads", "embed"), self._qkv_pieces(".weight", cfg.hidden_size),
            bias=self._qkv_pieces(".bias") if cfg.qkv_bias else None,
        )  # fmt: skip
        name, width = f"{cfg.names.layer}.{cfg.names.o}", cfg.num_heads * cfg.head_dim
        source = Source(f"{name}.weight", (cfg.hidden_size, width))
        bias = Source(f"{name}.bias", (cfg.hidden_size,)).piece(0, cfg.hidden_size)
        self.o = Linear(
            ctx, (cfg.hidden_size, plan.num_q_slots * cfg.head_dim), ("embed", "heads"),
            slots(source, plan.q_slots, cfg.head_dim), axis=1, bias=[bias] if cfg.o_bias else None,
        )  # fmt: skip
        sinks = slots(Source(f"{cfg.names.layer}.{cfg.names.sinks}", (cfg.num_heads,)), plan.q_slots, 1)
        spec = WeightSpec((plan.num_q_slots,), ctx.dtype, ("heads",), sinks)
        self.sinks = nnx.Param(spec) if cfg.sinks else None
        # In each projection's layer name, its last part left out: "model.layers.0.self_attn".
        module = f"{cfg.names.layer}.{cfg.names.o}".rpartition(".")[0]
        self.kv_scales = nnx.Param(cache_scales(module)) if ctx.kv_cache_dtype else None
        self.q_norm, self.k_norm = (
            RMSNorm(ctx, f"{cfg.names.layer}.{name}", cfg.head_dim, cfg.eps, cfg.norm_offset) if cfg.qk_norm else None
            for name in (cfg.names.q_norm, cfg.names.k_norm)
        )

    def _qkv_pieces(self, suffix: str, *inner: int) -> tuple[Piece, ...]:
        """Rows of shard 0's q, k and v, then those of shard 1, …, so that an even split gives each shard its heads."""
        cfg, plan = self.cfg, self.heads
        counts = (cfg.num_heads, cfg.num_kv_heads, cfg.num_kv_heads)
        names = [f"{cfg.names.layer}.{name}{suffix}" for name in cfg.names.qkv]
        sizes = [count * cfg.head_dim for count in counts]
        if len(names) == 1:
            offsets = (0, sizes[0], sizes[0] + sizes[1])
            sources = [Source(names[0], (sum(sizes), *inner), offset) for offset in offsets]
        else:
            sources = [Source(name, (size, *inner)) for name, size in zip(names, sizes, strict=True)]
        pieces: list[Piece] = []
        for shard in range(self.shards):
            for source, all_slots in zip(sources, (plan.q_slots, plan.kv_slots, plan.kv_slots), strict=True):
                per = len(all_slots) // self.shards
                pieces += slots(source, all_slots[shard * per : (shard + 1) * per], cfg.head_dim)
        return merge_pieces(pieces)

    def __call__(
        self,
        x: jax.Array,
        kv_cache: KVCache,
        layer: int | jax.Array,
        meta: AttentionMetadata,
        rope: Rotation,
        window: Any,
        in_stack: jax.Array | None = None,
    ) -> tuple[jax.Array, KVCache]:
        """x: [T, hidden]; `window` a Python int, None, or traced (<= 0: none); `in_stack` as `Linear` takes it."""
        cfg, plan, tokens = self.cfg, self.heads, x.shape[0]
        per_q, per_kv = plan.num_q_slots // self.shards, plan.num_kv_slots // self.shards
        qkv = before_split(self.qkv(x, in_stack)).reshape(tokens, self.shards, -1)
        # Cut along the lanes before heads are told apart, as in the MLP.
        ends = (per_q * cfg.head_dim, (per_q + per_kv) * cfg.head_dim)
        q, k, v = (part.reshape(tokens, -1, cfg.head_dim) for part in jnp.split(qkv, ends, axis=-1))
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rotate(q, k, rope, interleaved=cfg.interleaved_rope, eps=cfg.eps)
        out, kv_cache = attention(
            q, k, v, kv_cache, layer, meta,
            mesh=self.mesh, scale=cfg.scale, soft_cap=cfg.attention_soft_cap, sliding_window=window,
            sinks=None if self.sinks is None else self.sinks[...],
            kv_scales=None if self.kv_scales is None else self.kv_scales[...],
        )  # fmt: skip
        return self.o(out.reshape(tokens, -1), in_stack), kv_cache
