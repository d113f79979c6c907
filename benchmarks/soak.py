# SPDX-License-Identifier: Apache-2.0
"""A server under mixed load for half an hour: memory, latency and tokens a second, sampled, and nothing left at the end.

Clients send the fuzzer's requests (tests/fuzz: valid, hostile, streamed, abandoned) one after another; a probe asks the same greedy question all
the time, and its answer must not change. Writes results/soak.csv and soak.md; with --plot, for which matplotlib is needed, soak.svg from the csv.
"""

import argparse
import csv
import itertools
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from statistics import median, quantiles

from common import RESULTS, machine_line, table, write

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from fuzz.campaign import known_error
from fuzz.client import send
from fuzz.generate import request
from helpers.server import TELLING, Server, server, wait_until

CSV = RESULTS / "soak.csv"
BLOCKS = 21
"""Of the KV cache, one of them the null block: the longest request takes 16, so that others are preempted for it."""
PROBE = dict(prompt="Once upon a time", max_tokens=32)
COLUMNS = (
    "seconds",
    "api_server_mib",
    "engine_mib",
    "tokens_per_s",
    "requests_per_s",
    "p50_ms",
    "p99_ms",
    "preemptions",
)
MIB = 2**20


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--clients", type=int, default=6)
    parser.add_argument("--every", type=float, default=15, help="seconds between samples")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plot", action="store_true", help="only draw what results/soak.csv holds")
    return parser.parse_args()


class Load:
    """Clients and a probe, in threads, and what they count."""

    def __init__(self, target: Server, clients: int, seed: int) -> None:
        self._server, self._seed, self.clients = target, seed, clients
        self._numbers, self._lock = itertools.count(), threading.Lock()
        self._stop = threading.Event()
        self._expected = target.complete(**PROBE)["text"]
        self.statuses: Counter[int] = Counter()
        self.problems: list[str] = []
        self.latencies: list[float] = []
        self._threads = [threading.Thread(target=self._client) for _ in range(clients)] + [
            threading.Thread(target=self._probe)
        ]
        for thread in self._threads:
            thread.start()

    def _client(self) -> None:
        while not self._stop.is_set():
            with self._lock:
                index = next(self._numbers)
            asked = request(self._seed, index)
            outcome = send(self._server.port, asked)
            with self._lock:
                self.statuses[outcome.status] += 1
            if outcome.problem and not known_error(asked, outcome.problem):
                self.problems.append(f"request {index}: {outcome.problem}")

    def _probe(self) -> None:
        while not self._stop.wait(0.2):
            start = time.monotonic()
            if (text := self._server.complete(**PROBE)["text"]) != self._expected:
                self.problems.append(f"the probe was answered {text!r}")
            self.latencies.append(time.monotonic() - start)

    def take_latencies(self) -> list[float]:
        """Those since the last call, in ms."""
        taken, self.latencies = self.latencies, []
        return [1000 * seconds for seconds in taken]

    def stop(self) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()


def sample(target: Server, load: Load, start: float, before: dict[str, float]) -> dict[str, float]:
    """A row; `before` holds the counters of the row before, and is brought up to date."""
    now, latencies = time.monotonic() - start, load.take_latencies()
    memory = {"api": 0.0, "engine": 0.0}
    for process in target.processes():
        memory["engine" if "EngineCore" in process.name() else "api"] += process.memory_full_info().uss / MIB
    counters = {
        "seconds": now,
        "tokens": target.metric("vllm:generation_tokens_total"),
        "requests": float(load.statuses.total()),
    }
    passed = {name: value - before.get(name, 0.0) for name, value in counters.items()}
    before.update(counters)
    cuts = quantiles(latencies, n=100) if len(latencies) > 1 else [float("nan")] * 99
    values = (
        now, memory["api"], memory["engine"], passed["tokens"] / passed["seconds"], passed["requests"] / passed["seconds"],
        cuts[49], cuts[98], target.metric("vllm:num_preemptions_total"),
    )  # fmt: skip
    return dict(zip(COLUMNS, values, strict=True))


