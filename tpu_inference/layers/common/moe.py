# SPDX-License-Identifier: Apache-2.0
"""A layer of experts: which of them a token goes to, and what they make of it."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from tpu_inference.errors import TpuInferenceError
from tpu_inference.kernels.forms import Implementation
from tpu_inference.kernels.grouped_matmul import grouped_matmul, implementation_for, lies_transposed
from tpu_inference.kernels.grouped_matmul.config import LANES
from tpu_inference.layers.common.expert_dispatch import Dispatch
from tpu_inference.layers.common.sharding import MODEL_AXIS, spec

_SCORES: dict[str, Callable[[jax.Array], jax.Array]] = {
    "softmax": lambda logits: jax.nn.softmax(logits, axis=-1),
    "sigmoid": jax.nn.sigmoid,
}
SCORING = tuple(_SCORES)


@dataclass(frozen=True)
class Routing:
    """How experts are chosen."""

    top_k: int
    renormalize: bool
    """Whether the weights of the chosen are made to sum to 1."""
    scoring: str = "softmax"
    groups: int = 1
    """Experts are in so many groups of neighbours, and only those of the best `top_groups` are chosen from."""
    top_groups: int = 1
    scale: float = 1.0


def route(logits: jax.Array, routing: Routing, bias: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
    """Weights float32 [T, k] and ids int32 [T, k] of each token's experts.

    Args:
        logits: [T, E].
        bias: [E], added to the scores for the choice alone (DeepSeek V3).
    """
    scores = _SCORES[routing.scoring](logits.astype(jnp.float32))
    choice = scores if bias is None else scores + bias.astype(jnp.float32)
    if routing.groups > 1:
        choice = _of_best_groups(choice, routing, by_two=bias is not None)
    _, ids = jax.lax.top_k(choice, routing.top_k)
    weights = jnp.take_along_axis(scores, ids, axis=-1)
    if routing.renormalize:
        weights = weights / weights.sum(-1, keepdims=True)
    return weights * routing.scale, ids


def _of_best_groups(choice: jax.Array, routing: Routing, *, by_two: bool) -> jax.Array:
    """-inf for experts outside of the best groups. A group is as good as its best expert, or as its two best together."""
    grouped = choice.reshape(choice.shape[0], routing.groups, -1)
    best = jax.lax.top_k(grouped, 2)[0].sum(-1) if by_two else grouped.max(-1)
    _, groups = jax.lax.top_k(best, routing.top_groups)
    chosen = jax.nn.one_hot(groups, routing.groups, dtype=jnp.bool_).any(1)
    return jnp.where(chosen[:, :, None], grouped, -jnp.inf).reshape(choice.shape)


def _halves(act: Callable[[jax.Array], jax.Array]) -> Callable[[jax.Array], jax.Array]:
    def gated(h: jax.Array) -> jax.Array:
        gate, up = jnp.split(h, 2, axis=-1)
        return act(gate) * up

    return gated


def clamped_swiglu(h: jax.Array, *, alpha: float = 1.702, limit: float = 7.0) -> jax.Array:
    """gpt-oss's: gate and up are neighbouring columns, clamped, and up is taken from 1."""
    gate, up = jnp.minimum(h[..., ::2], limit), jnp.clip(h[..., 1::2], -limit, limit)
    return gate * jax.nn.sigmoid(alpha * gate) * (up + 1)


def _relu2(x: jax.Array) -> jax.Array:
    return jnp.square(jax.nn.relu(x))


def _gelu(x: jax.Array) -> jax.Array:
    return jax.nn.gelu(x, approximate=False)


def refuse_uneven_experts(num_experts: int, devices: int) -> None:
    """Raises TpuInferenceError where `num_experts` are not divided evenly among `devices`."""
    if num_experts % devices:
        raise TpuInferenceError(
            f"--enable-expert-parallel with {num_experts} experts on {devices} devices: each device needs as many experts. "
            "Use a --tensor-parallel-size that divides them, or remove --enable-expert-parallel."
        )


def refuse_small_groups(name: str, size: int, platform: str) -> None:
    """Raises TpuInferenceError where experts' scales are of groups of `size` columns that the kernel of that platform has no product with."""
    if platform == "tpu" and size % LANES:
        raise TpuInferenceError(
            f"{name} is quantized in groups of {size} columns, and those of experts are served on TPU in {LANES} columns or a multiple: "
            "use a checkpoint with such groups, or with a scale a row."
        )


Sharding = Literal["whole", "width", "experts"]
"""How experts lie on the devices: all on each, each one's width divided, or so many experts on each."""

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": _halves(jax.nn.silu),
    "gelu": _halves(_gelu),
    "gelu_tanh": _halves(jax.nn.gelu),
    "relu2": _halves(_relu2),
    "swigluoai": clamped_swiglu,
    "silu_no_mul": jax.nn.silu,
    "gelu_no_mul": _gelu,
    "gelu_tanh_no_mul": jax.nn.gelu,
    "relu2_no_mul": _relu2,
}
"""By vLLM's names: [T, 2 width] (or [T, width] with "_no_mul") -> [T, width]."""
INTERLEAVED = ("swigluoai",)
"""Activations that find gate and up in neighbouring columns, not in halves."""


