# SPDX-License-Identifier: Apache-2.0
"""Chips as data, accelerator types, and what device is found."""

import pytest

from tpu_inference import tpu_info
from tpu_inference.errors import ConfigError
from tpu_inference.tpu_info import CHIPS, detect, parse_accelerator_type


@pytest.fixture(autouse=True)
def machine(monkeypatch):
    """A machine of which nothing is known from the environment."""
    for name in ("JAX_PLATFORMS", "TPU_ACCELERATOR_TYPE", "TPU_USE_METADATA"):
        monkeypatch.delenv(name, raising=False)


def with_files(root, *names):
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return root


def test_every_generation_is_there():
    assert list(CHIPS) == ["v3", "v4", "v5e", "v5p", "v6e", "tpu7x"]
    assert CHIPS["v6e"].hbm_bytes == 32 * 2**30
    assert CHIPS["tpu7x"].hbm_bytes_per_device == 96 * 2**30


@pytest.mark.parametrize(
    ("text", "name", "chips", "hosts"),
    [
        ("v5litepod-16", "v5e", 16, 4),
        ("v6e-8", "v6e", 8, 1),
        ("tpu7x-8", "tpu7x", 4, 1),
        ("v4-8", "v4", 4, 1),
        ("v4-32", "v4", 16, 4),
        ("v5p-8", "v5p", 4, 1),
        ("v3-8", "v3", 4, 1),
    ],
)
def test_accelerator_types(text, name, chips, hosts):
    found = parse_accelerator_type(text)
    assert (found.chip.name, found.num_chips, found.num_hosts) == (name, chips, hosts)


@pytest.mark.parametrize("text", ["v6e", "v9-8", "v4-7", "v6e-0", "v6e-9", ""])
def test_impossible_accelerator_types(text):
    with pytest.raises(ConfigError, match="accelerator type"):
        parse_accelerator_type(text)


def test_no_tpu_is_the_cpu(tmp_path):
    found = detect(tmp_path)
    assert found.platform == "cpu" and "no TPU" in found.reason


def test_device_files_are_a_tpu(tmp_path, monkeypatch):
    monkeypatch.setattr(tpu_info, "_has_libtpu", lambda: True)
    root = with_files(tmp_path, "dev/accel0", "dev/accel1", "dev/accel2", "dev/accel3")
    monkeypatch.setenv("TPU_ACCELERATOR_TYPE", "v4-8")
    found = detect(root)
    assert (found.platform, found.chip.name, found.num_chips) == ("tpu", "v4", 4)


def test_vfio_alone_is_no_tpu(tmp_path):
    assert detect(with_files(tmp_path, "dev/vfio/0")).platform == "cpu"


def test_the_environment_tells_where_files_do_not(tmp_path, monkeypatch):
    monkeypatch.setattr(tpu_info, "_has_libtpu", lambda: True)
    monkeypatch.setenv("TPU_ACCELERATOR_TYPE", "v6e-8")
    assert detect(tmp_path).chip.name == "v6e"


def test_never_a_silent_fallback(tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "tpu")
    with pytest.raises(ConfigError, match="demands a TPU, but there is none"):
        detect(tmp_path)
    root = with_files(tmp_path, "dev/accel0")
    monkeypatch.setattr(tpu_info, "_has_libtpu", lambda: False)
    with pytest.raises(ConfigError, match="libtpu is not installed"):
        detect(root)
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    found = detect(root)
    assert found.platform == "cpu" and "though there is a TPU" in found.reason
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    with pytest.raises(ConfigError, match="neither"):
        detect(root)
