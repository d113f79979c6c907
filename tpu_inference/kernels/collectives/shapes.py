# SPDX-License-Identifier: Apache-2.0
"""Named shapes of the ops: what they are measured on. What devices send each other is not measured, but known: `sent_bytes`."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from tpu_inference.kernels.collectives.api import all_gather_matmul, matmul_reduce_scatter
from tpu_inference.kernels.collectives.config import GATHER, SCATTER, ShapeKey, misfit
from tpu_inference.kernels.forms import implementation_for

AXIS = "model"


@dataclass(frozen=True)
class ProductShape:
    """A product of all devices together."""

    about: str
    part: str
    tokens: int
    out: int
    columns: int
    sum_dtype: str = "bfloat16"
    devices: int = 8
    dtype: str = "bfloat16"
    chips: tuple[str, ...] = ()
    donated: tuple[int, ...] = ()

    @property
    def gathers(self) -> bool:
        return self.part == GATHER

    @property
    def useful_flops(self) -> int:
        """Of one device."""
        return 2 * self.tokens * self.out * self.columns // self.devices

    @property
    def useful_bytes(self) -> int:
        """Of one device: its weights, the rows and outputs of its product, once."""
        rows = (
            (self.columns + self.out // self.devices)
            if self.gathers
            else (self.columns // self.devices + self.out // self.devices)
        )
        return (self.out * self.columns // self.devices + self.tokens * rows) * jnp.dtype(self.dtype).itemsize

    @property
    def sent_bytes(self) -> int:
        """By one device, both ways together."""
        width = self.columns if self.gathers else self.out
        size = jnp.dtype(self.dtype if self.gathers else self.sum_dtype).itemsize
        return self.tokens * width * size * (self.devices - 1) // self.devices

    def arguments(self, device: jax.Device | None = None) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Of all devices."""
        del device
        return tuple(jax.ShapeDtypeStruct((n, self.columns), self.dtype) for n in (self.tokens, self.out))

    def specs(self) -> tuple[Any, Any]:
        """Of arguments and of the result over the axis."""
        rows, columns = PartitionSpec(AXIS), PartitionSpec(None, AXIS)
        return ((rows, rows), columns) if self.gathers else ((columns, columns), rows)

    def function(self, device: jax.Device, config: Any = None) -> Callable:
        """What each device runs."""
        common: dict[str, Any] = dict(axis_name=AXIS, config=config, implementation=implementation_for(device))
        if self.gathers:
            return partial(all_gather_matmul, **common)
        return partial(matmul_reduce_scatter, sum_dtype=jnp.dtype(self.sum_dtype).type, **common)

    def key(self, device: jax.Device | None = None) -> ShapeKey:
        """Of tuned tables."""
        del device
        rows, n = self.tokens // self.devices, self.devices
        out, columns = (self.out // n, self.columns) if self.gathers else (self.out, self.columns // n)
        return ShapeKey(n, rows, out, columns, self.dtype)

    def form(self, device: jax.Device) -> str:
        return str(misfit(self.key(), self.part) or implementation_for(device))

    def workload(self, device: jax.Device) -> Mapping[str, Mapping[int, Any]]:
        """Nothing that the kernels run by is data."""
        del device
        return {}


def _layer(name: str, about: str, width: int, hidden: int, attention: int, tokens: int) -> dict[str, ProductShape]:
    products = (
        ("gate_up", GATHER, 2 * width, hidden),
        ("down", SCATTER, hidden, width),
        ("o", SCATTER, hidden, attention),
    )
    return {
        f"{name}_{product}_{tokens}": ProductShape(
            f"{about}, {product}, {tokens} tokens on 8 devices", part, tokens, out, columns
        )
        for product, part, out, columns in products
    }


SHAPES: Mapping[str, ProductShape] = {
    **_layer("8b", "Llama 3.1 8B", 14336, 4096, 4096, 2048),
    **_layer("70b", "Llama 3.1 70B", 28672, 8192, 8192, 2048),
    **_layer("70b", "Llama 3.1 70B", 28672, 8192, 8192, 128),
}
