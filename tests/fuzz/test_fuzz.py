# SPDX-License-Identifier: Apache-2.0
"""The fuzzer itself: what it sends is a function of seed and number, and what it must find, it finds."""

import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from fuzz.campaign import KNOWN, known_error, unproven
from fuzz.client import GONE, reason_of, send
from fuzz.generate import Request, request

JSON, STREAM = "application/json", "text/event-stream"


def test_a_request_depends_on_seed_and_number_only():
    some = [request(3, i) for i in range(50)]
    assert some == [request(3, i) for i in range(50)]
    assert some != [request(4, i) for i in range(50)]
    assert len({asked.path for asked in some}) > 3


@pytest.fixture
def answering():
    """port and a dict (status, type, text) that a server answers with."""
    answer = {}

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            self.rfile.read(int(self.headers["Content-Length"]))
            if answer.get("status") is None:
                return  # closes the connection without a word
            self.send_response(answer["status"])
            self.send_header("Content-Type", answer["type"])
            self.end_headers()
            self.wfile.write(answer["text"].encode())

        def log_message(self, *args):
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server.server_port, answer
        server.shutdown()
        thread.join()


@pytest.mark.parametrize(
    ("status", "kind", "text", "problem"),
    [
        (200, JSON, '{"a": 1}', None),
        (400, JSON, '{"error": {"message": "no"}}', None),
        (400, JSON, "{}", "without a reason"),
        (200, JSON, '{"a": NaN}', "no JSON"),
        (200, JSON, "{", "no JSON"),
        (500, JSON, '{"error": {"message": "no"}}', "HTTP 500"),
        (200, STREAM, 'data: {"a": 1}\n\ndata: [DONE]\n\n', None),
        (200, STREAM, 'data: {"error": {"code": 400, "message": "no"}}\n\ndata: [DONE]\n\n', None),
        (200, STREAM, 'data: {"error": {"code": 500, "message": "no"}}\n\ndata: [DONE]\n\n', "an error 500"),
        (200, STREAM, 'data: {"a": 1}\n\n', "no end"),
        (200, STREAM, "data: {\n\ndata: [DONE]\n\n", "no JSON"),
        (None, JSON, "", "the connection broke"),
    ],
)
def test_what_is_wrong_with_an_answer(answering, status, kind, text, problem):
    port, answer = answering
    answer.update(status=status, type=kind, text=text)
    found = send(port, Request("/", b"{}")).problem
    assert (found is None) if problem is None else (problem in found)


def test_a_client_that_goes(answering):
    assert send(answering[0], Request("/", b"{}", gone_after=0.01)).status == GONE


def test_a_known_error_is_known_by_path_body_and_answer():
    asked = Request("/v1/completions", b'{"structured_outputs": 5}')
    problem = "HTTP 500: 'int' object has no attribute 'get'"
    assert known_error(asked, problem) == KNOWN[0]["frame"]
    assert known_error(Request("/v1/completions", b'{"structured_outputs": {}}'), problem) is None
    assert known_error(Request("/tokenize", asked.body), problem) is None
    assert known_error(asked, "HTTP 500: out of memory") is None


def test_what_is_laid_to_vllm_is_in_the_log():
    frame = KNOWN[0]["frame"]
    log = 'File "vllm/entrypoints/openai/completion/protocol.py", line 4, in check_structured_outputs_count\n'
    assert unproven({frame: 2}, log * 2) == []
    assert unproven({frame: 2}, log) == [(frame, 2, 1)]
    assert unproven({frame: 1}, "") == [(frame, 1, 0)]


def test_reasons():
    assert reason_of({"detail": "Not Found"}) and reason_of({"error": "no"})
    assert not reason_of({"error": {"message": ""}}) and not reason_of([])
