# SPDX-License-Identifier: Apache-2.0
"""The public op."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from tpu_inference.kernels.forms import Implementation, chip_of
from tpu_inference.kernels.quantized_matmul.config import LANES, MOST_VMEM_BYTES, Config, ShapeKey, config_for
from tpu_inference.kernels.quantized_matmul.kernel import quantized_matmul_pallas
from tpu_inference.kernels.quantized_matmul.packing import BLOCK, KINDS, Packed
from tpu_inference.kernels.quantized_matmul.reference import E4M3, quantized_matmul_reference, round_rows
from tpu_inference.kernels.quantized_matmul.resident import Resident, quantized_matmul_resident
from tpu_inference.kernels.quantized_matmul.xla import quantized_matmul_xla

_JNP = {"xla": quantized_matmul_xla, "reference": quantized_matmul_reference}
_INTERPRET = {"pallas": False, "pallas_interpret": pltpu.InterpretParams()}
_FORMS = (*_JNP, *_INTERPRET)
KERNEL_CHIPS = ("v5e", "v6e", "tpu7x")
"""Whose matrix units take float8 weights, and that have VMEM enough."""
MULTIPLIED: Mapping[str, tuple[str | None, ...]] = {"int8": ("v5e", "v6e", None), E4M3: ("tpu7x", None)}
"""By the dtype of rounded rows, chips whose matrix units multiply it by weights of its own; None is of interpret mode."""
FLOAT8: Mapping[str | None, str] = {"v5e": "float8_e4m3b11fnuz", "v6e": "float8_e4m3b11fnuz"}
"""What their matrix units have, where that is not e4m3fn."""
RESIDENT_CHIPS = ("v6e", None)
"""On which the kernel for many rows is a gain; None is of interpret mode. XLA's form is near the roofline on the others."""
MOST_ROWS, MOST_CONVERTED_ROWS = 128, 256
"""Of the kernel for few rows: more take longer to multiply than the weights to come. The second where XLA converts values one by one, or scales
groups, which takes longer yet."""
ACTIVATIONS = (None, *MULTIPLIED)
VALUES = tuple(jnp.dtype(name) for name in ("int8", "float8_e4m3fn", "float8_e5m2"))


def quantized_matmul(
    x: jax.Array,
    values: jax.Array,
    scales: jax.Array,
    *,
    activations: str | None = None,
    accumulate_dtype: Any = jnp.float32,
    layer: jax.Array | None = None,
    packed: Packed | None = None,
    zero_points: jax.Array | None = None,
    implementation: Implementation = "xla",
    config: Config | None = None,
) -> jax.Array:
    """x w^T, where w[o, i] = (values[o, i] - zero_points[o, i // group]) * scales[o, i // group].

    Args:
        x: [T, in], bfloat16 or float32.
        values: [out, in], of a dtype in `VALUES`.
        scales: float32 [out, groups]; a group is in / groups neighbouring columns. One group: a scale for each row, or copies of one for all.
        activations: None, or the dtype that each row of x is rounded to, by its greatest absolute value: that of the values, "int8" or
            "float8_e4m3fn", which have one group. Products of int8 are exact sums of int32.
        accumulate_dtype: of the product before it is scaled, which is what is summed over devices where `in` is divided among them.
        layer: int32 scalar: values [layers, out, in] and scales [layers, out, groups] have several layers', and this one's are meant; they are
            read where they lie, but by the XLA form where groups are of less than `LEAST_GROUP` columns.
        packed: None, or what values' codes of four bits mean, two a byte as `pack` makes them: values are then uint8 [out, in / 2], in a multiple of
            `BLOCK`. Of "int4" the code, 0 to 15, is the value; of "e2m1" the code has its bits, and is never that of -0 (`without_minus_zero`).
        zero_points: of packed "int4" alone; float32, shaped as scales. None is 8 there, and 0 elsewhere.
        implementation: "xla", "reference", "pallas" (TPU) or "pallas_interpret" (any device). One kernel is for few rows and one for whole
            thousands; "pallas" takes them where `form_of` says so and is the XLA form elsewhere. `implementation_for` a device also tells the chip.
        config: blocks of the kernel for few rows; None for those tuned for the shape and chip, else the heuristic's.

    Returns:
        [T, out] in x's dtype.

    Raises:
        ValueError: shapes or dtypes that do not fit, or an unknown implementation.
    """
    arrays, several, index = (values, scales, zero_points), layer is not None, jnp.int32(0) if layer is None else layer
    stacked = arrays if several else tuple(array if array is None else array[None] for array in arrays)
    of_one = [jax.ShapeDtypeStruct(array.shape[1:], array.dtype) for array in stacked[:2]]
    _check(x, *of_one, activations, implementation, packed)
    if zero_points is not None:
        _check_zero_points(zero_points, scales, packed)
    if activations == E4M3 and implementation != "reference" and not multiplies(E4M3, implementation):
        rounded, row_scales = round_rows(x, E4M3)  # numbers that x's dtype has
        product = quantized_matmul(
            rounded.astype(x.dtype), values, scales, accumulate_dtype=accumulate_dtype, layer=layer,
            implementation=implementation, config=config,
        )  # fmt: skip
        return (product.astype(jnp.float32) * row_scales).astype(x.dtype)
    form = form_of(x, values, scales, activations=activations, implementation=implementation, packed=packed)
    if form in _INTERPRET:
        chip, groups = chip_of(implementation), scales.shape[-1]
        if _is_resident(x, values, groups, activations, chip, packed):
            return quantized_matmul_resident(
                x, *stacked[:2], index, activations=activations, interpret=_INTERPRET[form]
            )
        return quantized_matmul_pallas(
            x, *stacked[:2], index, packed=packed, zero_points=stacked[2], unpacked=FLOAT8.get(chip, E4M3),
            activations=activations, direct=values.dtype != jnp.int8, exact=activations is None or chip in MULTIPLIED[activations],
            config=config or config_for(ShapeKey.of(x, values, groups, activations, packed), chip), interpret=_INTERPRET[form],
        )  # fmt: skip
    how: dict[str, Any] = dict(activations=activations, accumulate_dtype=accumulate_dtype, packed=packed)
    if form == "xla":
        return quantized_matmul_xla(x, values, scales, zero_points=zero_points, layer=layer, **how)
    values, scales, zero_points = (
        array if array is None else jax.lax.dynamic_index_in_dim(array, index, keepdims=False) for array in stacked
    )
    return quantized_matmul_reference(x, values, scales, zero_points=zero_points, **how)


