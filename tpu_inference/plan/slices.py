# SPDX-License-Identifier: Apache-2.0
"""TPU slices that can be rented, as data, and their devices as the compiler sees them."""

import math
from dataclasses import dataclass
from typing import Any

from tpu_inference.errors import ConfigError
from tpu_inference.tpu_info import CHIPS, GIB, ChipSpec

_FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBES = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8")
TOPOLOGIES: dict[str, tuple[str, ...]] = {
    "v3": ("2x2", "4x4", "8x8", "16x16"),
    "v4": _CUBES,
    "v5e": _FLAT,
    "v5p": _CUBES,
    "v6e": _FLAT,
    "tpu7x": ("1x1x1", *_CUBES),
}
"""What is offered of each chip, smallest first."""
PROGRAM_HBM_GIB = {"v3": 15.48, "v4": 30.75, "v5e": 15.75, "v5p": 95.73, "v6e": 31.24, "tpu7x": 94.74}
"""GiB of a device that programs may take, as libtpu 0.0.52 says when one asks for more; the rest is the runtime's. An ahead-of-time test asks."""
ICI_LINKS = {"v3": 4, "v4": 6, "v5e": 4, "v5p": 6, "v6e": 4, "tpu7x": 6}
"""Of a chip: two for every dimension of its torus."""
# Left alone, v4 is described as two devices a chip; its runtime shows one.
_CHIP_CONFIG = {"v4": {"chip_config_name": "megacore"}}
_CHIPS_PER_HOST_OF_MANY = 4


@dataclass(frozen=True)
class TpuSlice:
    """`chip` in a grid of `topology`."""

    chip: ChipSpec
    topology: str

    def __str__(self) -> str:
        return f"{self.chip.name}:{self.topology}"

    @property
    def grid(self) -> tuple[int, ...]:
        """Chips along each dimension."""
        return tuple(int(n) for n in self.topology.split("x"))

    @property
    def num_chips(self) -> int:
        return math.prod(self.grid)

    @property
    def num_devices(self) -> int:
        """JAX devices, which tensor parallelism counts."""
        return self.num_chips * self.chip.devices

    @property
    def num_hosts(self) -> int:
        one = self.num_chips <= self.chip.max_chips_on_one_host
        return 1 if one else self.num_chips // _CHIPS_PER_HOST_OF_MANY

    @property
    def program_hbm(self) -> int:
        """Bytes of a device that programs may take."""
        return int(PROGRAM_HBM_GIB[self.chip.name] * GIB)

    @property
    def link_bytes_per_s(self) -> float:
        """One ICI link, one way."""
        return self.chip.ici_bytes_per_s / ICI_LINKS[self.chip.name] / 2

    def devices(self) -> list[Any]:
        """The slice's devices, to compile for; loads libtpu."""
        from jax.experimental import topologies

        options: dict[str, Any] = dict(_CHIP_CONFIG.get(self.chip.name, {}))
        if self.num_hosts == 1:
            options["chips_per_host_bounds"] = [*self.grid, 1, 1][:3]
        described = topologies.get_topology_desc(platform="tpu", topology_name=str(self), **options)
        return list(described.devices)


def find_chip(name: str) -> ChipSpec:
    """The chip called `name`, by the names of accelerator types too; ConfigError lists the known."""
    wanted = name.strip().lower()
    for chip in CHIPS.values():
        if wanted in (chip.name, *chip.type_names):
            return chip
    raise ConfigError(f"The chip {name!r} is not known: known are {', '.join(CHIPS)}.")


def find_slice(chip_name: str, topology: str | None, tensor_parallel: int | None = None) -> TpuSlice:
    """The slice, or without a topology the smallest that has `tensor_parallel` (default 1) devices.

    Raises:
        ConfigError: an unknown chip or topology, or none is large enough; with the known ones.
    """
    chip = find_chip(chip_name)
    known = [TpuSlice(chip, shape) for shape in TOPOLOGIES[chip.name]]
    if topology is None:
        for candidate in known:
            if candidate.num_devices >= (tensor_parallel or 1):
                return candidate
        raise ConfigError(f"No slice of {chip.name} has {tensor_parallel} devices; the largest known is {known[-1]}.")
    for candidate in known:
        if candidate.topology == topology.strip().lower():
            return candidate
    raise ConfigError(
        f"The topology {topology!r} of {chip.name} is not known: known are {', '.join(s.topology for s in known)}."
    )


def parse_slice(text: str) -> TpuSlice:
    """ "v6e:2x4" as a slice."""
    chip, _, topology = text.partition(":")
    if not topology:
        raise ConfigError(f"{text!r} is not a slice: write CHIP:TOPOLOGY, as in v6e:2x4.")
    return find_slice(chip, topology)
