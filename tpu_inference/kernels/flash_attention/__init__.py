# SPDX-License-Identifier: Apache-2.0
"""Dense attention, for encoders and vision towers."""

from tpu_inference.kernels.flash_attention.api import flash_attention
from tpu_inference.kernels.forms import implementation_for

__all__ = ["flash_attention", "implementation_for"]
