# SPDX-License-Identifier: Apache-2.0
"""How the engine's process is started."""

import os
import subprocess
import sys

import pytest

from tpu_inference.compat import processes

SCRIPT = """
import torch
from vllm import LLM, SamplingParams
from tpu_inference.demo import MODEL

torch.set_num_threads(2)
(torch.ones(1000, 1000) @ torch.ones(1000, 1000)).sum()  # the parent's thread pool has worked
llm = LLM(MODEL, max_model_len=128, max_num_seqs=4, max_num_batched_tokens=128, num_gpu_blocks_override=20, dtype="float32")
print("ANSWER", llm.generate("Once upon a time", SamplingParams(temperature=0, max_tokens=8))[0].outputs[0].token_ids)
"""


@pytest.fixture
def environment(monkeypatch):
    """`set(value)` sets the variable or, with None, takes it away; it is as before after the test."""
    monkeypatch.setenv(processes.START_METHOD, "fork")

    def set_to(value):
        monkeypatch.delenv(processes.START_METHOD) if value is None else monkeypatch.setenv(
            processes.START_METHOD, value
        )

    return set_to


@pytest.mark.parametrize(
    ("started", "before", "after", "warns"),
    [
        (False, None, None, False),
        (False, "fork", "fork", False),
        (False, "spawn", "spawn", False),
        (True, None, "spawn", False),
        (True, "fork", "spawn", True),
        (True, "spawn", "spawn", False),
    ],
)
def test_no_fork_once_jax_has_started(monkeypatch, environment, started, before, after, warns):
    logged = []
    monkeypatch.setattr(processes.logger, "warning", lambda *args: logged.append(args))
    monkeypatch.setattr(processes, "jax_has_started", lambda: started)
    environment(before)
    processes.choose_start_method()
    assert os.environ.get(processes.START_METHOD) == after
    assert bool(logged) == warns


def test_jax_has_started_is_seen():
    code = "from tpu_inference.compat.processes import jax_has_started as s; a = s(); import jax; b = s(); jax.devices(); print(a, b, s())"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.split() == [
        "False", "False", "True",
    ]  # fmt: skip


@pytest.mark.slow
@pytest.mark.e2e
def test_a_script_without_a_main_guard(tmp_path):
    """vLLM forks the engine by default, and its users' scripts count on it."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    env = {k: v for k, v in os.environ.items() if k not in ("VLLM_ENABLE_V1_MULTIPROCESSING", processes.START_METHOD)}
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, env=env, timeout=180)
    assert done.stdout.count("ANSWER") == 1, done.stdout + done.stderr


STILL_NEEDED = {
    "torchax names overloads that torch has dropped": "import torchax.ops.jaten, torchax.decompositions",
    "vllm.ir wraps its operations in custom ops of torch": (
        "import torch, vllm.ir.op as op; assert not op._ENABLE_TORCH_WRAP, 'wrapped'"
    ),
    "torch.accelerator fails once torchax is imported": (
        "from tpu_inference.compat import lowering\n"
        "lowering.quiet_torch_accelerator = lambda: None\n"
        "lowering.import_torchax()\n"
        "import torch\n"
        "torch.accelerator.empty_cache(); torch.accelerator.synchronize()"
    ),
}
"""What a function of compat is for -> code that fails without it. When one of these runs, that function can go."""


@pytest.mark.slow
@pytest.mark.parametrize("why", STILL_NEEDED)
def test_what_is_worked_around_is_still_so(why):
    done = subprocess.run([sys.executable, "-c", STILL_NEEDED[why]], capture_output=True, text=True)
    assert done.returncode != 0, f"no longer: {why}"
    assert "SyntaxError" not in done.stderr and "ModuleNotFoundError" not in done.stderr, done.stderr


@pytest.mark.slow
def test_torchax_is_imported_all_the_same():
    code = "from tpu_inference.compat.lowering import import_torchax as i; print(i().__name__, i() is i())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.split() == ["torchax", "True"], done.stderr
