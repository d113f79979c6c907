# SPDX-License-Identifier: Apache-2.0
"""Collectives: the reference against NumPy, the kernels interpreted on virtual devices against the reference, and what is refused."""

import os
import subprocess
import sys
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import PartitionSpec as P

from tpu_inference.kernels.collectives import all_gather_matmul, api, matmul_reduce_scatter, ragged_all_to_all
from tpu_inference.kernels.collectives.config import (
    LEAST_VMEM_BYTES,
    VMEM_BYTES,
    GatherConfig,
    ReduceScatterConfig,
    config_for,
    misfit,
)
from tpu_inference.kernels.collectives.shapes import SHAPES

ROWS, COLUMNS = P("model"), P(None, "model")


def mesh_of(n, other=1):
    """A mesh of one axis, or of one around it."""
    devices = np.array(jax.devices()[: n * other]).reshape(other, n)
    return jax.sharding.Mesh(devices, ("data", "model"))


def sharded(function, mesh, in_specs, out_specs):
    return jax.jit(jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False))


def random(*shape, dtype=jnp.float32, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape, np.float32), dtype)


def gather(n, x, weight, form, config=None, other=1):
    op = partial(all_gather_matmul, axis_name="model", implementation=form, config=config)
    return np.asarray(sharded(op, mesh_of(n, other), (ROWS, ROWS), COLUMNS)(x, weight), np.float32)


def scatter(n, x, weight, form, config=None, other=1, **options):
    op = partial(matmul_reduce_scatter, axis_name="model", implementation=form, config=config, **options)
    return np.asarray(sharded(op, mesh_of(n, other), (COLUMNS, COLUMNS), ROWS)(x, weight), np.float32)


@cache
def exchange_of(n, form, capacity):
    def op(x, sizes):
        out, arrived = ragged_all_to_all(x[0], sizes[0], axis_name="model", capacity=capacity, implementation=form)
        return out[None], arrived[None]

    return sharded(op, mesh_of(n), (ROWS, ROWS), (ROWS, ROWS))


def exchange(x, sizes, form, capacity=None):
    """x [n, M, H], sizes [n, n] -> [n, capacity, H], [n, n]."""
    return [np.asarray(a) for a in exchange_of(len(x), form, capacity)(x, sizes)]


def expected_exchange(x, sizes, capacity):
    """What each device gets, without what is after it."""
    ends = np.cumsum(sizes, 1)
    n = len(x)
    return [
        np.concatenate([x[i, ends[i, j] - sizes[i, j] : ends[i, j]] for i in range(n)])[:capacity] for j in range(n)
    ]


def check_exchange(x, sizes, form, capacity=None):
    x, sizes = np.asarray(x), np.asarray(sizes, np.int32)
    out, arrived = exchange(x, sizes, form, capacity)
    assert out.shape == (len(x), capacity or x.shape[0] * x.shape[1], x.shape[2])
    for rows, expected, counts in zip(out, expected_exchange(x, sizes, capacity), arrived, strict=True):
        assert counts.sum() == len(expected)
        np.testing.assert_array_equal(rows[: len(expected)], expected)
    if capacity is None:
        np.testing.assert_array_equal(arrived, sizes.T)


@pytest.mark.parametrize("n", [1, 4])
def test_references(n):
    x, weight = random(8, 16), random(12, 16, seed=1)
    expected = np.asarray(x) @ np.asarray(weight).T
    np.testing.assert_allclose(gather(n, x, weight, "reference"), expected, atol=1e-5)
    np.testing.assert_allclose(scatter(n, x, weight, "reference"), expected, atol=1e-5)


@settings(deadline=None, max_examples=10)
@given(
    st.lists(st.lists(st.integers(0, 3), min_size=4, max_size=4), min_size=4, max_size=4), st.sampled_from([None, 5])
)
def test_exchange_reference(sizes, capacity):
    check_exchange(random(4, 12, 3), sizes, "reference", capacity)


