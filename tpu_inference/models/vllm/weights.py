# SPDX-License-Identifier: Apache-2.0
"""From vLLM's loaders to the devices: each parameter goes there as soon as its last piece is read, and leaves the host.

vLLM allocates parameters without writing them, so that those not read yet take no memory; what the host holds at a time is the parameters being
assembled.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from jax.sharding import Mesh
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
from vllm.model_executor.model_loader.weight_utils import default_weight_loader

from tpu_inference.layers.common.quantization import without_minus_zero
from tpu_inference.layers.common.sharding import MODEL_AXIS, named_sharding
from tpu_inference.layers.vllm.placement import Placement, placements
from tpu_inference.layers.vllm.rounding import CHECKPOINT_NUMEL, to_numpy
from tpu_inference.models.common.checkpoint import CheckpointError
from tpu_inference.models.vllm.repeat import Repeat

State = dict[str, Any]
"""Parameters and buffers on the devices (or their shapes), by their names in the module or of their stack."""


@dataclass(frozen=True)
class OwnedParameter:
    """A parameter, where it was first found."""

    owner: torch.nn.Module
    prefix: str
    """Of the owner, with its dot."""
    name: str
    tensor: torch.Tensor
    shape: torch.Size
    placed: tuple[Placement, ...]

    def arrays(self) -> Iterator[tuple[str, Placement, tuple[int, ...]]]:
        """(name, placement, shape) of each array that it becomes."""
        for placement in self.placed:
            shape = list(self.shape)
            if placement.rows is not None:
                shape[placement.along] = len(placement.rows)
            yield self.prefix + placement.name, placement, tuple(shape)

    @property
    def expected_numel(self) -> int:
        """How many numbers checkpoints hold of it: padding of the vocabulary, and scales that are repeated, are not among them."""
        layer = self.owner
        if isinstance(layer, VocabParallelEmbedding) and self.shape[0] == layer.num_embeddings_padded:
            return layer.num_embeddings * self.shape[1:].numel()
        return getattr(self.tensor, CHECKPOINT_NUMEL, self.shape.numel())


def _owned_parameters(model: torch.nn.Module, shards: int) -> list[OwnedParameter]:
    """Every parameter once, also where several modules share it."""
    found: dict[int, OwnedParameter] = {}
    for path, module in model.named_modules():
        prefix = f"{path}." if path else ""
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) not in found:
                placed = placements(module, name, parameter, shards)
                found[id(parameter)] = OwnedParameter(module, prefix, name, parameter, parameter.shape, placed)
    return list(found.values())


def jax_dtype(dtype: torch.dtype) -> Any:
    """What JAX holds it as; 64-bit numbers become 32-bit ones, as everywhere in JAX."""
    return jax.dtypes.canonicalize_dtype(jnp.dtype(str(dtype).removeprefix("torch.")))


@partial(jax.jit, donate_argnums=0)
def _set_in_stack(stack: jax.Array, array: jax.Array, index: int) -> jax.Array:
    return stack.at[index].set(array)


class DeviceState:
    """Collects what a module computes with, on the devices of `mesh`; the module then holds no numbers."""

    def __init__(self, model: torch.nn.Module, mesh: Mesh) -> None:
        """Takes the parameters of `model` for its own: one such object a model."""
        self._model, self._mesh = model, mesh
        self._owned = _owned_parameters(model, mesh.shape[MODEL_AXIS])
        self._stub_renamed()
        self._buffers = {name: buffer for name, buffer in model.named_buffers() if buffer.numel()}
        self._stacks: dict[str, list[str]] = {}
        self._in_stack: dict[str, tuple[str, int]] = {}
        self._state: State = {}
        self._moved: set[int] = set()
        self._missing: dict[int, int] = {}

    def stack(self, repeats: Sequence[Repeat]) -> None:
        """Gather the parameters of layers that repeat; before any is loaded."""
        names = {name for owned in self._owned for name, _, _ in owned.arrays()} | set(self._buffers)
        self._stacks = {stack: members for repeat in repeats for stack, members in repeat.stacks(names).items()}
        self._in_stack = {name: (s, i) for s, members in self._stacks.items() for i, name in enumerate(members)}

    def _stub_renamed(self) -> None:
        """A name in the module for each array; a parameter whose rows are moved is not to be found by its own."""
        for owned in self._owned:
            for placement in owned.placed:
                if placement.name not in owned.owner._parameters:
                    stub = torch.nn.Parameter(torch.empty(0, dtype=owned.tensor.dtype), requires_grad=False)
                    owned.owner.register_parameter(placement.name, stub)

    # From a checkpoint.

    def stream(self) -> None:
        """Move each parameter when vLLM's loaders have filled it."""
        for owned in self._owned:
            load = getattr(owned.tensor, "weight_loader", default_weight_loader)
            owned.tensor.weight_loader = self._counting(load, owned)
            self._missing[id(owned)] = owned.expected_numel

    def _counting(self, load: Callable[..., Any], owned: OwnedParameter) -> Callable[..., Any]:
        def counting(param: torch.Tensor, loaded_weight: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            if not param.numel():  # read once more after it was moved: the last one counts, as in vLLM
                param.data = torch.empty(owned.shape, dtype=param.dtype)
                self._missing[id(owned)] = owned.expected_numel
            result = load(param, loaded_weight, *args, **kwargs)
            self._missing[id(owned)] -= loaded_weight.numel()
            if self._missing[id(owned)] <= 0:
                self._move(owned)
            return result

        return counting

    def _move(self, owned: OwnedParameter) -> None:
        whole = to_numpy(owned.tensor.data)
        for name, placement, _ in owned.arrays():
            part = whole if placement.rows is None else whole.take(placement.rows, axis=placement.along)
            self._put(name, part, placement.axes)
        owned.tensor.data = torch.empty(0, dtype=owned.tensor.dtype)
        self._moved.add(id(owned))

    def _put(self, name: str, array: np.ndarray, axes: tuple[str | None, ...]) -> None:
        array = array.astype(jax.dtypes.canonicalize_dtype(array.dtype), copy=False)
        on_device = jax.device_put(without_minus_zero(array), named_sharding(self._mesh, axes))
        if name in self._in_stack:
            stack, index = self._in_stack[name]
            if stack not in self._state:
                self._state[stack] = self._zeros((len(self._stacks[stack]), *array.shape), array.dtype, axes)
            self._state[stack] = _set_in_stack(self._state[stack], on_device, index)
        else:
            self._state[name] = on_device
        jax.block_until_ready(self._state[self._in_stack.get(name, (name,))[0]])

    def _zeros(self, shape: tuple[int, ...], dtype: Any, axes: tuple[str | None, ...]) -> jax.Array:
        sharding = named_sharding(self._mesh, (None, *axes))
        return jax.jit(lambda: jnp.zeros(shape, dtype), out_shardings=sharding)()

    def check(self, where: str, loaded: Collection[str], known: Sequence[str] = ()) -> None:
        """Raises CheckpointError that names the weights of linear layers, embeddings and experts that were not read: vLLM lets those pass.

        Args:
            loaded: names that the model says it has loaded; some models fill parameters without asking the parameters' loaders.
            known: what else is wrong, in the error too.
        """
        problems = list(known)
        for owned in self._owned:
            missing, expected = self._missing[id(owned)], owned.expected_numel
            unread = missing == expected and owned.prefix + owned.name not in loaded
            partly = 0 < missing < expected
            if isinstance(owned.owner, LinearBase | VocabParallelEmbedding | RoutedExperts) and (unread or partly):
                kind = "missing" if unread else f"incomplete ({expected - missing} of {expected} numbers)"
                problems.append(f"{kind}: {owned.prefix}{owned.name} {list(owned.shape)}")
        if problems:
            raise CheckpointError(where, problems)

    def finish(self) -> State:
        """Move what is left, buffers too, and parameters that the model made while it was loaded (a head's bias)."""
        known = {id(owned.tensor) for owned in self._owned}
        made = _owned_parameters(self._model, self._mesh.shape[MODEL_AXIS])
        self._owned += [owned for owned in made if owned.tensor.numel() and id(owned.tensor) not in known]
        for owned in self._owned:
            if id(owned) not in self._moved:
                self._move(owned)
        for name, buffer in self._buffers.items():
            self._put(name, to_numpy(buffer), (None,) * buffer.ndim)
        return self._state

    # From nothing.

    def abstract(self) -> State:
        """Shapes and shardings of the arrays."""
        shapes: State = {}
        for owned in self._owned:
            for name, placement, shape in owned.arrays():
                self._describe(shapes, name, shape, owned.tensor.dtype, placement.axes)
        for name, buffer in self._buffers.items():
            self._describe(shapes, name, tuple(buffer.shape), buffer.dtype, (None,) * buffer.ndim)
        return shapes

    def _describe(self, shapes: State, name: str, shape: tuple[int, ...], dtype: torch.dtype, axes: Any) -> None:
        if name in self._in_stack:
            name, _ = self._in_stack[name]
            shape, axes = (len(self._stacks[name]), *shape), (None, *axes)
        shapes[name] = jax.ShapeDtypeStruct(shape, jax_dtype(dtype), sharding=named_sharding(self._mesh, axes))

    def fill(self, make: Callable[[str, jax.ShapeDtypeStruct], jax.Array]) -> State:
        """Parameters as `make(name, shape and sharding)` makes them; buffers are the module's own."""
        for owned in self._owned:
            owned.tensor.data = torch.empty(0, dtype=owned.tensor.dtype)
            self._moved.add(id(owned))
        buffers = {self._in_stack.get(name, (name,))[0] for name in self._buffers}
        self._state = {name: make(name, shape) for name, shape in self.abstract().items() if name not in buffers}
        return self.finish()


def register_loose_tensors(model: torch.nn.Module) -> None:
    """Make buffers of tensors that modules keep as plain attributes, so that they are found."""
    for module in model.modules():
        loose = {name: value for name, value in vars(module).items() if isinstance(value, torch.Tensor)}
        for name, value in loose.items():
            delattr(module, name)
            module.register_buffer(name, value, persistent=False)
