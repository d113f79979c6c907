# SPDX-License-Identifier: Apache-2.0
"""A decoder: embedding, layers that repeat by scan or by loop, final norm, logits."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from tpu_inference.layers.common.attention import KVCache
from tpu_inference.layers.common.attention_metadata import AttentionMetadata, in_chunks
from tpu_inference.layers.common.build import BuildContext
from tpu_inference.layers.common.linear import matmul
from tpu_inference.layers.common.rope import rotations
from tpu_inference.layers.common.weights import Source, WeightSpec, map_specs, padded
from tpu_inference.layers.jax.attention import Attention
from tpu_inference.layers.jax.config import DecoderConfig
from tpu_inference.layers.jax.linear import StackParam
from tpu_inference.layers.jax.mla import LatentAttention
from tpu_inference.layers.jax.mlp import GatedMLP
from tpu_inference.layers.jax.moe import MoE
from tpu_inference.layers.jax.norm import RMSNorm


class DecoderLayer(nnx.Module):
    """Attention and MLP (or experts), each with a norm before and, where the family has one, a norm after."""

    def __init__(self, cfg: DecoderConfig, ctx: BuildContext, *, moe: bool = False) -> None:
        def norms(names: tuple[str, ...]) -> nnx.List:
            return nnx.List(
                RMSNorm(ctx, f"{cfg.names.layer}.{name}", cfg.hidden_size, cfg.eps, cfg.norm_offset) for name in names
            )

        self.attention_norms, self.mlp_norms = norms(cfg.names.attention_norms), norms(cfg.names.mlp_norms)
        self.attention = LatentAttention(cfg, ctx) if cfg.mla else Attention(cfg, ctx)
        self.mlp = MoE(cfg, ctx) if moe else GatedMLP(cfg, ctx)

    def __call__(self, x: jax.Array, kv_cache: KVCache, layer, meta: AttentionMetadata, rope, window, in_stack=None):
        """Returns (x, kv_cache). `layer`: of the model; `in_stack`: of those whose weights are stacked, None where none are."""
        before, *after = self.attention_norms
        y, kv_cache = self.attention(before(x), kv_cache, layer, meta, rope, window, in_stack)
        for norm in after:
            y = norm(y)
        x = x + y
        before, *after = self.mlp_norms
        y = self.mlp(before(x), in_stack)
        for norm in after:
            y = norm(y)
        return x + y, kv_cache


def _with_specs(module: nnx.Module, fn) -> Any:
    graphdef, state = nnx.split(module)
    return nnx.merge(graphdef, map_specs(fn, state))


def _one_of(trees: Sequence[Any]) -> Callable[[jax.Array], Any]:
    """`trees[index]`, of trees of equal shapes, for a traced index."""
    if len(trees) == 1:
        return lambda index: trees[0]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)
    return lambda index: jax.tree.map(lambda leaf: leaf[index], stacked)


class Decoder(nnx.Module):
    """A causal language model. Built abstract: its parameters are `WeightSpec`s until arrays are merged in."""

    def __init__(self, cfg: DecoderConfig, ctx: BuildContext) -> None:
        self.cfg = cfg
        self.dtype, self.accumulate_dtype = ctx.dtype, ctx.accumulate_dtype
        self.kv_cache_dtype = ctx.kv_cache_dtype or ctx.dtype
        self.embed = nnx.Param(self._vocab_spec(cfg.names.embed, ctx))
        self.scans = ctx.scans
        self.layers = nnx.List(layers for run in cfg.runs() for layers in self._of_run(run, ctx))
        self.norm = RMSNorm(ctx, cfg.names.norm, cfg.hidden_size, cfg.eps, cfg.norm_offset)
        self.lm_head = None if cfg.tie_embeddings else nnx.Param(self._vocab_spec(cfg.names.lm_head, ctx))

    def _of_run(self, run: range, ctx: BuildContext) -> list[DecoderLayer]:
        """The layers of `run`, or one whose weights are all of theirs, stacked."""
        layer = DecoderLayer(self.cfg, ctx, moe=bool(self.cfg.moe_of_layer) and self.cfg.moe_of_layer[run.start])
        if self.scans:
            return [_with_specs(layer, lambda spec: spec.stacked(len(run), run.start))]
        return [_with_specs(layer, lambda spec, i=i: spec.of_layer(i)) for i in run]

    def _vocab_spec(self, name: str, ctx: BuildContext) -> WeightSpec:
        size, width = self.cfg.vocab_size, self.cfg.hidden_size
        rows = -(-size // ctx.shards) * ctx.shards
        source = Source(f"{name}.weight", (size, width))
        return WeightSpec((rows, width), ctx.dtype, ("vocab", "embed"), padded(source, size, rows))

    def __call__(self, token_ids: jax.Array, kv_cache: KVCache, meta: AttentionMetadata) -> tuple[jax.Array, KVCache]:
        """Token ids [T] -> (hidden states [T, hidden] after the last norm, kv_cache)."""
        x = self.embed[...][token_ids]
        if self.cfg.embed_scale != 1.0:
            x = x * jnp.asarray(self.cfg.embed_scale, x.dtype)
        ropes = rotations(self.cfg.ropes, meta.positions)
        metas = (meta,) if self.cfg.chunk is None else in_chunks(meta, self.cfg.chunk, kv_cache.pages[0].shape[3])
        x, kv_cache = (self._scan if self.scans else self._loop)(x, kv_cache, metas, ropes)
        return self.norm(x), kv_cache

    def _meta_of_layer(self, layer: int) -> int:
        """Index into the metadata: those of attention within chunks come second."""
        return int(bool(self.cfg.chunk_of_layer and self.cfg.chunk_of_layer[layer]))

    def _loop(self, x, kv_cache, metas, ropes):
        cfg = self.cfg
        for i, layer in enumerate(self.layers):
            meta, rope = metas[self._meta_of_layer(i)], ropes[cfg.rope_of_layer[i]]
            x, kv_cache = layer(x, kv_cache, i, meta, rope, cfg.window_of_layer[i])
        return x, kv_cache

    def _scan(self, x, kv_cache, metas, ropes):
        for run, stacked in zip(self.cfg.runs(), self.layers, strict=True):
            x, kv_cache = self._scan_run(run, stacked, x, kv_cache, metas, ropes)
        return x, kv_cache

    def _scan_run(self, run: range, stacked: DecoderLayer, x, kv_cache, metas, ropes):
        window_of_layer = [self.cfg.window_of_layer[i] for i in run]
        graphdef, stacks, state = nnx.split(stacked, StackParam, ...)
        # What all layers share stays a Python value, so that the op can leave its masks out.
        shared = set(window_of_layer)
        windows = jnp.asarray([w or -1 for w in window_of_layer], jnp.int32)
        kinds = [(self.cfg.rope_of_layer[i], self._meta_of_layer(i)) for i in run]
        rope_of_layer, meta_of_layer = (jnp.asarray(indices, jnp.int32) for indices in zip(*kinds, strict=True))
        rope_at, meta_at = _one_of(ropes), _one_of(metas)

        def body(carry, per_layer):
            x, kv_cache = carry
            state, layer, window, rope, meta = per_layer
            window = window if len(shared) > 1 else window_of_layer[0]
            module = nnx.merge(graphdef, stacks, state)
            return module(x, kv_cache, layer, meta_at(meta), rope_at(rope), window, layer - run.start), None

        layers = jnp.arange(run.start, run.stop, dtype=jnp.int32)
        return jax.lax.scan(body, (x, kv_cache), (state, layers, windows, rope_of_layer, meta_of_layer))[0]

    def logits(self, hidden: jax.Array) -> jax.Array:
        """float32 [N, vocab_size] of hidden states [N, hidden]."""
        weight = self.embed if self.lm_head is None else self.lm_head
        logits = matmul(hidden, weight[...], self.accumulate_dtype)[:, : self.cfg.vocab_size].astype(jnp.float32)
        cap = self.cfg.logits_soft_cap
        return logits if cap is None else cap * jnp.tanh(logits / cap)


def forward(graphdef, params, kv_cache: KVCache, token_ids: jax.Array, meta: AttentionMetadata):
    """`Decoder.__call__` as a pure function. Returns (hidden, kv_cache)."""
    return nnx.merge(graphdef, params)(token_ids, kv_cache, meta)


def logits(graphdef, params, hidden: jax.Array) -> jax.Array:
    """`Decoder.logits` as a pure function."""
    return nnx.merge(graphdef, params).logits(hidden)


def pure_functions(module: Decoder):
    """(specs, forward, logits): the tree of `WeightSpec`s, and the two functions of arrays in its place."""
    graphdef, specs = nnx.split(module)
    return specs, partial(forward, graphdef), partial(logits, graphdef)
