# SPDX-License-Identifier: Apache-2.0
"""The ops that have named shapes, and a shape's compile for a chip."""

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import tpu_inference.kernels
from tpu_inference.errors import ConfigError
from tpu_inference.kernels.forms import implementation_for
from tpu_inference.tools.schedule import TOPOLOGIES

CHIPS = ("v6e", "v5e", "tpu7x")
"""Reported where no chip is named."""


TOPOLOGIES_OF_EIGHT = {
    "v4": "v4:2x2x2", "v5e": "v5e:2x4", "v5p": "v5p:2x2x2", "v6e": "v6e:2x4", "tpu7x": "tpu7x:2x2x1",
}  # fmt: skip
"""The smallest with eight devices, for ops of several."""


class Shape(Protocol):
    """What an entry of `SHAPES` in `kernels/<op>/shapes.py` offers."""

    about: str
    dtype: str
    """Of the matrix products, for the peak."""
    chips: tuple[str, ...]
    """Those it is of interest for; all where empty."""
    donated: tuple[int, ...]
    useful_bytes: int
    useful_flops: int

    def arguments(self, device: Any) -> tuple[Any, ...]:
        """Abstract ones of `function`, by position."""

    def function(self, device: Any, config: Any = None) -> Callable:
        """The op as a device runs it, blocked by `config` where that is not None."""

    def key(self, device: Any) -> Any:
        """Its `str` is that of tuned tables."""

    def form(self, device: Any) -> str:
        """The form that the device runs, and why where that is not "pallas"."""

    def workload(self, device: Any) -> Mapping[str, Mapping[int, Any]]:
        """As `schedule.workload` takes it."""


def _shapes_of(op: str) -> Mapping[str, Shape]:
    return getattr(importlib.import_module(f"tpu_inference.kernels.{op}.shapes"), "SHAPES", {})


def ops() -> list[str]:
    """Names of packages under `kernels` that have SHAPES."""
    root = Path(tpu_inference.kernels.__file__).parent
    names = sorted(path.parent.name for path in root.glob("*/shapes.py"))
    return [name for name in names if _shapes_of(name)]


def pick(what: str, name: str, known: Any) -> str:
    """`name`; ConfigError, with the known ones, where it is none of them."""
    if name not in known:
        raise ConfigError(f"{what} {name!r} is not known; known are: {', '.join(known)}")
    return name


def shapes(op: str) -> Mapping[str, Shape]:
    """Raises ConfigError, with the known ones, for an unknown op."""
    return _shapes_of(pick("op", op, ops()))


def device_of(chip: str) -> Any:
    """A device of a topology of the chip. Loads libtpu."""
    from jax.experimental import topologies

    return topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGIES[chip]).devices[0]


def lower(shape: Shape, device: Any, config: Any = None) -> Any:
    """Ready to be compiled for the device."""
    import jax
    from jax.sharding import SingleDeviceSharding

    if getattr(shape, "devices", 1) > 1:
        return _lower_for_many(shape, device, config)
    sharding = SingleDeviceSharding(device)
    function = shape.function(device, config)
    jitted = jax.jit(function, in_shardings=sharding, out_shardings=sharding, donate_argnums=shape.donated)
    return jitted.lower(*shape.arguments(device))


def _lower_for_many(shape: Any, device: Any, config: Any) -> Any:
    """The same of an op that the devices of a mesh axis run together, with the shape's `specs` of arguments and result."""
    import jax
    import numpy as np
    from jax.experimental import topologies
    from jax.sharding import NamedSharding

    chip = implementation_for(device).chip
    found = topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGIES_OF_EIGHT[chip]).devices
    mesh = jax.sharding.Mesh(np.array(found[: shape.devices]), ("model",))
    ins, outs = shape.specs()
    function = jax.shard_map(shape.function(device, config), mesh=mesh, in_specs=ins, out_specs=outs, check_vma=False)
    shardings = [NamedSharding(mesh, spec) for spec in ins]
    jitted = jax.jit(function, in_shardings=shardings, donate_argnums=shape.donated)
    return jitted.lower(*shape.arguments(device))


@dataclass(frozen=True)
class Case:
    """A shape of an op on a chip."""

    op: str
    name: str
    chip: str

    @classmethod
    def of(cls, op: str, name: str, chip: str) -> "Case":
        """Raises ConfigError, with the known ones, for what is unknown."""
        return cls(op, pick(f"shape of {op}", name, shapes(op)), pick("chip", chip, TOPOLOGIES))

    @property
    def shape(self) -> Shape:
        return shapes(self.op)[self.name]

    @property
    def device(self) -> Any:
        return device_of(self.chip)

    def lower(self) -> Any:
        """Ready to be compiled for the chip."""
        return lower(self.shape, self.device)


def cases(op: str, chips: tuple[str, ...] = CHIPS) -> list[Case]:
    """Every shape of an op on every chip that it is of interest for."""
    named = shapes(op).items()
    return [
        Case.of(op, name, chip) for chip in chips for name, shape in named if not shape.chips or chip in shape.chips
    ]