@dataclass(frozen=True)
class ExpertWeights:
    """Of E experts, as checkpoints store them: [out, in]. Each may have a dimension of layers in front; see `experts`."""

    w13: jax.Array
    """[E, 2 width, d]: gate and up (or [E, width, d] where nothing is gated); divided over shards, each has its part of both."""
    w2: jax.Array
    """[E, d, width]"""
    b13: jax.Array | None = None
    """[E, 2 width]"""
    b2: jax.Array | None = None
    """[E, d]"""
    s13: jax.Array | None = None
    """[E, 2 width, groups]: scales of quantized weights, of each row and group of columns."""
    s2: jax.Array | None = None
    """[E, d, groups]"""


def experts(
    x: jax.Array,
    weights: jax.Array,
    ids: jax.Array,
    parameters: ExpertWeights,
    *,
    activation: str,
    mesh: Mesh,
    sharding: Sharding,
    accumulate_dtype: Any,
    weigh_input: bool = False,
    layer: jax.Array | None = None,
    implementation: Implementation | None = None,
) -> jax.Array:
    """The weighted sum of what each token's experts make of it: [T, d] in x's dtype.

    Tokens are sorted by expert, so that each expert multiplies its own and no others, and experts without tokens are not read.

    Args:
        x: [T, d].
        weights, ids: [T, k], of `route`; the ids of a token differ.
        sharding: what is divided over the model axis of `mesh`. With "experts", of which there are as many on each device
            (`refuse_uneven_experts`), every device has all tokens, and computes what its own experts make of them.
        accumulate_dtype: in which devices' parts are summed.
        weigh_input: weights go on what experts take in, not on what they give out.
        layer: int32 scalar, which of the layers' experts these are; None where `parameters` are of one layer.
        implementation: of `grouped_matmul`; None for what the devices of the mesh run.
    """
    form = implementation or implementation_for(mesh.devices.flat[0])
    of_shard = partial(_of_shard, activation=activation, weigh_input=weigh_input, form=form, owns=sharding == "experts")
    held = {name: array for name, array in vars(parameters).items() if array is not None}
    if layer is None:
        held, layer = {name: array[None] for name, array in held.items()}, jnp.int32(0)
    b2 = held.pop("b2", None)
    if sharding != "whole":
        local, whole = of_shard, PartitionSpec()
        divisions = {name: _division(name, array, sharding) for name, array in held.items()}
        of_shard = jax.shard_map(
            lambda *args: jax.lax.psum(local(*args).astype(accumulate_dtype), MODEL_AXIS),
            mesh=mesh, in_specs=(whole, whole, whole, whole, divisions), out_specs=whole, check_vma=False,
        )  # fmt: skip
    out = of_shard(x, weights, ids, layer, held)
    if b2 is not None:  # once, not by every device that has a part of the product
        factors = jnp.ones_like(weights) if weigh_input else weights
        chosen = (jax.nn.one_hot(ids, b2.shape[1], dtype=jnp.float32) * factors[..., None]).sum(1)
        out = out + jnp.matmul(chosen, b2[layer].astype(jnp.float32), precision=jax.lax.Precision.HIGHEST)
    return out.astype(x.dtype)


def _division(name: str, array: jax.Array, sharding: Sharding) -> PartitionSpec:
    """Of a field of `ExpertWeights`, behind the layers."""
    if sharding == "experts":
        return spec((None, "experts"))
    if name in ("w13", "s13", "b13"):
        return spec((None, None, "mlp"))
    return PartitionSpec() if name == "s2" and array.shape[3] == 1 else spec((None, None, None, "mlp"))


def _of_shard(
    x: jax.Array,
    weights: jax.Array,
    ids: jax.Array,
    layer: jax.Array,
    held: dict[str, jax.Array],
    *,
    activation: str,
    weigh_input: bool,
    form: Implementation,
    owns: bool,
) -> jax.Array:
    """What the experts of one device add, float32 [T, d], `held` by names of `ExpertWeights`; `owns`: they are some of all, not a part of each."""
    num_experts = held["w13"].shape[1]
    if owns:
        ids = ids - jax.lax.axis_index(MODEL_AXIS) * num_experts
    dispatch = Dispatch.of(ids, num_experts)
    rows = x[dispatch.token]
    if weigh_input:
        rows = rows * weights.reshape(-1)[dispatch.order][:, None].astype(x.dtype)

    def product(x: jax.Array, name: str) -> jax.Array:
        # All layers' experts, one after the other: none are copied out.
        weights, scales = (
            None if y is None else y.reshape(-1, *y.shape[2:]) for y in (held["w" + name], held.get("s" + name))
        )
        transposed = form == "pallas" and lies_transposed(*weights.shape[1:])
        return grouped_matmul(
            x, weights.swapaxes(1, 2) if transposed else weights, dispatch.group_sizes, scales=scales,
            first_group=layer * num_experts, transposed=transposed, implementation=form,
        )  # fmt: skip

    h = product(rows, "13")
    if "b13" in held:
        h = h + held["b13"][layer, dispatch.expert]
    y = product(ACTIVATIONS[activation](h), "2")
    # By token again. Those of experts elsewhere are not numbers that anyone computed.
    y = jnp.where(dispatch.here[..., None], y[dispatch.place].astype(jnp.float32), 0)
    return y.sum(1) if weigh_input else (y * weights[..., None]).sum(1)
