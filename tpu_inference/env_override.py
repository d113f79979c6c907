# SPDX-License-Identifier: Apache-2.0
"""Defaults of the process environment that must stand before JAX or torch is imported.

Imported first by every module that imports JAX on the way to a device (the platform, the worker). What the user set always stays.
"""

import os
from typing import NamedTuple

from tpu_inference import tpu_info
from tpu_inference.errors import ConfigError


class Default(NamedTuple):
    """A variable, the value it gets when the user set none, and why."""

    name: str
    value: str
    why: str


ALWAYS = (
    Default("VLLM_USE_V2_MODEL_RUNNER", "0", "It selects between vLLM's own GPU runners; ours replaces both."),
    Default(
        "VLLM_XLA_USE_SPMD",
        "1",
        "One process drives all devices of a host: vLLM then chooses the `uni` executor itself, and `mp` is the user's explicit wish.",
    ),
)
ON_CPU = (
    Default("JAX_PLATFORMS", "cpu", "With libtpu installed and no TPU, JAX would first look for one for a while."),
    Default(
        "TPU_SKIP_MDS_QUERY",
        "1",
        "libtpu, when used to compile ahead of time, asks a metadata server that is not there.",
    ),
)
ON_TPU = (
    Default("JAX_PLATFORMS", "tpu,cpu", "Left open, JAX falls back to the CPU silently when the TPU does not start."),
)


def apply() -> None:
    """Set the defaults; idempotent, and called when this module is imported."""
    try:
        detection = tpu_info.detect_once()
    except ConfigError:
        return  # the platform raises it, where it is not swallowed
    for default in (*ALWAYS, *(ON_TPU if detection.platform == "tpu" else ON_CPU)):
        os.environ.setdefault(default.name, default.value)
    if detection.platform == "cpu":
        # The user's list may name the absent TPU first ("tpu,cpu"), and JAX refuses a list with an absent backend.
        os.environ["JAX_PLATFORMS"] = "cpu"


apply()
