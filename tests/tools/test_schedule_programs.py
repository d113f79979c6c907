# SPDX-License-Identifier: Apache-2.0
"""Compiled programs' text, workloads, and what they sum to."""

import os

import jax
import numpy as np
import pytest

from tpu_inference.tools.schedule import ScheduleError, Timing, Unknown, environment, workload
from tpu_inference.tools.schedule.chips import Machine
from tpu_inference.tools.schedule.hlo import Module, base_name, shape_bytes
from tpu_inference.tools.schedule.recording import Recorded, Schedule
from tpu_inference.tools.schedule.timing import AsyncCopy, OpTiming
from tpu_inference.tools.schedule.workload import active

MODULE = """
HloModule jit_step, is_scheduled=true

%add (a: f32[], b: f32[]) -> f32[] {
  ROOT %sum = f32[] add(%a, %b)
}

%fused_a (p: bf16[64,128]) -> bf16[64,128] {
  %p = bf16[64,128]{1,0} parameter(0)
  ROOT %tanh.1 = bf16[64,128]{1,0} tanh(%p), metadata={op_name="first"}
}

%fused_b (p.2: bf16[64,128]) -> bf16[64,128] {
  %p.2 = bf16[64,128]{1,0} parameter(0)
  ROOT %tanh.2 = bf16[64,128]{1,0} tanh(%p.2), metadata={op_name="second"}
}

%fused_reduce (p.3: bf16[64,128]) -> bf16[16,128] {
  %p.3 = bf16[64,128]{1,0} parameter(0)
  %all-reduce.9 = bf16[64,128]{1,0} all-reduce(%p.3), replica_groups={{0,1,2,3}}, to_apply=%add
  ROOT %slice.9 = bf16[16,128]{1,0} dynamic-slice(%all-reduce.9)
}

%called (p.4: bf16[64,128]) -> bf16[64,128] {
  %p.4 = bf16[64,128]{1,0} parameter(0)
  ROOT %all-reduce.5 = bf16[64,128]{1,0} all-reduce(%p.4), replica_groups={{0,1},{2,3}}, to_apply=%add
}, execution_thread="sparsecore"

%async (p.5: bf16[64,128]) -> bf16[64,128] {
  %p.5 = bf16[64,128]{1,0} parameter(0)
  ROOT %custom-call.5 = bf16[64,128]{1,0} custom-call(%p.5), custom_call_target="offloaded", called_computations={%called}
}, execution_thread="sparsecore"

%inner_condition (c: (s32[])) -> pred[] {
  %i.1 = s32[] get-tuple-element(%c), index=0
  %limit.1 = s32[]{:T(128)} constant(3)
  ROOT %less.1 = pred[] compare(%i.1, %limit.1), direction=LT
}

%inner_body (c.2: (s32[])) -> (s32[]) {
  %x.1 = bf16[64,128]{1,0} get-tuple-element(%c.2), index=1
  ROOT %fusion.1 = bf16[64,128]{1,0} fusion(%x.1), kind=kLoop, calls=%fused_a
}

%outer_condition (c.3: (s32[])) -> pred[] {
  %i.2 = s32[] get-tuple-element(%c.3), index=0
  %limit.2 = s32[] constant(7)
  ROOT %less.2 = pred[] compare(%i.2, %limit.2), direction=LT
}

%outer_body (c.4: (s32[])) -> (s32[]) {
  %x.2 = bf16[64,128]{1,0} get-tuple-element(%c.4), index=1
  %all-reduce.1 = bf16[64,128]{1,0} all-reduce(%x.2), replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_1'}, to_apply=%add
  %all-reduce.6.call-start = ((), (), (s32[8]{0}, s32[0]{0})) async-start(), async_execution_thread="sparsecore", calls=%async
  %all-reduce.6.call-update = ((bf16[64,128]{1,0}), bf16[64,128]{1,0}, (s32[8]{0})) async-update(%all-reduce.6.call-start, %x.2)
  %all-reduce.6.call-done = bf16[64,128]{1,0} async-done(%all-reduce.6.call-update)
  %start.1 = s32[]{:T(128)} constant(0)
  %start.copy = s32[]{:T(128)S(6)} copy(%start.1)
  %tuple.1 = (s32[], bf16[64,128]{1,0}) tuple(%start.copy, %all-reduce.1)
  ROOT %while.1 = (s32[], bf16[64,128]{1,0}) while(%tuple.1), condition=%inner_condition, body=%inner_body
}

%open_condition (c.5: (s32[])) -> pred[] {
  ROOT %less.3 = pred[] compare(%i.3, %n.3), direction=LT
}

%open_body (c.6: (s32[])) -> (s32[]) {
  ROOT %paged_decode.7 = bf16[64,128]{1,0} custom-call(%x.2), custom_call_target="tpu_custom_call", backend_config={}
}

ENTRY %main (x: bf16[64,128]) -> bf16[64,128] {
  %x = bf16[64,128]{1,0} parameter(0)
  %fusion.2 = bf16[64,128]{1,0} fusion(%x), kind=kLoop, calls=%fused_b
  %fusion.3 = bf16[16,128]{1,0} fusion(%fusion.2), kind=kCustom, calls=%fused_reduce
  %copy-start.1 = (bf16[64,128]{1,0:S(1)}, bf16[64,128]{1,0}, u32[]{:S(2)}) copy-start(%x)
  %all-gather-start.1 = (bf16[16,128]{1,0}, bf16[64,128]{1,0}) all-gather-start(%fusion.3), replica_groups=[2,4]<=[8], dimensions={0}
  %all-gather-done.1 = bf16[64,128]{1,0} all-gather-done(%all-gather-start.1)
  %fusion.4 = s32[] fusion(%x), kind=kLoop, calls=%fused_scalar
  %custom-call.6 = bf16[64,128]{1,0:S(1)} custom-call(%slice-done, %slice-done.1), custom_call_target="ConcatBitcast"
  %while.3 = (s32[], bf16[64,128]{1,0}) while(%tuple.3), condition=%open_condition, body=%open_body
  %start.2 = s32[] constant(2)
  %tuple.2 = (s32[], bf16[64,128]{1,0}) tuple(%start.2, %all-gather-done.1)
  ROOT %while.2 = (s32[], bf16[64,128]{1,0}) while(%tuple.2), condition=%outer_condition, body=%outer_body
}
"""
EMPTY = "\n   0   :  {}\n   0x1 :  {}\n"


