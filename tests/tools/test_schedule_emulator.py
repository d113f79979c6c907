# SPDX-License-Identifier: Apache-2.0
"""Bundles of real compiles, followed instruction by instruction."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tpu_inference.tools.schedule.arithmetic import function_of
from tpu_inference.tools.schedule.bundles import Program
from tpu_inference.tools.schedule.chips import Machine
from tpu_inference.tools.schedule.emulator import Emulator
from tpu_inference.tools.schedule.environment import ScheduleError
from tpu_inference.tools.schedule.slots import SlotTable, loops_of

DATA = Path(__file__).parent / "data"
COPY = """
     0   :  { %2 = vsyncpa [#allocation0], 0  ;;  %s47_s0 = inlined_call_operand.hbm [shape: bf16[256,4,128], index: 0, kind: input, shape index: {}] /* operand 0 */  ;;  %s48_s1 = inlined_call_operand.vmem [shape: bf16[256,4,128], index: 1, kind: output, shape index: {}] /* operand 1 */ }
   0x1   :  { %s3_s1 = sshll.u32 %s48_s1, 4  ;;  %s4_s1 = int_to_ptr.vmem [resolvable:$true] %s3_s1 }
   0x2   :  { %s17_s8 = scalar_lea.vmem %s4_s1, 8192  ;;  %p22_p1 = scmp.lt.s32.totalorder %s4_s1, %s4_s1 }
   0x3   :  { %p18_p0 = scmp.ne.s32.totalorder %s4_s1, %s17_s8  ;;  %p23_p2 = scmp.lt.s32.totalorder %s17_s8, %s17_s8 }
   0x4   :  { %p24_p3 = por %p23_p2, %p22_p1 }
   0x5   :  { %p25_p4 = pnand %p24_p3, %p18_p0 }
   0x6   :  { %28 = shalt.err (!%p25_p4) /* BoundsCheck 0 [deref of opnd#2] for dma.hbm_to_vmem
hlo: copy.25
 */ }
   0x7   :  { %6 = dma.hbm_to_vmem [thread:$0]  /*hbm=*/%s47_s0, /*size_in_granules=*/8192, /*vmem=*/%s4_s1, /*dst_syncflagno=*/[#allocation0] }
   0x8   :  { %29 = dma.done.wait [#allocation0], 8192 /* local-dma-wait */ }
   0x9   :  { %30 = vsyncadd [#allocation0], 4294959104 }
   0xa   :  { %8 = vsyncpa [#allocation0], 1 } /* exit bundle: %copy.25 = copy(%q.1) */
"""  # noqa: E501


def machine(chip="v6e", latency=300, bandwidth=1.0):
    return Machine.of(chip, latency, bandwidth)


@pytest.fixture(scope="module")
def program():
    """A loop over `count` DMAs; `kernel` in data/record_programs.py."""
    return Program.parse((DATA / "gather_sum_v6e.bundles.txt").read_text())


def run(program, count=7, **options):
    return Emulator(program, machine(**options), {0: np.array([count]), 1: np.arange(16)}).run()


@pytest.mark.parametrize(("latency", "cycles"), [(300, 589), (1000, 1289)])
def test_copy_as_the_first_emulator_timed_it(latency, cycles):
    """The script that this package grew from gave these cycles, for 1640 GB/s."""
    pipe = replace(machine(latency=latency), bytes_per_second=1640e9)
    result = Emulator(Program.parse(COPY), pipe).run()
    assert (result.cycles, result.bundles, result.read_bytes, result.written_bytes) == (cycles, 11, 262144, 0)
    assert not result.unknown


@pytest.mark.parametrize(
    ("way", "expected"), [("{hbm}, 64, {vmem}", (2048, 0, 0)), ("{vmem}, 64, {hbm}", (0, 2048, 0))]
)
def test_general_copies_go_where_their_addresses_are(way, expected):
    text = """
   0   :  {{ %s1_s0 = inlined_call_operand.hbm [shape: bf16[256,4,128], index: 0, kind: input, shape index: {{}}] }}
   0x1 :  {{ %s2_s2 = scalar_lea.hbm %s1_s0, 64  ;;  %s3_s3 = scalar_lea.vmem [#allocation0], 0 }}
   0x2 :  {{ %4 = dma.general /*src=*/{way}, /*dst_syncflagno=*/[#allocation1] }}
"""
    text = text.format(way=way.format(hbm="%s2_s2", vmem="/*dst=*/%s3_s3"))
    result = Emulator(Program.parse(text), machine()).run()
    assert (result.read_bytes, result.written_bytes, result.local_bytes) == expected


@pytest.mark.parametrize("count", [0, 1, 7])
def test_loop_runs_as_often_as_the_workload_says(program, count):
    result = run(program, count)
    assert not result.unknown
    before, body, after = 12, 23, 15
    assert result.bundles == before + count * body + after
    table, block = 512, 8 * 128 * 4
    assert result.read_bytes == table + count * block
    assert result.written_bytes == block
    assert result.counts[before : before + body] == [count] * body


def test_without_a_workload_the_loop_is_unknown(program):
    result = Emulator(program, machine()).run()
    assert result.unknown.branches == 2, "around the loop, and back"
    assert result.counts[12] == 1, "a branch that is not known is not taken"


def test_every_wait_pays_the_latency(program):
    near, far = run(program, latency=300), run(program, latency=1000)
    waits = 7 + 2  # the blocks, the table, the result
    assert far.cycles - near.cycles == pytest.approx(waits * 700, abs=waits)
    assert far.waited - near.waited == pytest.approx(waits * 700, abs=waits)


def test_bandwidth(program):
    moved = run(program).read_bytes + run(program).written_bytes
    slower = run(program, bandwidth=0.5).cycles - run(program).cycles
    assert slower == pytest.approx(moved / machine().bytes_per_cycle, rel=0.05)


def test_loops_and_their_slots(program):
    result, table = run(program), SlotTable.parse((DATA / "gather_sum_v6e.slots.txt").read_text())
    (loop,) = loops_of(program, table, result)
    assert (loop.start, loop.depth, loop.bundles, loop.spills, loop.fills) == (12, 1, 23, 0, 0)
    assert loop.cycles - loop.stalled == 7 * 23
    assert loop.stalled < result.waited
    assert 0.5 < loop.use["SALU"] < 0.6, "addresses and bounds checks"
    assert loop.use["MATMUL"] == 0


def test_delay_slots_end_where_a_block_begins(program):
    branch = 7
    assert program.slots_after(branch, 4) == 4, "an empty bundle each"
    assert program.slots_after(branch, 6) == 4, "the loop begins"
    assert program.slots_after(branch, 2) == 2


def test_what_is_not_decoded_is_kept(program):
    assert program.not_decoded == {"spop.sfrf": 1}


def test_unknown_predicate_leaves_the_value_unknown():
    text = """
   0   :  { %s1_s0 = smov.u32 5  ;;  %p9_p0 = scmp.eq.s32.totalorder %s8_s8, 0 }
   0x1 :  { %s2_s0 = smov.u32 (!%p9_p0), 6 }
   0x2 :  { %s3_s1 = smov.u32 (!%p9_p0, %s1_s0), 5 }
"""
    emulator = Emulator(Program.parse(text), machine())
    emulator.run()
    assert emulator.values["%s2_s0"] is None
    assert emulator.values["%s3_s1"] == 5, "the same either way"


@pytest.mark.parametrize(
    ("instruction", "operands", "value"),
    [
        ("sadd.s32", (0xFFFFFFFF, 2), 1),
        ("ssub.s32", (1, 2), 0xFFFFFFFF),
        ("smul.u32", (None, 0), 0),
        ("sand.u32", (None, 1), None),
        ("sshra.s32", (0x80000000, 31), 0xFFFFFFFF),
        ("sshrl.u32", (0x80000000, 31), 1),
        ("sc.u32", (0xFFFFFFFF, 1), True),
        ("smulhi.u32", (1 << 31, 4), 2),
        ("scmp.lt.s32.totalorder", (0xFFFFFFFF, 0), True),
        ("scmp.lt.u32.totalorder", (0xFFFFFFFF, 0), False),
        ("smin.s32", (0xFFFFFFFF, 0), 0xFFFFFFFF),
        ("smin.u32", (0xFFFFFFFF, 0), 0),
        ("sdivrem.u32", (17, 5, 0), 3),
        ("sdivrem.u32", (17, 5, 1), 2),
        ("sdivrem.u32", (17, 5, 2), [3, 2]),
        ("pand", (None, False), False),
        ("pand", (None, True), None),
        ("por", (None, True), True),
        ("pnand", (None, False), True),
        ("pnor", (None, False), None),
        ("scalar_select", (True, 3, None), 3),
        ("scalar_select", (None, 3, 4), None),
    ],
)
def test_arithmetic(instruction, operands, value):
    assert function_of(instruction)(*operands) == value


def test_floats_are_not_followed():
    assert function_of("scmp.lt.f32.totalorder") is None


def test_generations_without_a_clock_are_refused():
    with pytest.raises(ScheduleError, match="'v3' is none of v4"):
        Machine.of("v3", 300, 1.0)
