# SPDX-License-Identifier: Apache-2.0
"""`tpu_inference.platforms.TpuPlatform`, the path vLLM's builtin TPU detection imports; loaded when first asked for."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tpu_inference.platforms.tpu_platform import TpuPlatform

__all__ = ["TpuPlatform"]


def __getattr__(name: str) -> Any:
    if name != "TpuPlatform":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from tpu_inference.platforms.tpu_platform import TpuPlatform

    return TpuPlatform
