# SPDX-License-Identifier: Apache-2.0
"""The checkpoint that the demo serves: small, complete, and it says something."""

import json
import re
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

MODEL = Path(__file__).parent.parent / "tpu_inference" / "demo" / "model"
FILES = {
    "README.md",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
}


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(MODEL)


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def model(request):
    return AutoModelForCausalLM.from_pretrained(MODEL, dtype=getattr(torch, request.param)).eval()


@torch.no_grad()
def generate(model, ids, tokens=256):
    output = model.generate(
        torch.tensor([ids]),
        attention_mask=torch.ones(1, len(ids), dtype=torch.long),
        max_new_tokens=tokens,
        do_sample=False,
    )
    return output[0, len(ids) :].tolist()


def chat(model, tokenizer, *turns):
    roles = ("user", "assistant") * len(turns)
    messages = [{"role": role, "content": turn} for role, turn in zip(roles, turns, strict=False)]
    prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return generate(model, tokenizer(prompt, add_special_tokens=False).input_ids)


def answer(model, tokenizer, *turns):
    return tokenizer.decode(chat(model, tokenizer, *turns), skip_special_tokens=True)


def has_loop(ids):
    """Whether some run of tokens is followed at once by itself."""
    return any(
        ids[start : start + size] == ids[start + size : start + 2 * size]
        for size in range(1, 33)
        for start in range(len(ids) - 2 * size + 1)
    )


def check_story(ids, tokenizer):
    """A story ends by itself, uses many words, and never says the same thing twice in a row."""
    assert ids[-1] == tokenizer.eos_token_id
    assert len(ids) >= 30
    assert len(set(ids)) >= 20
    assert not has_loop(ids), tokenizer.decode(ids)
    sentences = re.split(r"(?<=[.!?])\s", tokenizer.decode(ids, skip_special_tokens=True))
    assert len(set(sentences)) == len(sentences)


def test_files():
    assert {path.name for path in MODEL.iterdir()} == FILES
    assert sum(path.stat().st_size for path in MODEL.iterdir()) <= 8 * 2**20


def test_config(tokenizer):
    config = json.loads((MODEL / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["torch_dtype"] == "bfloat16"
    assert config["max_position_embeddings"] == 1024
    assert (config["bos_token_id"], config["eos_token_id"]) == (tokenizer.bos_token_id, tokenizer.eos_token_id)
    assert len(tokenizer) == config["vocab_size"]


def test_tokenizer(tokenizer):
    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    text = "Once upon a time, a naïve fox\n saw 日本 and 😀."
    ids = tokenizer(text).input_ids
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_chat_template(tokenizer):
    messages = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": " Hello! "}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == "<|bos|><|system|>Be kind.<|end|><|user|>Hello!<|end|><|assistant|>"
    ids = tokenizer(text, add_special_tokens=False).input_ids
    assert [i for i in ids if i in tokenizer.all_special_ids] == tokenizer.convert_tokens_to_ids(
        ["<|bos|>", "<|system|>", "<|end|>", "<|user|>", "<|end|>", "<|assistant|>"]
    )


@pytest.mark.parametrize("prompt", ["Once upon a time", "Long ago, a brave rabbit named Ruby"])
def test_completion(model, tokenizer, prompt):
    check_story(generate(model, tokenizer(prompt).input_ids), tokenizer)


@pytest.mark.parametrize("kind", ["fox", "owl", "bear"])
def test_story_on_request(model, tokenizer, kind):
    ids = chat(model, tokenizer, f"Tell me a story about {'an' if kind == 'owl' else 'a'} {kind}.")
    check_story(ids, tokenizer)
    assert kind in tokenizer.decode(ids)


@pytest.mark.parametrize(
    ("question", "expected"),
    [
        ("What is the opposite of hot?", "The opposite of hot is cold."),
        ("What is the capital of France?", "The capital of France is Paris."),
        ("What is 3 plus 4?", "3 plus 4 is 7."),
        ("What day comes after Monday?", "Tuesday comes after Monday."),
    ],
)
def test_answers(model, tokenizer, question, expected):
    assert answer(model, tokenizer, question) == expected


def test_says_what_it_is(model, tokenizer):
    assert "tiny demo model" in answer(model, tokenizer, "Who are you?")


def test_second_turn(model, tokenizer):
    first = "What is the opposite of big?"
    assert answer(model, tokenizer, first, answer(model, tokenizer, first), "What is 2 plus 2?") == "2 plus 2 is 4."


@pytest.mark.parametrize(
    ("prompt", "completion"),
    [("The sky is", " blue."), ("The capital of France is", " Paris."), ("The opposite of big is", " small.")],
)
def test_fact_completion(model, tokenizer, prompt, completion):
    """A plain statement is completed, and ends without repeating itself."""
    ids = generate(model, tokenizer(prompt).input_ids)
    assert ids[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(ids).startswith(completion)
    assert not has_loop(ids)


# What the present checkpoint gets wrong. A better one makes these pass, and then the marks go.


@pytest.mark.xfail(strict=True, reason="loses count")
def test_counting(model, tokenizer):
    assert answer(model, tokenizer, "Count from 1 to 10.") == "1, 2, 3, 4, 5, 6, 7, 8, 9, 10."


@pytest.mark.xfail(strict=True, reason="does not keep the names of a story")
def test_keeps_the_name(model, tokenizer):
    assert "Zoe" in answer(model, tokenizer, "Tell me a story about a penguin named Zoe.")
