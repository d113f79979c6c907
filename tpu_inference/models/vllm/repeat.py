# SPDX-License-Identifier: Apache-2.0
"""Layers that repeat are traced once: their parameters are stacked and scanned over, as those of JAX models are.

A model's own code loops over a list of layers, and stays as it is: the list yields the first layers as they are, then one callable that stands for
all that compute alike, then the last ones. Which do is decided by tracing each layer alone and comparing what came of it.
"""

import itertools
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch

from tpu_inference.compat.lowering import import_torchax
from tpu_inference.layers.vllm.context import StepContext, current_step
from tpu_inference.models.vllm.exchange import Places

MAX_PERIOD = 8
"""Layers of a pattern at most: Gemma 3 has five of one kind and one of another."""
MIN_LAYERS = 4

Slot = str
"""An argument's position, in two digits, or its keyword."""


@dataclass(frozen=True)
class Repeat:
    """`groups` times `period` layers of one list, from layer `first` on."""

    path: str
    """Of the list in the model."""
    first: int
    period: int
    groups: int
    carried: tuple[tuple[Slot, int], ...]
    """(argument, output): what each layer takes from the one before; other arguments are the same for all."""

    @property
    def end(self) -> int:
        return self.first + self.period * self.groups

    def names(self, position: int, rest: str) -> list[str]:
        """Of a group's layer at `position` the parameter `rest`: its name in every group."""
        return [f"{self.path}.{self.first + group * self.period + position}.{rest}" for group in range(self.groups)]

    def stack_name(self, position: int, rest: str) -> str:
        return f"{self.path}.[{self.first + position}:{self.end}:{self.period}].{rest}"

    def stacks(self, names: set[str]) -> dict[str, list[str]]:
        """Name of each stack -> names of what it holds, given the names of all parameters and buffers.

        What a group has that others have not is shared among the layers (torch counts it for the first one): it is not stacked.
        """
        found: dict[str, list[str]] = {}
        for position in range(self.period):
            prefix = f"{self.path}.{self.first + position}."
            for name in sorted(name for name in names if name.startswith(prefix)):
                rest = name.removeprefix(prefix)
                if names.issuperset(members := self.names(position, rest)):
                    found[self.stack_name(position, rest)] = members
        return found

    def by_position(self, state: dict[str, Any]) -> list[dict[str, Any]]:
        """The stacks in `state`, by the parameter's name in its layer, for each position."""
        prefixes = [self.stack_name(position, "") for position in range(self.period)]
        return [{k.removeprefix(p): v for k, v in state.items() if k.startswith(p)} for p in prefixes]


def _leaves(value: Any) -> list[Any]:
    return jax.tree.leaves(value, is_leaf=lambda leaf: isinstance(leaf, torch.Tensor))


def _map(fn: Callable[[Any], Any], tree: Any) -> Any:
    """`tree` with `fn` of its tensors (torch's or JAX's)."""
    is_tensor = lambda leaf: isinstance(leaf, torch.Tensor | jax.Array)  # noqa: E731
    return jax.tree.map(lambda leaf: fn(leaf) if is_tensor(leaf) else leaf, tree, is_leaf=is_tensor)


def _to_jax(tree: Any) -> Any:
    return _map(lambda tensor: tensor.jax(), tree)


def _to_torch(tree: Any) -> Any:
    return _map(import_torchax().interop.torch_view, tree)


def _slots(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[Slot, Any]:
    return {f"{i:02}": value for i, value in enumerate(args)} | kwargs


def _call_layer(layer: torch.nn.Module, state: dict[str, jax.Array], arguments: dict[Slot, Any]) -> Any:
    """The layer's outputs, as a pytree of JAX arrays; `arguments` hold JAX arrays too."""
    arguments = {slot: _to_torch(value) for slot, value in arguments.items()}
    positional = [arguments[slot] for slot in sorted(arguments) if slot.isdigit()]
    keywords = {slot: value for slot, value in arguments.items() if not slot.isdigit()}
    with Places(layer).holding(_to_torch(state)):
        return _to_jax(layer(*positional, **keywords))


@dataclass
class _Call:
    """One call of a layer while the whole model was traced, and the layer traced alone."""

    arguments: dict[Slot, Any]
    outputs: list[Any]
    program: str
    shared: tuple[Any, ...]
    """Arrays that are none of the layer's own: the identity of the model's, the value of constants."""


class LayerList(torch.nn.ModuleList):
    """A model's list of layers, which yields the scanned ones as one where the step has stacks for it."""

    repeat: Repeat | None = None
    walked = False
    """Whether the model iterates over it; one that asks for layers by their index would never meet the scan."""

    def __iter__(self) -> Iterator[Any]:
        self.walked = True
        layers = list(super().__iter__())
        repeat = self.repeat
        if repeat is None or repeat.path not in current_step().stacks:
            yield from layers
            return
        yield from layers[: repeat.first]
        yield _Scan(repeat, layers)
        yield from layers[repeat.end :]

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice) and index.indices(len(self)) == (0, len(self), 1):
            return list(self)
        return super().__getitem__(index)


