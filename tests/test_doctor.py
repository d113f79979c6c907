# SPDX-License-Identifier: Apache-2.0
"""The doctor finds nothing on a good machine, and each fault on a bad one."""

import pytest

from tpu_inference import doctor


def test_a_good_machine(capsys):
    assert doctor.main() == 0
    out = capsys.readouterr().out
    assert ["vllm", "0.32.0"] in map(str.split, out.splitlines())
    assert ["device", "cpu"] in map(str.split, out.splitlines())
    assert out.endswith("nothing\n")


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("VLLM_PLUGINS", "other", "leaves this plugin out"),
        ("VLLM_TARGET_DEVICE", "cpu", "skip every plugin"),
        ("JAX_PLATFORMS", "tpu", "demands a TPU"),
        ("SKIP_JAX_PRECOMPILE", "perhaps", "SKIP_JAX_PRECOMPILE='perhaps' is not valid"),
        ("VLLM_XLA_CACHE_PATH", f"{__file__}/below-a-file", "cannot be written"),
    ],
)
def test_faults(monkeypatch, capsys, name, value, message):
    monkeypatch.setenv(name, value)
    monkeypatch.setattr(doctor.subprocess, "run", lambda *a, **k: doctor.subprocess.CompletedProcess(a, 0, "1 cpu", ""))
    assert doctor.main() == 1
    assert message in capsys.readouterr().out.partition("What is wrong")[2]
