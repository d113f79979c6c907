# SPDX-License-Identifier: Apache-2.0
"""The public op."""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from tpu_inference.kernels.forms import Implementation, chip_of
from tpu_inference.kernels.grouped_matmul.config import LANES, NO_FLOAT8, Config, ShapeKey, config_for
from tpu_inference.kernels.grouped_matmul.pallas import grouped_matmul_pallas
from tpu_inference.kernels.grouped_matmul.reference import grouped_matmul_reference
from tpu_inference.kernels.grouped_matmul.xla import grouped_matmul_xla

_PLAIN = {"xla": grouped_matmul_xla, "reference": grouped_matmul_reference}
_INTERPRET = {"pallas": False, "pallas_interpret": pltpu.InterpretParams()}


def grouped_matmul(
    x: jax.Array,
    weights: jax.Array,
    group_sizes: jax.Array,
    *,
    scales: jax.Array | None = None,
    first_group: jax.Array | int = 0,
    transposed: bool = False,
    implementation: Implementation = "xla",
    config: Config | None = None,
) -> jax.Array:
    """Rows of each group times the weight of the group, transposed: [M, out] in x's dtype, summed in float32.

    Args:
        x: [M, in], bfloat16 or float32; the rows of group 0, then those of group 1, and so on. M > 0.
        weights: [E or more, out, in], in x's dtype, or what `scales` are for. Of float8_e4m3fn without NaN and -0, which chips before tpu7x read
            as NaN (`layers.common.quantization.without_minus_zero`).
        group_sizes: int32 [E], rows of each group; may be 0, and M in all at most. Rows past the last group are unspecified, and may
            not be finite.
        scales: [E or more, out / a, in / b], of blocks of a x b numbers of `weights`, which they are multiplied by; a block may be all of
            a dimension. On TPU b is a multiple of 128, or all of `in`.
        first_group: int32 scalar. `weights` and `scales` may have more groups than `group_sizes`, and those from here on are meant: of stacked
            layers, none is copied out for the kernel.
        transposed: `weights` are [E or more, in, out]. See `lies_transposed`.
        implementation: "pallas" (TPU), "pallas_interpret" (the same kernel interpreted, on any device), "xla", "reference". `implementation_for`
            a device also tells the chip, for which the kernel is blocked.
        config: blocks of the Pallas kernel; None for those tuned for the shape and chip, else the heuristic's.

    Raises:
        ValueError: shapes or dtypes that do not fit, or an unknown implementation.
    """
    _check(x, weights.swapaxes(1, 2) if transposed else weights, group_sizes, scales)
    if implementation not in (*_PLAIN, *_INTERPRET):
        raise ValueError(f"implementation={implementation!r} is none of {sorted((*_PLAIN, *_INTERPRET))}")
    out, blocks = weights.shape[2 if transposed else 1], False
    if scales is not None:
        scales = jax.lax.dynamic_slice_in_dim(scales, first_group, len(group_sizes)).astype(jnp.float32)
        blocks = implementation in _INTERPRET and scales.shape[2] > 1 and out // scales.shape[1] % LANES == 0
        scales = jnp.repeat(scales, out // scales.shape[1] // LANES, axis=1) if blocks else _by_output(scales, out)
    if implementation in _PLAIN:
        weights = weights.swapaxes(1, 2) if transposed else weights
        return _PLAIN[implementation](x, weights, group_sizes, scales, first_group)
    groups = 1 if scales is None else scales.shape[2 if blocks else 1]
    if groups > 1 and x.shape[1] // groups % LANES:
        raise ValueError(f"scales of {x.shape[1] // groups} columns are not served by the kernel: 128 or a multiple")
    key, chip = ShapeKey.of(x, weights, len(group_sizes), transposed=transposed), chip_of(implementation)
    return grouped_matmul_pallas(
        x, weights, group_sizes, scales, first_group,
        transposed=transposed, blocks=blocks, rebias=chip not in (None, "tpu7x"), direct=chip not in NO_FLOAT8,
        config=config or config_for(key, chip),
        interpret=_INTERPRET[implementation],
    )  # fmt: skip


def lies_transposed(out: int, columns: int) -> bool:
    """Whether an array [..., out, columns] lies on TPU as [..., columns, out]: where that takes less padding, of the last dimension to lanes and of
    the one before to tiles of eight rows."""

    def padded(rows: int, lanes: int) -> int:
        return pl.cdiv(rows, 8) * 8 * pl.cdiv(lanes, LANES) * LANES

    return padded(columns, out) < padded(out, columns)


def lies_across(groups: int, out: int, columns: int) -> bool:
    """Whether an array [..., groups, out, columns] lies on TPU with its groups along the lanes, which they fill and nothing else does.

    The kernel would be given a copy of all of it. One group more, and it lies as `lies_transposed` says.
    """
    return groups % LANES == 0 and out % LANES != 0 and columns % LANES != 0


def _by_output(scales: jax.Array, out: int) -> jax.Array:
    """[E, out / a, in / b] -> [E, in / b, out]."""
    return jnp.repeat(scales.swapaxes(1, 2), out // scales.shape[1], axis=2)


def _check(x: jax.Array, weights: jax.Array, group_sizes: jax.Array, scales: jax.Array | None) -> None:
    if x.ndim != 2 or weights.ndim != 3 or x.shape[1] != weights.shape[2] or not x.shape[0]:
        raise ValueError(f"x {x.shape} and weights {weights.shape} are not [M, in] and [E, out, in]")
    if x.dtype not in (jnp.bfloat16, jnp.float32):
        raise ValueError(f"x of {x.dtype} is neither bfloat16 nor float32")
    if (
        group_sizes.ndim != 1
        or not 0 < len(group_sizes) <= len(weights)
        or not jnp.issubdtype(group_sizes.dtype, jnp.integer)
    ):
        raise ValueError(
            f"group_sizes {group_sizes.dtype}{group_sizes.shape} are not an integer for each of {len(weights)} groups, or of some of them"
        )
    if scales is None and weights.dtype != x.dtype:
        raise ValueError(f"weights of {weights.dtype} need scales to be multiplied by x of {x.dtype}")
    if scales is None:
        return
    fits = scales.ndim == 3 and len(scales) == len(weights)
    if not fits or any(not n or size % n for n, size in zip(scales.shape[1:], weights.shape[1:], strict=True)):
        raise ValueError(f"scales {scales.shape} are not those of blocks of weights {weights.shape}")
