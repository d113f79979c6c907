# SPDX-License-Identifier: Apache-2.0
"""vLLM's OpenAI-compatible server on the demo model: answers, refusals, clients that go, and how it starts and stops."""

import json
import math
import re
import signal
import threading
import time

import pytest
from transformers import AutoTokenizer

from helpers.server import NAME, Server, server, wait_until
from tpu_inference.demo import MODEL

pytestmark = [pytest.mark.slow, pytest.mark.e2e]

STORY = "Once upon a time"
HELLO = [{"role": "user", "content": "Hello"}]
EXIT_S = 30


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """Of logs, and of a compile cache that is empty at first."""
    return tmp_path_factory.mktemp("server")


@pytest.fixture(scope="module")
def running(directory):
    with server(directory / "first.log", cache=directory / "cache") as started:
        yield started


@pytest.fixture(scope="module")
def story(running):
    """What the server answers before anything has happened to it."""
    return running.complete(STORY, max_tokens=30)["text"]


@pytest.fixture
def serving(running, story):
    """The server; after the test it runs nothing and answers as before."""
    yield running
    wait_until(lambda: load(running) == 0, 10, "requests are gone")
    assert running.metric("vllm:kv_cache_usage_perc") == 0
    assert running.complete(STORY, max_tokens=30)["text"] == story


def load(running):
    return running.metric("vllm:num_requests_running") + running.metric("vllm:num_requests_waiting")


def table(log):
    """(programs, of them cached) of the start-up table."""
    return tuple(map(int, re.search(r"(\d+) programs, (\d+) from the cache", log).groups()))


# ------------------------------------------------------------------------------------------------------------- answers


def test_models(serving):
    status, text = serving.get("/v1/models")
    assert status == 200 and f'"id":"{NAME}"' in text and '"max_model_len":256' in text


def test_completion(serving, story):
    choice = serving.complete(STORY, max_tokens=30)
    assert choice["finish_reason"] == "length" and choice["text"] == story
    assert len(set(story.split())) >= 12, "not text"


def test_streamed_completion(serving, story):
    """The same text in pieces, and the counts at the end."""
    usage = {"include_usage": True}
    events = list(serving.stream("/v1/completions", prompt=STORY, temperature=0, max_tokens=30, stream_options=usage))
    texts = [event["choices"][0]["text"] for event in events if event["choices"]]
    assert "".join(texts) == story and len(texts) >= 10
    assert events[-1]["usage"]["completion_tokens"] == 30


def test_chat(serving):
    status, answer = serving.post("/v1/chat/completions", messages=HELLO, temperature=0, max_tokens=60)
    assert status == 200
    choice = answer["choices"][0]
    assert choice["message"]["content"].startswith("Hello!") and "<|" not in choice["message"]["content"]
    assert choice["finish_reason"] == "stop"
    events = serving.stream("/v1/chat/completions", messages=HELLO, temperature=0, max_tokens=60)
    assert "".join(e["choices"][0]["delta"].get("content") or "" for e in events) == choice["message"]["content"]


def test_logprobs(serving, story):
    choice = serving.complete(STORY, max_tokens=5, logprobs=2, echo=False)
    found = choice["logprobs"]
    assert "".join(found["tokens"]) == choice["text"] == story[: len(choice["text"])]
    for token, logprob, top in zip(found["tokens"], found["token_logprobs"], found["top_logprobs"], strict=True):
        assert len(top) == 2 and math.isclose(top[token], max(top.values())) and math.isclose(logprob, top[token])
    status, answer = serving.post(
        "/v1/chat/completions", messages=HELLO, max_tokens=4, logprobs=True, top_logprobs=3, temperature=0
    )
    assert status == 200
    assert [len(token["top_logprobs"]) for token in answer["choices"][0]["logprobs"]["content"]] == [3] * 4


def test_echo_has_the_prompts_logprobs(serving):
    found = serving.complete(STORY, max_tokens=2, logprobs=1, echo=True)["logprobs"]["token_logprobs"]
    assert found[0] is None and len(found) >= 5 and all(logprob < 0 for logprob in found[1:])


