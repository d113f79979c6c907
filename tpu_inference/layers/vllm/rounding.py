# SPDX-License-Identifier: Apache-2.0
"""What loaders of quantized layers and experts of vLLM's share."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from tpu_inference.errors import TpuInferenceError
from tpu_inference.layers.common.quantization import Scheme, part_of_group, rounded_rows

CHECKPOINT_NUMEL = "checkpoint_numel"
"""Attribute of a parameter of which the checkpoint has fewer numbers than the device."""


def to_numpy(tensor: torch.Tensor) -> np.ndarray:
    """The same memory, if it is contiguous."""
    tensor = tensor.detach().contiguous()
    name = str(tensor.dtype).removeprefix("torch.")
    if name == "bfloat16":
        return tensor.view(torch.int16).numpy().view(name)
    if name.startswith("float8"):
        return tensor.view(torch.uint8).numpy().view(name)
    return tensor.numpy()


def to_torch(array: np.ndarray) -> torch.Tensor:
    """The same memory, if it is contiguous and writeable."""
    array = np.ascontiguousarray(array)
    if array.dtype.name.startswith("float8"):
        return torch.from_numpy(array.view(np.uint8)).view(getattr(torch, array.dtype.name))
    return torch.from_numpy(array)


def rounded_whole(weight: torch.Tensor, dtype: str, group: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(scales [rows, groups], values [rows, columns] in `dtype`, int8 for "int4") of a weight in full, whose rows are cut into groups of so many
    columns."""
    scales = torch.empty(weight.shape[0], weight.shape[1] // group, dtype=torch.float32)
    values = torch.empty(weight.shape, dtype=torch.int8 if dtype == "int4" else getattr(torch, dtype))
    for part, of_rows, rounded in rounded_rows(
        lambda part: to_numpy(weight[part]), slice(0, len(weight)), dtype, group
    ):
        scales[part], values[part] = to_torch(of_rows), to_torch(rounded)
    return scales, values


def group_size(scheme: Scheme, name: str, columns: int, shards: int, *, may_cut: bool = True) -> int:
    """Columns that share a scale on each of `shards` devices. Raises TpuInferenceError where these would have too small a part of a group,
    or any part unless `may_cut`."""
    if scheme.groups(columns) == 1:
        return columns
    size = scheme.block[1] or columns
    part = part_of_group(size, (columns, columns // shards))
    if part is None or (part < size and not may_cut):
        advice = (
            "use a smaller --tensor-parallel-size" if shards > 1 else "use a checkpoint with groups that divide them"
        )
        raise TpuInferenceError(
            f"{name} is quantized in groups of {size} columns, which {columns} columns on {shards} devices are not divided into: {advice}."
        )
    return part


def repeat_then(load: Callable[..., Any], parts: int, groups: int) -> Callable[..., Any]:
    """A loader of scales [rows, groups of the checkpoint], each of which is cut into so many parts, `groups` in all."""

    def repeating(parameter: torch.nn.Parameter, loaded: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return load(parameter, loaded.repeat_interleave(parts, 1)[:, :groups], *args, **kwargs)

    return load if parts == 1 else repeating
