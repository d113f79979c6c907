# SPDX-License-Identifier: Apache-2.0
"""Recording compiles of the real TPU compiler, without a TPU."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.aot]
SCRIPT = Path(__file__).parent / "data/record_programs.py"


def output_of(*command):
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.splitlines()


@pytest.fixture(scope="module")
def facts():
    return json.loads(output_of(str(SCRIPT))[-1])


def test_kernels_run_on_their_workload(facts):
    for chip, kernel in facts["kernels"].items():
        assert kernel["unknown"] == "none", chip
        assert 40 * 4096 <= kernel["read"] <= 41 * 4096, chip
        assert 40 * 300 / 2.2e3 < kernel["microseconds"] < 12, "40 waits, one after the other"


def test_scan_over_a_mesh(facts):
    scan = facts["scan"]
    assert scan["unknown"] == "none"
    assert scan["trips"] == 6
    assert ["all-reduce", 6, 4, 256 * 4096 * 2] in scan["collectives"]
    weights = 6 * 1024 * 4096 * 2
    assert weights <= scan["moved"] < 1.2 * weights


def test_unrolled_layers_are_all_counted(facts):
    unrolled = facts["unrolled"]
    assert unrolled["unknown"] == "none"
    assert len([kind for _, kind in unrolled["ops"] if kind == "fusion"]) == 4


def test_errors(facts):
    assert "no_such_kernel" in facts["unused"]
    assert "no schedule" in facts["not_for_tpu"]


def test_recording_must_be_prepared_before_libtpu():
    code = (
        "from tpu_inference.tools import schedule\n"
        "from tpu_inference.tools.schedule.environment import set_defaults\n"
        "set_defaults()\n"
        "from jax.experimental import topologies\n"
        "topologies.get_topology_desc(platform='tpu', topology_name='v6e:2x2')\n"
        "try:\n    schedule.prepare()\nexcept schedule.ScheduleError as error:\n    print(error)\n"
    )
    assert "libtpu is loaded in this process already" in output_of("-c", code)[-1]


def test_report_of_a_shape():
    command = [
        "-m",
        "tpu_inference.tools.kernel_report",
        "--op",
        "ragged_paged_attention",
        "--shape",
        "decode_tp8_64x1k",
    ]
    (line,) = (line for line in output_of(*command, "--json") if line.startswith("{"))
    report = json.loads(line)
    assert report["chip"] == "v6e"
    assert report["form"] == "pallas"
    assert report["unknown"] == {}
    assert 1 <= report["moved_bytes"] / report["useful_bytes"] < 1.1
    assert all(0.3 < figure["roofline"] <= 1 for figure in report["figures"])
    assert report["kernels"][0]["loops"][0]["spills"] == 0
    assert report["compile_seconds"] > 0
