# SPDX-License-Identifier: Apache-2.0
"""The engine's own metrics: what a scrape of the files shows, and what a step pays."""

import time

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector

from tpu_inference.runner.metrics import StepMetrics


@pytest.fixture
def scrape(tmp_path):
    registry = CollectorRegistry()
    MultiProcessCollector(registry, path=str(tmp_path))

    def read():
        lines = generate_latest(registry).decode().splitlines()
        return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines if not line.startswith("#")}

    return read


def line(name, **labels):
    pairs = {"engine": "0", "model_name": "m", **labels}
    inner = ",".join('{}="{}"'.format(*pair) for pair in sorted(pairs.items()))
    return f"{name}{{{inner}}}"


def test_a_scrape_shows_the_steps(tmp_path, scrape):
    metrics = StepMetrics("m", directory=str(tmp_path))
    assert scrape()[line("vllm:tpu_recompiles_total")] == 0, "there before anything has happened"
    metrics.step("16x8", 5, 11, 0.0015)
    metrics.step("16x8", 16, 0, 0.3)
    metrics.step("64x8", 40, 24, 7.0)
    metrics.recompiles(2)
    metrics.recompiles(2)
    metrics.weights_version(3)
    found = scrape()
    assert found[line("vllm:tpu_steps_total", bucket="16x8")] == 2
    assert found[line("vllm:tpu_step_tokens_total", bucket="16x8")] == 21
    assert found[line("vllm:tpu_step_padding_tokens_total", bucket="64x8")] == 24
    assert found[line("vllm:tpu_step_host_seconds_count")] == 3
    assert found[line("vllm:tpu_step_host_seconds_sum")] == pytest.approx(7.3015)
    buckets = [found[line("vllm:tpu_step_host_seconds_bucket", le=le)] for le in ("0.001", "0.002", "0.5", "+Inf")]
    assert buckets == [0, 1, 2, 3]
    assert found[line("vllm:tpu_recompiles_total")] == 2
    assert found[line("vllm:tpu_weights_version")] == 3


def test_two_engines_of_a_process_are_added(tmp_path, scrape):
    for _ in range(2):
        StepMetrics("m", directory=str(tmp_path)).step("16x8", 1, 15, 0.001)
    assert scrape()[line("vllm:tpu_steps_total", bucket="16x8")] == 2


def test_with_several_api_servers_they_lie_where_vllm_looks(tmp_path, scrape, monkeypatch):
    monkeypatch.setenv("TPU_METRICS_DIR", str(tmp_path / "elsewhere"))
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path))
    StepMetrics("m").step("16x8", 1, 15, 0.001)
    assert scrape()[line("vllm:tpu_steps_total", bucket="16x8")] == 1


def test_without_a_directory_nothing_is_written(monkeypatch):
    monkeypatch.delenv("TPU_METRICS_DIR", raising=False)
    monkeypatch.delenv("PROMETHEUS_MULTIPROC_DIR", raising=False)
    StepMetrics("m").step("16x8", 1, 15, 0.001)


def test_a_step_pays_microseconds(tmp_path):
    """A decode step of one row has half a millisecond of host time: see benchmarks/results/host_time.md."""
    metrics, count = StepMetrics("m", directory=str(tmp_path)), 2000
    start = time.thread_time()
    for _ in range(count):
        metrics.step("16x8", 1, 15, 0.0004)
        metrics.recompiles(0)
    assert (time.thread_time() - start) / count < 100e-6
