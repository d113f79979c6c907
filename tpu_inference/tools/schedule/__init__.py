# SPDX-License-Identifier: Apache-2.0
"""What a program would cost on a TPU, from the real compiler's schedule, on any machine that has libtpu.

    schedule.prepare()                                   # before libtpu is loaded
    with schedule.workload({"kernel": {0: lengths}}):    # what its loops run over, where that is data
        compiled, recorded = schedule.record(lambda: jitted.lower(*arguments).compile())
    timing = recorded.time("v6e", latency=300, bandwidth=1.0)

Nothing here was calibrated on hardware: figures are for comparing similar programs on one generation. See docs/measuring_a_kernel.md.
"""

from tpu_inference.tools.schedule.chips import BANDWIDTHS, LATENCIES, TOPOLOGIES, Machine
from tpu_inference.tools.schedule.environment import ScheduleError, prepare
from tpu_inference.tools.schedule.hlo import Collective
from tpu_inference.tools.schedule.recording import Recorded, record
from tpu_inference.tools.schedule.timing import AsyncCopy, OpTiming, Timing, Unknown
from tpu_inference.tools.schedule.workload import workload

__all__ = [
    "BANDWIDTHS",
    "LATENCIES",
    "TOPOLOGIES",
    "AsyncCopy",
    "Collective",
    "Machine",
    "OpTiming",
    "Recorded",
    "ScheduleError",
    "Timing",
    "Unknown",
    "prepare",
    "record",
    "workload",
]