def form_of(
    x: Any, values: Any, scales: Any, *, activations: str | None, implementation: Implementation, packed: str | None = None
) -> str:  # fmt: skip
    """The form that a call runs: `implementation`, but "xla" where the kernel does not serve it or is no gain on the chip."""
    if implementation not in _INTERPRET:
        return str(implementation)
    chip = chip_of(implementation)
    runs = implementation == "pallas_interpret" or chip in KERNEL_CHIPS
    what = (x, values, scales.shape[-1], activations, chip, packed)
    return str(implementation) if runs and (_serves(*what) or _is_resident(*what)) else "xla"


def multiplies(dtype: str, implementation: Implementation) -> bool:
    """Whether the matrix unit multiplies rows and weights of `dtype`, an entry of `MULTIPLIED`, where an implementation runs."""
    return implementation in _INTERPRET and chip_of(implementation) in MULTIPLIED[dtype]


def most_rows(dtype: Any, groups: int) -> int:
    """That the kernel for few rows takes, of values of a dtype."""
    return MOST_CONVERTED_ROWS if groups > 1 or dtype != jnp.int8 else MOST_ROWS


def _serves(x: Any, values: Any, groups: int, activations: str | None, chip: str | None, packed: str | None) -> bool:
    """Whether the kernel for few rows takes arrays of these shapes and dtypes; the XLA form takes all."""
    (rows, columns), out = x.shape, values.shape[-2]
    group, key = columns // groups, ShapeKey.of(x, values, groups, activations, packed)
    whole = columns % LANES == 0 and out % LANES == 0 and (groups == 1 or group % LANES == 0 or LANES % group == 0)
    fits = key.vmem_bytes(config_for(key, chip).within(out)) <= MOST_VMEM_BYTES
    return x.dtype == jnp.bfloat16 and rows <= most_rows(values.dtype, groups) and whole and fits


def _is_resident(
    x: Any, values: Any, groups: int, activations: str | None, chip: str | None, packed: str | None
) -> bool:
    """Whether the kernel for many rows takes them."""
    static = Resident(x.shape[0], *values.shape[-2:], activations is not None, values.dtype != jnp.int8)
    return (
        not packed
        and activations != E4M3
        and x.dtype == jnp.bfloat16
        and groups == 1
        and chip in RESIDENT_CHIPS
        and static.serves
    )


def _check(x: Any, values: Any, scales: Any, activations: str | None, implementation: str, packed: str | None) -> None:
    if implementation not in _FORMS:
        raise ValueError(f"implementation={implementation!r} is none of {sorted(_FORMS)}")
    if packed is not None:
        _check_packed(x, values, activations, packed)
    elif x.ndim != 2 or values.ndim != 2 or x.shape[1] != values.shape[1]:
        raise ValueError(f"x {x.shape} and values {values.shape} are not [T, in] and [out, in]")
    if scales.ndim != 2 or scales.shape[0] != values.shape[0] or x.shape[1] % max(scales.shape[1], 1):
        raise ValueError(f"scales {scales.shape} are not [out, groups] of values {values.shape}: groups must divide in")
    if not packed and values.dtype not in VALUES:
        raise ValueError(f"values are {values.dtype}; served are {', '.join(map(str, VALUES))}")
    if activations not in ACTIVATIONS:
        raise ValueError(f"activations={activations!r} is none of {ACTIVATIONS}")
    if activations and (values.dtype != activations or scales.shape[1] != 1):
        raise ValueError(
            f"{activations} activations need {activations} values of one group, not {values.dtype} of {scales.shape[1]}"
        )


def _check_packed(x: Any, values: Any, activations: str | None, packed: str) -> None:
    if packed not in KINDS:
        raise ValueError(f"packed={packed!r} is none of {KINDS}")
    if activations:
        raise ValueError(
            f"activations={activations!r} are not served with packed={packed!r} values: they need int8 ones"
        )
    if values.dtype != jnp.uint8:
        raise ValueError(f"packed values are uint8, two codes a byte, not {values.dtype}")
    if x.ndim != 2 or values.ndim != 2 or x.shape[1] != 2 * values.shape[1]:
        raise ValueError(f"x {x.shape} and packed values {values.shape} are not [T, in] and [out, in / 2]")
    if x.shape[1] % BLOCK:
        raise ValueError(f"{x.shape[1]} columns are not whole blocks of {BLOCK}, which packed values come in")


def _check_zero_points(zero_points: Any, scales: Any, packed: str | None) -> None:
    if packed != "int4":
        raise ValueError(f'zero points are served with packed="int4" alone, not {packed!r}')
    if zero_points.shape != scales.shape or zero_points.dtype != jnp.float32:
        raise ValueError(
            f"zero points {zero_points.dtype}{list(zero_points.shape)} are not float32, shaped as scales {scales.shape}"
        )