def run(args: argparse.Namespace) -> None:
    rows: list[dict[str, float]] = []
    with (
        tempfile.TemporaryDirectory() as directory,
        server(
            Path(directory) / "log", *TELLING.args, "--num-gpu-blocks-override", str(BLOCKS), env=TELLING.env
        ) as target,
    ):
        load, start = Load(target, args.clients, args.seed), time.monotonic()
        before: dict[str, float] = {"seconds": 0.0, "tokens": target.metric("vllm:generation_tokens_total")}
        try:
            with CSV.open("w", newline="") as file:
                writer = csv.DictWriter(file, COLUMNS)
                writer.writeheader()
                while time.monotonic() - start < 60 * args.minutes and target.process.poll() is None:
                    time.sleep(args.every)
                    rows.append(sample(target, load, start, before))
                    writer.writerow({name: round(value, 2) for name, value in rows[-1].items()})
                    file.flush()
        finally:
            load.stop()
        wait_until(target.is_idle, 60, "the requests are gone")
        left = target.live_state()
        if not rows[-1]["preemptions"]:
            load.problems.append("no request was preempted: the load says nothing of preemption")
        write("soak.md", render(rows, load, left))
    sys.exit("\n".join(load.problems[:20]) or bool(any(left.values())))


def render(rows: list[dict[str, float]], load: Load, left: dict[str, int]) -> str:
    """The report."""
    end = rows[-1]["seconds"]

    def between(first: float, last: float) -> list[dict[str, float]]:
        return [row for row in rows if first * end <= row["seconds"] <= last * end]

    parts = {
        "first sixth": between(0, 1 / 6),
        "second": between(1 / 6, 1 / 3),
        "middle third": between(1 / 3, 2 / 3),
        "last sixth": between(5 / 6, 1),
    }
    shown = [name for name in COLUMNS if name not in ("seconds", "preemptions")]
    lines = [[name, *(median(row[column] for row in part) for column in shown)] for name, part in parts.items()]
    statuses = ", ".join(f"{status or 'client gone'}: {count}" for status, count in sorted(load.statuses.items()))
    return "\n\n".join(
        [
            "# Soak",
            machine_line(),
            f"{end / 60:.1f} minutes of the fuzzer's requests (`tests/fuzz`: valid, hostile, streamed, abandoned) from {load.clients} clients, and a "
            f"probe of {PROBE['max_tokens']} greedy tokens, which is what the latencies are of. The demo model on the CPU backend, a KV cache of "
            f"{BLOCKS - 1} blocks, of which the longest request takes 16. "
            "Memory is what each process holds for itself (USS). Medians over the samples of a part:",
            table(["", *shown], lines),
            f"- Requests by status: {statuses}\n"
            f"- Preemptions: {rows[-1]['preemptions']:.0f}\n"
            f"- Answers that were wrong, hangs, 5xx that `tests/fuzz/known_errors.json` does not lay to vLLM: {len(load.problems)}\n"
            f"- Left at the end: {', '.join(f'{count} {name}' for name, count in left.items())}, no block of the KV cache",
            "![Memory, latency and tokens a second over time](soak.svg)",
            *load.problems[:20],
        ]
    )  # fmt: skip


def plot() -> None:
    """results/soak.svg from results/soak.csv."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    with CSV.open() as file:
        rows = [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]
    minutes = [row["seconds"] / 60 for row in rows]
    panels = (
        ("MiB", ("engine_mib", "api_server_mib")),
        ("ms", ("p50_ms", "p99_ms")),
        ("a second", ("tokens_per_s", "requests_per_s")),
    )
    figure, axes = pyplot.subplots(len(panels), 1, sharex=True, figsize=(8, 7), layout="constrained")
    for axis, (unit, names) in zip(axes, panels, strict=True):
        for name in names:
            axis.plot(minutes, [row[name] for row in rows], label=name)
        axis.set(ylabel=unit, ylim=(0, None))
        axis.legend(loc="lower right")
        axis.grid(alpha=0.3)
    axes[-1].set_xlabel("minutes")
    figure.savefig(RESULTS / "soak.svg", metadata={"Date": None})


if __name__ == "__main__":
    arguments = parse_args()
    plot() if arguments.plot else run(arguments)
