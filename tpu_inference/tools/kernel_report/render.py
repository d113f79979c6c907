# SPDX-License-Identifier: Apache-2.0
"""Reports as text for a terminal, and as the tables of docs/kernels.md."""

from collections.abc import Iterable, Mapping
from typing import Any

from tpu_inference.tools.kernel_report.measure import Figure, Kernel, Report
from tpu_inference.tools.schedule import TOPOLOGIES

BEGIN, END = "<!-- kernels:begin -->", "<!-- kernels:end -->"
NOT = (
    "An emulation of the compiler's schedule, not calibrated on hardware: for comparing similar programs on one chip. Not in it: ICI, the host, "
    "occupancy of the matrix unit, conflicts of VMEM banks and HBM pages."
)
_HEAD = (
    "| Shape | Form | Compile, s | Moved / useful bytes | Kernels, µs | Other ops, µs | % of roofline | at 83 % of bandwidth | VMEM, MiB | "
    "Spills in the hot loop | Unknown |"
)


def _percent(*figures: Figure) -> str:
    return " / ".join(f"{100 * figure.roofline:.0f}" for figure in figures)


def _at(report: Report, bandwidth: float) -> list[Figure]:
    return [figure for figure in report.figures if figure.bandwidth == bandwidth]


def _span(values: Iterable[float]) -> str:
    return " / ".join(f"{x:.1f}" for x in values)


def unknown(counters: Mapping[str, Any]) -> str:
    """What could not be followed, or "none"."""
    parts = [f"{len(x) if isinstance(x, (list, tuple)) else x} {name}" for name, x in counters.items() if x]
    return ", ".join(parts) or "none"


def _hottest(report: Report) -> Kernel | None:
    return max(report.kernels, key=lambda kernel: kernel.microseconds, default=None)


def _loop_lines(kernel: Kernel) -> Iterable[str]:
    for loop in kernel.loops:
        use = " ".join(f"{slot} {100 * x:.0f}%" for slot, x in loop["use"].items())
        yield (
            f"    loop at {loop['start']:#x}, depth {loop['depth']}: {loop['bundles']} bundles, {loop['cycles']} cycles, {loop['stalled']} of them "
            f"stalled; spills {loop['spills']}, fills {loop['fills']}; slots {use}"
        )


def as_text(report: Report) -> str:
    lines = [
        f"{report.op} {report.shape} on {report.chip}: {report.about}; form {report.form}",
        f"  compile {report.compile_seconds} s; HBM {report.moved_bytes / 1e6:.2f} MB moved, {report.useful_bytes / 1e6:.2f} useful; "
        f"{report.useful_flops / 1e9:.2f} GFLOP useful; {report.temporary_bytes / 2**20:.1f} MiB temporary",
    ]
    for x in report.figures:
        lines.append(
            f"  DMA latency {x.latency:4d} cycles, {100 * x.bandwidth:3.0f} % of bandwidth: kernels {x.kernels:8.2f} µs, "
            f"other ops {x.wrappers:7.2f} µs, total {x.total:8.2f} µs, {100 * x.roofline:.1f} % of roofline"
        )
    for kernel in report.kernels:
        vmem = "VMEM not told" if kernel.vmem_bytes is None else f"VMEM {kernel.vmem_bytes / 2**20:.1f} MiB"
        lines += [f"  {kernel.name}: {kernel.microseconds} µs, {vmem}", *_loop_lines(kernel)]
    bound = "" if not report.unknown else ": times are lower bounds"
    return "\n".join([*lines, f"  unknown: {unknown(report.unknown)}{bound}", f"  {NOT}"])


def _row(report: Report) -> str:
    kernel, full, less = _hottest(report), _at(report, 1.0), _at(report, 0.83)
    vmem = max((x.vmem_bytes or 0 for x in report.kernels), default=0)
    spills = kernel.loops[0]["spills"] if kernel and kernel.loops else "-"
    cells = (
        f"`{report.shape}`", report.form.split(" ")[0], report.compile_seconds, f"{report.moved_bytes / report.useful_bytes:.2f}",
        _span(x.kernels for x in full), _span(x.wrappers for x in full), _percent(*full), _percent(*less),
        f"{vmem / 2**20:.1f}" if vmem else "-", spills, unknown(report.unknown),
    )  # fmt: skip
    return f"| {' | '.join(map(str, cells))} |"


def as_tables(reports: Iterable[Report]) -> str:
    """Markdown, a table for each op and chip, chips in the order of `TOPOLOGIES`."""
    groups: dict[tuple[str, int, str], list[Report]] = {}
    for report in reports:
        order = list(TOPOLOGIES).index(report.chip)
        groups.setdefault((report.op, order, report.chip), []).append(report)
    blocks = []
    for (op, _, chip), members in sorted(groups.items()):
        made = sorted({f"jax {x.versions['jax']}, libtpu {x.versions['libtpu']}, {x.date}" for x in members})
        rows = [_HEAD, "| --- " * (_HEAD.count("|") - 1) + "|", *map(_row, members)]
        blocks.append("\n".join([f"### `{op}` on {chip}", "", *rows, "", f"Made with {'; '.join(made)}."]))
    return "\n\n".join(blocks)


def replace_region(text: str, body: str, markers: tuple[str, str] = (BEGIN, END)) -> str:
    """`text` with `body` between the markers; ValueError without exactly one pair of them."""
    begin, end = markers
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise ValueError(f"needs one {begin} before one {end}")
    head, rest = text.split(begin)
    return f"{head}{begin}\n{body}\n{end}{rest.split(end)[1]}"
