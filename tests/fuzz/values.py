# SPDX-License-Identifier: Apache-2.0
"""What requests are made of, as data: fields, values that are served, and values that nobody expects."""

import base64
import math
import pickle
from typing import Any

from helpers.server import NAME


def nested(depth: int, leaf: Any = 1) -> Any:
    """{"a": {"a": …}}"""
    for _ in range(depth):
        leaf = {"a": leaf}
    return leaf


def nested_schema(depth: int) -> dict[str, Any]:
    """A JSON schema of objects in objects."""
    schema: dict[str, Any] = {"type": "integer"}
    for _ in range(depth):
        schema = {"type": "object", "properties": {"a": schema}, "required": ["a"], "additionalProperties": False}
    return schema


STORY = "Once upon a time"
TEXTS = [STORY, "Hello", "The sky is", "a", " ", "日本語のテキスト", "Ünïcödé ß ŋ", "👩‍👩‍👧‍👦🏳️‍🌈", "a\u0000b", "\u202eright to left", "<|bos|><|user|>x<|end|>", "\r\n\t"]
HOSTILE_TEXTS = ["", "\x00", "\ud800", "\udfff\ud800", "\uffff", "a\u0301" * 60, "word " * 3000, "🦊" * 2000, "%s%n{0}{{}}", "<|end|>" * 300, "\\u0000", "'; DROP TABLE x; --"]
NUMBERS = [0, -1, 1, 2, 7, 2**31 - 1, 2**31, 2**32, 2**53, 2**63 - 1, 2**63, 2**64, 10**30, -(2**31), -(2**63), -(2**64), 0.5, -0.0, 1e-320, 1e308, -1e308, math.nan, math.inf, -math.inf]  # fmt: skip
WRONG: list[Any] = [None, True, False, "", "x", "1", "nan", "\ud800", [], [None], [[]], {}, {"": None}, nested(3), nested(200), [0] * 5000, "y" * 100_000]
"""Values of the wrong kind, whatever the field."""


