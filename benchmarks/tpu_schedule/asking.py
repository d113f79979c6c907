# SPDX-License-Identifier: Apache-2.0
"""What the scripts that ask the planner share: a question in a process of its own, and answers that are kept one by one."""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tpu_inference.tools.kernel_report.render import replace_region

HERE = Path(__file__).resolve().parent
PAGE = HERE.parent.parent / "docs" / "planner.md"
GIB = 2**30


def run_planner(
    config: Mapping[str, Any], where: str, tensor_parallel: int, *options: str
) -> tuple[int, dict[str, Any] | str]:
    """The planner's exit code and its answer for requests of up to 8,192 tokens; of code 2, what it said."""
    chip, topology = where.split(":")
    with tempfile.TemporaryDirectory() as directory:
        (Path(directory) / "config.json").write_text(json.dumps(config), encoding="utf-8")
        command = [sys.executable, "-m", "tpu_inference.plan", "--model", directory, "--chip", chip]
        command += ["--topology", topology, "-tp", str(tensor_parallel), "--max-model-len", "8192", "--json", *options]
        done = subprocess.run(command, capture_output=True, text=True, timeout=1800)
    if done.returncode > 1:
        return done.returncode, (done.stderr.strip().splitlines() or ["no message"])[-1][:400]
    return done.returncode, json.loads(done.stdout)


def memory_of(answer: Mapping[str, Any]) -> dict[str, Any]:
    """What is kept of an answer's memory: bytes of a device, and the requests of 8,192 tokens that it holds."""
    memory = {key: answer["hbm_bytes_per_device"][key] for key in ("weights", "kv_cache", "temporaries")}
    return {"memory": memory, "requests": answer["requests_held"].get("8192", 0)}


def cells_of(kept: Mapping[str, Any]) -> list[str]:
    """The same as cells of a table: sizes in GiB, then the requests."""
    sizes = (kept["memory"][name] / GIB for name in ("weights", "kv_cache", "temporaries"))
    return [*(f"{size:.2f}" for size in sizes), str(kept["requests"])]


def ask_all(
    about: str | None,
    questions: Mapping[str, Callable[[], dict[str, Any]]],
    path: Path,
    as_text: Callable[[Mapping[str, Any]], str],
    marks: tuple[str, str],
) -> int:
    """The command: ask, and after each answer keep it in `path` and bring the page's table between `marks` up to date.

    Returns 1 where an answer is an error, else 0.
    """
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--only", default="", help="questions whose name has this in it; the others' answers stay")
    args = parser.parse_args()
    result = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    failed = 0
    for name, ask in questions.items():
        if args.only not in name:
            continue
        start = time.monotonic()
        found = ask()
        result[name] = {**found, "seconds": round(time.monotonic() - start, 1)}
        failed += "error" in found
        print(name, json.dumps(result[name]), flush=True)
        result = {key: result[key] for key in questions if key in result}
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        PAGE.write_text(replace_region(PAGE.read_text(encoding="utf-8"), as_text(result), marks), encoding="utf-8")
    return min(failed, 1)
