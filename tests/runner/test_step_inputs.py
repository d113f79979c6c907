# SPDX-License-Identifier: Apache-2.0
"""A step's inputs: what the host writes into the views is what the program reads from the buffer."""

import dataclasses

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tpu_inference.runner.step_inputs import PackedInputs, SamplingInputs, StepInputs, dim

SIZES = st.fixed_dictionaries(
    {
        "tokens": st.integers(1, 40),
        "rows": st.integers(1, 9),
        "groups": st.integers(1, 3),
        "blocks": st.integers(1, 7),
    }
)


def fill(views, rng):
    """Random bits in every field; returns copies by name."""
    out = {}
    for field in dataclasses.fields(views):
        view = getattr(views, field.name)
        if view.dtype == np.float32:
            view[...] = rng.normal(size=view.shape) * 10.0 ** rng.integers(-30, 30, view.shape)
        else:
            limits = np.iinfo(view.dtype)
            view[...] = rng.integers(limits.min, limits.max, view.shape, dtype=view.dtype, endpoint=True)
        out[field.name] = view.copy()
    return out


@pytest.mark.parametrize("cls", [StepInputs, SamplingInputs])
@settings(max_examples=15, deadline=None)
@given(sizes=SIZES, seed=st.integers(0, 2**16))
def test_unpacked_on_the_device_equals_the_views(cls, sizes, seed):
    buffer, views = cls.allocate(sizes)
    expected = fill(views, np.random.default_rng(seed))
    # A dict, since the declarations are no pytrees.
    unpacked = jax.jit(lambda words: vars(cls.unpack(words, sizes)))(buffer)
    assert unpacked.keys() == expected.keys()
    for name, value in expected.items():
        assert unpacked[name].dtype == value.dtype, name
        np.testing.assert_array_equal(np.asarray(unpacked[name]).view(np.int32), value.view(np.int32), err_msg=name)


@pytest.mark.parametrize("cls", [StepInputs, SamplingInputs])
@given(sizes=SIZES)
def test_the_buffer_is_what_was_declared_and_no_more(cls, sizes):
    abstract = cls.abstract(sizes)
    buffer, views = cls.allocate(sizes)
    assert (buffer.shape, buffer.dtype) == (abstract.shape, abstract.dtype)
    assert not buffer.any()
    assert buffer.size == sum(getattr(views, field.name).size for field in dataclasses.fields(cls))
    # Views share the buffer and do not overlap.
    for field in dataclasses.fields(cls):
        getattr(views, field.name)[...].view(np.int32)[...] += 1
    assert (buffer == 1).all()


@dataclasses.dataclass(frozen=True)
class Toy(PackedInputs):
    """Two fields, one of them with one more entry than there are rows."""

    ends: object = dim("rows+1")
    table: object = dim("groups", "rows", dtype=np.float32)


def test_dimensions_may_be_one_more():
    _, views = Toy.allocate({"rows": 3, "groups": 2})
    assert views.ends.shape == (4,)
    assert views.table.shape == (2, 3)
    assert views.table.dtype == np.float32
    assert Toy.abstract({"rows": 3, "groups": 2}).shape == (10,)


def test_every_step_has_a_fresh_buffer():
    """JAX may still read the last one."""
    first, _ = Toy.allocate({"rows": 3, "groups": 2})
    second, views = Toy.allocate({"rows": 3, "groups": 2})
    views.ends[:] = 7
    assert not first.any() and second.any()


def test_only_words_are_declared():
    with pytest.raises(AssertionError, match="32-bit"):
        dim("rows", dtype=np.int64)
