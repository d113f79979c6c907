# SPDX-License-Identifier: Apache-2.0
"""Collectives between the devices of a slice, by formula: nothing here comes from the compiler's schedule but their bytes."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

HOP_S = 1e-6
"""From one chip to the next, a small message: an assumption, in the slow estimate only."""


class Collective(Protocol):
    """As `tools.schedule` reads it from a program: bytes are one device's, of one execution."""

    @property
    def kind(self) -> str: ...
    @property
    def trips(self) -> int: ...
    @property
    def operand_bytes(self) -> int: ...
    @property
    def result_bytes(self) -> int: ...


@dataclass(frozen=True)
class IciCost:
    """Of one step. Microseconds are those of the bytes alone, and with the hops."""

    bytes: int
    """That a device sends."""
    count: int
    fast: float
    slow: float


def _sent(collective: Collective, devices: int) -> tuple[float, float]:
    """(bytes that a device sends, hops one after the other) on a ring of `devices`, both ways round at once."""
    share, half = (devices - 1) / devices, devices / 2
    if collective.kind == "all-reduce":  # a reduce-scatter, then an all-gather
        return 2 * share * collective.operand_bytes, 2 * half
    if collective.kind in ("all-gather", "reduce-scatter", "all-to-all"):
        return share * max(collective.operand_bytes, collective.result_bytes), half
    return collective.operand_bytes, 1


def ici_cost(collectives: Sequence[Collective], devices: int, link_bytes_per_s: float) -> IciCost:
    """A ring over the devices uses one link each way out of every chip; a 2D or 3D torus may do better, a line without wrap-around worse."""
    total = hops = 0.0
    for collective in collectives if devices > 1 else ():
        sent, steps = _sent(collective, devices)
        total += collective.trips * sent
        hops += collective.trips * steps
    fast = total / (2 * link_bytes_per_s) * 1e6
    count = sum(c.trips for c in collectives) if devices > 1 else 0
    return IciCost(int(total), count, fast, fast + hops * HOP_S * 1e6)
