# SPDX-License-Identifier: Apache-2.0
"""The examples run as a reader would run them."""

import json
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
DEMO = "tpu_inference/demo/model"
# Set for tests that run the engine in their own process; an example has one of its own, and one device.
NOT_INHERITED = ("VLLM_ENABLE_V1_MULTIPROCESSING", "XLA_FLAGS")
# A share of the free memory would be far more than the demo model needs.
SMALL_CACHE = ("--kv-cache-memory-bytes", str(64 * 2**20))


def environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name not in NOT_INHERITED}


def run(*args: str, timeout: float = 60) -> str:
    """Standard output of an example; the failure shows all of its output."""
    done = subprocess.run(
        [sys.executable, *args], cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=timeout
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


class FakeServer(BaseHTTPRequestHandler):
    """As much of the OpenAI protocol as the client uses; `requests` is what it was asked."""

    requests: list[dict] = []  # noqa: RUF012

    def log_message(self, *args: object) -> None:
        pass

    def reply(self, body: str, content_type: str = "application/json") -> None:
        self.send_response(200)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body.encode())

    def do_GET(self) -> None:
        model = {"id": "fake", "object": "model", "created": 0, "owned_by": "us"}
        self.reply(json.dumps({"object": "list", "data": [model]}))

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.requests.append(asked)
        if "messages" in asked:
            deltas = [{"role": "assistant"}, {"content": "streamed "}, {"content": "answer"}]
            chunks = [{"id": "1", "choices": [{"index": 0, "delta": delta}]} for delta in deltas]
            chunks.append({"id": "1", "choices": []})
            events = [f"data: {json.dumps(chunk)}\n\n" for chunk in chunks]
            self.reply("".join([*events, "data: [DONE]\n\n"]), "text/event-stream")
        else:
            usage = {"prompt_tokens": 4, "completion_tokens": 3, "total_tokens": 7}
            choice = {"index": 0, "text": "there was a fox", "finish_reason": "stop"}
            self.reply(json.dumps({"id": "2", "object": "text_completion", "choices": [choice], "usage": usage}))


def test_online_client_prints_what_a_server_says():
    server = ThreadingHTTPServer(("127.0.0.1", 0), FakeServer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        out = run("examples/online_client.py", "--base-url", f"http://127.0.0.1:{server.server_port}/v1")
    finally:
        server.shutdown()
        server.server_close()
    assert "chat with fake: Tell me a story about a fox." in out
    assert "streamed answer" in out
    assert "there was a fox" in out
    assert "4 tokens in, 3 out" in out
    chat, completion = FakeServer.requests
    assert chat["stream"] is True
    assert completion["prompt"] == "Once upon a time"


@pytest.mark.slow
def test_the_demo_says_something_and_ends_cleanly():
    args = [sys.executable, "-m", "tpu_inference.demo", "--max-tokens", "8"]
    done = subprocess.run(args, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    assert "8 tokens, the first after" in done.stdout
    assert "Traceback" not in done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.e2e
@pytest.mark.parametrize("model_impl", ["auto", "vllm"])
def test_offline_inference_takes_vllms_flags(model_impl):
    out = run(
        "examples/offline_inference.py", "--model", DEMO, "--max-model-len", "128", "--prompt", "Once upon a time",
        "--prompt", "The fox lives in", "--max-tokens", "16", "--model-impl", model_impl, *SMALL_CACHE, timeout=300,
    )  # fmt: skip
    answers = [line.partition("->")[2].strip().strip("'\"") for line in out.splitlines() if "->" in line]
    assert len(answers) == 2
    assert all(len(answer.split()) >= 5 for answer in answers)


@pytest.mark.slow
@pytest.mark.e2e
def test_online_client_against_the_demo_server(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        str(Path(sys.executable).parent / "vllm"), "serve", DEMO, "--served-model-name", "demo", "--host", "127.0.0.1",
        "--port", str(port), "--max-num-seqs", "8", "--max-num-batched-tokens", "512", *SMALL_CACHE,
    ]  # fmt: skip
    log_path = tmp_path / "server.log"
    with log_path.open("w") as log:
        server = subprocess.Popen(command, cwd=ROOT, env=environment(), stdout=log, stderr=subprocess.STDOUT)
        try:
            deadline = time.monotonic() + 300
            while not healthy(port):
                assert server.poll() is None, log_path.read_text()
                assert time.monotonic() < deadline, log_path.read_text()
                time.sleep(0.5)
            out = run(
                "examples/online_client.py",
                "--base-url",
                f"http://127.0.0.1:{port}/v1",
                "--max-tokens",
                "24",
                timeout=120,
            )
        finally:
            server.terminate()
            try:
                server.wait(timeout=60)
            except subprocess.TimeoutExpired:
                server.kill()
                raise
    chat = out.partition("fox.\n")[2].partition("\n\ncompletion")[0]
    assert "chat with demo" in out
    assert len(chat.split()) >= 5
    assert "24 out" in out


def healthy(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as reply:
            return reply.status == 200
    except OSError:
        return False
