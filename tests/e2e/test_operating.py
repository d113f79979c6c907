# SPDX-License-Identifier: Apache-2.0
"""One server as an operator has it: metrics, health, traces, profiles, sleep, new weights, caches, log levels; last, an engine that dies."""

import gzip
import json
import os
import re
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from helpers.server import server, wait_until
from tpu_inference.demo import MODEL

pytestmark = [pytest.mark.slow, pytest.mark.e2e]

STORY = "Once upon a time"
ROOT = Path(__file__).parents[2]
HEALTH_S = 8


class Collector(BaseHTTPRequestHandler):
    """Takes OTLP over HTTP, and keeps the bodies."""

    received: list[bytes] = []  # noqa: RUF012

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        self.received.append(body)
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def collector():
    http = HTTPServer(("127.0.0.1", 0), Collector)
    threading.Thread(target=http.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{http.server_port}/v1/traces"
    http.shutdown()


@pytest.fixture(scope="module")
def traces(tmp_path_factory):
    return tmp_path_factory.mktemp("profiles")


@pytest.fixture(scope="module")
def running(tmp_path_factory, collector, traces):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_SERVER_DEV_MODE", "1")
        patch.setenv("VLLM_KEEP_ALIVE_ON_ENGINE_DEATH", "1")
        patch.setenv("VLLM_LOGGING_LEVEL", "DEBUG")
        patch.setenv("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "http/protobuf")
        patch.setenv("TPU_PROFILE_MAX_STEPS", "5")
        patch.setenv("TPU_PROFILE_MAX_GIB", "0.2")
        patch.setenv("TPU_HEALTH_TIMEOUT", str(HEALTH_S))
        patch.setenv("PYTHONPATH", str(ROOT / "tests"), prepend=os.pathsep)
        profiler = {"profiler": "torch", "torch_profiler_dir": str(traces), "torch_profiler_with_stack": False}
        with server(
            tmp_path_factory.mktemp("operating") / "log",
            "--otlp-traces-endpoint", collector, "--profiler-config", json.dumps(profiler), "--enable-sleep-mode",
            "--kv-cache-metrics", "--enable-mfu-metrics", "--num-gpu-blocks-override", "24",
            "--enable-logging-iteration-details", "--worker-extension-cls", "helpers.worker_extension.ForTests",
        ) as started:  # fmt: skip
            yield started


@pytest.fixture(scope="module")
def story(running):
    return running.complete(STORY, max_tokens=30)["text"]


def rpc(running, method, *args, **kwargs):
    status, answer = running.post("/collective_rpc", method=method, args=args, kwargs=kwargs)
    assert status == 200, answer
    return answer["results"][0]


# -------------------------------------------------------------------------------------------------------------- metrics


def test_a_small_cache_fills_vllms_metrics(running, story):
    """Preemption, prefix cache hits and the use of the cache: 24 blocks hold less than eight long requests."""
    seen = []
    done = threading.Event()
    watch = threading.Thread(target=lambda: [seen.append(usage(running)) for _ in iter(done.is_set, True)])
    watch.start()
    status, answer = running.post(
        "/v1/completions", prompt=STORY, n=8, temperature=1.0, seed=3, max_tokens=150, ignore_eos=True
    )
    done.set()
    watch.join()
    assert status == 200 and answer["usage"]["completion_tokens"] == 8 * 150
    assert max(seen) > 0.5 and usage(running) == 0
    assert running.metric("vllm:num_preemptions_total") > 0
    long = "word " * 20
    for _ in range(2):
        running.complete(long, max_tokens=1)
    assert running.metric("vllm:prefix_cache_hits_total") > 0
    assert running.metric("vllm:prefix_cache_queries_total") > running.metric("vllm:prefix_cache_hits_total")
    assert running.metric("vllm:estimated_flops_per_gpu_total") > 0
    assert re.search(r"Iteration\(\d+\): ", running.log)


def usage(running):
    return running.metric("vllm:kv_cache_usage_perc")


def test_the_engines_own_metrics(running, story):
    steps, tokens = running.metric("vllm:tpu_steps_total"), running.metric("vllm:tpu_step_tokens_total")
    running.complete(STORY, max_tokens=7)
    wait_until(lambda: running.metric("vllm:tpu_steps_total") >= steps + 7, 5, "steps are counted")
    assert running.metric("vllm:tpu_step_tokens_total") > tokens
    assert running.metric("vllm:tpu_step_padding_tokens_total") > 0
    assert running.metric("vllm:tpu_step_host_seconds_count") == running.metric("vllm:tpu_steps_total")
    assert running.metric("vllm:tpu_step_host_seconds_sum") > 0
    assert running.metric("vllm:tpu_recompiles_total") == 0
    assert running.metric("vllm:tpu_weights_version") >= 1


def test_the_dashboard_asks_for_metrics_that_there_are(running, story):
    text = running.get("/metrics")[1]
    have = set(re.findall(r"^# TYPE (\S+)", text, re.MULTILINE))
    dashboard = json.loads((ROOT / "examples/grafana_dashboard.json").read_text())
    asked = {
        name
        for panel in dashboard["panels"]
        for target in panel.get("targets", [])
        for name in re.findall(r"vllm:\w+", target["expr"])
    }
    assert len(asked) > 15
    families = have | {f"{name}{end}" for name in have for end in ("_bucket", "_sum", "_count")}
    assert asked <= families, asked - families


# ------------------------------------------------------------------------------------------------- traces and profiles


def test_requests_are_traced(running, story):
    running.complete(STORY, max_tokens=3)
    wait_until(lambda: any(b"gen_ai.usage.completion_tokens" in body for body in Collector.received), 15, "a span")


def profiles(traces):
    return [path.relative_to(traces) for path in Path(traces).rglob("*.xplane.pb")]


def test_a_profile_ends_by_itself_and_a_second_start_is_refused(running, story, traces):
    start = running.connect("POST", "/start_profile", {"profile_prefix": "first"})
    assert running._finish(start)[0] == 200
    status, answer = post_text(running, "/start_profile")
    assert status == 409 and "already active" in answer
    running.complete(STORY, max_tokens=20)
    wait_until(lambda: profiles(traces), 20, "the profile is written after five steps")
    assert post_text(running, "/stop_profile")[0] == 200
    (trace,) = profiles(traces)
    assert trace.parts[0] == "first"


def post_text(running, path):
    return running._finish(running.connect("POST", path))


# ------------------------------------------------------------------------------------------- sleep, weights, caches, logs


def test_sleep_and_wake_up(running, story):
    assert post_text(running, "/sleep?level=1")[0] == 200
    assert '"is_sleeping":true' in running.get("/is_sleeping")[1]
    assert running.metric("vllm:engine_sleep_state", sleep_state="weights_offloaded") == 1
    assert running.get("/health")[0] == 200
    assert post_text(running, "/wake_up?tags=weights")[0] == 200
    assert '"status":"awake"' in post_text(running, "/wake_up?tags=kv_cache")[1]
    assert running.complete(STORY, max_tokens=30)["text"] == story


def test_deep_sleep_wants_the_weights_again(running, story):
    assert post_text(running, "/sleep?level=2")[0] == 200
    status, answer = post_text(running, "/wake_up")
    assert status == 500 and "reload_weights" in answer
    assert post_text(running, "/wake_up?tags=weights")[0] == 200
    version = rpc(running, "weights_info")["version"]
    assert rpc(running, "reload_weights", weights_path=MODEL)["version"] == version + 1
    assert post_text(running, "/wake_up?tags=kv_cache")[0] == 200
    assert running.complete(STORY, max_tokens=30)["text"] == story
    assert running.metric("vllm:tpu_weights_version") == version + 1


def test_weights_that_are_not_there_leave_the_server_serving(running, story, tmp_path):
    status, answer = running.post("/collective_rpc", method="reload_weights", args=[str(tmp_path)])
    assert status == 500, answer
    assert running.complete(STORY, max_tokens=30)["text"] == story


def test_new_weights_between_pause_and_resume(running, story):
    """As a trainer does it, with a name of its own for the version."""
    _, before = running.post("/weight_checker", action="checksum")
    assert post_text(running, "/pause?mode=keep")[0] == 200
    rpc(running, "reload_weights")
    assert running.post("/update_weight_version", new_version="step-2")[0] == 200
    assert post_text(running, "/resume")[0] == 200
    assert json.loads(running.get("/weight_info")[1]) == {"weight_version": "step-2"}
    status, answer = running.post("/weight_checker", action="compare", baseline=before["checksums"])
    assert status == 200 and answer["match"] and len(before["checksums"]) > 5
    assert running.complete(STORY, max_tokens=30)["text"] == story


def test_the_prefix_cache_is_reset(running, story):
    prompt = "other " * 20
    running.complete(prompt, max_tokens=1)
    status, answer = post_text(running, "/reset_prefix_cache")
    assert status == 200 and json.loads(answer) == {"success": True}
    hits = running.metric("vllm:prefix_cache_hits_total")
    running.complete(prompt, max_tokens=1)
    assert running.metric("vllm:prefix_cache_hits_total") == hits


def test_the_log_has_the_level_it_was_given(running, story):
    """In the engine, and in the API server."""
    assert re.search(r"EngineCore.* DEBUG ", running.log) and re.search(r"APIServer.* DEBUG ", running.log)


# ---------------------------------------------------------------------------------------------------------------- health


def test_health_is_true_to_the_device(running, story):
    """Last: the engine ends."""
    assert running.get("/health")[0] == 200
    rpc(running, "check_health")
    rpc(running, "lose_device")
    assert running.get("/health")[0] == 200
    wait_until(lambda: running.get("/health")[0] == 503, 3 * HEALTH_S, "/health is 503")
    assert re.search(r"CRITICAL.*the chip is gone.*The engine ends", running.log)
    status, _ = running.post("/v1/completions", prompt=STORY, max_tokens=1)
    assert status >= 500
