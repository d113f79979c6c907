# SPDX-License-Identifier: Apache-2.0
"""A ring of devices along a mesh axis, as kernels see it."""

from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

Way = Literal[-1, 1]
"""1: to the next device of the axis; -1: to the one before."""


@dataclass(frozen=True)
class Ring:
    """Devices of one axis of any mesh; places on the other axes stay the caller's own. Within a kernel."""

    axis_name: str
    size: int

    def place(self, distance: Any = 0) -> jax.Array:
        """int32: the index of the device `distance` further on; 0 for this one. `distance` is -size at least."""
        return jax.lax.rem(jax.lax.axis_index(self.axis_name) + self.size + distance, self.size)

    def device(self, index: Any) -> dict[str, Any]:
        return {self.axis_name: index}

    def copy(self, source: Any, target: Any, sent: Any, received: Any, way: Way) -> Any:
        """A remote copy to a neighbour, not started. Waiting for `received` means that of the neighbour on the other side."""
        return self.copy_to(source, target, sent, received, self.place(way))

    def copy_to(self, source: Any, target: Any, sent: Any, received: Any, index: Any) -> Any:
        """The same to any device of the axis."""
        return pltpu.make_async_remote_copy(
            source, target, sent, received, device_id=self.device(index), device_id_type=pl.DeviceIdType.MESH
        )

    def signal(self, semaphore: Any, index: Any) -> None:
        """Add one to a device's semaphore."""
        pl.semaphore_signal(semaphore, 1, device_id=self.device(index), device_id_type=pl.DeviceIdType.MESH)

    def meet_neighbours(self) -> None:
        """Wait until both neighbours run this kernel: before that their buffers may be in other use."""
        barrier = pltpu.get_barrier_semaphore()
        for way in (-1, 1):
            self.signal(barrier, self.place(way))
        pl.semaphore_wait(barrier, 2)

    def meet_all(self) -> None:
        """The same of all devices of the axis."""
        barrier = pltpu.get_barrier_semaphore()

        def signal(i: Any, _: None) -> None:
            self.signal(barrier, i)

        jax.lax.fori_loop(jnp.int32(0), jnp.int32(self.size), signal, None)
        pl.semaphore_wait(barrier, self.size)
