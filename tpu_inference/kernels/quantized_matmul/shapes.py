# SPDX-License-Identifier: Apache-2.0
"""Named shapes: what tests compile, and what benchmarks measure."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from tpu_inference.kernels.forms import implementation_for
from tpu_inference.kernels.quantized_matmul.api import form_of, quantized_matmul


@dataclass(frozen=True)
class Spec:
    """A call of the op."""

    rows: int
    out: int
    columns: int
    values: str = "int8"
    activations: str | None = None
    groups: int = 1
    donated: tuple[int, ...] = ()
    chips: tuple[str, ...] = ()

    @property
    def about(self) -> str:
        rounded = f", {self.activations} activations" if self.activations else ""
        return f"{self.rows} rows by {self.out} x {self.columns} of {self.values}{rounded}"

    @property
    def dtype(self) -> str:
        """Of the product, for the peak."""
        return self.activations or "bfloat16"

    def arguments(self, device: jax.Device | None = None) -> tuple[jax.ShapeDtypeStruct, ...]:
        """x, values, scales."""
        del device
        return (
            jax.ShapeDtypeStruct((self.rows, self.columns), jnp.bfloat16),
            jax.ShapeDtypeStruct((self.out, self.columns), self.values),
            jax.ShapeDtypeStruct((self.out, self.groups), jnp.float32),
        )

    @property
    def useful_flops(self) -> float:
        return 2.0 * self.rows * self.out * self.columns

    @property
    def useful_bytes(self) -> int:
        """x, values and scales once, and the output."""
        arrays = (*self.arguments(), jax.ShapeDtypeStruct((self.rows, self.out), jnp.bfloat16))
        return sum(x.size * jnp.dtype(x.dtype).itemsize for x in arrays)

    def function(self, device: jax.Device, config: Any = None) -> Callable:
        """The op as a device runs it. Nothing of it is tuned, so there is no config."""
        if config is not None:
            raise ValueError(f"quantized_matmul takes no config, but is given {config}")
        form = implementation_for(device)
        return partial(quantized_matmul, activations=self.activations, implementation=form)

    def key(self, device: jax.Device | None = None) -> str:
        del device
        return "_".join(filter(None, (f"{self.rows}x{self.out}x{self.columns}_{self.values}", self.activations)))

    def form(self, device: jax.Device) -> str:
        return form_of(*self.arguments(), activations=self.activations, implementation=implementation_for(device))

    def workload(self, device: jax.Device) -> Mapping[str, Mapping[int, Any]]:
        """Nothing that the op runs by is data."""
        return {}


_LAYERS = {
    "8b_qkv": (768, 4096), "8b_o": (4096, 512), "8b_gate_up": (3584, 4096), "8b_down": (4096, 1792),
    "70b_qkv": (1280, 8192), "70b_o": (8192, 1024), "70b_gate_up": (7168, 8192), "70b_down": (8192, 3584),
}  # fmt: skip
"""out and in of one of eight devices."""
_KINDS = {"int8": ("int8", None), "w8a8": ("int8", "int8"), "e4m3": ("float8_e4m3fn", None)}
SHAPES = {
    f"{kind}_{name}_{rows}": Spec(rows, *sizes, *_KINDS[kind])
    for name, sizes in _LAYERS.items()
    for kind, rows in (("int8", 64), ("w8a8", 64), ("e4m3", 64), ("int8", 2048), ("w8a8", 2048))
    if rows == 64 or name in ("8b_gate_up", "70b_down")
}