class _Scan:
    """Stands for the layers of all groups in the model's own loop."""

    def __init__(self, repeat: Repeat, layers: list[torch.nn.Module]) -> None:
        self._repeat = repeat
        self._templates = layers[repeat.first : repeat.first + repeat.period]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._templates[0], name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        step, repeat = current_step(), self._repeat
        arguments = {slot: _to_jax(value) for slot, value in _slots(args, kwargs).items()}
        carried = dict(repeat.carried)
        fixed = {slot: value for slot, value in arguments.items() if slot not in carried}
        structure = None

        def body(carry: Any, group: Any) -> Any:
            nonlocal structure
            flowing, kv_cache = carry
            states, offset = group
            outputs = None
            step.kv_cache, before = kv_cache, step.layer_offset
            step.layer_offset = before + offset
            for layer, state in zip(self._templates, states, strict=True):
                outputs = _call_layer(layer, state, fixed | flowing)
                leaves = jax.tree.leaves(outputs)
                flowing = {slot: leaves[output] for slot, output in carried.items()}
            step.layer_offset = before
            structure = jax.tree.structure(outputs)
            return (flowing, step.kv_cache), None

        offsets = jnp.arange(repeat.groups, dtype=jnp.int32) * repeat.period
        carry = ({slot: arguments[slot] for slot in carried}, step.kv_cache)
        (flowing, step.kv_cache), _ = jax.lax.scan(body, carry, (step.stacks[repeat.path], offsets))
        leaves = [flowing[slot] for slot, _ in sorted(repeat.carried, key=lambda pair: pair[1])]
        return _to_torch(jax.tree.unflatten(structure, leaves))


class _Recorder:
    """Follows a model's own loop over one list of layers while the model is traced."""

    def __init__(self, path: str, layers: torch.nn.ModuleList, state: dict[str, jax.Array]) -> None:
        self.path, self.layers, self._state = path, layers, state
        held = [{id(tensor) for _, tensor in _tensors(layer)} for layer in layers]
        times = Counter(itertools.chain.from_iterable(held))
        self._own = [{name for name, tensor in _tensors(layer) if times[id(tensor)] == 1} for layer in layers]
        self.calls: list[_Call] = []
        self.in_order = True

    def hooks(self) -> list[Any]:
        return [
            layer.register_forward_hook(lambda module, args, kwargs, out, i=i: self._record(i, args, kwargs, out), with_kwargs=True)
            for i, layer in enumerate(self.layers)
        ]  # fmt: skip

    def _record(self, index: int, args: Any, kwargs: Any, outputs: Any) -> None:
        if getattr(self, "_inside", False):
            return
        self.in_order &= index == len(self.calls)
        arguments = _slots(args, kwargs)
        self._inside = True
        try:
            program, shared = self._trace_alone(index, arguments)
        finally:
            self._inside = False
        self.calls.append(_Call(arguments, _leaves(outputs), program, shared))

    def _trace_alone(self, index: int, arguments: dict[Slot, Any]) -> tuple[str, tuple[Any, ...]]:
        step, layer, prefix = current_step(), self.layers[index], f"{self.path}.{index}."
        # What layers share is the model's, seen through the trace around this one.
        own = {name: self._state[prefix + name] for name in self._own[index] if prefix + name in self._state}
        names = [name for name in step.index_of_layer if name.startswith(prefix) or f".{prefix}" in name]
        first = min((step.index_of_layer[name] for name in names), default=0)
        kept = (step.kv_cache, step.layer_offset, step.index_of_layer, dict(step.written))
        tensors = {slot: _to_jax(value) for slot, value in arguments.items()}
        constant = {slot: value for slot, value in tensors.items() if not jax.tree.leaves(value)}
        flowing = {slot: value for slot, value in tensors.items() if slot not in constant}

        def alone(own: Any, kv_cache: Any, offset: Any, flowing: Any) -> Any:
            step.kv_cache, step.layer_offset = kv_cache, offset
            outputs = _call_layer(layer, own, constant | flowing)
            return outputs, step.kv_cache

        step.index_of_layer = {name: value - first for name, value in step.index_of_layer.items()}
        try:
            jaxpr = jax.make_jaxpr(alone)(own, step.kv_cache, jnp.int32(0), flowing)
        finally:
            step.kv_cache, step.layer_offset, step.index_of_layer, step.written = kept
        return str((jaxpr.jaxpr, sorted(own), constant)), tuple(map(_identity, jaxpr.consts))


