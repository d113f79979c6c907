# SPDX-License-Identifier: Apache-2.0
"""Logical axes and the table that maps them to mesh axes."""

import jax
import pytest
from jax.sharding import PartitionSpec

from tpu_inference.layers.common.sharding import (
    DATA_AXIS,
    MESH_AXES,
    MODEL_AXIS,
    RULES,
    make_mesh,
    named_sharding,
    shard_bytes,
    sharding_where_it_divides,
    spec,
)


@pytest.mark.parametrize("count", [1, 2, 8])
def test_a_mesh_of_the_first_devices(count):
    mesh = make_mesh(jax.devices(), count)
    assert dict(mesh.shape) == {DATA_AXIS: 1, MODEL_AXIS: count}
    assert mesh.axis_names == MESH_AXES
    assert list(mesh.devices.flat) == jax.devices()[:count]


def test_too_few_devices_is_an_error_that_says_so():
    with pytest.raises(ValueError, match=r"tensor_parallel_size=9 .* JAX sees 8.*--tensor-parallel-size"):
        make_mesh(jax.devices(), 9)


def test_every_rule_names_an_axis_of_the_mesh():
    assert set(RULES.values()) <= {None, *MESH_AXES}


def test_spec_follows_the_table():
    assert spec(("layers", "mlp", "embed")) == PartitionSpec(None, MODEL_AXIS, None)
    assert spec((None, "heads", None)) == PartitionSpec(None, MODEL_AXIS, None)
    assert spec(()) == PartitionSpec()


def test_an_unknown_axis_is_an_error():
    with pytest.raises(KeyError, match="mpl"):
        spec(("mpl", "embed"))


@pytest.mark.parametrize(
    ("axes", "shape", "shard"),
    [
        (("vocab", "embed"), (16, 6), (4, 6)),
        (("embed", "mlp"), (6, 16), (6, 4)),
        (("pages", None, "kv_heads", None, "head_dim"), (5, 2, 8, 16, 4), (5, 2, 2, 16, 4)),
        (("tokens", "embed"), (7, 6), (7, 6)),
    ],
)
def test_shards(axes, shape, shard):
    assert named_sharding(make_mesh(jax.devices(), 4), axes).shard_shape(shape) == shard


@pytest.mark.parametrize(("vocab", "shard"), [(336, 42), (331, 331)])
def test_an_array_that_does_not_divide_is_whole_on_every_device(vocab, shard):
    sharding = sharding_where_it_divides(make_mesh(jax.devices(), 8), (None, "vocab"), (3, vocab))
    assert sharding.shard_shape((3, vocab)) == (3, shard)
    assert shard_bytes(jax.ShapeDtypeStruct((3, vocab), "float32", sharding=sharding)) == 12 * shard
