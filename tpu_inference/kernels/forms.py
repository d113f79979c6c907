# SPDX-License-Identifier: Apache-2.0
"""Which form of an op a device runs."""

from typing import Literal

import jax

Implementation = Literal["pallas", "pallas_interpret", "xla", "reference"]
NO_PALLAS = ("TPU v2", "TPU v3")
"""Device kinds that the kernels are not compiled for."""


def implementation_for(device: jax.Device) -> Implementation:
    """The form that a kind of device runs."""
    return "pallas" if device.platform == "tpu" and not device.device_kind.startswith(NO_PALLAS) else "xla"