def _tensors(module: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from module.named_parameters()
    yield from module.named_buffers()


def _identity(const: Any) -> Any:
    """Equal for two constants only if they are equal."""
    return (
        id(const) if isinstance(const, jax.core.Tracer) else (np.asarray(const).dtype.name, np.asarray(const).tobytes())
    )


def _carried(before: _Call, after: _Call) -> tuple[tuple[Slot, int], ...] | None:
    """What `after` takes from `before`; None where something else changes in between."""
    if before.arguments.keys() != after.arguments.keys():
        return None
    carried = []
    for slot, value in after.arguments.items():
        source = next((i for i, out in enumerate(before.outputs) if out is value), None)
        if source is not None:
            carried.append((slot, source))
        elif not _same(value, before.arguments[slot]):
            return None
    return tuple(carried) if len(carried) == len(before.outputs) else None


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor) or isinstance(b, torch.Tensor):
        return a is b
    if isinstance(a, tuple | list) and isinstance(b, tuple | list):
        return len(a) == len(b) and all(map(_same, a, b))
    return bool(a == b)


def _plan(path: str, calls: list[_Call]) -> Repeat | None:
    """The repetition that leaves the fewest layers to compile."""
    best: Repeat | None = None
    total = len(calls)
    alike = [(call.program, call.shared) for call in calls]
    links = [_carried(a, b) for a, b in itertools.pairwise(calls)]
    for period in range(1, MAX_PERIOD + 1):
        for first in range(1, total - 2 * period + 1):
            carried = links[first - 1]
            groups = 1
            while (
                (end := first + (groups + 1) * period) <= total
                and alike[end - period : end] == alike[first : first + period]
                and all(link == carried for link in links[first - 1 : end - 1])
            ):
                groups += 1
            found = Repeat(path, first, period, groups, carried or ())
            if carried and groups > 1 and (best is None or _left(found, total) < _left(best, total)):
                best = found
    return best


def _left(repeat: Repeat, total: int) -> int:
    """Layers to compile."""
    return total - repeat.period * (repeat.groups - 1)


def lists_of_layers(model: torch.nn.Module) -> dict[str, torch.nn.ModuleList]:
    """Lists that may hold a model's layers: the outermost ones that are long enough."""
    found: dict[str, torch.nn.ModuleList] = {}
    for path, module in model.named_modules():
        if (
            type(module) is torch.nn.ModuleList
            and len(module) >= MIN_LAYERS
            and not any(path.startswith(f"{p}.") for p in found)
        ):
            found[path] = module
    return found


def find_repeats(
    model: torch.nn.Module, trace: Callable[[Callable[[StepContext, dict[str, jax.Array]], None]], None]
) -> list[Repeat]:
    """The repetitions of `model`.

    `trace(observe)` traces the whole model once, and calls `observe(step, state)` first.
    """
    recorders: list[_Recorder] = []
    hooks: list[Any] = []

    def observe(step: StepContext, state: dict[str, jax.Array]) -> None:
        for path, layers in lists_of_layers(model).items():
            recorders.append(_Recorder(path, layers, state))
            hooks.extend(recorders[-1].hooks())
            layers.__class__ = LayerList

    try:
        trace(observe)
    finally:
        for hook in hooks:
            hook.remove()
    repeats = [
        repeat
        for recorder in recorders
        if recorder.layers.walked and recorder.in_order and len(recorder.calls) == len(recorder.layers)
        if (repeat := _plan(recorder.path, recorder.calls)) is not None
    ]
    for repeat in repeats:
        model.get_submodule(repeat.path).repeat = repeat
    return repeats
