# SPDX-License-Identifier: Apache-2.0
"""The HBM split and the step times as a picture."""

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tpu_inference.errors import ConfigError
from tpu_inference.plan.answer import Answer

FORMATS = (".png", ".svg", ".pdf")
GIB = 2**30


def check(path: str) -> None:
    """ConfigError where the picture could not be drawn or written."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError("--plot needs matplotlib, which is not installed: `pip install 'tpu-inference[plot]'`.")
    if Path(path).suffix.lower() not in FORMATS:
        raise ConfigError(f"--plot {path!r}: the name must end in one of {', '.join(FORMATS)}.")
    if not Path(path).absolute().parent.is_dir():
        raise ConfigError(f"--plot {path!r}: there is no directory {Path(path).absolute().parent}.")


def hbm_bars(answers: Sequence[Answer]) -> dict[str, list[float]]:
    """Part -> GiB of a device on each slice."""
    return {
        "weights": [a.memory.device.weights / GIB for a in answers],
        "KV cache": [a.memory.kv_cache / GIB for a in answers],
        "temporaries": [a.memory.device.temporaries / GIB for a in answers],
        "free": [max(a.memory.free, 0) / GIB for a in answers],
    }


def decode_lines(answer: Answer) -> dict[int, list[tuple[int, float, float]]]:
    """Context -> (batch, fast, slow milliseconds of a step), by batch."""
    lines: dict[int, list[tuple[int, float, float]]] = {}
    for step in answer.steps:
        load = step.cost.load
        if load.name == "decode":
            lines.setdefault(load.context, []).append((load.decodes, step.fast / 1e3, step.slow / 1e3))
    return {context: sorted(points) for context, points in sorted(lines.items())}


def _draw_hbm(axes: Any, answers: Sequence[Answer]) -> None:
    names, bottom = [str(a.slice) for a in answers], [0.0] * len(answers)
    for part, sizes in hbm_bars(answers).items():
        axes.bar(names, sizes, bottom=bottom, label=part)
        bottom = [low + size for low, size in zip(bottom, sizes, strict=True)]
    axes.set(title="HBM of a device", ylabel="GiB")
    axes.legend()


def _draw_steps(axes: Any, answers: Sequence[Answer]) -> None:
    for answer in answers:
        for context, points in decode_lines(answer).items():
            batches, fast, slow = zip(*points, strict=True)
            (line,) = axes.plot(batches, fast, marker="o", label=f"{answer.slice}, context {context:,}")
            axes.fill_between(batches, fast, slow, alpha=0.2, color=line.get_color())
    axes.set(
        title="A decode step, by the compiler's schedule",
        xlabel="requests",
        ylabel="ms (estimated range)",
        ylim=(0, None),
    )
    if axes.lines:
        axes.legend()


def draw(answers: Sequence[Answer], path: str) -> None:
    """Write the picture to `path`."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    _draw_hbm(left, answers)
    _draw_steps(right, answers)
    figure.savefig(path)
