# SPDX-License-Identifier: Apache-2.0
"""No request, client, signal or disk takes the server down, and after each nothing is left of it: no block, no slot, no memory."""

import json
import os
import random
import re
import signal
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPException
from pathlib import Path

import pytest

from fuzz.campaign import Campaign, known_error
from fuzz.client import reset, send
from fuzz.generate import Request
from helpers.server import HOST, NAME, TELLING, Server, server, wait_until

pytestmark = [pytest.mark.slow, pytest.mark.e2e]

STORY = "Once upon a time"
LONG = dict(prompt=STORY, max_tokens=200, ignore_eos=True)
MUCH = dict(**LONG, logprobs=20)
"""An answer of more bytes than the buffers of a connection hold."""
MIB = 2**20
MORE_MIB = 256
"""What the server may hold more after all of this than before: grammars that vLLM keeps, arenas of the allocator."""
DEBUG_ENDPOINTS = (
    "start_profile stop_profile server_info reset_prefix_cache reset_mm_cache collective_rpc sleep wake_up is_sleeping pause resume "
    "abort_requests update_weights init_weight_transfer_engine get_world_size v1/load_lora_adapter"
)
HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
EXIT_S = 5
"""Within which a server with requests in flight is gone after SIGTERM."""


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return tmp_path_factory.mktemp("robustness")


@pytest.fixture(scope="module")
def pair(directory):
    """A server that tells what it holds, and a plain one: started at once, over one compile cache, empty at first."""
    options = dict(cache=directory / "cache")
    servers = [
        Server(directory / "telling.log", *TELLING.args, env=TELLING.env, **options),
        Server(directory / "plain.log", *TELLING.args[-2:], **options),
    ]
    try:
        for each in servers:
            each.wait_ready()
        yield servers
    finally:
        for each in servers:
            each.kill()


@pytest.fixture(scope="module")
def plain(pair):
    return pair[1]


@pytest.fixture(scope="module")
def first(pair):
    """What the telling server answers, and holds, before anything has happened to it."""
    return pair[0].complete(STORY, max_tokens=30)["text"], pair[0].memory()


@pytest.fixture
def serving(pair, first):
    """The telling server; after the test nothing is left of its requests, and it answers as before."""
    telling = pair[0]
    yield telling
    wait_until(telling.is_idle, 30, "no request runs or waits, and no block is used")
    wait_until(lambda: not any(telling.live_state().values()), 5, "no slot is taken")
    assert telling.complete(STORY, max_tokens=30)["text"] == first[0]
    assert telling.memory() - first[1] < MORE_MIB * MIB


# ------------------------------------------------------------------------------------------------- what is open, and shared


def test_two_servers_share_a_compile_cache(pair, first):
    """They compile the same programs at the same time into one empty directory."""
    assert pair[1].complete(STORY, max_tokens=30)["text"] == first[0]
    for each in pair:
        assert "The compile cache" not in each.log and "persistent compilation cache" not in each.log


def test_no_debug_endpoint_is_open(plain):
    paths = set(json.loads(plain.get("/openapi.json")[1])["paths"])
    for name in DEBUG_ENDPOINTS.split():
        assert f"/{name}" not in paths
        connection = plain.connect("POST", f"/{name}", {})
        assert connection.getresponse().status == 404, name
        connection.close()


def test_nothing_listens_but_the_port(plain):
    """The engine process is reached by sockets of the file system, and no pickle comes in by any other way."""
    listening = [c.laddr for p in plain.processes() for c in p.net_connections("inet") if c.status == "LISTEN"]
    assert [(address.ip, address.port) for address in listening] == [(HOST, plain.port)]


# ----------------------------------------------------------------------------------------------------------------- requests


def test_a_slice_of_the_fuzzer(serving):
    """`make fuzz N=…` sends more."""
    report = Campaign(serving, seed=1).run(200)
    assert not report.failures
    assert report.statuses[200] > 40 and report.statuses[400] > 40


