# SPDX-License-Identifier: Apache-2.0
"""Operations that vLLM's models use and torchax has no lowering of. docs/pytorch_models.md says how to add one."""

from collections.abc import Callable
from typing import Any

import torch
from torch.utils import _mode_utils

from tpu_inference.compat.lowering import import_torchax, operations_that_call_modules


def _of_torch(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` by torch itself: it takes and gives no tensors."""

    def outside(*args: Any, **kwargs: Any) -> Any:
        with _mode_utils.no_dispatch(), torch._C.DisableTorchFunction():
            return function(*args, **kwargs)

    return outside


LOWERINGS: dict[Any, Callable[..., Any]] = {
    torch.promote_types: _of_torch(torch.promote_types),
}
"""Operation -> what computes it, of torchax tensors."""


def register() -> None:
    """Tell torchax, once the model is built."""
    env = import_torchax().default_env()
    for operation, function in (LOWERINGS | operations_that_call_modules()).items():
        env.override_op_definition(operation, function)