def test_several_answers_and_seed(serving):
    body = dict(prompt=STORY, max_tokens=12, temperature=1.5, seed=11, n=3)
    _, first = serving.post("/v1/completions", **body)
    _, again = serving.post("/v1/completions", **body)
    texts = [choice["text"] for choice in first["choices"]]
    assert texts == [choice["text"] for choice in again["choices"]] and len(set(texts)) == 3


def test_many_clients_at_once(serving, story):
    """Four times as many as there are slots."""
    answers: list[str] = []
    ask = lambda: answers.append(serving.complete(STORY, max_tokens=30)["text"])  # noqa: E731
    threads = [threading.Thread(target=ask) for _ in range(32)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == [story] * 32


def test_metrics(serving):
    before = serving.metric("vllm:generation_tokens_total")
    serving.complete(STORY, max_tokens=7)
    wait_until(lambda: serving.metric("vllm:generation_tokens_total") == before + 7, 5, "tokens are counted")
    for name in ("vllm:prompt_tokens_total", "vllm:time_to_first_token_seconds_count", "vllm:request_success_total"):
        assert serving.metric(name) > 0


# -------------------------------------------------------------------------------------------------- sampling and structure


@pytest.mark.parametrize(
    "body",
    [
        dict(presence_penalty=0.5, frequency_penalty=-0.5, repetition_penalty=1.3),
        dict(logit_bias={"5": 3}, bad_words=["fox"]),
        dict(allowed_token_ids=[300, 301], logprobs=0),
        dict(min_tokens=4, stop_token_ids=list(range(2, 300))),
    ],
    ids=str,
)
def test_parameters_of_completions(serving, body):
    choice = serving.complete(STORY, **{"max_tokens": 5, **body})
    assert choice["text"] and choice["finish_reason"] in ("length", "stop")


def test_a_json_schema_in_chat(serving):
    schema = {
        "type": "object",
        "properties": {"a": {"enum": ["x", "y"]}},
        "required": ["a"],
        "additionalProperties": False,
    }
    response_format = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}
    status, answer = serving.post(
        "/v1/chat/completions", messages=HELLO, response_format=response_format, max_tokens=200, temperature=1.0, seed=1
    )
    assert status == 200
    assert json.loads(answer["choices"][0]["message"]["content"])["a"] in ("x", "y")


def test_a_tool_that_must_be_called(serving):
    """vLLM's structural tag allows white space anywhere, which the model would write for ever: it is biased against it."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    blank = {str(token): -100 for token in range(len(tokenizer)) if tokenizer.decode([token]).isspace()}
    parameters = {
        "type": "object",
        "properties": {"to": {"enum": ["n", "s"]}},
        "required": ["to"],
        "additionalProperties": False,
    }
    status, answer = serving.post(
        "/v1/chat/completions",
        messages=HELLO,
        tools=[{"type": "function", "function": {"name": "go", "strict": True, "parameters": parameters}}],
        tool_choice={"type": "function", "function": {"name": "go"}},
        max_tokens=200,
        temperature=1.0,
        seed=1,
        logit_bias=blank,
    )
    assert status == 200, answer
    (call,) = answer["choices"][0]["message"]["tool_calls"]
    assert call["function"]["name"] == "go" and json.loads(call["function"]["arguments"])["to"] in ("n", "s")


# ------------------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("body", "named"),
    [
        (dict(structured_outputs={"json": {"type": "nothing"}}), "(?i)schema|grammar|type"),
        (dict(structured_outputs={"regex": "(["}), "(?i)regex|grammar"),
        (dict(allowed_token_ids=[]), "allowed_token_ids"),
        (dict(logit_bias={"99999": 3}), "logit_bias"),
        (dict(thinking_token_budget=5), "thinking_token_budget"),
        (dict(vllm_xargs={"custom": 1}), "extra_args"),
        (dict(temperature=-1), "temperature"),
        (dict(top_p=7), "top_p"),
        (dict(top_k=-5), "top_k"),
        (dict(min_p=2), "min_p"),
        (dict(max_tokens=0), "max_tokens"),
        (dict(n=0), "n "),
        (dict(logprobs=-1), "logprobs"),
        (dict(logprobs=1000), "logprobs"),
        (dict(max_tokens=1000), "max_tokens|maximum context"),
        (dict(prompt="word " * 400), "maximum context|maximum model|longer|length"),
        (dict(prompt=[5, 99999]), "vocab"),
        (dict(prompt=[]), "prompt"),
    ],
    ids=str,
)
def test_what_is_not_served_is_400_and_names_it(serving, body, named):
    status, answer = serving.post("/v1/completions", **{"prompt": STORY, "max_tokens": 4, **body})
    assert status == 400, answer
    assert re.search(named, answer["error"]["message"]), answer


def test_nan_is_refused(serving):
    """Python's JSON has a NaN, and so has the server's."""
    status, answer = serving.post("/v1/completions", prompt=STORY, max_tokens=2, temperature=float("nan"))
    assert status in (400, 422), answer


def test_a_stream_that_is_refused(serving):
    """vLLM has answered 200 by the time it looks at the request: the error is the stream's only event."""
    (event,) = serving.stream("/v1/completions", prompt=STORY, vllm_xargs={"custom": 1})
    assert event["error"]["code"] == 400 and event["error"]["param"] == "extra_args"


