# SPDX-License-Identifier: Apache-2.0
"""Tensors of quantized checkpoints on their way to vLLM's loaders, in the form that the layers hold."""

from collections.abc import Iterable, Iterator
from typing import Any

import torch

from tpu_inference.layers.common.quantization import Quantization, Scheme, has_nan_bytes
from tpu_inference.layers.common.weights import Source
from tpu_inference.layers.vllm.quantization import SCALES, VALUES
from tpu_inference.layers.vllm.rounding import to_numpy, to_torch
from tpu_inference.models.common.checkpoint import nan_problem
from tpu_inference.models.common.loader import wrong_scales

CACHE_SCALES = (".k_scale", ".v_scale", ".kv_scale")
Weights = Iterable[tuple[str, torch.Tensor]]


class HeldForm:
    """A layer's tensors are kept until all of them were read, which checkpoints have side by side, and go on as values and scales."""

    def __init__(self, quantization: Quantization, *, cache_scales: bool = False) -> None:
        """`cache_scales`: whether scales of the KV cache are read."""
        self._quantization, self._cache_scales = quantization, cache_scales
        self.cache_scales: set[str] = set()
        """Names of those that were read."""
        self._waiting: dict[str, dict[str, torch.Tensor]] = {}
        self._wrong: list[str] = []

    def of(self, weights: Weights) -> Iterator[tuple[str, torch.Tensor]]:
        """`weights` with every quantized layer's tensors replaced by `VALUES` and `SCALES`; what nothing reads is left out."""
        for name, tensor in weights:
            if self._cache_scales and name.endswith(CACHE_SCALES):
                yield from self._of_cache(name, tensor)
                continue
            layer, _, kind = name.rpartition(".")
            scheme = self._quantization.scheme_of(layer)
            stored = scheme is not None and not scheme.at_load and self._is_stored(scheme, kind, tensor)
            if not stored and name.endswith(self._quantization.unread):
                continue
            if not stored:
                yield name, tensor
                continue
            have = self._waiting.setdefault(layer, {})
            have[kind] = tensor
            if len(have) == len(scheme.stored_names):
                yield from self._held(layer, scheme, self._waiting.pop(layer))

    def _of_cache(self, name: str, tensor: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
        if tensor.numel() != 1:
            self._wrong.append(f"mis-shaped: {name} is {list(tensor.shape)}, a scale of the KV cache is one number")
        elif wrong := wrong_scales(name, tensor.float().numpy(), of_cache=True):
            self._wrong.append(wrong)
        else:
            self.cache_scales.add(name)
            yield name, tensor

    def _is_stored(self, scheme: Scheme, kind: str, tensor: torch.Tensor) -> bool:
        if kind not in scheme.stored_names:
            return False
        # An embedding's weight has the same name, and another type.
        return kind != "weight" or (
            tensor.ndim == 2 and str(tensor.dtype).removeprefix("torch.") == scheme.stored_dtype
        )

    def _held(self, layer: str, scheme: Scheme, have: dict[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
        arrays = {f"{layer}.{kind}": to_numpy(tensor) for kind, tensor in have.items()}
        rows, columns = scheme.weight_shape(tuple(have[scheme.values_name].shape))
        weight = Source(f"{layer}.weight", (rows, columns))
        values, scales = scheme.values(weight), scheme.scales(weight)
        if wrong := [
            f"mis-shaped: {source.name} is {list(arrays[source.name].shape)}, {list(source.shape)} belong to the values"
            for source in (scales, *values.beside, *scales.beside)
            if not source.accepts(arrays[source.name].shape)
        ]:
            self._wrong += wrong
            return
        for source in (scales, *scales.beside):
            if wrong_number := wrong_scales(source.name, arrays[source.name]):
                self._wrong.append(wrong_number)

        self._wrong += [nan_problem(name) for name, array in arrays.items() if has_nan_bytes(array)]

        def read(name: str, index: tuple[slice, ...] = ()) -> Any:
            return arrays[name][index] if index else arrays[name]

        groups = scheme.groups(columns)
        yield f"{layer}.{VALUES}", to_torch(values.read(read, values.name, (slice(0, rows), slice(0, columns))))
        yield f"{layer}.{SCALES}", to_torch(scales.read(read, scales.name, (slice(0, rows), slice(0, groups))))

    def problems(self) -> list[str]:
        """What was wrong with what was read, once all was."""
        missing = [
            f"missing: {layer}.{kind}"
            for layer, have in self._waiting.items()
            for kind in self._quantization.scheme_of(layer).stored_names
            if kind not in have
        ]
        return self._wrong + missing
