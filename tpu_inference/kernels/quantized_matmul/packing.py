# SPDX-License-Identifier: Apache-2.0
"""Values of four bits, two a byte.

Byte j of a block of 128 has the code of column j in its low nibble and that of column 128 + j in its high one: each nibble of a tile of bytes is a
tile of neighbouring columns, and no lanes move when they are unpacked.
"""

from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np

Packed = Literal["int4", "e2m1"]
KINDS: tuple[str, ...] = get_args(Packed)
BLOCK = 256
"""Columns whose codes lie in neighbouring bytes."""
HALF = BLOCK // 2
ZERO = 8
"""The code of 0 of "int4", where no zero points say otherwise."""
_MINUS_ZERO = 8


def pack(codes: np.ndarray) -> np.ndarray:
    """uint8 [..., in / 2] of codes, uint8 [..., in] below 16. Those of e2m1 go through `without_minus_zero` first."""
    if codes.dtype != np.uint8 or codes.shape[-1] % BLOCK:
        raise ValueError(f"codes {codes.dtype}{codes.shape} are not uint8 [..., in] with whole blocks of {BLOCK}")
    if codes.size and codes.max() > 15:
        raise ValueError(f"a code is {codes.max()}; four bits hold no more than 15")
    blocks = codes.reshape(*codes.shape[:-1], -1, 2, HALF)
    packed = blocks[..., 0, :] | blocks[..., 1, :] << 4
    return packed.reshape(*codes.shape[:-1], codes.shape[-1] // 2)


def without_minus_zero(codes: np.ndarray) -> np.ndarray:
    """The same numbers of e2m1. The kernel makes e4m3 of them, whose -0 is NaN where the matrix unit reads it with another bias."""
    return np.where(codes == _MINUS_ZERO, np.uint8(0), codes)


def nibbles(packed: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Codes, uint8 [..., in / 2] each: those of the first halves of blocks of columns, and those of the second ones. As `halves` has them."""
    return packed & 15, packed >> 4


def halves(array: jax.Array) -> tuple[jax.Array, jax.Array]:
    """[..., in / 2] each: of [..., in], the first halves of blocks of columns, and the second ones."""
    blocks = array.reshape(*array.shape[:-1], -1, 2, HALF)
    low, high = (blocks[..., i, :].reshape(*array.shape[:-1], -1) for i in range(2))
    return low, high


def unpack(packed: jax.Array) -> jax.Array:
    """Codes, uint8 [..., in]."""
    blocks = [nibble.reshape(*packed.shape[:-1], -1, HALF) for nibble in nibbles(packed)]
    return jnp.stack(blocks, axis=-2).reshape(*packed.shape[:-1], -1)


def numbers(codes: jax.Array, kind: str) -> jax.Array:
    """float32, what codes mean: of "int4" code - `ZERO`, of "e2m1" the float."""
    if kind == "int4":  # by no wider integers, which keep XLA's CPU backend from converting several at a time
        return codes.astype(jnp.float32) - ZERO
    bits = codes & 7
    twice = jnp.where(bits < 4, bits, jnp.where(bits < 6, 2 * bits - 4, 4 * bits - 16))
    return twice.astype(jnp.float32) * (0.5 - (codes >> 3).astype(jnp.float32))
