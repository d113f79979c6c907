# SPDX-License-Identifier: Apache-2.0
"""The gated MLP."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from tpu_inference.layers.common.build import BuildContext
from tpu_inference.layers.common.linear import before_split
from tpu_inference.layers.common.weights import Piece, Source, merge_pieces, padded
from tpu_inference.layers.jax.config import DecoderConfig
from tpu_inference.layers.jax.linear import Linear

ACTIVATION_FUNCTIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_pytorch_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "gelu_new": lambda x: jax.nn.gelu(x, approximate=True),
    "relu": jax.nn.relu,
}


def in_turns(sources: Sequence[Source], size: int, width: int, shards: int) -> tuple[Piece, ...]:
    """`size` rows of each of `sources`, padded to `width`: those of shard 0 from every source, then those of shard 1, …"""
    pieces: list[Piece] = []
    for start in range(0, width, per := width // shards):
        real = min(max(size - start, 0), per)
        for source in sources:
            pieces += [source.piece(start, real), Piece(per - real)]
    return merge_pieces(pieces)


class GatedMLP(nnx.Module):
    """down(act(gate(x)) * up(x)), gate and up in one product, columns padded to divide among the shards."""

    def __init__(self, cfg: DecoderConfig, ctx: BuildContext) -> None:
        self.shards, self.activation = ctx.shards, cfg.activation
        self.width = -(-cfg.intermediate_size // ctx.shards) * ctx.shards
        self.gate_up = Linear(
            ctx, (2 * self.width, cfg.hidden_size), ("mlp", "embed"),
            self._gate_up_pieces(cfg, ".weight", cfg.hidden_size),
            bias=self._gate_up_pieces(cfg, ".bias") if cfg.mlp_bias else None,
        )  # fmt: skip
        name = f"{cfg.names.layer}.{cfg.names.down}"
        source = Source(f"{name}.weight", (cfg.hidden_size, cfg.intermediate_size))
        bias = Source(f"{name}.bias", (cfg.hidden_size,)).piece(0, cfg.hidden_size)
        self.down = Linear(
            ctx, (cfg.hidden_size, self.width), ("embed", "mlp"),
            padded(source, cfg.intermediate_size, self.width), axis=1, bias=[bias] if cfg.mlp_bias else None,
        )  # fmt: skip

    def _gate_up_pieces(self, cfg: DecoderConfig, suffix: str, *inner: int) -> tuple[Piece, ...]:
        """Rows of shard 0's gate and up, then those of shard 1, …"""
        size = cfg.intermediate_size
        names = [f"{cfg.names.layer}.{name}{suffix}" for name in cfg.names.gate_up]
        if len(names) == 1:
            sources = [Source(names[0], (2 * size, *inner), offset) for offset in (0, size)]
        else:
            sources = [Source(name, (size, *inner)) for name in names]
        return in_turns(sources, size, self.width, self.shards)

    def __call__(self, x: jax.Array, in_stack: jax.Array | None = None) -> jax.Array:
        """[T, hidden] -> [T, hidden]; `in_stack` as `Linear` takes it."""
        both = before_split(self.gate_up(x, in_stack)).reshape(x.shape[0], self.shards, -1)
        # Cut along the lanes, which moves nothing on TPU; a dimension of two of its own would be laid out anew.
        gate, up = jnp.split(both, 2, axis=-1)
        gated = ACTIVATION_FUNCTIONS[self.activation](gate) * up
        return self.down(gated.reshape(x.shape[0], -1), in_stack)
