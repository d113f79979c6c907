# SPDX-License-Identifier: Apache-2.0
"""What the benchmarks share: the machine they ran on, and Markdown tables."""

import os
import platform
import subprocess
from collections.abc import Iterable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
CPU_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")


def cpu() -> dict[str, Any]:
    """Model, cores, and which of the vector extensions that matter to matrix products it has."""
    fields: dict[str, str] = {}
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        key, _, value = line.partition(":")
        fields.setdefault(key.strip(), value.strip())
    flags = set(fields.get("flags", "").split())
    return {
        "model": f"{fields.get('model name', platform.processor())} (family {fields.get('cpu family')})",
        "cores": len(os.sched_getaffinity(0)),
        "flags": [flag for flag in CPU_FLAGS if flag in flags],
        "load_average": os.getloadavg()[0],
    }


def versions(names: Iterable[str], python: str | None = None) -> dict[str, str]:
    """Versions of the distributions that are installed, here or for another interpreter."""
    if python is None:
        found = {}
        for name in names:
            try:
                found[name] = metadata.version(name)
            except metadata.PackageNotFoundError:
                continue
        return found
    code = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import common; "
    code += f"print(*(f'{{k}}={{v}}' for k, v in common.versions({list(names)!r}).items()))"
    out = subprocess.run([python, "-c", code], check=True, capture_output=True, text=True).stdout
    return dict(item.split("=", 1) for item in out.split())


def machine_line() -> str:
    """One line of Markdown on the machine."""
    info = cpu()
    return (
        f"Machine: {info['cores']} cores, {info['model']}, {', '.join(info['flags']) or 'no vector extensions'}; "
        f"load average {info['load_average']:.1f} at the end (others worked on it if that is above 1)."
    )


def table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A Markdown table; floats to three significant digits."""

    def text(value: Any) -> str:
        return (
            f"{value:.3g}"
            if isinstance(value, float) and abs(value) < 1000
            else f"{value:.0f}"
            if isinstance(value, float)
            else str(value)
        )

    lines = [header, ["---"] * len(header), *([text(value) for value in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def met(value: float, bar: float, *, at_least: bool = False) -> str:
    """ "yes" or "no"."""
    return "yes" if (value >= bar if at_least else value <= bar) else "**no**"


def write(name: str, text: str) -> None:
    """Print `text`, and keep it as results/NAME."""
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / name).write_text(text.rstrip() + "\n")
    print(text)