@pytest.fixture
def module():
    return Module.parse(MODULE)


def test_trips_multiply_through_nested_loops(module):
    trips = {name: module.trips(module.operations[name]) for name in ("fusion.1", "all-reduce.1", "fusion.2")}
    assert trips == {"fusion.1": 15, "all-reduce.1": 5, "fusion.2": 1}


def test_a_loop_over_data_counts_once_and_is_named(module):
    assert module.trips(module.operations["paged_decode.7"]) == 1
    assert module.unknown_loops == ["while.3"]


def test_collectives_also_within_fusions_and_on_other_cores(module):
    size = 64 * 128 * 2
    found = {x.name: (x.kind, x.trips, x.operand_bytes, x.result_bytes, x.group_size) for x in module.collectives}
    assert found == {
        "all-reduce.1": ("all-reduce", 5, size, size, 4),
        "all-reduce.6.call-start": ("all-reduce", 5, size, size, 2),
        "fusion.3": ("all-reduce", 1, size, size, 4),
        "all-gather-start.1": ("all-gather", 1, size // 4, size, 4),
    }


def test_kinds(module):
    assert module.operations["paged_decode.7"].kind == "kernel"
    assert module.operations["fusion.1"].kind == "fusion"
    assert "tanh.1" not in {x.name for x in module.top_level()}, "part of a fusion"


@pytest.mark.parametrize(
    ("text", "size"),
    [("bf16[2,3]{1,0}", 12), ("pred[7]", 7), ("f32[]", 4), ("(s8[4], f8e4m3fn[4])", 8), ("s4[8]", 8)],
)
def test_shape_bytes(text, size):
    assert shape_bytes(text) == size


@pytest.mark.parametrize("name", ["paged_decode", "paged_decode.1", "paged_decode.12.remat2", "paged_decode.clone.3"])
def test_base_name(name):
    assert base_name(name) == "paged_decode"


def test_bodies_list_the_same_in_any_order():
    text = """
%first (a: s32[], b: s32[]) -> pred[] {
  %a = s32[] parameter(0)
  %b = s32[] parameter(1)
  ROOT %less = pred[] compare(%a, %b), direction=DIRECTION
}

%second (d: s32[], c: s32[]) -> pred[] {
  %d = s32[] parameter(1)
  %c = s32[] parameter(0)
  ROOT %less.2 = pred[] compare(%c, %d), direction=LT
}

ENTRY %main (x: s32[64]) -> s32[64] {
  %x = s32[64]{0} parameter(0)
  %sort.1 = s32[64]{0} sort(%x), dimensions={0}, to_apply=%first
  ROOT %sort.2 = s32[64]{0} sort(%sort.1), dimensions={0}, to_apply=%second
}
"""
    found = [Module.parse(text.replace("DIRECTION", direction)) for direction in ("LT", "GT")]
    signatures = [[module.signature(module.operations[f"sort.{i}"]) for i in (1, 2)] for module in found]
    assert signatures[0][0] == signatures[0][1]
    assert signatures[1][0] != signatures[1][1]


def recorded(module, *names):
    return Recorded(module, {name: Schedule(EMPTY, "") for name in names})


def test_identical_operations_share_a_schedule(module):
    timing = recorded(module, "fusion.2", "paged_decode.7").time("v6e")
    assert {x.name: x.trips for x in timing.ops} == {"fusion.1": 15, "fusion.2": 1, "paged_decode.7": 1}
    assert timing.microseconds >= 17 * 2 / 1.75e9
    assert timing.unknown.loops == ("while.3",)
    assert timing.unknown.operations == (), "scalars and places have no schedule, collectives are apart"


def test_operations_without_a_schedule_are_named(module):
    unknown = recorded(module, "fusion.2").time("v6e").unknown
    assert unknown.operations == ("paged_decode.7",)
    assert str(unknown) == "1 loops, 1 operations"


def test_asynchronous_copies_take_the_pipe(module):
    timing = recorded(module, "fusion.2", "paged_decode.7").time("v6e")
    assert timing.async_copies == (AsyncCopy("copy-start.1", 1, 64 * 128 * 2),)
    assert timing.moved_bytes == 64 * 128 * 2


def test_hbm_is_a_floor():
    machine = Machine.of("v6e", 300, 1.0)
    op = OpTiming("copy", "copy", 1, 1.0, 0, 0, 0, 0.0, 1, 0, 0, 0, 0, 0)
    copy = AsyncCopy("copy-start", 2, int(machine.bytes_per_second * 1e-6))
    timing = Timing((op,), (copy,), (), Unknown(0, 0, 0, 0, (), ()), machine)
    assert timing.microseconds == pytest.approx(2.0)
    assert not timing.unknown
    assert str(timing.unknown) == "none"


def test_workload_reaches_kernels_by_name():
    with workload({"paged_decode": {0: [1, 2]}}):
        assert active().scalars_of("other.1") is None
        np.testing.assert_array_equal(active().scalars_of("paged_decode.7")[0], [1, 2])
    assert active().values == {}


def test_a_name_that_no_kernel_has_is_an_error():
    with pytest.raises(ScheduleError, match="no kernel named absent was"), workload({"absent": {0: [1]}}):
        pass


def test_an_error_inside_a_workload_is_not_hidden():
    with pytest.raises(ZeroDivisionError), workload({"absent": {0: [1]}}):
        raise ZeroDivisionError


@pytest.fixture
def fresh(monkeypatch):
    """The environment as `prepare` finds it first, and the process as it was afterwards."""
    monkeypatch.setenv("LIBTPU_INIT_ARGS", "--mine=1")
    monkeypatch.setenv("XLA_FLAGS", "--also_mine=1")
    for name in environment._DEFAULTS:
        monkeypatch.setenv(name, os.environ.get(name, "cpu" if name == "JAX_PLATFORMS" else "1"))
    monkeypatch.setattr(environment, "_found", {})
    monkeypatch.setattr(environment, "_libtpu_is_loaded", lambda: False)
    return monkeypatch


def test_prepare_keeps_the_flags_that_were_there(fresh):
    directory = environment.prepare.__wrapped__()
    flags = os.environ["LIBTPU_INIT_ARGS"].split()
    assert flags[:2] == ["--mine=1", f"--xla_jf_dump_to={directory}"]
    assert directory.is_dir()
    assert os.environ["XLA_FLAGS"].split()[:2] == ["--also_mine=1", f"--xla_dump_to={directory}/hlo"]
    child = environment.without_recording()
    assert (child["LIBTPU_INIT_ARGS"], child["XLA_FLAGS"]) == ("--mine=1", "--also_mine=1"), "a child records nothing"
    directory.rmdir()


def test_prepare_after_libtpu_is_an_error(fresh):
    fresh.setattr(environment, "_libtpu_is_loaded", lambda: True)
    with pytest.raises(ScheduleError, match="libtpu is loaded in this process already"):
        environment.prepare.__wrapped__()
    assert os.environ["LIBTPU_INIT_ARGS"] == "--mine=1"


def test_compile_cache_is_left_as_it_was():
    from tpu_inference.tools.schedule.recording import no_compile_cache

    before = jax.config.jax_enable_compilation_cache
    with no_compile_cache():
        assert not jax.config.jax_enable_compilation_cache
    assert jax.config.jax_enable_compilation_cache == before
