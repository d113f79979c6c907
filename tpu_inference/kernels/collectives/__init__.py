# SPDX-License-Identifier: Apache-2.0
"""Products that hide what devices send each other for them, and the exchange of rows between devices."""

from tpu_inference.kernels.collectives.api import all_gather_matmul, matmul_reduce_scatter, ragged_all_to_all

__all__ = ["all_gather_matmul", "matmul_reduce_scatter", "ragged_all_to_all"]
