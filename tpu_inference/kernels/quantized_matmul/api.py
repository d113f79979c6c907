# SPDX-License-Identifier: Apache-2.0
"""The public op."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from tpu_inference.kernels.forms import Implementation, chip_of
from tpu_inference.kernels.quantized_matmul.kernel import quantized_matmul_pallas, serves
from tpu_inference.kernels.quantized_matmul.reference import quantized_matmul_reference
from tpu_inference.kernels.quantized_matmul.xla import quantized_matmul_xla

_JNP = {"xla": quantized_matmul_xla, "reference": quantized_matmul_reference}
_INTERPRET = {"pallas": False, "pallas_interpret": pltpu.InterpretParams()}
_FORMS = (*_JNP, *_INTERPRET)
KERNEL_CHIPS = ("v6e",)
"""Where the kernel is faster than XLA's own conversion, by the compiler's schedule."""
LEAST_COLUMNS = 3072
"""Below, its blocks are too small to hide the latency of HBM: at 1792 columns it loses at 1000 cycles, at 1024 and fewer always."""
ACTIVATIONS = (None, "int8")
VALUES = tuple(jnp.dtype(name) for name in ("int8", "float8_e4m3fn", "float8_e5m2"))


def quantized_matmul(
    x: jax.Array,
    values: jax.Array,
    scales: jax.Array,
    *,
    activations: str | None = None,
    accumulate_dtype: Any = jnp.float32,
    layer: jax.Array | None = None,
    implementation: Implementation = "xla",
) -> jax.Array:
    """x w^T, where w[o, i] = values[o, i] * scales[o, i // group].

    Args:
        x: [T, in], bfloat16 or float32.
        values: [out, in], of a dtype in `VALUES`.
        scales: float32 [out, groups]; a group is in / groups neighbouring columns. One group: a scale for each row, or copies of one for all.
        activations: None, or "int8": each row of x is rounded to int8 by its greatest absolute value, and the products are exact sums of int32. Needs
            int8 values and one group.
        accumulate_dtype: of the product before it is scaled, which is what is summed over devices where `in` is divided among them.
        layer: int32 scalar: values [layers, out, in] and scales [layers, out, groups] have several layers', and this one's are meant; none are
            copied out where there are groups of `LEAST_GROUP` columns or more.
        implementation: "xla", "reference", "pallas" (TPU) or "pallas_interpret" (any device). The kernel is for float8_e4m3fn weights of one group
            and few rows; "pallas" takes it where `form_of` says so and is the XLA form elsewhere. The kernel reads NaN values as 480.

    Returns:
        [T, out] in x's dtype.

    Raises:
        ValueError: shapes or dtypes that do not fit, or an unknown implementation.
    """
    if layer is not None and implementation == "xla":
        _check(x, values[0], scales[0], activations, implementation)
        return quantized_matmul_xla(
            x, values, scales, activations=activations, accumulate_dtype=accumulate_dtype, layer=layer
        )
    if layer is not None:
        values, scales = (jax.lax.dynamic_index_in_dim(array, layer, keepdims=False) for array in (values, scales))
    _check(x, values, scales, activations, implementation)
    form = form_of(x, values, scales, activations=activations, implementation=implementation)
    if form in _INTERPRET:
        return quantized_matmul_pallas(x, values, scales, interpret=_INTERPRET[form])
    return _JNP[form](x, values, scales, activations=activations, accumulate_dtype=accumulate_dtype)


def form_of(x: Any, values: Any, scales: Any, *, activations: str | None, implementation: Implementation) -> str:
    """The form that a call runs: `implementation`, but "xla" where the kernel does not serve it or is no gain on the chip."""
    if implementation not in _INTERPRET:
        return str(implementation)
    gains = chip_of(implementation) in KERNEL_CHIPS and x.shape[1] >= LEAST_COLUMNS
    gains = gains or implementation == "pallas_interpret"
    return str(implementation) if gains and serves(x, values, scales.shape[1], activations) else "xla"


def _check(x: Any, values: Any, scales: Any, activations: str | None, implementation: str) -> None:
    if implementation not in _FORMS:
        raise ValueError(f"implementation={implementation!r} is none of {sorted(_FORMS)}")
    if x.ndim != 2 or values.ndim != 2 or x.shape[1] != values.shape[1]:
        raise ValueError(f"x {x.shape} and values {values.shape} are not [T, in] and [out, in]")
    if scales.ndim != 2 or scales.shape[0] != values.shape[0] or values.shape[1] % max(scales.shape[1], 1):
        raise ValueError(f"scales {scales.shape} are not [out, groups] of values {values.shape}: groups must divide in")
    if values.dtype not in VALUES:
        raise ValueError(f"values are {values.dtype}; served are {', '.join(map(str, VALUES))}")
    if activations not in ACTIVATIONS:
        raise ValueError(f"activations={activations!r} is none of {ACTIVATIONS}")
    if activations and (values.dtype != jnp.int8 or scales.shape[1] != 1):
        raise ValueError(f"int8 activations need int8 values of one group, not {values.dtype} of {scales.shape[1]}")
