# SPDX-License-Identifier: Apache-2.0
"""Multi-head latent attention (DeepSeek): one latent a token in the cache, whose up-projections are absorbed into queries and outputs."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from tpu_inference.layers.common.attention import KVCache
from tpu_inference.layers.common.attention_metadata import AttentionMetadata
from tpu_inference.layers.common.build import BuildContext
from tpu_inference.layers.common.cache_scales import cache_scales
from tpu_inference.layers.common.heads import plan_heads
from tpu_inference.layers.common.linear import before_split
from tpu_inference.layers.common.mla import latent_attention, times_heads
from tpu_inference.layers.common.quantization import dequantized
from tpu_inference.layers.common.rope import Rotation, apply_rope
from tpu_inference.layers.common.weights import Piece, Source, WeightSpec, merge_pieces, slots
from tpu_inference.layers.jax.config import DecoderConfig
from tpu_inference.layers.jax.linear import Linear
from tpu_inference.layers.jax.norm import RMSNorm

LANES = 128
"""Outputs of products are padded to whole ones: what is quantized and is not is copied out of its stack in every step."""
INNER_EPS = 1e-6
"""Of the norms of latents: DeepSeek's own code has it so, whatever the config's rms_norm_eps."""


class LatentAttention(nnx.Module):
    """One layer's attention. Heads are divided among the devices; the low-rank projections and the latents are whole on each."""

    def __init__(self, cfg: DecoderConfig, ctx: BuildContext) -> None:
        assert cfg.mla is not None
        self.mla = mla = cfg.mla
        self.scale, self.mesh, self.accumulate_dtype = cfg.scale, ctx.mesh, ctx.accumulate_dtype
        self.layer, self.hidden, self.num_heads = cfg.names.layer, cfg.hidden_size, cfg.num_heads
        self.slots = plan_heads(cfg.num_heads, cfg.num_heads, ctx.shards).q_slots
        self._declare_down(ctx)
        # K's is that of latents and of rotated keys; V's, which checkpoints may have beside it, is read over.
        self.kv_scales = (
            nnx.Param(cache_scales(f"{self.layer}.self_attn", ("k_scale",))) if ctx.kv_cache_dtype else None
        )
        q = self._source("q_b_proj" if mla.q_rank else "q_proj", cfg.num_heads * mla.qk_dim, mla.q_rank or self.hidden)
        inner = None if mla.q_rank else "embed"
        self.q = Linear(
            ctx, (len(self.slots) * mla.qk_dim, q.shape[1]), ("heads", inner), slots(q, self.slots, mla.qk_dim)
        )
        self.k_up, self.v_up = self._up(ctx, 0, mla.nope_dim), self._up(ctx, mla.nope_dim, mla.value_dim)
        o = self._source("o_proj", self.hidden, cfg.num_heads * mla.value_dim)
        self.o = Linear(
            ctx, (self.hidden, len(self.slots) * mla.value_dim), ("embed", "heads"), slots(o, self.slots, mla.value_dim), axis=1,
            bias=self._bias("o_proj", self.hidden) if cfg.o_bias else None,
        )  # fmt: skip

    def _source(self, name: str, rows: int, columns: int) -> Source:
        return Source(f"{self.layer}.self_attn.{name}.weight", (rows, columns))

    def _bias(self, name: str, size: int) -> list[Piece]:
        return [Source(f"{self.layer}.self_attn.{name}.bias", (size,)).piece(0, size)]

    def _declare_down(self, ctx: BuildContext) -> None:
        """One product for the queries' low rank, the latent and the shared rotated key: every device needs all of them."""
        mla, biased = self.mla, self.mla.down_bias
        sizes = {"q_a_proj": mla.q_rank, "kv_a_proj_with_mqa": mla.kv_rank + mla.rope_dim}
        sizes = {name: size for name, size in sizes.items() if size}
        pieces = [self._source(name, size, self.hidden).piece(0, size) for name, size in sizes.items()]
        biases = [piece for name, size in sizes.items() for piece in self._bias(name, size)]
        rows = sum(sizes.values())
        if extra := -rows % LANES:
            pieces, biases = [*pieces, Piece(extra)], [*biases, Piece(extra)]
        self.down = Linear(ctx, (rows + extra, self.hidden), (None, "embed"), pieces, bias=biases if biased else None)
        norm = f"{self.layer}.self_attn"
        self.q_norm = RMSNorm(ctx, f"{norm}.q_a_layernorm", mla.q_rank, INNER_EPS) if mla.q_rank else None
        self.kv_norm = RMSNorm(ctx, f"{norm}.kv_a_layernorm", mla.kv_rank, INNER_EPS)

    def _up(self, ctx: BuildContext, start: int, size: int) -> nnx.Param:
        """Of each head's rows of kv_b_proj those that make its keys, or its values: [slots x size, kv_rank], never quantized on the device."""
        mla = self.mla
        each = mla.nope_dim + mla.value_dim
        source = self._source("kv_b_proj", self.num_heads * each, mla.kv_rank)
        if scheme := ctx.quantization and ctx.quantization.of_weight((source.piece(0, size),)):
            source = dequantized(source, scheme)
        pieces = [Piece(size) if head is None else source.piece(head * each + start, size) for head in self.slots]
        return nnx.Param(
            WeightSpec((len(self.slots) * size, mla.kv_rank), ctx.dtype, ("heads", None), merge_pieces(pieces))
        )

    def _by_head(self, up: nnx.Param) -> jax.Array:
        return up[...].reshape(len(self.slots), -1, self.mla.kv_rank)

    def __call__(
        self,
        x: jax.Array,
        kv_cache: KVCache,
        layer: Any,
        meta: AttentionMetadata,
        rope: Rotation,
        window: Any,
        in_stack: Any = None,
    ) -> tuple[jax.Array, KVCache]:
        """x: [T, hidden]; there are no windows; `in_stack` as `Linear` takes it."""
        mla, tokens = self.mla, x.shape[0]
        ends = (mla.q_rank, mla.q_rank + mla.kv_rank, mla.q_rank + mla.kv_rank + mla.rope_dim)
        low, latent, k_rope, _ = jnp.split(before_split(self.down(x, in_stack)), ends, axis=-1)
        low = x if self.q_norm is None else self.q_norm(low)
        q = before_split(self.q(low, in_stack)).reshape(tokens, len(self.slots), mla.qk_dim)
        q_nope, q_rope = q[..., : mla.nope_dim], q[..., mla.nope_dim :]
        q_rope, k_rope = (
            apply_rope(part, rope.cos, rope.sin, interleaved=mla.pairs) for part in (q_rope, k_rope[:, None])
        )
        q_latent = times_heads(q_nope, self._by_head(self.k_up), 1, self.accumulate_dtype)
        out, kv_cache = latent_attention(
            q_latent,
            q_rope,
            self.kv_norm(latent),
            k_rope[:, 0],
            kv_cache,
            layer,
            meta,
            mesh=self.mesh,
            scale=self.scale,
            kv_scale=None if self.kv_scales is None else self.kv_scales[...][0],
        )
        values = times_heads(out, self._by_head(self.v_up), 2, self.accumulate_dtype)
        return self.o(values.reshape(tokens, -1), in_stack), kv_cache
