# SPDX-License-Identifier: Apache-2.0
"""torch and torchax around vLLM's PyTorch classes."""

import atexit
import logging
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from types import ModuleType
from typing import Any


def quiet_torch_accelerator() -> None:
    """Make the calls that vLLM makes on "the accelerator" do nothing: torch has none here, JAX holds the device."""
    import torch

    def nothing(*args: object, **kwargs: object) -> None:
        return None

    for name in ("empty_cache", "empty_host_cache", "synchronize"):
        if hasattr(torch.accelerator, name):
            setattr(torch.accelerator, name, nothing)


class _DroppedOverload:
    """Stands where torchax names an overload that torch no longer has: nothing ever calls it."""


@contextmanager
def _dropped_overloads_tolerated() -> Iterator[None]:
    from torch._ops import OpOverloadPacket

    original = OpOverloadPacket.__getattr__

    def tolerant(packet: Any, name: str) -> Any:
        try:
            return original(packet, name)
        except AttributeError:
            if name.startswith("_"):
                raise
            return _DroppedOverload()

    OpOverloadPacket.__getattr__ = tolerant
    try:
        yield
    finally:
        OpOverloadPacket.__getattr__ = original


def import_torchax() -> ModuleType:
    """torchax with its lowerings and decompositions. Only processes that serve a PyTorch model import it."""
    if "torchax" not in sys.modules:
        with _dropped_overloads_tolerated():
            for name in ("torchax", "torchax.decompositions", "torchax.ops.jaten", "torchax.ops.jtorch"):
                import_module(name)
        quiet_torch_accelerator()  # its import makes "jax" torch's accelerator
        torchax = sys.modules["torchax"]
        for tensor in (torchax.tensor.Tensor, torchax.view.View):
            tensor.type_as = lambda self, other: self.to(other.dtype)
        # It warns of every `.data`, which vLLM's norms read.
        logging.getLogger("torchax.tensor").setLevel(logging.ERROR)
    return sys.modules["torchax"]


def operations_that_call_modules() -> dict[Any, Callable[..., Any]]:
    """vLLM's operations that call back into a model's modules, each with its Python function: torch's dispatcher would leave torchax on the way.

    Those of modules that are imported by now.
    """
    import torch

    experts = sys.modules.get("vllm.model_executor.models.transformers.moe")
    return (
        {} if experts is None else {torch.ops.vllm.transformers_moe_forward.default: experts._transformers_moe_forward}
    )


@cache
def _rendezvous() -> str:
    """A file where the process group of one meets, as long as the process lives."""
    directory = tempfile.mkdtemp(prefix="tpu-inference-")
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    return f"file://{directory}/store"


def start_torch_alone(vllm_config: Any) -> None:
    """What vLLM's PyTorch classes need around them: a process group of one, and operations that are plain torch."""
    import vllm.ir
    from vllm.config import set_current_vllm_config
    from vllm.distributed import (
        destroy_model_parallel,
        ensure_model_parallel_initialized,
        init_distributed_environment,
    )

    vllm.ir.set_default_torch_wrap(False)
    vllm_config.kernel_config.ir_op_priority.set_default()
    # Which groups there are depends on the model: those of one served before in this process may not do.
    destroy_model_parallel()
    with set_current_vllm_config(vllm_config):
        init_distributed_environment(
            world_size=1, rank=0, local_rank=0, distributed_init_method=_rendezvous(), backend="gloo"
        )
        ensure_model_parallel_initialized(1, 1)
