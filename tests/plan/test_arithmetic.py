# SPDX-License-Identifier: Apache-2.0
"""Collectives, workloads, kinds of operations, processes."""

import os
from types import SimpleNamespace

import numpy as np
import pytest

from tpu_inference.errors import TpuInferenceError
from tpu_inference.plan.children import run_all
from tpu_inference.plan.experts import expert_scalars
from tpu_inference.plan.ici import ici_cost
from tpu_inference.plan.steps import Load, kernel_scalars, kind_of
from tpu_inference.tools.schedule.hlo import Module


def collective(kind, size, trips=1, result=None):
    return SimpleNamespace(kind=kind, trips=trips, operand_bytes=size, result_bytes=result or size)


def test_a_ring_all_reduce_sends_nearly_twice_its_bytes():
    cost = ici_cost([collective("all-reduce", 800, trips=3)], 8, link_bytes_per_s=1e6)
    assert cost.bytes == 3 * 2 * 7 * 100
    assert cost.fast == pytest.approx(cost.bytes / 2e6 * 1e6)
    assert cost.slow == pytest.approx(cost.fast + 3 * 8)
    assert cost.count == 3


def test_an_all_gather_is_counted_by_its_result():
    assert ici_cost([collective("all-gather", 100, result=400)], 4, 1e6).bytes == 300


def test_one_device_talks_to_none():
    assert ici_cost([collective("all-reduce", 800)], 1, 1e6).slow == 0


def test_scalars_of_decoding_rows():
    values = kernel_scalars(Load("decode", 2, 0, 300), rows=4, width=5, block_size=128, num_blocks=10, window=None)
    assert values["paged_decode"][0].tolist() == [2, 2, 0, 2**30]
    assert values["paged_decode"][1].tolist() == [300, 300, 0, 0]
    tables = values["paged_decode"][2].reshape(4, 5)
    assert tables[:2, :3].min() >= 1 and tables.max() < 10
    assert not tables[2:].any() and not tables[:, 3:].any()


def test_scalars_of_a_prompt_after_decodes():
    values = kernel_scalars(Load("mixed", 3, 20, 64), rows=8, width=2, block_size=64, num_blocks=100, window=32)
    assert values["paged_prefill"][0].tolist() == [3, 4, 0, 32]
    assert values["paged_prefill"][2].tolist() == [0, 1, 2, 3, 23, 23, 23, 23, 23]
    assert values["paged_write"] is values["paged_prefill"]


def test_scalars_are_laid_out_as_the_kernels_own_shapes_lay_them_out():
    from tpu_inference.kernels.ragged_paged_attention.shapes import AttentionShape

    shape = AttentionShape("", rows=((99, 1), (99, 1), (60, 40)), num_heads=4, num_kv_heads=1, page_size=16)
    theirs = shape.workload(SimpleNamespace(platform="tpu", device_kind="TPU v6 lite"))
    ours = kernel_scalars(Load("mixed", 2, 40, 100), 3, shape.table_width, 16, 50, None)
    assert set(ours) == set(theirs)
    for kernel, arguments in theirs.items():
        assert set(ours[kernel]) == set(arguments)
        for index, values in arguments.items():
            assert np.shape(ours[kernel][index]) == np.shape(values)
    assert ours["paged_decode"][0].tolist() == list(theirs["paged_decode"][0])
    assert ours["paged_prefill"][2].tolist() == list(theirs["paged_prefill"][2])


def a_call(name, local, num_blocks, block_rows):
    """A program's text with a call of the experts' kernel in it."""
    pairs = local + num_blocks - 1
    lengths = [pairs, pairs, pairs, local, local + 1, 3]
    lines = [f"%{name}_{i} = s32[{length}]{{0:T(128)S(1)}} parameter({i})" for i, length in enumerate(lengths)]
    lines.append(f"%{name}_6 = bf16[{num_blocks * block_rows},4096]{{1,0:T(8,128)}} parameter(6)")
    operands = ", ".join(f"%{name}_{i}" for i in range(7))
    call = f'%{name} = bf16[{num_blocks * block_rows},64]{{1,0}} custom-call({operands}), custom_call_target="tpu_custom_call"'
    return "\n".join(f"  {line}" for line in [*lines, call])


