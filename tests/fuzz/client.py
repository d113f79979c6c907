# SPDX-License-Identifier: Apache-2.0
"""Sends one request, and says what is wrong with the answer."""

import json
import shlex
import socket
import struct
import time
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException, HTTPResponse
from typing import Any

from fuzz.generate import Request
from helpers.server import HOST

HANG_S = 60.0
GONE = 0
"""The status of a request whose client went."""
CURL_BODY_LIMIT = 2000


@dataclass(frozen=True)
class Outcome:
    """`problem` is None where the answer is one that a client can rely on."""

    status: int
    problem: str | None
    seconds: float
    text: str = ""


def strict_json(text: str) -> Any:
    """Parsed; ValueError also for NaN and infinities, which are no JSON."""

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    return json.loads(text, parse_constant=refuse)


def send(port: int, request: Request) -> Outcome:
    """One connection, one request. A client that goes resets its connection."""
    start = time.monotonic()
    connection = HTTPConnection(HOST, port, timeout=HANG_S)
    try:
        connection.request("POST", request.path, request.body, {"Content-Type": request.content_type})
        if request.gone_after is not None:
            time.sleep(request.gone_after)
            reset(connection.sock)
            return Outcome(GONE, None, time.monotonic() - start)
        response = connection.getresponse()
        text = response.read().decode("utf-8", "strict")
    except TimeoutError:
        return Outcome(-1, f"no answer within {HANG_S:.0f} s", time.monotonic() - start)
    except (OSError, HTTPException, UnicodeDecodeError) as error:
        return Outcome(-1, f"the connection broke: {type(error).__name__}: {error}", time.monotonic() - start)
    finally:
        connection.close()
    return Outcome(response.status, _problem(response, text), time.monotonic() - start, text)


def reset(sock: socket.socket) -> None:
    """Close as a crashed client does: RST, not FIN."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


def _problem(response: HTTPResponse, text: str) -> str | None:
    if response.status >= 500:
        return f"HTTP {response.status}: {text[:300]}"
    try:
        if "text/event-stream" in (response.getheader("Content-Type") or ""):
            return _stream_problem(text)
        answer = strict_json(text)
    except ValueError as error:
        return f"HTTP {response.status} is no JSON ({error}): {text[:300]}"
    if response.status >= 400 and not reason_of(answer):
        return f"HTTP {response.status} without a reason: {text[:300]}"
    return None


def _stream_problem(text: str) -> str | None:
    events = [line.removeprefix("data:").strip() for line in text.split("\n") if line.startswith("data:")]
    for event in events:
        if event == "[DONE]":
            continue
        error = strict_json(event).get("error")
        if isinstance(error, dict) and int(error.get("code") or 0) >= 500:
            return f"an error {error['code']} in the stream: {event[:300]}"
    # Anthropic's and Responses' streams name their last event; the others end with [DONE].
    return (
        None
        if events and (events[-1] == "[DONE]" or '"type"' in events[-1])
        else f"the stream has no end: {text[-200:]}"
    )


def reason_of(answer: Any) -> str:
    """Why a request was refused: OpenAI's, Anthropic's and FastAPI's forms."""
    if not isinstance(answer, dict):
        return ""
    error = answer.get("error")
    return str((error.get("message") if isinstance(error, dict) else error) or answer.get("detail") or "")


def reproduction(request: Request, seed: int, index: int) -> str:
    """How to send it again: by seed and number, and with curl where the body is short."""
    again = f"make fuzz SEED={seed} ONLY={index}"
    if len(request.body) > CURL_BODY_LIMIT:
        return again
    body = shlex.quote(request.body.decode("utf-8", "backslashreplace"))
    return f"{again}\n    curl -sS localhost:8000{request.path} -H 'Content-Type: {request.content_type}' --data-binary {body}"
