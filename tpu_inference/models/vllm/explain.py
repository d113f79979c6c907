# SPDX-License-Identifier: Apache-2.0
"""What went wrong while a module was traced, said in terms of the model."""

import traceback
from types import TracebackType

import torch

from tpu_inference.compat.lowering import import_torchax
from tpu_inference.errors import TpuInferenceError

ADVICE = "Use --model-impl flax_nnx if there is a JAX class for it, or add the lowering (docs/pytorch_models.md says how) and tell us."


class LoweringError(TpuInferenceError):
    """A PyTorch operation that has no form in JAX, with where the model uses it."""


def explain(error: Exception, model: torch.nn.Module) -> Exception:
    """A LoweringError in place of torchax's own errors about operations and tensors; other errors as they are."""
    if isinstance(error, import_torchax().tensor.OperatorNotFound):
        return LoweringError(f"{error} to JAX{_place(error.__traceback__, model)}. {ADVICE}")
    if isinstance(error, AssertionError) and "mixed math" in str(error):
        what = "a PyTorch tensor that is no parameter or buffer of the model meets those of the step"
        return LoweringError(f"{what}{_place(error.__traceback__, model)}. {ADVICE}")
    return error


def _place(trace: TracebackType | None, model: torch.nn.Module) -> str:
    """The innermost line of a module of `model`, with the module's name."""
    names = {id(module): name or "the model itself" for name, module in model.named_modules()}
    place = ""
    for frame, line in traceback.walk_tb(trace):
        module = frame.f_locals.get("self")
        if (
            isinstance(module, torch.nn.Module)
            and id(module) in names
            and "torch/nn/modules" not in frame.f_code.co_filename
        ):
            place = f"; used by {names[id(module)]} ({type(module).__name__}) at {frame.f_code.co_filename}:{line}"
    return place