def test_scalars_of_experts_are_those_of_the_kernels_own_shapes():
    from tpu_inference.kernels.grouped_matmul.shapes import SHAPES

    shape = SHAPES["qwen3_235b_fp8_ep16_b64_down"]
    assert (shape.tokens, shape.top_k, shape.experts, shape.local) == (64, 8, 128, 8)
    (theirs,) = shape.workload(SimpleNamespace(platform="tpu", device_kind="TPU v6 lite")).values()
    calls = [
        a_call("grouped_matmul.3", 8, 4, 128),
        a_call("grouped_matmul.4", 8, 2, 256),
        a_call("paged_decode.1", 8, 4, 128),
    ]
    module = Module.parse("\n".join(["ENTRY %main (p: f32[]) -> f32[] {", *calls, "}"]))
    found = expert_scalars(module, tokens=64, top_k=8, num_experts=128)
    assert set(found) == {"grouped_matmul.3", "grouped_matmul.4"}
    for index, values in theirs.items():
        assert found["grouped_matmul.3"][index].tolist() == values.tolist()
    assert found["grouped_matmul.4"][0].shape == (9,)
    assert found["grouped_matmul.4"][4].tolist() == theirs[4].tolist(), "rows of groups, however blocked"
    assert not expert_scalars(module, tokens=64, top_k=0, num_experts=0)


def test_tokens_choose_different_experts_and_no_spare_one():
    from tpu_inference.kernels.grouped_matmul.shapes import random_group_sizes

    sizes = random_group_sizes(tokens=100, top_k=3, experts=8, local=9)
    assert sizes.sum() == 300 and sizes.max() <= 100 and sizes[8] == 0
    assert random_group_sizes(tokens=5, top_k=4, experts=4, local=2).tolist() == [5, 5], "all of them"


@pytest.mark.parametrize(
    ("opcode", "inside", "kind"),
    [
        ("fusion", {"parameter", "convolution", "add"}, "matmul"),
        ("fusion", {"parameter", "constant", "dynamic-slice"}, "weight loads"),
        ("fusion", {"parameter", "bitcast", "copy"}, "copies"),
        ("copy", set(), "copies"),
        ("fusion", {"parameter", "multiply", "reduce"}, "norm and elementwise"),
        ("add", set(), "norm and elementwise"),
    ],
)
def test_kinds(opcode, inside, kind):
    operation = SimpleNamespace(kind=opcode, opcode=opcode, called=["body"] if inside else [])
    assert kind_of(operation, {"body": inside}) == kind
    if kind == "weight loads":
        assert kind_of(operation, {"body": inside}, written_bytes=1) == "copies"


@pytest.mark.parametrize(("name", "kind"), [("paged_decode.3", "attention"), ("grouped_matmul.2", "matmul")])
def test_kinds_of_kernels(name, kind):
    assert kind_of(SimpleNamespace(kind="kernel", opcode="custom-call", called=[], name=name), {}) == kind


def refuse(message):
    raise TpuInferenceError(message)


def test_results_come_in_order_from_other_processes():
    pids = run_all([(os.getpid,)] * 5, at_once=2)
    assert len(set(pids)) == 5 and os.getpid() not in pids
    assert run_all([(abs, -1), (max, 2, 3)]) == [1, 3]


def test_a_refusal_crosses_over_and_a_death_is_told():
    with pytest.raises(TpuInferenceError, match=r"^no$"):
        run_all([(refuse, "no")])
    with pytest.raises(TpuInferenceError, match="ended with code 3"):
        run_all([(os._exit, 3)])
