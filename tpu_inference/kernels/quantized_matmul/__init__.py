# SPDX-License-Identifier: Apache-2.0
"""A matrix product with quantized weights."""

from tpu_inference.kernels.quantized_matmul.api import ACTIVATIONS, multiplies, quantized_matmul
from tpu_inference.kernels.quantized_matmul.packing import BLOCK, KINDS, ZERO, Packed, pack, unpack, without_minus_zero

__all__ = [
    "ACTIVATIONS",
    "BLOCK",
    "KINDS",
    "ZERO",
    "Packed",
    "multiplies",
    "pack",
    "quantized_matmul",
    "unpack",
    "without_minus_zero",
]
