# SPDX-License-Identifier: Apache-2.0
"""`vllm serve` in processes of its own, and what tests ask of it over HTTP."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import psutil

from tpu_inference.demo import MODEL

HOST = "127.0.0.1"
NAME = "demo"
ARGS = (
    "--served-model-name", NAME, "--host", HOST, "--max-model-len", "256", "--max-num-seqs", "8",
    "--max-num-batched-tokens", "128", "--num-gpu-blocks-override", "200",
    "--additional-config", '{"token_buckets": [8, 128]}', "--dtype", "float32", "--enable-auto-tool-choice", "--tool-call-parser", "hermes",
    "--structured-outputs-config", '{"backend": "xgrammar", "disable_any_whitespace": true}',
)  # fmt: skip
"""Few programs to compile, and the same text whatever the batch: in bfloat16 near ties fall one way or the other."""
# What tests/conftest.py sets for engines inside the tests' own process.
FOR_IN_PROCESS = ("VLLM_ENABLE_V1_MULTIPROCESSING", "XLA_FLAGS")
READY_S = 180
ANSWER_S = 180
"""An overloaded server answers in the end."""


@dataclass(frozen=True)
class Options:
    """Arguments and environment of a server."""

    args: tuple[str, ...]
    env: dict[str, str] = field(default_factory=dict)


TELLING = Options(
    ("--worker-extension-cls", "helpers.live_state.LiveState", "--num-gpu-blocks-override", "49"),
    {
        "VLLM_SERVER_DEV_MODE": "1",
        "VLLM_MAX_N_SEQUENCES": "8",
        "PYTHONPATH": os.pathsep.join(filter(None, (str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH")))),
    },
)
"""A server that tells what it still holds (`Server.live_state`), with a KV cache for three requests of the longest kind."""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return probe.getsockname()[1]


def wait_until(condition: Callable[[], Any], seconds: float, what: str) -> Any:
    """The first true value of `condition()`; AssertionError that says `what` did not happen."""
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, f"not within {seconds} s: {what}"
        time.sleep(0.05)
    return value


class Server:
    """A started server, perhaps not listening yet."""

    def __init__(
        self,
        log: Path,
        *args: str,
        port: int | None = None,
        cache: Path | None = None,
        env: Mapping[str, str] | None = None,
    ) -> None:
        self.port = port or free_port()
        self._log = log
        env = {name: value for name, value in os.environ.items() if name not in FOR_IN_PROCESS} | dict(env or {})
        if cache is not None:
            env["VLLM_XLA_CACHE_PATH"] = str(cache)
        command = [str(Path(sys.executable).parent / "vllm"), "serve", MODEL, *ARGS, "--port", str(self.port), *args]
        with log.open("wb") as out:
            self.process = subprocess.Popen(
                command, env=env, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
            )

    @property
    def log(self) -> str:
        """What it has printed so far."""
        return self._log.read_text(errors="replace")

    def wait_ready(self) -> None:
        wait_until(self._ready, READY_S, "the server is ready")

    def _ready(self) -> bool:
        code = self.process.poll()
        assert code is None, f"the server exited with {code}:\n{self.log[-3000:]}"
        try:
            return self.get("/health")[0] == 200
        except OSError:
            return False

    def connect(self, method: str, path: str, body: Any = None) -> HTTPConnection:
        """A connection whose response is still to be read."""
        connection = HTTPConnection(HOST, self.port, timeout=ANSWER_S)
        payload = None if body is None else json.dumps(body)
        connection.request(method, path, payload, {"Content-Type": "application/json"})
        return connection

    def get(self, path: str) -> tuple[int, str]:
        return self._finish(self.connect("GET", path))

    def post(self, path: str, **body: Any) -> tuple[int, Any]:
        """(status, parsed answer)"""
        status, text = self._finish(self.connect("POST", path, {"model": NAME, **body}))
        return status, json.loads(text)

    @staticmethod
    def _finish(connection: HTTPConnection) -> tuple[int, str]:
        try:
            response = connection.getresponse()
            return response.status, response.read().decode()
        finally:
            connection.close()

    def complete(self, prompt: str, **body: Any) -> dict[str, Any]:
        """The only choice of a greedy completion."""
        status, answer = self.post("/v1/completions", prompt=prompt, **{"temperature": 0, **body})
        assert status == 200, answer
        return answer["choices"][0]

    def stream(self, path: str, **body: Any) -> Iterator[dict[str, Any]]:
        """The events of a streamed answer. Closing the iterator early closes the connection."""
        connection = self.connect("POST", path, {"model": NAME, "stream": True, **body})
        try:
            response = connection.getresponse()
            assert response.status == 200, response.read()
            for line in response:
                data = line.decode().removeprefix("data: ").strip()
                if data == "[DONE]":
                    return
                if data:
                    yield json.loads(data)
        finally:
            connection.close()

    def metric(self, name: str, **labels: str) -> float:
        """Sum of a metric's samples with these labels."""
        status, text = self.get("/metrics")
        assert status == 200
        samples = re.findall(rf"^{re.escape(name)}(\{{.*\}})? (\S+)$", text, re.MULTILINE)
        assert samples, f"/metrics has no {name}"
        wanted = [f'{label}="{value}"' for label, value in labels.items()]
        return sum(float(value) for found, value in samples if all(label in found for label in wanted))

    def is_idle(self) -> bool:
        """Whether no request runs or waits, and no block of the KV cache is used."""
        names = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
        return not any(self.metric(f"vllm:{name}") for name in names)

    def live_state(self) -> dict[str, int]:
        """What the runner still knows of requests (helpers.live_state), of a server with the options TELLING."""
        status, text = self._finish(self.connect("POST", "/collective_rpc", {"method": "live_state"}))
        assert status == 200, text
        (state,) = json.loads(text)["results"]
        return state

    def memory(self) -> int:
        """Anonymous bytes of its processes: what they hold, without what is mapped from files."""
        return sum(process.memory_full_info().uss for process in self.processes())

    def processes(self) -> list[psutil.Process]:
        """The API server and all that it started."""
        parent = psutil.Process(self.process.pid)
        return [parent, *parent.children(recursive=True)]

    def alive(self) -> bool:
        """Whether any of its processes is left."""
        self.process.poll()
        try:
            os.killpg(self.process.pid, 0)
        except ProcessLookupError:
            return False
        return True

    def kill(self) -> None:
        """Every process of it, at once."""
        if self.alive():
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@contextmanager
def server(log: Path, *args: str, **options: Any) -> Iterator[Server]:
    """A server that is ready, and gone afterwards."""
    started = Server(log, *args, **options)
    try:
        started.wait_ready()
        yield started
    finally:
        started.kill()
