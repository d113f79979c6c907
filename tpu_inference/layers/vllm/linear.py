# SPDX-License-Identifier: Apache-2.0
"""vLLM's linear layers and embeddings over `layers.common`, for weights that are not quantized."""

from typing import Any

import jax
import torch
from vllm.model_executor.layers.linear import ColumnParallelLinear, LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod, VocabParallelEmbedding

from tpu_inference.compat import import_torchax
from tpu_inference.layers.common.linear import before_split, matmul
from tpu_inference.layers.common.partition import Partition
from tpu_inference.layers.vllm.placement import DIVIDED, WHOLE, partition_of


def _array(layer: torch.nn.Module, name: str) -> jax.Array | None:
    tensor = getattr(layer, name, None)
    return None if tensor is None else tensor.jax()


class _Product:
    """x times a layer's weight, whose rows may be partitioned."""

    def __init__(self, accumulate_dtype: Any, partition: Partition | None = None) -> None:
        self._accumulate_dtype = accumulate_dtype
        self._partition = None if partition is None or partition.is_plain else partition

    def __call__(self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        array = x.jax()
        rows = array.reshape(-1, array.shape[-1])
        if self._partition is None:
            out = before_split(self._times(rows, layer.weight.jax(), None if bias is None else bias.jax()))
        else:
            parts = (
                self._times(rows, _array(layer, "weight" + suffix), _array(layer, "bias" + suffix) if bias is not None else None)
                for suffix in (DIVIDED, WHOLE)
            )  # fmt: skip
            out = self._partition.join(*(part if part is None else before_split(part) for part in parts))
        return import_torchax().interop.torch_view(out.reshape(*array.shape[:-1], out.shape[-1]))

    def _times(self, x: jax.Array, weight: jax.Array | None, bias: jax.Array | None) -> jax.Array | None:
        if weight is None:
            return None
        out = matmul(x, weight, self._accumulate_dtype)
        return out if bias is None else out + bias


class TpuLinearMethod(UnquantizedLinearMethod):
    """The product of one linear layer."""

    def __init__(self, accumulate_dtype: Any, partition: Partition | None) -> None:
        super().__init__()
        self._product = _Product(accumulate_dtype, partition)

    def apply(self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return self._product(layer, x, bias)


class TpuEmbeddingMethod(UnquantizedEmbeddingMethod):
    """The look-up of an embedding, and the product of a head."""

    def __init__(self, accumulate_dtype: Any) -> None:
        self._product = _Product(accumulate_dtype)

    def apply(self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return self._product(layer, x, bias)

    def embedding(self, layer: torch.nn.Module, input_: torch.Tensor) -> torch.Tensor:
        return import_torchax().interop.torch_view(layer.weight.jax()[input_.jax()])


def use_shells(model: torch.nn.Module, shards: int, accumulate_dtype: Any) -> None:
    """Let the unquantized linear layers and embeddings of `model` compute by the methods above."""
    for layer in model.modules():
        method = getattr(layer, "quant_method", None)
        if isinstance(layer, LinearBase) and type(method) is UnquantizedLinearMethod:
            divided = isinstance(layer, ColumnParallelLinear) and not layer.disable_tp
            layer.quant_method = TpuLinearMethod(accumulate_dtype, partition_of(layer, shards) if divided else None)
        elif isinstance(layer, VocabParallelEmbedding) and type(method) is UnquantizedEmbeddingMethod:
            layer.quant_method = TpuEmbeddingMethod(accumulate_dtype)
