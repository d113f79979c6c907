# SPDX-License-Identifier: Apache-2.0
"""Rotary position embeddings. Frequencies of the scaled variants come from transformers' own functions."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tpu_inference.errors import TpuInferenceError

SERVED = ("default", "linear", "dynamic", "yarn", "llama3", "longrope")


@dataclass(frozen=True)
class Rope:
    """Frequencies of one kind of layer."""

    inv_freq: tuple[float, ...]
    """One for each pair of the rotated dimensions."""
    factor: float = 1.0
    """Scales cosine and sine (yarn, longrope)."""
    normed: bool = False
    """Whether queries and keys are divided by their root mean square afterwards (Llama 4)."""
    temperature: tuple[float, float] | None = None
    """(a, n): queries are multiplied by 1 + a log(1 + floor((position + 1) / n)) (Llama 4)."""

    def cos_sin(self, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
        """float32 [T, len(inv_freq)] each, for int32 positions [T]."""
        angles = positions[:, None].astype(jnp.float32) * jnp.asarray(np.asarray(self.inv_freq, np.float32))
        return jnp.cos(angles) * self.factor, jnp.sin(angles) * self.factor

    def query_scale(self, positions: jax.Array) -> jax.Array:
        """float32 [T]."""
        if self.temperature is None:
            return jnp.ones(len(positions), jnp.float32)
        scale, floor = self.temperature
        return jnp.log1p(jnp.floor((positions.astype(jnp.float32) + 1) / floor)) * scale + 1


class Rotation(NamedTuple):
    """A `Rope` at a step's positions."""

    cos: jax.Array
    """float32 [T, pairs]"""
    sin: jax.Array
    query_scale: jax.Array | None = None
    """float32 [T]; None where no layer's queries are scaled."""
    normed: jax.Array | None = None
    """bool scalar; None where no layer's are."""


def rotations(ropes: Sequence[Rope], positions: jax.Array) -> list[Rotation]:
    """Of each rope, alike in what is None, so that a layer's may be chosen by a traced index."""
    scaled, normed = any(rope.temperature for rope in ropes), any(rope.normed for rope in ropes)
    return [
        Rotation(
            *rope.cos_sin(positions),
            rope.query_scale(positions) if scaled else None,
            jnp.asarray(rope.normed) if normed else None,
        )
        for rope in ropes
    ]


def rotate(
    q: jax.Array, k: jax.Array, rotation: Rotation, *, interleaved: bool, eps: float
) -> tuple[jax.Array, jax.Array]:
    """q and k [T, heads, head_dim] as attention takes them."""
    q, k = (apply_rope(x, rotation.cos, rotation.sin, interleaved=interleaved) for x in (q, k))
    if rotation.normed is not None:
        q, k = (jnp.where(rotation.normed, _unit_mean_square(x, eps), x) for x in (q, k))
    if rotation.query_scale is not None:
        q = (q.astype(jnp.float32) * rotation.query_scale[:, None, None]).astype(q.dtype)
    return q, k


def _unit_mean_square(x: jax.Array, eps: float) -> jax.Array:
    x32 = x.astype(jnp.float32)
    return (x32 * jax.lax.rsqrt(jnp.square(x32).mean(-1, keepdims=True) + eps)).astype(x.dtype)


def apply_rope(x: jax.Array, cos: jax.Array, sin: jax.Array, *, interleaved: bool = False) -> jax.Array:
    """Rotate the leading 2 * cos.shape[-1] dimensions of `x` [T, heads, head_dim] in float32; halves are paired, or neighbours."""
    half = cos.shape[-1]
    wide, rest = x[..., : 2 * half].astype(jnp.float32), x[..., 2 * half :]
    if interleaved:
        is_first = jnp.arange(2 * half) % 2 == 0
        partner = jnp.where(is_first, -jnp.roll(wide, -1, axis=-1), jnp.roll(wide, 1, axis=-1))
        cos, sin = (jnp.repeat(table, 2, axis=-1)[:, None] for table in (cos, sin))
        parts = [wide * cos + partner * sin]
    else:
        cos, sin = cos[:, None], sin[:, None]
        first, second = wide[..., :half], wide[..., half:]
        parts = [first * cos - second * sin, second * cos + first * sin]
    return jnp.concatenate([*(part.astype(x.dtype) for part in parts), rest], axis=-1)


def rope_from_config(config: Any, head_dim: int, max_model_len: int, layer_type: str | None = None) -> Rope:
    """The `Rope` of a transformers config; `layer_type` where its `rope_parameters` has one entry for each.

    `dynamic` and `longrope` depend on length: the table is that of a sequence of `max_model_len` tokens, so that cached keys stay valid.

    Raises:
        TpuInferenceError: an unknown variant.
    """
    parameters = config.rope_parameters
    parameters = parameters[layer_type] if layer_type is not None else parameters
    kind = parameters.get("rope_type", "default")
    if kind not in SERVED:
        raise TpuInferenceError(f"rope_type={kind!r} is not served; served are {', '.join(SERVED)}.")
    if kind == "default":
        rotated = int(head_dim * parameters.get("partial_rotary_factor", 1.0))
        exponents = np.arange(0, rotated, 2, dtype=np.float32) / np.float32(rotated)
        return Rope(tuple(float(f) for f in 1.0 / np.float32(parameters["rope_theta"]) ** exponents))
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    inv_freq, factor = ROPE_INIT_FUNCTIONS[kind](config, "cpu", seq_len=max_model_len, layer_type=layer_type)
    return Rope(tuple(inv_freq.float().tolist()), float(factor))
