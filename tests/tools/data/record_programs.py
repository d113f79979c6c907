# SPDX-License-Identifier: Apache-2.0
"""Run by test_schedule_aot.py in a process of its own, since libtpu reads its flags once: prints what it recorded as JSON."""

import json

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental import topologies
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from tpu_inference.tools import schedule

schedule.prepare()


def abstract(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


def devices(chip):
    return topologies.get_topology_desc(platform="tpu", topology_name=schedule.TOPOLOGIES[chip]).devices


def kernel(count, table, x, out, buffer, semaphore):
    """The sum of the `count` blocks of x that `table` lists; its v6e schedule is gather_sum_v6e.bundles.txt."""
    out[...] = jnp.zeros_like(out)

    def step(i, carry):
        copy = pltpu.make_async_copy(x.at[table[i]], buffer, semaphore)
        copy.start()
        copy.wait()
        out[...] += buffer[...]
        return carry

    jax.lax.fori_loop(0, count[0], step, None)


def gather_sum(count, table, x):
    return pl.pallas_call(
        kernel,
        out_shape=abstract(8, 128),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(),
            in_specs=[pl.BlockSpec(memory_space=pl.ANY)],
            out_specs=pl.BlockSpec(memory_space=pltpu.VMEM),
            scratch_shapes=[pltpu.VMEM((8, 128), jnp.float32), pltpu.SemaphoreType.DMA(())],
        ),
        name="gather_sum",
    )(count, table, x)


def record_kernel(chip, blocks):
    arguments = (abstract(1, dtype=jnp.int32), abstract(64, dtype=jnp.int32), abstract(65536, 8, 128))
    jitted = jax.jit(gather_sum, in_shardings=SingleDeviceSharding(devices(chip)[0]))
    with schedule.workload({"gather_sum": {0: np.array([blocks]), 1: np.arange(64)}}):
        return schedule.record(lambda: jitted.lower(*arguments).compile())[1]


def kernel_facts(chip):
    timing = record_kernel(chip, 40).time(chip)
    (op,) = timing.kernels
    return dict(name=op.name, unknown=str(timing.unknown), read=op.read_bytes, microseconds=timing.microseconds)


def scan_over_a_mesh(x, weights):
    def layer(x, w):
        return jnp.tanh(x @ w), None

    return jax.lax.scan(layer, x, weights)[0]


def scan_facts():
    mesh = Mesh(np.array(devices("v6e")), ("model",))
    shard = lambda *spec: NamedSharding(mesh, PartitionSpec(*spec))  # noqa: E731
    jitted = jax.jit(scan_over_a_mesh, in_shardings=(shard(), shard(None, "model", None)), out_shardings=shard())
    arguments = (abstract(256, 4096, dtype=jnp.bfloat16), abstract(6, 4096, 4096, dtype=jnp.bfloat16))
    _, recorded = schedule.record(lambda: jitted.lower(*arguments).compile())
    timing = recorded.time("v6e")
    return dict(
        unknown=str(timing.unknown),
        trips=max(op.trips for op in timing.ops),
        moved=timing.moved_bytes,
        collectives=[(x.kind, x.trips, x.group_size, x.operand_bytes) for x in timing.collectives],
    )


def unrolled_facts():
    def layers(x, weights):
        for i in range(4):
            x = jnp.tanh(jax.lax.optimization_barrier(x) @ weights[i])
        return x

    jitted = jax.jit(layers, in_shardings=SingleDeviceSharding(devices("v5e")[0]))
    arguments = (abstract(256, 2048, dtype=jnp.bfloat16), tuple([abstract(2048, 2048, dtype=jnp.bfloat16)] * 4))
    _, recorded = schedule.record(lambda: jitted.lower(*arguments).compile())
    timing = recorded.time("v5e")
    return dict(
        schedules=len(recorded.schedules), ops=[(x.name, x.kind) for x in timing.ops], unknown=str(timing.unknown),
        copies=[x.bytes for x in timing.async_copies],
    )  # fmt: skip


def error_of(function):
    try:
        function()
    except schedule.ScheduleError as error:
        return str(error)
    return None


def unused_name():
    with schedule.workload({"no_such_kernel": {0: np.array([1])}}):
        record_kernel("v6e", 1)


print(
    json.dumps(
        dict(
            kernels={chip: kernel_facts(chip) for chip in ("v6e", "v5e", "tpu7x")},
            scan=scan_facts(),
            unrolled=unrolled_facts(),
            unused=error_of(unused_name),
            not_for_tpu=error_of(lambda: schedule.record(lambda: jax.jit(jnp.sin).lower(abstract(8)).compile())),
        )
    )
)