def test_there_and_back():
    """Combining is dispatching with what arrived."""
    x, sizes = random(4, 6, 3), np.array([[1, 2, 0, 3], [0, 0, 0, 6], [6, 0, 0, 0], [1, 1, 1, 1]], np.int32)
    out, arrived = exchange(x, sizes, "reference")
    back, returned = exchange(jnp.asarray(out), arrived, "reference", 6)
    np.testing.assert_array_equal(returned, sizes)
    for rows, expected, count in zip(back, np.asarray(x), sizes.sum(1), strict=True):
        np.testing.assert_array_equal(rows[:count], expected[:count])


ONES = jnp.ones((4, 128))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: gather(2, ONES, jnp.ones((4, 96)), "xla"), r"are not \[T, in\] and \[out, in\]"),
        (lambda: gather(2, ONES, ONES.astype(jnp.int8), "xla"), "are not both bfloat16 or both float32"),
        (lambda: gather(2, ONES, ONES, "cuda"), "implementation='cuda' is none of"),
        (lambda: gather(2, ONES, jnp.ones((512, 128)), "pallas"), "2 rows a device are not a multiple of 8; take"),
        (lambda: gather(2, jnp.ones((16, 96)), jnp.ones((256, 96)), "pallas"), "96 columns are not a multiple of 128"),
        (lambda: gather(2, jnp.ones((16, 128)), jnp.ones((192, 128)), "pallas"), "96 outputs are not a multiple of 128"),
        (lambda: gather(2, jnp.ones((16, 128)), jnp.ones((256, 128)), "pallas", GatherConfig(3, 128)), "not divide"),
        (lambda: gather(2, jnp.ones((16, 128)), jnp.ones((512, 128)), "pallas", GatherConfig(1, 128, 1)), "too few"),
        (lambda: scatter(2, jnp.ones((3, 256)), jnp.ones((256, 256)), "xla"), "3 rows are not a multiple of 2"),
        (lambda: scatter(2, ONES, ONES, "xla", sum_dtype=jnp.int32), "is neither float32 nor bfloat16"),
        (lambda: exchange(jnp.ones((2, 0, 4)), jnp.zeros((2, 2), int), "xla"), "is not .M, H. with M > 0"),
        (lambda: exchange(jnp.ones((2, 1, 4), jnp.int8), jnp.zeros((2, 2), int), "xla"), "not of 2 or 4 bytes"),
        (lambda: exchange(jnp.ones((2, 1, 4)), jnp.zeros((2, 3), int), "xla"), "an integer for each of 2 devices"),
        (lambda: exchange(jnp.ones((2, 1, 4)), jnp.zeros((2, 2), int), "xla", -1), "capacity -1 is not positive"),
        (lambda: exchange(jnp.ones((2, 1, 4)), jnp.zeros((2, 2), int), "cuda"), "implementation='cuda' is none of"),
    ],
)  # fmt: skip
def test_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("chip", ["v4", "v5e", "v5p", "v6e", "tpu7x"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_heuristics_fit(chip, shape):
    key = shape.key()
    config, budget = config_for(key, shape.part, chip), VMEM_BYTES.get(chip, LEAST_VMEM_BYTES)
    assert misfit(key, shape.part) is None and key.out % config.block_out == 0
    if shape.gathers:
        assert key.gather_bytes(config) <= max(budget, 16 * 2**20) and key.devices % config.shards == 0
    else:
        assert key.reduce_scatter_bytes(config) <= max(budget, 16 * 2**20) and key.rows % config.block_rows == 0


def test_what_is_sent():
    """A ring's share, both ways together."""
    gate_up, down = SHAPES["70b_gate_up_2048"], SHAPES["70b_down_2048"]
    assert gate_up.sent_bytes == 7 * 256 * 8192 * 2 and down.sent_bytes == 7 * 256 * 8192 * 2


# ----------------------------------------------------------------------------------------------- the kernels, interpreted


@pytest.mark.slow
@pytest.mark.interpret
class TestKernels:
    @pytest.fixture(autouse=True)
    def races(self, monkeypatch):
        monkeypatch.setitem(api._INTERPRET, "pallas_interpret", pltpu.InterpretParams(detect_races=True))
        yield
        assert not interpret_pallas_call.races.races_found

    @pytest.mark.parametrize(
        ("n", "rows", "blocks", "config"),
        [
            (2, 16, 2, GatherConfig(1, 128)),
            (3, 8, 1, GatherConfig(1, 128, 1)),
            (4, 16, 3, GatherConfig(1, 128, 3)),
            (4, 8, 2, GatherConfig(2, 128, alone=True)),
            (4, 8, 3, GatherConfig(4, 128, 2)),
            (4, 8, 1, GatherConfig(4, 128, 1, alone=True)),
        ],
        ids=["two", "odd", "stays", "alone", "once", "all"],
    )
    def test_all_gather_matmul(self, n, rows, blocks, config):
        x, weight = random(n * rows, 128), random(n * blocks * 128, 128, seed=1)
        found = gather(n, x, weight, "pallas_interpret", config)
        np.testing.assert_allclose(found, gather(n, x, weight, "reference"), atol=1e-4)

    @pytest.mark.parametrize(
        ("n", "rows", "block_rows", "blocks"), [(2, 8, 8, 1), (3, 8, 8, 2), (4, 16, 8, 1), (2, 8, 8, 5)]
    )
    def test_matmul_reduce_scatter(self, n, rows, block_rows, blocks):
        x, weight = random(n * rows, n * 128), random(blocks * 256, n * 128, seed=1)
        found = scatter(n, x, weight, "pallas_interpret", ReduceScatterConfig(block_rows, 256))
        np.testing.assert_allclose(found, scatter(n, x, weight, "reference"), atol=1e-4)

    def test_bfloat16_on_one_axis_of_two(self):
        x, weight = random(32, 256, dtype=jnp.bfloat16), random(256, 256, dtype=jnp.bfloat16, seed=1)
        for op, options in ((gather, {}), (scatter, dict(sum_dtype=jnp.bfloat16))):
            found, expected = (op(2, x, weight, form, other=2, **options) for form in ("pallas_interpret", "reference"))
            np.testing.assert_allclose(found, expected, atol=1, rtol=2e-2)

    @pytest.mark.parametrize(
        "sizes",
        [
            [[3, 0, 1, 2], [0, 0, 0, 0], [1, 1, 1, 1], [0, 5, 0, 2]],
            [[0, 0, 9, 0]] * 4,
            [[0] * 4] * 4,
            [[9, 0, 0, 0], [0, 9, 0, 0], [0, 0, 9, 0], [0, 0, 0, 9]],
        ],
        ids=["ragged", "hot", "empty", "own"],
    )
    @pytest.mark.parametrize("capacity", [None, 7])
    def test_exchange(self, sizes, capacity):
        check_exchange(random(4, 9, 40), sizes, "pallas_interpret", capacity)

    def test_eight_devices(self):
        # As many devices as XLA's pool has threads would hold all of them while they wait for each other, and the interpreter needs some itself.
        # So a process of its own, whose pool is larger.
        env = {**os.environ, "NPROC": "32", "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "8"}
        done = subprocess.run([sys.executable, __file__], env=env, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0 and "no races" in done.stdout, done.stdout + done.stderr


def check_eight_devices():
    api._INTERPRET["pallas_interpret"] = pltpu.InterpretParams(detect_races=True)
    x, weight = random(64, 128), random(1024, 128, seed=1)
    found = gather(8, x, weight, "pallas_interpret", GatherConfig(4, 128, 1, alone=True))
    np.testing.assert_allclose(found, gather(8, x, weight, "reference"), atol=1e-4)
    assert not interpret_pallas_call.races.races_found
    x, weight = random(64, 1024), random(512, 1024, seed=1)
    found = scatter(8, x, weight, "pallas_interpret", ReduceScatterConfig(8, 256))
    np.testing.assert_allclose(found, scatter(8, x, weight, "reference"), atol=1e-4)
    assert not interpret_pallas_call.races.races_found
    sizes = np.random.default_rng(0).multinomial(9, np.ones(8) / 8, 8)
    check_exchange(random(8, 9, 40), sizes, "pallas_interpret")
    assert not interpret_pallas_call.races.races_found
    print("no races")


if __name__ == "__main__":
    check_eight_devices()