def test_the_servers_own_schema(serving, plain):
    """What schemathesis makes of the OpenAPI schema of a server without debug endpoints, sent to the one that tells what is left."""
    schemathesis = pytest.importorskip("schemathesis", exc_type=ImportError)
    from hypothesis import HealthCheck, Phase, given, settings

    bounds = settings(
        max_examples=8, derandomize=True, database=None, deadline=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck)
    )  # fmt: skip
    schema, sent, problems = json.loads(plain.get("/openapi.json")[1]), [], []

    def judge(case):
        answer = case.call(base_url=f"http://{HOST}:{serving.port}", timeout=60)
        sent.append(answer.status_code)
        body = answer.request.body or b""
        asked = Request(case.path, body if isinstance(body, bytes) else body.encode())
        refused = answer.status_code == 501  # vLLM's word for what a model cannot do
        if (
            answer.status_code >= 500
            and not refused
            and not known_error(asked, f"HTTP {answer.status_code}: {answer.text}")
        ):
            problems.append((case.method, case.path, asked.body[:500], answer.status_code, answer.text[:200]))

    for operation in (result.ok() for result in schemathesis.openapi.from_dict(schema).get_all_operations()):
        for mode in schemathesis.GenerationMode:
            try:
                bounds(given(case=operation.as_strategy(generation_mode=mode))(judge))()
            except Exception as error:
                if type(error).__name__ != "Unsatisfiable":  # an operation without parameters has no wrong ones
                    raise
    assert not problems
    assert len(sent) > 100


def test_no_url_of_a_request_is_fetched(serving):
    with socket.create_server((HOST, 0)) as trap:
        url = f"http://{HOST}:{trap.getsockname()[1]}/x.png"
        for part in (
            {"type": "image_url", "image_url": {"url": url}},
            {"type": "audio_url", "audio_url": {"url": url}},
        ):
            status, answer = serving.post(
                "/v1/chat/completions", messages=[{"role": "user", "content": [part]}], max_tokens=2
            )
            assert status == 400, answer
        trap.settimeout(0.5)
        with pytest.raises(TimeoutError):
            trap.accept()


# ------------------------------------------------------------------------------------------------------------------ clients


def drop_a_connection(port, rng):
    """A client that goes somewhere between the first byte of its request and the last of the answer."""
    asked = dict(model=NAME, max_tokens=rng.randint(1, 200), n=rng.randint(1, 3), stream=rng.random() < 0.5)
    body = json.dumps({**asked, "prompt": STORY, "temperature": 1, "ignore_eos": True}).encode()
    data = HEAD % len(body) + body
    with socket.create_connection((HOST, port), timeout=30) as sock:
        if rng.random() < 0.3:
            sock.sendall(data[: rng.randrange(1, len(data))])
        else:
            sock.sendall(data)
        time.sleep(rng.uniform(0, 0.5))
        if rng.random() < 0.5:
            reset(sock)


def test_a_thousand_dropped_connections(serving):
    done = serving.metric("vllm:generation_tokens_total")
    with ThreadPoolExecutor(50) as pool:
        list(pool.map(lambda i: drop_a_connection(serving.port, random.Random(i)), range(1000)))
    assert serving.metric("vllm:generation_tokens_total") > done, "some of them were being served"


def test_overload(serving):
    """300 requests, and a KV cache for three of the longest: they take each other's place, and all are answered as if alone."""
    rng = random.Random(5)
    prompts = [[rng.randrange(3, 1536) for _ in range(80)] for _ in range(300)]

    def ask(prompt):
        return serving.complete(prompt, max_tokens=40, ignore_eos=True, return_token_ids=True)["token_ids"]

    alone = {i: ask(prompts[i]) for i in range(0, 300, 60)}
    preempted = serving.metric("vllm:num_preemptions_total")
    with ThreadPoolExecutor(300) as pool:
        answers = list(pool.map(ask, prompts))
    assert serving.metric("vllm:num_preemptions_total") > preempted
    assert {len(answer) for answer in answers} == {40}
    assert {i: answers[i] for i in alone} == alone


def test_slow_readers(serving):
    """Clients that do not read hold nobody up, and find all of their answer when they do."""
    expected = serving.complete(**MUCH)["text"]
    body = json.dumps({"model": NAME, "temperature": 0, "stream": True, **MUCH}).encode()
    socks = []
    for _ in range(12):
        sock = socket.socket()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        sock.connect((HOST, serving.port))
        sock.sendall(HEAD % len(body) + body)
        socks.append(sock)
    wait_until(serving.is_idle, 30, "the engine has finished what nobody reads")
    assert serving.complete(**MUCH)["text"] == expected
    for sock in socks:
        with sock, sock.makefile("rb") as stream:
            events = [line[6:] for line in stream if line.startswith(b"data: ")]
        assert events[-1].strip() == b"[DONE]"
        assert "".join(json.loads(event)["choices"][0]["text"] for event in events[:-1]) == expected


