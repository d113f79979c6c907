# SPDX-License-Identifier: Apache-2.0
"""Named shapes: what tests compile, and what benchmarks measure."""

import math
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from tpu_inference.kernels.forms import implementation_for
from tpu_inference.kernels.quantized_matmul.api import form_of, most_rows, quantized_matmul
from tpu_inference.kernels.quantized_matmul.config import ShapeKey
from tpu_inference.kernels.quantized_matmul.kernel import NAME
from tpu_inference.kernels.quantized_matmul.packing import KINDS, Packed

STACK_BYTES = 160e6
"""Of all layers' weights: more than a chip's VMEM, into which XLA would bring the weights of fewer."""


@dataclass(frozen=True)
class Spec:
    """A call of the op, with the weights of one of several layers."""

    rows: int
    out: int
    columns: int
    values: str = "int8"
    """A dtype, or what packed values are."""
    activations: str | None = None
    groups: int = 1
    zero_points: bool = False
    donated: tuple[int, ...] = ()
    chips: tuple[str, ...] = ()

    @property
    def about(self) -> str:
        rounded = f", {self.activations} activations" if self.activations else ""
        groups = f", groups of {self.columns // self.groups}" if self.groups > 1 else ""
        zero_points = " with zero points" if self.zero_points else ""
        return f"{self.rows} rows by {self.out} x {self.columns} of {self.values}{groups}{zero_points}{rounded}"

    @property
    def packed(self) -> Packed | None:
        return cast(Packed, self.values) if self.values in KINDS else None

    @property
    def weight(self) -> tuple[tuple[int, int], str]:
        """Shape and dtype of a layer's values."""
        return ((self.out, self.columns // 2), "uint8") if self.packed else ((self.out, self.columns), self.values)

    @property
    def layers(self) -> int:
        return -(-int(STACK_BYTES) // math.prod(self.weight[0]))

    @property
    def dtype(self) -> str:
        """Of the product, for the peak."""
        return self.activations or "bfloat16"

    def arguments(self, device: jax.Device | None = None) -> tuple[jax.ShapeDtypeStruct, ...]:
        """x, values, scales, layer, and zero points where they are given."""
        del device
        shape, dtype = self.weight
        of_groups = jax.ShapeDtypeStruct((self.layers, self.out, self.groups), jnp.float32)
        return (
            jax.ShapeDtypeStruct((self.rows, self.columns), jnp.bfloat16),
            jax.ShapeDtypeStruct((self.layers, *shape), dtype),
            of_groups,
            jax.ShapeDtypeStruct((), jnp.int32),
            *[of_groups] * self.zero_points,
        )

    @property
    def few(self) -> bool:
        """Whether the kernel takes so many rows."""
        return self.rows <= most_rows(jnp.dtype(self.weight[1]), self.groups)

    @property
    def useful_flops(self) -> float:
        return 2.0 * self.rows * self.out * self.columns

    @property
    def useful_bytes(self) -> int:
        """x, values, scales and zero points once, and the output."""
        weights = math.prod(self.weight[0]) + 4 * self.out * self.groups * (1 + self.zero_points)
        return weights + 2 * self.rows * (self.columns + self.out)

    def function(self, device: jax.Device, config: Any = None) -> Callable:
        """The op as a device runs it."""
        form = implementation_for(device)

        def call(
            x: jax.Array, values: jax.Array, scales: jax.Array, layer: jax.Array, *zero_points: jax.Array
        ) -> jax.Array:
            return quantized_matmul(
                x, values, scales, layer=layer, activations=self.activations, implementation=form, config=config,
                packed=self.packed, zero_points=zero_points[0] if zero_points else None,
            )  # fmt: skip

        return call

    def key(self, device: jax.Device | None = None) -> ShapeKey:
        del device
        x, values, *_ = self.arguments()
        return ShapeKey.of(x, values, self.groups, self.activations, self.packed)

    def form(self, device: jax.Device) -> str:
        how: dict[str, Any] = dict(activations=self.activations, implementation=implementation_for(device))
        return form_of(*self.arguments()[:3], **how, packed=self.packed)

    def workload(self, device: jax.Device) -> Mapping[str, Mapping[int, Any]]:
        """Which layer's weights are meant."""
        return {NAME: {0: np.ones(1, np.int32)}} if self.form(device) == "pallas" else {}


_LAYERS = {
    "8b_qkv": (768, 4096), "8b_o": (4096, 512), "8b_gate_up": (3584, 4096), "8b_down": (4096, 1792),
    "70b_qkv": (1280, 8192), "70b_o": (8192, 1024), "70b_gate_up": (7168, 8192), "70b_down": (8192, 3584),
}  # fmt: skip
"""out and in of one of eight devices."""
_KINDS: Mapping[str, tuple[Any, ...]] = {
    "int8": ("int8", None), "w8a8": ("int8", "int8"), "e4m3": ("float8_e4m3fn", None), "e5m2": ("float8_e5m2", None),
    "e4m3_g128": ("float8_e4m3fn", None, 128), "int8_g128": ("int8", None, 128), "int8_g64": ("int8", None, 64), "int8_g32": ("int8", None, 32),
}  # fmt: skip
"""Values, activations, and columns of a group where there are several."""
_WIDE = ("8b_gate_up", "70b_down")
_PACKED: Mapping[str, tuple[Any, ...]] = {
    "int4_g128": ("int4", None, 128), "int4_zeros_g128": ("int4", None, 128, True), "int4": ("int4", None), "e2m1_g32": ("e2m1", None, 32),
    "e2m1_g16": ("e2m1", None, 16),
}  # fmt: skip
"""The same of packed values, and whether zero points are given."""
_OF_FEW_SHAPES = ("e5m2", "e4m3_g128", "int8_g128", "int8_g64", "int8_g32")


def _spec(
    rows: int,
    sizes: tuple[int, int],
    values: str,
    activations: str | None,
    per_group: int = 0,
    zero_points: bool = False,
) -> Spec:
    return Spec(rows, *sizes, values, activations, sizes[1] // per_group if per_group else 1, zero_points)


def drawn(source: random.Random) -> Spec:
    """A product as a device's share of some model's might be."""
    rows, out = source.choice((8, 16, 32, 64)), 128 * source.randint(4, 80)
    how = source.choice([_KINDS[kind] for kind in ("int8", "w8a8", "e4m3", "e5m2", "e4m3_g128", "int8_g128")])
    return _spec(rows, (out, 128 * source.randint(4, 64)), *how)


_SOURCE = random.Random(1)
SHAPES = (
    {
        f"{kind}_{name}_{rows}": _spec(rows, sizes, *how)
        for name, sizes in _LAYERS.items()
        for kind, how in _KINDS.items()
        for rows in (64, 2048)
        if (name in _WIDE or (rows == 64 and kind not in _OF_FEW_SHAPES))
        and not (rows == 2048 and kind in _OF_FEW_SHAPES)
    }
    | {
        f"{kind}_{name}_64": _spec(64, _LAYERS[name], *how)
        for kind, how in _PACKED.items()
        for name in ((*_WIDE, "8b_qkv") if kind == "int4_g128" else _WIDE[:1])
    }
    | {f"drawn_{i}": drawn(_SOURCE) for i in range(8)}
)
