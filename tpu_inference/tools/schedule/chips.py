# SPDX-License-Identifier: Apache-2.0
"""A TPU core as the emulator sees it: `tpu_info`'s chips, and the few numbers that are not published there."""

from collections.abc import Mapping
from dataclasses import dataclass

from tpu_inference.tools.schedule.environment import ScheduleError
from tpu_inference.tpu_info import CHIPS, ChipSpec

CLOCK_HZ: Mapping[str, float] = {"v4": 1.05e9, "v5e": 1.5e9, "v5p": 1.75e9, "v6e": 1.75e9, "tpu7x": 2.2e9}
"""v4, v5e, v5p: https://jax-ml.github.io/scaling-book/tpus. The others: peak FLOP/s over those of the matrix units in a cycle (four of 256 x 256
on v6e; twice that on tpu7x, whose units are not published, so that its clock may be 10 % off)."""
TOPOLOGIES: Mapping[str, str] = {
    "v4": "v4:2x2x1",
    "v5e": "v5e:2x2",
    "v5p": "v5p:2x2x1",
    "v6e": "v6e:2x2",
    "tpu7x": "tpu7x:2x2x1",
}
"""The smallest that libtpu compiles for."""
DELAY_SLOTS: Mapping[str, int] = {"v4": 1, "v5e": 4, "v5p": 4, "v6e": 4, "tpu7x": 6}
"""Bundles after a branch that run before it takes effect, read off where blocks begin in each generation's bundles. On tpu7x an empty bundle stands
for all remaining slots where none has work; that it takes as long is an assumption. Where libtpu does not mark the block after it, bundles of that
block run too (seen in unrolled copies, as a wait that is not known)."""
LATENCIES = (300, 1000)
"""Cycles between issue and arrival of a DMA from or to HBM: assumptions, around what libtpu's own static profiler uses (550 to 1140)."""
BANDWIDTHS = (1.0, 0.83)
"""Of the published bandwidth; real streams are said to reach the second."""
LOCAL_LATENCY, LOCAL_BYTES_PER_CYCLE = 100, 512
"""Of DMAs inside the chip: assumptions."""
GRANULE = 32
"""Bytes that a DMA's size counts in, checked against windows of known sizes on every generation."""


@dataclass(frozen=True)
class Machine:
    """One JAX device under assumptions."""

    chip: ChipSpec
    clock: float
    latency: int
    bytes_per_second: float

    @classmethod
    def of(cls, generation: str, latency: int, bandwidth: float) -> "Machine":
        """Raises ScheduleError where the generation is not one of CLOCK_HZ."""
        if generation not in CLOCK_HZ:
            raise ScheduleError(f"generation {generation!r} is none of {', '.join(CLOCK_HZ)}")
        chip = CHIPS[generation]
        return cls(chip, CLOCK_HZ[generation], latency, bandwidth * chip.hbm_bytes_per_s / chip.devices)

    @property
    def delay_slots(self) -> int:
        return DELAY_SLOTS[self.chip.name]

    @property
    def bytes_per_cycle(self) -> float:
        return self.bytes_per_second / self.clock

    def microseconds(self, cycles: float) -> float:
        return cycles / self.clock * 1e6

    def flops(self, dtype: str) -> float:
        """Dense peak of one device; that of bfloat16 where the matrix unit has none for `dtype`."""
        return self.chip.flops.get(dtype, self.chip.flops["bfloat16"]) / self.chip.devices
