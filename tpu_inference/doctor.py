# SPDX-License-Identifier: Apache-2.0
"""`python -m tpu_inference.doctor`: versions, device, plugin state, caches, and what is wrong. Exits with 1 where something is."""

import os
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, entry_points, version

from tpu_inference import envs, tpu_info
from tpu_inference.errors import ConfigError

PACKAGES = (
    "tpu-inference",
    "vllm",
    "jax",
    "jaxlib",
    "libtpu",
    "flax",
    "torch",
    "torchax",
    "transformers",
    "safetensors",
)
TESTED_VLLM = "0.32.0"
ENTRY_POINT = "tpu_inference"
PROBE_SECONDS = 60

Section = tuple[list[tuple[str, str]], list[str]]
"""Rows to print, and problems found."""


def versions() -> Section:
    rows, problems = [("python", sys.version.split()[0])], []
    for name in PACKAGES:
        try:
            rows.append((name, version(name)))
        except PackageNotFoundError:
            rows.append((name, "not installed"))
    found = dict(rows)
    if found["vllm"] == "not installed":
        problems.append(
            "vLLM is not installed: install it (see README.md), then this package into the same environment."
        )
    elif found["vllm"].split("+")[0] != TESTED_VLLM:
        problems.append(f"vLLM {found['vllm']} is installed; this version is tested with {TESTED_VLLM} only.")
    if found["tpu-inference"] == "not installed":
        problems.append("The package is not installed, so vLLM cannot find it: `pip install -e .` in its directory.")
    return rows, problems


def device() -> Section:
    try:
        detection = tpu_info.detect()
    except ConfigError as error:
        return [("device", "none")], [str(error)]
    rows = [("device", detection.platform), ("why", detection.reason)]
    if detection.chip:
        rows.append(("chip", f"{detection.num_chips} x {detection.chip.name}"))
    # In a process of its own: a TPU that another process holds, or a broken libtpu, must not end the doctor.
    code = "import tpu_inference.env_override, jax; print(len(jax.devices()), jax.devices()[0].device_kind)"
    try:
        probe = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=PROBE_SECONDS)
    except subprocess.TimeoutExpired:
        return rows, [f"JAX did not show its devices within {PROBE_SECONDS} s: is another process using the TPU?"]
    if probe.returncode:
        last = (probe.stderr.strip().splitlines() or ["no message"])[-1]
        return rows, [f"JAX does not start: {last}"]
    return [*rows, ("JAX devices", probe.stdout.strip())], []


def plugin() -> Section:
    group = entry_points(group="vllm.platform_plugins")
    names = sorted(entry.name for entry in group)
    allowed = os.environ.get("VLLM_PLUGINS")
    rows, problems = [("platform plugins", ", ".join(names) or "none"), ("VLLM_PLUGINS", allowed or "unset: all")], []
    if ENTRY_POINT not in names:
        problems.append("vLLM would not find this plugin: its entry point is not installed (`pip install -e .`).")
    if allowed is not None and ENTRY_POINT not in allowed.split(","):
        problems.append(f"VLLM_PLUGINS={allowed} leaves this plugin out: add {ENTRY_POINT} to it, or unset it.")
    if target := os.environ.get("VLLM_TARGET_DEVICE"):
        rows.append(("VLLM_TARGET_DEVICE", target))
        if target == "cpu":
            problems.append("VLLM_TARGET_DEVICE=cpu makes vLLM skip every plugin: unset it.")
    active = []
    for entry in group:
        try:
            if entry.load()():
                active.append(entry.name)
        except Exception as error:
            problems.append(f"The plugin {entry.name} fails to load: {error}")
    chosen = [name for name in active if allowed is None or name in allowed.split(",")]
    if len(chosen) > 1:
        problems.append(
            f"Several platform plugins are active ({', '.join(chosen)}) and vLLM takes one: set VLLM_PLUGINS={ENTRY_POINT}."
        )
    return rows, problems


def caches() -> Section:
    path = envs.VLLM_XLA_CACHE_PATH
    files = [os.path.join(root, name) for root, _, names in os.walk(path) for name in names]
    size = sum(os.path.getsize(file) for file in files if os.path.exists(file))
    rows = [("compile cache", path), ("", f"{len(files)} files, {size / 2**20:.1f} MiB")]
    existing = path
    while not os.path.exists(existing):
        existing = os.path.dirname(existing)
    if not (os.path.isdir(existing) and os.access(existing, os.W_OK)):
        return rows, [
            f"The compile cache {path} cannot be written: every start compiles anew. Set VLLM_XLA_CACHE_PATH."
        ]
    return rows, []


def environment() -> Section:
    rows = [(name, os.environ[name]) for name in envs.ENV_VARS if name in os.environ]
    return rows or [("variables", "none set")], list(envs.invalid().values())


SECTIONS: dict[str, Callable[[], Section]] = {
    "Versions": versions,
    "Environment": environment,
    "Device": device,
    "Plugin": plugin,
    "Caches": caches,
}


def main() -> int:
    problems: list[str] = []
    for title, section in SECTIONS.items():
        try:
            rows, found = section()
        except ConfigError as error:
            rows, found = [], [str(error)]
        print(f"{title}\n" + "\n".join(f"  {name:<29} {value}" for name, value in rows))
        problems += [problem for problem in found if problem not in problems]
    print("What is wrong\n" + ("\n".join(f"  - {problem}" for problem in problems) or "  nothing"))
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
