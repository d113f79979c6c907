# SPDX-License-Identifier: Apache-2.0
"""Structured outputs through vLLM's own backends: every answer follows its own grammar, whoever else is in the batch."""

import json
import re

import pytest
from vllm import SamplingParams
from vllm.sampling_params import StructuredOutputsParams

from helpers.engines import engine, free_blocks, scheduler
from tpu_inference.demo import MODEL

PROMPT = "Once upon a time"
OPTIONS = dict(
    skip_tokenizer_init=False, max_num_seqs=12, max_num_batched_tokens=16, long_prefill_token_threshold=8,
    num_gpu_blocks_override=14, max_model_len=128, additional_config={"scan_layers": True, "background_compile": False, "token_buckets": [16]},
)  # fmt: skip
COMPACT = {"disable_any_whitespace": True}
"""A model as small as this one would rather indent for ever than go on with an object."""
BACKENDS = ["xgrammar", "guidance", "outlines"]


def schema(i):
    """An object whose answers no other number's schema admits."""
    properties = {f"k{i}": {"enum": [f"v{i}a", f"v{i}b"]}, "ok": {"type": "boolean"}}
    return {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}


def is_of_schema(i):
    def check(text):
        value = json.loads(text)
        return value[f"k{i}"] in (f"v{i}a", f"v{i}b") and isinstance(value["ok"], bool) and len(value) == 2

    return check


def is_match(pattern):
    return lambda text: re.fullmatch(pattern, text) is not None


def structural_tag(i):
    """As tool calls are asked for: text between a begin and an end."""
    content = {"type": "regex", "pattern": f"p{i}[a-c]{{3}}"}
    return json.dumps(
        {"type": "structural_tag", "format": {"type": "tag", "begin": "<call>", "content": content, "end": "</call>"}}
    )


KINDS = {
    "json": lambda i: (dict(json=schema(i)), is_of_schema(i)),
    "regex": lambda i: (dict(regex=rf"id{i}-[a-f]{{4}}"), is_match(rf"id{i}-[a-f]{{4}}")),
    "choice": lambda i: (dict(choice=[f"yes {i}", f"no {i}"]), is_match(rf"(yes|no) {i}")),
    "grammar": lambda i: (dict(grammar=f'root ::= "n{i} " ("plus" | "minus") " m"'), is_match(rf"n{i} (plus|minus) m")),
    "structural_tag": lambda i: (dict(structural_tag=structural_tag(i)), is_match(rf"<call>p{i}[a-c]{{3}}</call>")),
    "long": lambda i: (dict(regex=rf"id{i}-[a-f]{{40}}"), is_match(rf"id{i}-[a-f]{{40}}")),
}
SERVED_BY = {
    "xgrammar": ["json", "regex", "choice", "grammar", "structural_tag"],
    "guidance": ["json", "regex", "choice"],
    "outlines": ["json", "regex", "choice"],
}


def structured(kind, i, **fields):
    """(parameters, what its text must be)"""
    asked, check = KINDS[kind](i)
    params = dict(temperature=1.0, seed=i, max_tokens=64, structured_outputs=StructuredOutputsParams(**asked), **fields)
    return SamplingParams(**params), check


def complete(llm, prompts, params):
    return [out.outputs[0] for out in llm.generate(prompts, params, use_tqdm=False)]


@pytest.fixture(scope="module")
def llm():
    with engine(MODEL, **OPTIONS, structured_outputs_config={"backend": "xgrammar", **COMPACT}) as llm:
        yield llm
        free, total = free_blocks(llm)
        assert free == total


def test_twelve_at_once_each_with_its_own(llm):
    """Among plain ones, which answer as they do alone."""
    plain = SamplingParams(temperature=0, max_tokens=20)
    alone = complete(llm, PROMPT, plain)[0].text
    batch = [structured(kind, i) for i, kind in enumerate([*SERVED_BY["xgrammar"]] * 4)]
    params = [p for pair in batch for p in (pair[0], plain)]
    # Prompts of different lengths: some rows are prefilled in chunks while others decode.
    prompts = [text for i in range(len(batch)) for text in (PROMPT + " there was a fox" * (i % 4), PROMPT)]
    outputs = complete(llm, prompts, params)
    for i, (_, check) in enumerate(batch):
        assert check(outputs[2 * i].text), (i, outputs[2 * i].text)
        assert outputs[2 * i].finish_reason == "stop"
        assert outputs[2 * i + 1].text == alone


def test_with_everything_else_that_changes_logits(llm):
    """Penalties and biases choose among what the grammar allows; `min_tokens` does not lock a finished grammar; logprobs are of what is allowed."""
    more = dict(repetition_penalty=1.5, logit_bias={5: 3.0}, min_tokens=2, logprobs=2, bad_words=["yes 3"])
    params, check = zip(*(structured("choice", i, **more) for i in range(6)), strict=True)
    for i, out in enumerate(complete(llm, [PROMPT] * 6, list(params))):
        assert check[i](out.text), out.text
        assert all(entry[token].logprob <= 0 for entry, token in zip(out.logprobs, out.token_ids, strict=True))


def test_preempted_in_the_middle(llm, monkeypatch):
    """The cache does not hold the long answers of all that run: those that lose their place go on where they were when they return."""
    kind = type(scheduler(llm))
    original, preempted = kind._preempt_request, []

    def counted(self, request, *args, **kwargs):
        preempted.append(request.num_output_tokens)
        return original(self, request, *args, **kwargs)

    monkeypatch.setattr(kind, "_preempt_request", counted)
    kinds = ["json", "long", "choice", "long"]
    batch = [structured(kinds[i % 4], i, repetition_penalty=1.2) for i in range(24)]
    prompts = [PROMPT + " there was a fox" * (i % 5) for i in range(24)]
    outputs = complete(llm, prompts, [params for params, _ in batch])
    for out, (_, check) in zip(outputs, batch, strict=True):
        assert check(out.text), out.text
    assert max(preempted, default=0) > 1, "nothing was preempted while it wrote"


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_backend(backend):
    compact = COMPACT if backend in ("xgrammar", "guidance") else {}
    with engine(MODEL, **OPTIONS, structured_outputs_config={"backend": backend, **compact}) as llm:
        batch = [structured(kind, i) for i, kind in enumerate(SERVED_BY[backend] * 3)]
        for out, (_, check) in zip(complete(llm, [PROMPT] * len(batch), [p for p, _ in batch]), batch, strict=True):
            assert check(out.text), out.text
