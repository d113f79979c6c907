# SPDX-License-Identifier: Apache-2.0
"""Products of groups of rows, each with a weight of its own: experts of a mixture."""

from tpu_inference.kernels.forms import implementation_for
from tpu_inference.kernels.grouped_matmul.api import grouped_matmul, lies_across, lies_transposed

__all__ = ["grouped_matmul", "implementation_for", "lies_across", "lies_transposed"]