# --------------------------------------------------------------------------------------------------------------------- ends


class InFlight:
    """Clients with a long request each, and how each of them ended."""

    def __init__(self, target, count=4):
        self.ends = []
        self._threads = [threading.Thread(target=self._ask, args=(target, i % 2 == 0)) for i in range(count)]
        for thread in self._threads:
            thread.start()
        wait_until(lambda: target.metric("vllm:num_requests_running") > 0, 20, "requests run")

    def _ask(self, target, stream):
        asked = {"model": NAME, **LONG, "n": 2, "temperature": 1, "stream": stream}
        try:
            # Again and again: the server must be busy whenever it is told to end.
            while (outcome := send(target.port, Request("/v1/completions", json.dumps(asked).encode()))).status == 200:
                pass
        except (OSError, HTTPException, ValueError) as error:
            self.ends.append(repr(error))
        else:
            self.ends.append(outcome.problem or f"HTTP {outcome.status}")

    def join(self, seconds):
        """All have ended within `seconds`: no client hangs."""
        end = time.monotonic() + seconds
        for thread in self._threads:
            thread.join(max(0, end - time.monotonic()))
        assert not any(thread.is_alive() for thread in self._threads), self.ends


def test_the_engine_is_killed(plain):
    """The API server says so, fails what is in flight, and exits with an error."""
    (engine,) = (process for process in plain.processes() if "EngineCore" in process.name())
    clients = InFlight(plain)
    engine.kill()
    clients.join(20)
    assert plain.process.wait(20) not in (0, None)
    assert re.search(r"(?i)engine ?core.*(died|dead|unexpectedly)|EngineDeadError", plain.log)


def compiled_anew(started):
    """Programs that were not in the cache, before serving and since."""
    (at_start,) = re.findall(r"(\d+) programs, (\d+) from the cache(; \d+ more)?", started.log)
    later = re.compile(r"Compiled the other (\d+) programs while serving, (\d+) from the cache")
    if at_start[2]:
        wait_until(lambda: later.search(started.log), 60, "all programs are there")
    return [int(found[0]) - int(found[1]) for found in (at_start, *later.findall(started.log))]


def end_while_busy(started):
    """(seconds from SIGTERM until the server has exited, its clients); none of them waits any longer, and no process is left."""
    clients = InFlight(started)
    start = time.monotonic()
    started.process.send_signal(signal.SIGTERM)
    started.process.wait(20)
    took = time.monotonic() - start
    clients.join(10)
    wait_until(lambda: not started.alive(), 5, "its processes are gone")
    return took, clients


def test_several_api_servers_and_sigterm(first, directory):
    """vLLM ends them without a last answer; no client waits for one."""
    several = ("--api-server-count", "2")
    with server(directory / "several.log", *TELLING.args[-2:], *several, cache=directory / "cache") as started:
        assert started.complete(STORY, max_tokens=30)["text"] == first[0]
        took, _ = end_while_busy(started)
    assert took <= EXIT_S


def test_a_damaged_cache_entry_and_sigterm(pair, first, directory):
    """That program is compiled again, with one warning, and the start after finds it; told to end, a busy server is gone in five seconds."""
    entries = sorted(Path(directory / "cache").glob("*.program"), key=lambda file: file.stat().st_size)
    damaged = entries[-1]
    damaged.write_bytes(damaged.read_bytes()[:-100])
    with server(directory / "third.log", *TELLING.args[-2:], cache=directory / "cache") as third:
        assert sum(compiled_anew(third)) == 1
        (warning,) = (line for line in third.log.splitlines() if "The compile cache" in line)
        assert damaged.name in warning and "damaged" in warning
        assert third.complete(STORY, max_tokens=30)["text"] == first[0]
        assert damaged.exists()
        took, clients = end_while_busy(third)
    assert took <= EXIT_S
    assert not any("no answer" in end for end in clients.ends), clients.ends


def test_no_pickle_was_opened():
    """tests/fuzz/values.py sends one wherever a request may carry tensors: had anything unpickled it, this file would be there."""
    assert not os.path.exists("/tmp/tpu-inference-fuzz-was-unpickled")
