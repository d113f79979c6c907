# SPDX-License-Identifier: Apache-2.0
"""Tensors in the place of a module's own."""

import pytest
import torch

from tpu_inference.models.vllm.exchange import Places


def shared():
    """Two layers that share a module with a buffer, and one tied parameter."""
    table = torch.nn.Module()
    table.register_buffer("values", torch.zeros(2))
    model = torch.nn.ModuleList([torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)])
    for layer in model:
        layer.table = table
    model[1].weight = model[0].weight
    return model


def test_all_places_of_a_shared_tensor_hold_the_new_one_and_then_the_old():
    model = shared()
    weight, values = model[0].weight, model[0].table.values
    new = {"0.weight": torch.ones(2, 2), "0.table.values": torch.ones(2)}
    with Places(model).holding(new):
        assert model[1].weight is new["0.weight"]
        assert model[1].table.values is new["0.table.values"]
        model[1].table.values = torch.full((2,), 7.0)  # as rotary tables do that change their dtype
    assert model[0].weight is weight and model[1].weight is weight
    assert model[0].table.values is values


def test_errors_inside_restore_too():
    model = shared()
    weight = model[0].weight
    with pytest.raises(RuntimeError), Places(model).holding({"0.weight": torch.ones(2, 2)}):
        raise RuntimeError
    assert model[1].weight is weight


def test_a_name_that_is_none_of_the_module():
    with pytest.raises(KeyError), Places(shared()).holding({"1.weight": torch.ones(2, 2)}):
        pass
