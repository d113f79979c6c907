# SPDX-License-Identifier: Apache-2.0
"""The same Llama checkpoints by the JAX class and by vLLM's PyTorch class, on JAX's CPU backend.

    python benchmarks/pytorch_twins.py --work-dir /tmp/pytorch_twins [--sizes 3m 125m]

For each size: each side starts alone, with empty compile caches and then with full ones; then both start, and the workloads run on the two engines by
turns. The best of the repetitions counts. Ratio is PyTorch / JAX for times, JAX / PyTorch for throughput: above 1 the PyTorch class is slower.
"""

import argparse
import re
import shutil
import sys
from contextlib import ExitStack
from pathlib import Path

import common
from make_models import SIZES, make
from vs_vllm_cpu import WORKLOADS, Engine

SIDES = ("flax_nnx", "vllm")
BARS = {
    "start_cold": 1.5,
    "start_warm": 1.5,
    "warm_up_cold": 1.5,
    "warm_up_warm": 1.5,
    "decode": 1.15,
    "throughput": 1.15,
    "prefill": 1.15,
}
TITLES = {
    "start_cold": "start to first token, cold, s",
    "start_warm": "start to first token, warm, s",
    "warm_up_cold": "of it compiling, s",
    "warm_up_warm": "of it reading programs from the cache, s",
    "programs": "programs at start",
    "decode": "single stream, ms/token",
    "throughput": "32 x (128 in, 128 out), tokens/s",
    "prefill": "prefill of 2048 tokens, s",
}


def compare(size: str, work: Path, repetitions: int) -> dict[str, dict[str, float]]:
    """Side -> metric -> value."""
    model = make(work / "models", size)
    values: dict[str, dict[str, float]] = {side: {} for side in SIDES}

    def start(side: str, kind: str) -> Engine:
        log = work / f"{size}-{side}-{kind}.log"
        env = {"MODEL_IMPL_TYPE": side}
        engine = Engine(Path(sys.executable), model, size, log, work / "caches" / side, env)
        seconds, programs = re.search(r"warm-up +([\d.]+) +(\d+) programs", log.read_text()).groups()
        values[side] |= {f"start_{kind}": engine.start, f"warm_up_{kind}": float(seconds), "programs": float(programs)}
        return engine

    shutil.rmtree(work / "caches", ignore_errors=True)
    for kind in ("cold", "warm"):
        for side in SIDES:
            with start(side, kind):  # alone: an engine goes on compiling in the background once it serves
                pass
    with ExitStack() as stack:
        engines = {side: stack.enter_context(start(side, "both")) for side in SIDES}
        for workload in WORKLOADS:
            samples: dict[str, list[float]] = {side: [] for side in SIDES}
            for _ in range(repetitions):
                for side in SIDES:
                    samples[side].append(engines[side].run(workload))
            best = max if workload == "throughput" else min
            for side in SIDES:
                values[side][workload] = best(samples[side])
    return values


def render(results: dict[str, dict[str, dict[str, float]]]) -> str:
    """The report."""
    parts = ["# PyTorch models beside their JAX twins", common.machine_line(), __doc__.split("\n\n")[2]]
    for size, sides in results.items():
        rows = []
        for name, title in TITLES.items():
            ours, theirs = (sides[side][name] for side in SIDES)
            ratio = ours / theirs if name == "throughput" else theirs / ours
            bar = BARS.get(name)
            said = ("-", "-") if bar is None else (f"<= {bar:g}", common.met(ratio, bar))
            rows.append((title, ours, theirs, ratio, *said))
        parts += [f"## {size}", common.table(["", "JAX class", "PyTorch class", "ratio", "bar", "met"], rows)]
    return "\n\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work-dir", type=Path, required=True)
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), default=["3m"])
    parser.add_argument("--repetitions", type=int, default=3)
    args = parser.parse_args()
    work = args.work_dir.resolve()
    work.mkdir(parents=True, exist_ok=True)
    common.write("pytorch_twins.md", render({size: compare(size, work, args.repetitions) for size in args.sizes}))


if __name__ == "__main__":
    main()
