# SPDX-License-Identifier: Apache-2.0
"""Collectives: the reference against NumPy, the kernels interpreted on virtual devices against the reference, and what is refused."""

from functools import partial

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
from tpu_inference.kernels.collectives.config import GatherConfig, ReduceScatterConfig

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


def exchange(x, sizes, form, capacity=None):
    """x [n, M, H], sizes [n, n] -> [n, capacity, H], [n, n]."""

    def op(x, sizes):
        out, arrived = ragged_all_to_all(
            x[0], sizes[0], axis_name="model", capacity=capacity, implementation=form
        )
        return out[None], arrived[None]

    return [np.asarray(a) for a in sharded(op, mesh_of(len(x)), (ROWS, ROWS), (ROWS, ROWS))(x, sizes)]


def expected_exchange(x, sizes, capacity):
    """What each device gets, without what is after it."""
    ends = np.cumsum(sizes, 1)
    n = len(x)
    return [np.concatenate([x[i, ends[i, j] - sizes[i, j] : ends[i, j]] for i in range(n)])[:capacity] for j in range(n)]


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
@given(st.lists(st.lists(st.integers(0, 3), min_size=4, max_size=4), min_size=4, max_size=4), st.sampled_from([None, 5]))
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
        ("n", "rows", "shards", "blocks"),
        [(2, 16, 1, 2), (3, 8, 1, 1), (4, 16, 1, 3), (4, 8, 2, 2), (8, 16, 2, 1), (8, 8, 8, 2)],
    )
    def test_all_gather_matmul(self, n, rows, shards, blocks):
        x, weight = random(n * rows, 128), random(n * blocks * 128, 128, seed=1)
        found = gather(n, x, weight, "pallas_interpret", GatherConfig(shards, 128))
        np.testing.assert_allclose(found, gather(n, x, weight, "reference"), atol=1e-4)

    @pytest.mark.parametrize(
        ("n", "rows", "block_rows", "blocks"), [(2, 8, 8, 1), (3, 8, 8, 2), (4, 16, 8, 1), (8, 8, 8, 3), (2, 8, 8, 5)]
    )
    def test_matmul_reduce_scatter(self, n, rows, block_rows, blocks):
        x, weight = random(n * rows, n * 128), random(blocks * 256, n * 128, seed=1)
        found = scatter(n, x, weight, "pallas_interpret", ReduceScatterConfig(block_rows, 256))
        np.testing.assert_allclose(found, scatter(n, x, weight, "reference"), atol=1e-4)

    def test_bfloat16_on_one_axis_of_two(self):
        x, weight = random(64, 512, dtype=jnp.bfloat16), random(512, 512, dtype=jnp.bfloat16, seed=1)
        for op, options in ((gather, {}), (scatter, dict(sum_dtype=jnp.bfloat16))):
            found, expected = (op(4, x, weight, form, other=2, **options) for form in ("pallas_interpret", "reference"))
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
