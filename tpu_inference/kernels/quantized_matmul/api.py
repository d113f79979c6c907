# SPDX-License-Identifier: Apache-2.0
"""The public op."""

from typing import Any

import jax
import jax.numpy as jnp

from tpu_inference.kernels.forms import Implementation
from tpu_inference.kernels.quantized_matmul.reference import quantized_matmul_reference
from tpu_inference.kernels.quantized_matmul.xla import quantized_matmul_xla

_FORMS = {"xla": quantized_matmul_xla, "pallas": quantized_matmul_xla, "reference": quantized_matmul_reference}
ACTIVATIONS = (None, "int8")
VALUES = tuple(jnp.dtype(name) for name in ("int8", "float8_e4m3fn", "float8_e5m2"))


def quantized_matmul(
    x: jax.Array,
    values: jax.Array,
    scales: jax.Array,
    *,
    activations: str | None = None,
    accumulate_dtype: Any = jnp.float32,
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
        implementation: "xla", "reference"; "pallas" is the XLA form too, which is at the roofline for one group of int8 (docs/kernels.md).

    Returns:
        [T, out] in x's dtype.

    Raises:
        ValueError: shapes or dtypes that do not fit, or an unknown implementation.
    """
    _check(x, values, scales, activations, implementation)
    return _FORMS[implementation](x, values, scales, activations=activations, accumulate_dtype=accumulate_dtype)


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
