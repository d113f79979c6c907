# SPDX-License-Identifier: Apache-2.0
"""Where the parameters of vLLM's layers lie on the devices, from the types of the layers."""

from dataclasses import dataclass

import numpy as np
import torch
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    LinearBase,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
)
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

from tpu_inference.layers.common.moe import INTERLEAVED, Sharding
from tpu_inference.layers.common.partition import Partition
from tpu_inference.layers.vllm.moe import TpuExpertsMethod

DIVIDED, WHOLE = "_by_shard", "_on_each_shard"
"""Suffixes of the arrays that a parameter becomes whose rows do not stay in their order."""


@dataclass(frozen=True)
class Placement:
    """One array on the devices, made of a torch parameter."""

    name: str
    """The parameter's own, within its module, or with a suffix."""
    axes: tuple[str | None, ...]
    """Logical axes."""
    rows: np.ndarray | None = None
    """Which rows of `along`, in which order; None: all as they are."""
    along: int = 0


def partition_of(layer: ColumnParallelLinear, shards: int) -> Partition:
    """How the rows of a column-parallel layer are divided."""
    sizes = tuple(layer.output_partition_sizes)
    units = sizes
    if isinstance(layer, QKVParallelLinear):
        units = (layer.num_heads, layer.num_kv_heads, layer.num_kv_heads)
    return Partition(sizes, units, shards)


def _by_rows(name: str, ndim: int, partition: Partition, axis: str) -> tuple[Placement, ...]:
    rest = (None,) * (ndim - 1)
    if partition.is_plain:
        return (Placement(name, (axis, *rest)),)
    placements = (
        Placement(name + DIVIDED, (axis, *rest), partition.rows(True)),
        Placement(name + WHOLE, (None, *rest), partition.rows(False)),
    )
    return tuple(placement for placement in placements if len(placement.rows))


def _replicated(name: str, ndim: int) -> tuple[Placement, ...]:
    return (Placement(name, (None,) * ndim),)


def _of_linear(layer: LinearBase, name: str, shape: torch.Size, shards: int) -> tuple[Placement, ...]:
    ndim = len(shape)
    if isinstance(layer, ColumnParallelLinear):
        axis = "heads" if isinstance(layer, QKVParallelLinear) else "mlp"
        return _by_rows(name, ndim, partition_of(layer, shards), axis)
    # A row's one scale is not divided.
    if isinstance(layer, RowParallelLinear) and ndim == 2 and shape[1] % shards == 0:
        return (Placement(name, (None, "mlp")),)
    return _replicated(name, ndim)


def _of_experts(
    layer: RoutedExperts, sharding: Sharding, name: str, shape: torch.Size, shards: int
) -> tuple[Placement, ...]:
    """Experts divided among the devices, or every expert: rows of gate and up, columns of down."""
    width, ndim = layer.intermediate_size_per_partition, len(shape)
    if sharding == "whole" or not name.startswith(("w13", "w2_weight")):
        return _replicated(name, ndim)
    if sharding == "experts":
        return (Placement(name, ("experts", None, None)[:ndim]),)
    if name == "w2_weight_scale" and shape[-1] == 1:  # a row's one scale is not divided
        return _replicated(name, ndim)
    if name.startswith("w2_weight"):
        return (Placement(name, (None, None, "mlp")),)
    axes = (None, "mlp", None)[:ndim]
    if not layer.moe_config.is_act_and_mul or layer.activation.value in INTERLEAVED or shards == 1:
        return (Placement(name, axes),)
    return (Placement(name, axes, Partition((width, width), (width, width), shards).rows(True), along=1),)


def placements(layer: torch.nn.Module, name: str, parameter: torch.Tensor, shards: int) -> tuple[Placement, ...]:
    """The arrays that `parameter`, `layer`'s own by the name of `name`, becomes on `shards` devices."""
    ndim = parameter.ndim
    if isinstance(layer, LinearBase) and not isinstance(layer, ReplicatedLinear) and not layer.disable_tp:
        return _of_linear(layer, name, parameter.shape, shards)
    if isinstance(layer, VocabParallelEmbedding) and parameter.shape[0] % shards == 0:
        return (Placement(name, ("vocab", *[None] * (ndim - 1))),)
    if isinstance(layer, RoutedExperts) and isinstance(method := layer.quant_method, TpuExpertsMethod):
        return _of_experts(layer, method.sharding, name, parameter.shape, shards)
    return _replicated(name, ndim)
