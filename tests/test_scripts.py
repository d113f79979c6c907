# SPDX-License-Identifier: Apache-2.0
"""scripts/: the generated tables, and how the installer refuses."""

import importlib.util
import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def gen():
    spec = importlib.util.spec_from_file_location("gen_support_table", ROOT / "scripts/gen_support_table.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_table_has_every_architecture(gen):
    from tpu_inference.models.common.registry import _MODELS, supported_architectures

    table = gen.table(_MODELS)
    assert all(f"`{name}`" in table for name in supported_architectures())


def test_table_has_every_sampling_parameter(gen):
    """Served or refused with a reason, as requests are checked."""
    from vllm import SamplingParams

    from tpu_inference.platforms import requests

    names = ("SERVED", "FRONT_END", "REASONS")
    read = gen.literals(ROOT / "tpu_inference/platforms/requests.py", *names)
    assert read == {name: getattr(requests, name) for name in names}
    assert set(requests.REASONS) == set(requests.UNSERVED)
    rows = gen.sampling_table(*read.values()).splitlines()[2:]
    fields = [name for name in SamplingParams.__struct_fields__ if not name.startswith("_")]
    assert sorted(row.split("`")[1] for row in rows) == sorted(fields)


def test_region_is_replaced_and_the_rest_kept(gen):
    begin, end = gen.BEGIN.format("models"), gen.END.format("models")
    once = gen.replace_region(f"before\n{begin}\nold\n{end}\nafter\n", "new")
    assert once == f"before\n{begin}\nnew\n{end}\nafter\n"
    assert gen.replace_region(once, "new") == once


@pytest.mark.parametrize("markers", ["", "{0}", "{1} {0}", "{0} {1} {0} {1}"])
def test_wrong_markers_are_an_error(gen, markers):
    with pytest.raises(ValueError, match="needs one"):
        gen.replace_region(markers.format(gen.BEGIN.format("models"), gen.END.format("models")), "new")


@pytest.fixture
def install(tmp_path):
    """Runs a copy of the installer in an empty directory, where it has nothing to install."""
    (tmp_path / "scripts").mkdir()
    script = shutil.copy(ROOT / "scripts/install.sh", tmp_path / "scripts")
    return lambda *args, **env: subprocess.run(
        ["bash", script, *args], env={**os.environ, **env}, capture_output=True, text=True, timeout=30
    )


def test_installer_refuses_an_unknown_option(install):
    done = install("--everything")
    assert done.returncode == 1
    assert "unknown option --everything; known are --dev, --docs and --tpu" in done.stderr


def test_installer_refuses_a_python_that_is_none(install, tmp_path):
    done = install(PYTHON="false")
    assert done.returncode == 1
    assert "PYTHON=false is no working Python; one of 3.11 3.12 3.13 is needed" in done.stderr
    assert not (tmp_path / ".venv").exists()


def test_installer_refuses_an_old_python(install, tmp_path):
    old = tmp_path / "python3.10"
    old.write_text("#!/bin/sh\necho 3.10\n")
    old.chmod(0o755)
    done = install(PYTHON=str(old))
    assert done.returncode == 1
    assert f"PYTHON={old} is 3.10; one of 3.11 3.12 3.13 is needed" in done.stderr