def test_a_client_that_goes_in_mid_stream(serving):
    """Its sequences are aborted: far from all the tokens it asked for are generated."""
    tokens = serving.metric("vllm:generation_tokens_total")
    asked = dict(prompt=STORY, temperature=1, max_tokens=240, n=8, ignore_eos=True)
    events = serving.stream("/v1/completions", **asked)
    assert next(events)["choices"]
    assert next(events)["choices"]
    events.close()
    wait_until(lambda: load(serving) == 0, 10, "the sequences are aborted")
    assert serving.metric("vllm:generation_tokens_total") - tokens < 8 * 240


# ---------------------------------------------------------------------------------------------------------- start and stop


def test_a_second_server_on_the_same_port(serving, directory):
    """It says so before it loads anything; the first serves on."""
    second = Server(directory / "second.log", port=serving.port, cache=directory / "cache")
    try:
        assert second.process.wait(60) != 0
    finally:
        second.kill()
    assert re.search(r"(?i)address already in use", second.log)
    assert "Start-up:" not in second.log


def test_first_start_compiled_everything(running):
    programs, cached = table(running.log)
    assert programs > 3 and cached == 0
    assert "compiled while serving" not in running.log


@pytest.mark.parametrize("signum", [signal.SIGTERM], ids=lambda s: s.name)
def test_second_start_compiles_nothing_and_stops_while_busy(running, story, directory, signum):
    with server(directory / "third.log", cache=directory / "cache") as second:
        programs, cached = table(second.log)
        assert programs == cached == table(running.log)[0]
        assert second.complete(STORY, max_tokens=30)["text"] == story
        stop = threading.Event()
        clients = [threading.Thread(target=keep_busy, args=(second, stop)) for _ in range(4)]
        for client in clients:
            client.start()
        try:
            wait_until(lambda: load(second) > 0, 10, "requests run")
            second.process.send_signal(signum)
            start = time.monotonic()
            second.process.wait(EXIT_S)
            wait_until(lambda: not second.alive(), EXIT_S - (time.monotonic() - start), "its processes are gone")
        finally:
            stop.set()
            second.kill()
            for client in clients:
                client.join()
    assert "[shutdown] EngineCore: aborting in-flight requests" in second.log, "it was killed with its requests"


def keep_busy(target, stop):
    """Ask for long answers until told to stop, or until nobody answers."""
    while not stop.is_set():
        try:
            status, _ = target.post("/v1/completions", prompt=STORY, max_tokens=240, n=2, ignore_eos=True)
        except (OSError, ValueError):  # the connection broke, perhaps in the middle of an answer
            return
        if status != 200:
            return
