# SPDX-License-Identifier: Apache-2.0
"""Request number i of a seed: a pure function of both, so that any one of them can be sent again alone."""

import json
import random
from dataclasses import dataclass
from typing import Any

from fuzz import values
from helpers.server import NAME

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
KINDS = {"completion": 60, "chat": 20, "other": 12, "raw": 8}
"""Per cent of the requests."""
FIELDS = (1, 1, 2, 2, 3, 4, 8)
"""How many fields a request has beside the prompt; one of these."""
P_HOSTILE = (0.0, 0.0, 0.1, 0.3, 0.6)
"""How likely each part of a request is hostile; one of these, so that many requests are served, and some have just one flaw."""
P_ANY = 0.2
"""Of the hostile values: a number or a value of the wrong kind, whatever the field."""
P_STREAM = 0.2
P_GONE = 0.06
MAX_TOKENS = 6


@dataclass(frozen=True)
class Request:
    """What is sent, and whether the client stays."""

    path: str
    body: bytes
    content_type: str = "application/json"
    gone_after: float | None = None
    """Seconds after which the client closes the connection."""


def request(seed: int, index: int) -> Request:
    """The request `index` of `seed`."""
    rng = random.Random(f"{seed}:{index}")
    (kind,) = rng.choices(list(KINDS), list(KINDS.values()))
    gone = rng.uniform(0, 0.3) if rng.random() < P_GONE else None
    if kind == "raw":
        path = rng.choice([COMPLETIONS, CHAT, *values.OTHER_BODIES])
        return Request(path, rng.choice(values.RAW_BODIES), rng.choice(values.CONTENT_TYPES), gone)
    if kind == "other":
        path = rng.choice(list(values.OTHER_BODIES))
        return Request(path, _encode({"model": NAME, **rng.choice(values.OTHER_BODIES[path])}), gone_after=gone)
    return Request(*_generation(rng, kind), gone_after=gone)


def _generation(rng: random.Random, kind: str) -> tuple[str, bytes]:
    chat = kind == "chat"
    good, bad = (values.MESSAGES, values.HOSTILE_MESSAGES) if chat else (values.PROMPTS, values.HOSTILE_PROMPTS)
    p_hostile = rng.choice(P_HOSTILE)
    body = {
        "model": NAME,
        "messages" if chat else "prompt": rng.choice(bad if rng.random() < p_hostile else good),
        "max_tokens": rng.randint(1, MAX_TOKENS),
    }
    table = {**values.SAMPLING, **values.CHAT} if chat else values.SAMPLING
    names = [name for name, (good, _) in table.items() if good or p_hostile]
    for name in rng.sample(names, rng.choice(FIELDS)):
        body[name] = _value(rng, p_hostile, *table[name])
    if rng.random() < P_STREAM:
        body["stream"] = True
    return CHAT if chat else COMPLETIONS, _encode(body)


def _value(rng: random.Random, p_hostile: float, good: list[Any], hostile: list[Any]) -> Any:
    if good and rng.random() >= p_hostile:
        return rng.choice(good)
    if not hostile or rng.random() < P_ANY:
        return rng.choice(values.NUMBERS + values.WRONG)
    return rng.choice(hostile)


def _encode(body: Any) -> bytes:
    """JSON as Python writes it: NaN and infinities by name, lone surrogates as escapes."""
    return json.dumps(body).encode()
