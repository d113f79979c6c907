# SPDX-License-Identifier: Apache-2.0
"""Importing the package is cheap and touches nothing; a failing entry point is not silent."""

import logging
import subprocess
import sys

import pytest

import tpu_inference


def test_import_loads_nothing_heavy():
    code = (
        "import sys, tpu_inference; tpu_inference.tpu_platform_plugin();"
        "print([m for m in ('jax', 'torch', 'vllm', 'numpy') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


def test_entry_point_names_the_platform():
    from tpu_inference.platforms import TpuPlatform

    module, _, name = tpu_inference.tpu_platform_plugin().rpartition(".")
    assert (module, name) == (TpuPlatform.__module__, TpuPlatform.__name__)


def test_a_failing_entry_point_is_logged_at_error(monkeypatch, caplog):
    import tpu_inference.env_override

    def fail():
        raise RuntimeError("broken on purpose")

    monkeypatch.setattr(tpu_inference.env_override, "apply", fail)
    logger = logging.getLogger("vllm.tpu_inference")
    logger.addHandler(caplog.handler)
    try:
        with pytest.raises(RuntimeError, match="on purpose"):
            tpu_inference.tpu_platform_plugin()
    finally:
        logger.removeHandler(caplog.handler)
    (record,) = caplog.records[:1]
    assert record.levelno == logging.ERROR and "broken on purpose" in str(record.exc_info)
