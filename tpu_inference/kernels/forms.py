# SPDX-License-Identifier: Apache-2.0
"""Which form of an op a device runs, and for which chip its kernels are blocked."""

from typing import Literal

import jax

Implementation = Literal["pallas", "pallas_interpret", "xla", "reference"]
NO_PALLAS = ("TPU v2", "TPU v3")
"""Device kinds that the kernels are not compiled for."""
_CHIPS = {
    "TPU v4": "v4", "TPU v5": "v5p", "TPU v5p": "v5p", "TPU v5 lite": "v5e", "TPU v5e": "v5e", "TPU v6 lite": "v6e", "TPU v6e": "v6e",
    "TPU7x": "tpu7x",
}  # fmt: skip
"""Device kind -> the name of the chip, as in `tuned/<chip>.json`."""


class Form(str):
    """A form of an op, with the chip that it is to run on: a plain "pallas" is blocked for no chip in particular."""

    chip: str | None

    def __new__(cls, name: Implementation, chip: str | None = None) -> "Form":
        form = super().__new__(cls, name)
        form.chip = chip
        return form


def chip_of(form: str) -> str | None:
    """The chip of a `Form`; None for a plain string."""
    return getattr(form, "chip", None)


def implementation_for(device: jax.Device) -> Form:
    """The form that a kind of device runs."""
    pallas = device.platform == "tpu" and not device.device_kind.startswith(NO_PALLAS)
    return Form("pallas" if pallas else "xla", _CHIPS.get(device.device_kind))
