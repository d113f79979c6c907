# SPDX-License-Identifier: Apache-2.0
"""A matrix product with quantized weights."""

from tpu_inference.kernels.quantized_matmul.api import ACTIVATIONS, quantized_matmul

__all__ = ["ACTIVATIONS", "quantized_matmul"]