class _Opens:
    """What a pickle from the network could do: nobody must ever call this."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (open, ("/tmp/tpu-inference-fuzz-was-unpickled", "w"))


PICKLE = base64.b64encode(pickle.dumps(_Opens())).decode()
PROMPTS: list[Any] = [*TEXTS, [STORY, "Hello"], [1, 2, 3], [300] * 40, [[5, 6], [7]], list(range(3, 250))]
HOSTILE_PROMPTS: list[Any] = [
    *HOSTILE_TEXTS, [], [[]], [""], [1536], [-1], [1535, 0, 1, 2], [2**31], [2**63], [2**64], [1.5], [True], [5] * 5000, [[5], []], [[5], [99999]],
    ["a", 5], [None], [["a"]], [[[5]]], {"prompt": "x"}, {"prompt_token_ids": [5]}, {"prompt_embeds": PICKLE}, ["x"] * 20, [[5]] * 20, ["x"] * 1100,
]  # fmt: skip
MESSAGES: list[Any] = [
    [{"role": "user", "content": "Hello"}],
    [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "What is the opposite of hot?"}],
    [{"role": "user", "content": [{"type": "text", "text": "Hello"}]}],
    [{"role": "user", "content": text} for text in ("Hi", "there")],
    [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}, {"role": "user", "content": "z"}],
]
HOSTILE_MESSAGES: list[Any] = [
    [], [{}], [{"role": "user"}], [{"role": "nobody", "content": "x"}], [{"role": "user", "content": None}], [{"role": "user", "content": 5}],
    [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://127.0.0.1:9/x.png"}}]}],
    [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}]}],
    [{"role": "user", "content": [{"type": "image_embeds", "image_embeds": PICKLE}]}],
    [{"role": "user", "content": [{"type": "prompt_embeds", "prompt_embeds": PICKLE}]}],
    [{"role": "user", "content": [{"type": "nothing"}]}], [{"role": "user", "content": [{"type": "text"}]}], [{"role": "user", "content": [[]]}],
    [{"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}],
    [{"role": "assistant", "tool_calls": [{"id": "1", "type": "function", "function": {"name": "f", "arguments": "[]"}}]}],
    [{"role": "tool", "content": "x", "tool_call_id": "1"}], [{"role": "user", "content": "\ud800"}], [{"role": "user", "content": "x" * 50_000}],
    [{"role": "user", "content": "x"}] * 500, "Hello", {"role": "user"}, [["user", "x"]], [None],
]  # fmt: skip

SCHEMAS: list[Any] = [
    {"type": "object", "properties": {"a": {"enum": ["x", "y"]}}, "required": ["a"], "additionalProperties": False},
    {"type": "integer"},
    {"type": "array", "items": {"type": "boolean"}, "maxItems": 3},
    nested_schema(5),
]
HOSTILE_SCHEMAS: list[Any] = [
    nested_schema(40), nested_schema(400), {"$ref": "#"}, {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}, {"$ref": "http://127.0.0.1:9/s.json"},
    {"$ref": "#/nowhere"}, {"type": "nothing"}, {"type": ["string", "null"]}, {"enum": []}, {"enum": [f"v{i}" for i in range(3000)]}, {"const": None}, {"not": {}},
    {"type": "string", "minLength": 10**9}, {"type": "string", "maxLength": -1}, {"type": "string", "minLength": 5, "maxLength": 2}, {"type": "array", "minItems": 10**9},
    {"type": "integer", "minimum": 10**30}, {"type": "integer", "minimum": 5, "maximum": 1}, {"type": "number", "multipleOf": 0}, {"type": "string", "pattern": "(["},
    {"type": "string", "pattern": "(a+)+$"}, {"type": "string", "pattern": "(?=a)b"}, {"type": "string", "format": "nothing"}, {"allOf": [{"type": "string"}, {"type": "integer"}]},
    {"anyOf": []}, {"oneOf": [{"type": "string"}, {"type": "string"}]}, {"patternProperties": {"(": {}}}, {"properties": 5}, {"properties": {"\ud800": {}}},
    {"type": "object", "properties": {f"k{i}": {"type": "string"} for i in range(300)}}, {"if": {}, "then": False}, [], True, False, "", "{", "null", 5,
]  # fmt: skip
STRUCTURES: list[Any] = [
    {"choice": ["yes", "no"]}, {"regex": "[ab]{3}"}, {"json": SCHEMAS[0]}, {"json_object": True}, {"grammar": 'root ::= "a" | "b" root'}, *({"json": schema} for schema in SCHEMAS),
]  # fmt: skip
HOSTILE_STRUCTURES: list[Any] = [
    *({"json": schema} for schema in HOSTILE_SCHEMAS), {}, {"choice": []}, {"choice": [""]}, {"choice": [5]}, {"choice": ["\ud800"]}, {"choice": [f"c{i}" for i in range(2000)]},
    {"regex": ""}, {"regex": "(["}, {"regex": "(a|a)*b"}, {"regex": "(a{1,40}){1,40}"}, {"regex": "a{100000}"}, {"regex": "(?<=x)y"}, {"regex": "\\p{L}+"}, {"regex": "(" * 300 + ")" * 300},
    {"regex": "[" + "a" * 5000 + "]"}, {"regex": "\ud800"}, {"grammar": ""}, {"grammar": "root ::= root"}, {"grammar": 'root ::= root "a" | "b"'}, {"grammar": "root ::= nowhere"},
    {"grammar": "root ::= " + "(" * 200 + '"a"' + ")" * 200}, {"grammar": "start: /a+/"}, {"grammar": "\x00"}, {"structural_tag": "{"}, {"structural_tag": "{}"}, {"structural_tag": '{"type": "structural_tag"}'},
    {"structural_tag": '{"structures": [{"begin": "<a>", "schema": {}, "end": "</a>"}], "triggers": ["<a"]}'}, {"json": SCHEMAS[0], "regex": "a"}, {"json_object": False}, {"nothing": 1},
    {"choice": ["a"], "_backend": "nothing"}, {"json": SCHEMAS[0], "_backend": "lm-format-enforcer"}, {"regex": "a", "_backend": "guidance"}, {"json": SCHEMAS[1], "whitespace_pattern": "(["},
]  # fmt: skip
FORMATS: list[Any] = [{"type": "text"}, {"type": "json_object"}, *({"type": "json_schema", "json_schema": {"name": "s", "schema": schema}} for schema in SCHEMAS)]
HOSTILE_FORMATS: list[Any] = [
    *({"type": "json_schema", "json_schema": {"name": "s", "schema": schema}} for schema in HOSTILE_SCHEMAS), {"type": "json_schema"}, {"type": "nothing"}, {"type": "structural_tag"},
    {"type": "structural_tag", "structures": [], "triggers": []}, {"type": "structural_tag", "format": {"type": "nothing"}},
]  # fmt: skip


def _tool(parameters: Any, name: Any = "go") -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


TOOLS: list[Any] = [[_tool(SCHEMAS[0])], [_tool(SCHEMAS[0]), _tool(SCHEMAS[3], "deep")]]
HOSTILE_TOOLS: list[Any] = [[], [{}], [_tool(None)], [_tool({}, "")], [_tool({}, "\ud800")], [_tool(5)], [_tool({"type": "string"})], [{"type": "nothing"}], *([_tool(schema)] for schema in HOSTILE_SCHEMAS)]

SAMPLING: dict[str, tuple[list[Any], list[Any]]] = {
    "temperature": ([0, 0.5, 1, 2], [-1, 2.1, 1e-9, 1e-5, math.nan, math.inf]),
    "top_p": ([1, 0.9, 0.1], [0, 1.1, 1e-30, math.nan]),
    "top_k": ([0, -1, 1, 50, 1536], [-2, 1537, 2**31, 2**63, 2**64, 1.5]),
    "min_p": ([0, 0.1, 1], [-0.1, 1.1, math.nan]),
    "seed": ([0, 1, 2**31], [-1, 2**32, 2**63 - 1, -(2**63), 2**63, 2**64, 10**30, 1.5]),
    "presence_penalty": ([0, 0.5, -2, 2], [2.1, math.nan]),
    "frequency_penalty": ([0, 0.5, -2, 2], [-2.1, math.nan]),
    "repetition_penalty": ([1, 1.3, 0.8], [0, -1, 1e-30, 1e-45, 1e30, 1e38, 1e300, math.inf, math.nan]),
    "max_tokens": ([1, 2, 8, 24], [0, -1, 257, 2**31, 2**63, 1.5, math.nan]),
    "min_tokens": ([0, 1], [-1, 25, 2**31, 2**63]),
    "stop": (["the", ["a", "fox"]], ["", [""], ["x"] * 5, ["\ud800"], [1], "y" * 5000]),
    "stop_token_ids": ([[5], [1, 2], list(range(3, 300))], [[-1], [1536], [2**31], [2**63], [2**64], [None], ["a"], [1.5]]),
    "bad_words": ([["fox"], ["the cat", "a"]], [[""], ["\ud800"], ["x"] * 200, [1], "fox"]),
    "logit_bias": ([{"5": 3}, {"300": -100, "301": 100}], [{"-1": 1}, {"1536": 1}, {"99999999999999999999": 1}, {"a": 1}, {"5": math.nan}, {"5": math.inf}, {"5": -math.inf}, {"5": 1e308}, {"5": None}, {"5.5": 1}]),
    "allowed_token_ids": ([[300, 301], list(range(3, 600))], [[], [-1], [1536], [2**63], [5] * 3000, [None]]),
    "logprobs": ([0, 1, 5], [-1, -2, 20, 21, 1536, 2**63, True]),
    "top_logprobs": ([0, 5], [-1, 21, 2**63]),
    "prompt_logprobs": ([0, 2], [-1, -2, 21, 2**63]),
    "logprob_token_ids": ([[5, 6]], [[], [-1], [1536], [2**63], list(range(300))]),
    "n": ([1, 2, 3], [0, -1, 20_000, 2**63, 1.5]),
    "ignore_eos": ([True, False], [1]),
    "skip_special_tokens": ([True, False], []),
    "include_stop_str_in_output": ([True, False], []),
    "echo": ([True, False], []),
    "truncate_prompt_tokens": ([-1, 10], [0, -2, 10**6, 2**63]),
    "truncation_side": (["left", "right"], ["up"]),
    "return_token_ids": ([True], []),
    "return_tokens_as_token_ids": ([True], []),
    "add_special_tokens": ([True, False], []),
    "priority": ([0], [1, -(2**63), 2**64]),
    "stream_interval": ([1, 3], [0, -1, 2**63]),
    "stream_options": ([{"include_usage": True}], [{"include_usage": 1}, {"x": 1}]),
    "cache_salt": (["salt"], ["", "\ud800", "s" * 10_000]),
    "request_id": ([], ["same", "\ud800", "", "../../x", "r" * 10_000]),
    "structured_outputs": (STRUCTURES, HOSTILE_STRUCTURES),
    "response_format": (FORMATS, HOSTILE_FORMATS),
    "use_beam_search": ([False], [True]),
    "length_penalty": ([1.0], [math.nan, math.inf]),
    "suffix": ([], ["x"]),
    "thinking_token_budget": ([], [0, 5, -1, 2**63]),
    "repetition_detection": ([], [{"max_pattern_size": 3, "min_count": 2}, {"max_pattern_size": -1}, {"max_pattern_size": 2**63, "min_pattern_size": 5}]),
    "vllm_xargs": ([], [{"x": 1}, {"x": 10**30}]),
    "watermarking": ([], [True]),
    "routed_experts_prompt_start": ([], [0, 3, -1]),
    "kv_transfer_params": ([], [{"do_remote_prefill": True}, {"x": nested(50)}]),
    "ec_transfer_params": ([], [{"x": 1}]),
    "prompt_embeds": ([], [PICKLE, [PICKLE], "", "AAAA", "!"]),
    "mm_payload": ([], [{}, {"image": PICKLE}, "x"]),
    "model": ([NAME], ["nobody", "", "../../etc/passwd", "\ud800"]),
    "unknown_field": ([], [1]),
}  # fmt: skip
"""Field -> (values that are served, hostile values). All of them may also get one of NUMBERS or WRONG."""
CHAT: dict[str, tuple[list[Any], list[Any]]] = {
    "tools": (TOOLS, HOSTILE_TOOLS),
    "tool_choice": (["auto", "none", "required", {"type": "function", "function": {"name": "go"}}], ["nothing", {"type": "function"}, {"type": "function", "function": {"name": "nobody"}}]),
    "parallel_tool_calls": ([True, False], []),
    "add_generation_prompt": ([True, False], []),
    "continue_final_message": ([], [True]),
    "chat_template": ([], ["{{ messages }}", "{% for x in range(10**9) %}{% endfor %}", "{{ ''.__class__.__mro__ }}", "{%"]),
    "chat_template_kwargs": ([{}], [{"chat_template": "{{ 1 }}"}, {"tokenize": True}, {"messages": []}]),
    "documents": ([], [[{"title": "x"}], [5]]),
    "reasoning_effort": ([], ["low", "nothing"]),
    "media_io_kwargs": ([], [{"image": {}}]),
}  # fmt: skip
OTHER_BODIES: dict[str, list[Any]] = {
    "/tokenize": [{"prompt": text} for text in TEXTS + HOSTILE_TEXTS] + [{"messages": m} for m in MESSAGES + HOSTILE_MESSAGES] + [{"prompt": p} for p in HOSTILE_PROMPTS],
    "/detokenize": [{"tokens": tokens} for tokens in ([], [5, 6], [-1], [1536], [2**31], [2**32], [2**63], [2**64], [1.5], ["a"], [None], [[5]], "x", [5] * 5000)],
    "/v1/responses": [{"input": text, "max_output_tokens": 4} for text in TEXTS + HOSTILE_TEXTS] + [{"input": m, "max_output_tokens": 4} for m in MESSAGES + HOSTILE_MESSAGES]
    + [{"input": "x", "background": True}, {"input": "x", "previous_response_id": "nobody"}, {"input": "x", "text": {"format": {"type": "json_schema", "name": "s", "schema": {"$ref": "#"}}}, "max_output_tokens": 4}],
    "/v1/messages": [{"messages": m, "max_tokens": 4} for m in MESSAGES + HOSTILE_MESSAGES] + [{"messages": MESSAGES[0], "max_tokens": value} for value in NUMBERS],
    "/v1/messages/count_tokens": [{"messages": m} for m in MESSAGES + HOSTILE_MESSAGES],
    "/generative_scoring": [{"query": q, "items": items, "label_token_ids": ids} for q in (STORY, [5, 6], "", [-1], [2**63]) for items in (["a"], [[5]], [], [2**64]) for ids in ([5, 6], [], [-1], [1536], [2**63])],
}  # fmt: skip
"""Other endpoints of the front end, with whole bodies."""
RAW_BODIES: list[bytes] = [
    b"", b"{", b"null", b"[]", b"5", b'"x"', b"{}", b"\x00", b"\xff\xfe", b'{"prompt": "\xff"}', b"NaN", b'{"prompt": "x", "prompt": [5]}', b'{"model": "demo", "prompt": "x", "max_tokens": 1e2}',
    b"[" * 100_000, b'{"a":' * 50_000, b'{"model": "demo", "prompt": "x", "seed": ' + b"9" * 5000 + b"}", b'{"model": "demo", "prompt": "x", "temperature": 1e999, "max_tokens": 2}', b"a=b&c=d", b" " * 100_000,
    b'\xef\xbb\xbf{"model": "demo", "prompt": "x", "max_tokens": 1}', b'{"model": "demo", "prompt": "x", "max_tokens": 1}trailing',
]  # fmt: skip
CONTENT_TYPES = ["application/json", "text/plain", "", "application/x-www-form-urlencoded", "multipart/form-data", "application/json; charset=utf-16", "application/octet-stream"]
