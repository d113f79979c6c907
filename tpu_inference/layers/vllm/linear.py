# SPDX-License-Identifier: Apache-2.0
"""vLLM's linear layers and embeddings over `layers.common`."""

from collections.abc import Callable
from typing import Any

import jax
import torch
from jax.sharding import Mesh
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    LinearBase,
    UnquantizedLinearMethod,
)
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod, VocabParallelEmbedding

from tpu_inference.compat.lowering import import_torchax
from tpu_inference.layers.common.linear import before_split, matmul
from tpu_inference.layers.common.partition import Partition
from tpu_inference.layers.common.quantized_linear import quantized_product
from tpu_inference.layers.common.sharding import MODEL_AXIS, LogicalAxes
from tpu_inference.layers.vllm.placement import DIVIDED, WHOLE, partition_of
from tpu_inference.layers.vllm.quantization import SCALES, VALUES, ZERO_POINTS, QuantizedLinearMethod

Times = Callable[[torch.nn.Module, str, jax.Array], jax.Array | None]
"""(layer, suffix of its arrays, x [T, in]) -> [T, out], or None where the layer has no such arrays."""


def _array(layer: torch.nn.Module, name: str) -> jax.Array | None:
    tensor = getattr(layer, name, None)
    return None if tensor is None else tensor.jax()


def _plain(accumulate_dtype: Any) -> Times:
    def times(layer: torch.nn.Module, suffix: str, x: jax.Array) -> jax.Array | None:
        weight = _array(layer, "weight" + suffix)
        return None if weight is None else matmul(x, weight, accumulate_dtype)

    return times


def _quantized(method: QuantizedLinearMethod, axes: LogicalAxes, mesh: Mesh, accumulate_dtype: Any) -> Times:
    activations = method.scheme.activations_on(mesh.devices.flat[0])

    def times(layer: torch.nn.Module, suffix: str, x: jax.Array) -> jax.Array | None:
        values, scales = _array(layer, VALUES + suffix), _array(layer, SCALES + suffix)
        if values is None or scales is None:
            return None
        return quantized_product(
            x, values, scales, axes=(None, None) if suffix == WHOLE else axes, mesh=mesh,
            accumulate_dtype=accumulate_dtype, activations=activations, packed=method.packed,
            zero_points=_array(layer, ZERO_POINTS + suffix),
        )  # fmt: skip

    return times


class _Product:
    """x times a layer's weight, whose rows may be partitioned."""

    def __init__(self, times: Times, partition: Partition | None = None) -> None:
        self._times_weight = times
        self._partition = None if partition is None or partition.is_plain else partition

    def __call__(self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        array = x.jax()
        rows = array.reshape(-1, array.shape[-1])
        if self._partition is None:
            out = before_split(self._times(layer, "", rows, None if bias is None else bias.jax()))
        else:
            parts = (
                self._times(layer, suffix, rows, _array(layer, "bias" + suffix) if bias is not None else None)
                for suffix in (DIVIDED, WHOLE)
            )
            out = self._partition.join(*(part if part is None else before_split(part) for part in parts))
        return import_torchax().interop.torch_view(out.reshape(*array.shape[:-1], out.shape[-1]))

    def _times(self, layer: torch.nn.Module, suffix: str, rows: jax.Array, bias: jax.Array | None) -> jax.Array | None:
        out = self._times_weight(layer, suffix, rows)
        return out if out is None or bias is None else out + bias


class TpuLinearMethod(UnquantizedLinearMethod):
    """The product of one linear layer."""

    def __init__(self, accumulate_dtype: Any, partition: Partition | None) -> None:
        super().__init__()
        self._product = _Product(_plain(accumulate_dtype), partition)

    def apply(self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return self._product(layer, x, bias)


class TpuEmbeddingMethod(UnquantizedEmbeddingMethod):
    """The look-up of an embedding, and the product of a head."""

    def __init__(self, accumulate_dtype: Any) -> None:
        self._product = _Product(_plain(accumulate_dtype))

    def apply(self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return self._product(layer, x, bias)

    def embedding(self, layer: torch.nn.Module, input_: torch.Tensor) -> torch.Tensor:
        return import_torchax().interop.torch_view(layer.weight.jax()[input_.jax()])


def use_shells(model: torch.nn.Module, mesh: Mesh, accumulate_dtype: Any) -> None:
    """Let the linear layers and embeddings of `model` compute by the methods above."""
    shards = mesh.shape[MODEL_AXIS]
    for layer in model.modules():
        method = getattr(layer, "quant_method", None)
        if isinstance(layer, LinearBase) and type(method) is UnquantizedLinearMethod:
            layer.quant_method = TpuLinearMethod(accumulate_dtype, _partition(layer, shards))
        elif isinstance(layer, LinearBase) and type(method) is QuantizedLinearMethod:
            axes = method.axes(layer, shards)
            method.product = _Product(_quantized(method, axes, mesh, accumulate_dtype), _partition(layer, shards))
        elif isinstance(layer, VocabParallelEmbedding) and type(method) is UnquantizedEmbeddingMethod:
            layer.quant_method = TpuEmbeddingMethod(accumulate_dtype)


def _partition(layer: LinearBase, shards: int) -> Partition | None:
    divided = isinstance(layer, ColumnParallelLinear) and not layer.disable_tp
    return partition_of(layer, shards) if divided else None
