# SPDX-License-Identifier: Apache-2.0
"""The command, the committed reports, and the page made from them."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import jax.numpy as jnp
import pytest

from tpu_inference.kernels.ragged_paged_attention.shapes import SHAPES
from tpu_inference.tools.kernel_report import store
from tpu_inference.tools.kernel_report.__main__ import main
from tpu_inference.tools.kernel_report.cases import CHIPS, cases, ops, shapes
from tpu_inference.tools.kernel_report.measure import Figure, Kernel, Report
from tpu_inference.tools.kernel_report.render import BEGIN, END, as_tables, as_text, replace_region
from tpu_inference.tools.schedule import BANDWIDTHS, LATENCIES

ROOT = Path(__file__).resolve().parent.parent.parent
OP = "ragged_paged_attention"
LOOP = dict(start=0x20, depth=1, bundles=100, cycles=5000, stalled=50, use={"VALU": 0.5}, spills=3, fills=2)


@pytest.fixture
def report():
    figures = [
        Figure(latency, bandwidth, 20.0, 2.0, 22.0, 0.8)
        for bandwidth in BANDWIDTHS
        for latency in LATENCIES
    ]  # fmt: skip
    kernel = Kernel("paged_decode.1", 20.0, 2 * 2**20, [LOOP])
    return Report(
        OP, "decode_tp8_64x1k", "64 decodes at 1024", "v6e", "pallas", 1.5, 1000, 2000, 1100, 0, figures, [kernel], {},
        {"jax": "1", "libtpu": "2"}, "2026-01-01",
    )  # fmt: skip


def test_committed_page_is_what_the_committed_reports_make():
    text = (ROOT / store.PAGE).read_text(encoding="utf-8")
    assert store.page(text, store.read(ROOT / "benchmarks/tpu_schedule")) == text, (
        "run python -m tpu_inference.tools.kernel_report --op ... --write benchmarks/tpu_schedule"
    )


def test_committed_reports_are_of_shapes_that_exist():
    reports = store.read(ROOT / "benchmarks/tpu_schedule")
    assert reports
    for made in reports:
        assert made.op in ops()
        assert made.shape in shapes(made.op)
        assert [(x.latency, x.bandwidth) for x in made.figures] == [(x, y) for y in BANDWIDTHS for x in LATENCIES]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--op", "nothing", "--all"], "op 'nothing' is not known; known are: "),
        (["--op", OP, "--shape", "nothing"], "'nothing' is not known; known are: decode_tp1_64x1k, "),
        (["--op", OP, "--shape", "decode_tp8_64x1k", "--chip", "v1"], "chip 'v1' is not known; known are: v4, "),
    ],
)
def test_unknown_names_list_the_known(arguments, message, capsys):
    assert main(arguments) == 2
    assert message in capsys.readouterr().err


def test_all_has_every_shape_where_it_is_of_interest():
    found = {(case.name, case.chip) for case in cases(OP)}
    assert {chip for _, chip in found} == set(CHIPS)
    assert {chip for name, chip in found if name.endswith("_page256")} == {"tpu7x"}


def test_written_reports_come_back(report, tmp_path):
    other = replace(report, shape="prefill_tp8_2048", unknown={"branches": 2, "loops": ["while.1"]})
    for made in (report, other, report):
        path = store.write(tmp_path / "new", made)
    assert path.name == "ragged_paged_attention_v6e.json"
    assert store.read(tmp_path / "new") == [report, other]


def test_page_is_rewritten_between_its_markers(report, tmp_path):
    page = tmp_path / "kernels.md"
    assert not store.update_page(tmp_path, page)
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    store.write(tmp_path / "reports", report)
    assert store.update_page(tmp_path / "reports", page)
    text = page.read_text()
    assert text.startswith(f"before\n{BEGIN}\n### `{OP}` on v6e\n")
    assert text.endswith(f"{END}\nafter\n")
    assert (
        "| `decode_tp8_64x1k` | pallas | 1.5 | 1.10 | 20.0 / 20.0 | 2.0 / 2.0 | 80 / 80 | 80 / 80 | 2.0 | 3 | none |"
        in text
    )


@pytest.mark.parametrize("text", ["", f"{BEGIN}", f"{END} {BEGIN}", f"{BEGIN} {END} {BEGIN} {END}"])
def test_wrong_markers_are_an_error(text):
    with pytest.raises(ValueError, match="needs one"):
        replace_region(text, "new")


def test_text_says_what_the_figure_is_not(report):
    text = as_text(report)
    assert "not calibrated on hardware" in text
    assert "unknown: none" in text
    assert "spills 3, fills 2; slots VALU 50%" in text
    assert "lower bounds" in as_text(replace(report, unknown={"branches": 2}))


def test_a_form_without_kernels_has_a_row(report):
    table = as_tables([replace(report, form="xla (head_dim 64)", kernels=[], unknown={"loops": ["while.1"]})])
    assert "| xla |" in table
    assert "| - | - | 1 loops |" in table


@pytest.mark.parametrize("name", SHAPES)
def test_shapes_are_consistent(name):
    shape = SHAPES[name]
    device = SimpleNamespace(platform="tpu", device_kind="TPU v6 lite")
    q, k, v, pages, tables, lengths, starts = shape.arguments(device)
    assert q.shape[0] == k.shape[0] == v.shape[0] == sum(new for _, new in shape.rows)
    assert tables.shape == (lengths.shape[0], shape.table_width) == (starts.shape[0] - 1, shape.table_width)
    assert shape.table_width * shape.page_size >= max(shape.lengths)
    assert pages.shape[0] >= tables.size + 1000, "too large for VMEM"
    ones = [new == 1 for _, new in shape.rows]
    assert ones == sorted(ones, reverse=True), "rows of one token first"


def test_useful_work():
    shape = SHAPES["decode_fp8_tp1_64x8k"]
    assert shape.useful_bytes == 64 * 8192 * 2 * 8 * 128 * 1
    assert shape.useful_flops == 64 * 8192 * 4 * 32 * 128
    assert jnp.dtype(shape.cache_dtype).itemsize == 1
    assert SHAPES["prefill_tp8_2048"].useful_flops == 4 * 4 * 128 * 2048 * 2049 // 2
