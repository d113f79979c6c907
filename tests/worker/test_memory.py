# SPDX-License-Identifier: Apache-2.0
"""The budget of the KV cache."""

from types import SimpleNamespace

import pytest

from tpu_inference.errors import TpuInferenceError
from tpu_inference.worker import memory

GIB = 2**30


def budget(monkeypatch, *, free=20 * GIB, device=None, temporaries=0, **cache):
    monkeypatch.setattr(memory.psutil, "virtual_memory", lambda: SimpleNamespace(available=free))
    config = SimpleNamespace(**{"kv_cache_memory_bytes": None, "gpu_memory_utilization": 0.9, **cache})
    devices = [device or SimpleNamespace(platform="cpu")] * 2
    return memory.kv_cache_budget(config, devices, 2 * GIB, temporaries)


def tpu(limit, in_use):
    return SimpleNamespace(platform="tpu", memory_stats=lambda: {"bytes_limit": limit, "bytes_in_use": in_use})


@pytest.fixture(autouse=True)
def unset(monkeypatch):
    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE", raising=False)


def test_the_user_decides(monkeypatch):
    assert budget(monkeypatch, kv_cache_memory_bytes=12345) == 12345
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "3")
    assert budget(monkeypatch) == 3 * GIB


def test_more_than_is_free_is_refused(monkeypatch):
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "30")
    with pytest.raises(TpuInferenceError, match=r"VLLM_CPU_KVCACHE_SPACE=30.*20\.00 GiB of RAM are free"):
        budget(monkeypatch)


@pytest.mark.parametrize("free", [17 * GIB, 20 * GIB, 31 * GIB])
def test_the_cpus_share_does_not_move_with_the_free_memory(monkeypatch, free):
    assert budget(monkeypatch, free=free) == 2 * GIB


def test_a_tpus_memory_less_what_is_used_and_needed(monkeypatch):
    left = budget(monkeypatch, device=tpu(10 * GIB, 3 * GIB), temporaries=GIB)
    assert left == 2 * (int(10 * GIB * 0.9) - 4 * GIB)


def test_nothing_left_gives_the_numbers_and_the_flags(monkeypatch):
    with pytest.raises(TpuInferenceError, match=r"10\.00 GiB HBM.*--tensor-parallel-size"):
        budget(monkeypatch, device=tpu(10 * GIB, 9 * GIB), temporaries=GIB)


def division(**changes) -> memory.DeviceMemory:
    fields = dict(limit=32 * GIB, share=0.5, weights=4 * GIB, used=5 * GIB, temporaries=GIB)
    return memory.DeviceMemory(**{**fields, **changes})


def test_what_is_left_is_allowed_less_used_less_temporaries():
    assert division().allowed == 16 * GIB
    assert division().kv_cache == 10 * GIB
    assert division(used=18 * GIB).kv_cache == -3 * GIB


def test_the_table_adds_up():
    lines = division().table().splitlines()
    assert [float(line.split()[-2]) for line in lines] == [32, 16, 4, 1, 1, 10]
    assert len({len(line) for line in lines}) == 1


def test_the_engine_prints_the_table_whether_it_fits_or_not(monkeypatch, caplog):
    monkeypatch.setattr(memory.logger, "propagate", True)
    with caplog.at_level("INFO", logger=memory.logger.name):
        budget(monkeypatch, device=tpu(10 * GIB, 3 * GIB), temporaries=GIB)
    same = memory.DeviceMemory(10 * GIB, 0.9, GIB, 3 * GIB, GIB)
    with pytest.raises(TpuInferenceError) as error:
        budget(monkeypatch, device=tpu(10 * GIB, 9 * GIB), temporaries=GIB)
    assert memory.DeviceMemory(10 * GIB, 0.9, GIB, 9 * GIB, GIB).table() in str(error.value)
    assert same.table() in caplog.text
