# SPDX-License-Identifier: Apache-2.0
"""A module called with other tensors in the place of its parameters and buffers.

torch's own functional_call restores a tensor that several paths lead to (a rotary table that layers share) to what the first path had put there.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch


class Places:
    """Where each parameter and buffer of a module is held, which may be several places."""

    def __init__(self, module: torch.nn.Module) -> None:
        self._of: dict[str, list[tuple[dict[str, Any], str]]] = {}
        name_of: dict[int, str] = {}
        for path, child in module.named_modules():
            prefix = f"{path}." if path else ""
            for held in (child._parameters, child._buffers):
                for key, tensor in held.items():
                    if tensor is not None:
                        name = name_of.setdefault(id(tensor), prefix + key)
                        self._of.setdefault(name, []).append((held, key))

    @contextmanager
    def holding(self, tensors: Mapping[str, torch.Tensor]) -> Iterator[None]:
        """`tensors` are there inside, by the names of `named_parameters` and `named_buffers`."""
        places = [(held, key, tensor) for name, tensor in tensors.items() for held, key in self._of[name]]
        before = [(held, key, held[key]) for held, key, _ in places]
        try:
            for held, key, tensor in places:
                held[key] = tensor
            yield
        finally:
            for held, key, tensor in before:
                held[key] = tensor
