# SPDX-License-Identifier: Apache-2.0
"""What JSON can say and the engine cannot be told is refused before it is sent there."""

import pytest
from vllm import SamplingParams
from vllm.sampling_params import StructuredOutputsParams

from tpu_inference.platforms.requests import RequestError, validate

INPUTS = {"type": "token", "prompt_token_ids": [5, 6]}


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        (dict(stop=["\ud800"]), "not valid Unicode"),
        (dict(bad_words=["fox", "\udfff"]), "not valid Unicode"),
        (dict(structured_outputs=StructuredOutputsParams(regex="[\ud800]")), "not valid Unicode"),
        (dict(top_k=2**64), "out of range"),
        (dict(stop_token_ids=[2**64]), "out of range"),
        (dict(seed=-(2**64)), "out of range"),
    ],
    ids=str,
)
def test_what_cannot_be_sent_to_the_engine(fields, reason):
    with pytest.raises(RequestError, match=reason):
        validate(INPUTS, SamplingParams(**fields), vocab_size=100)


@pytest.mark.parametrize(
    "fields",
    [dict(stop=["日本語", "\x00"]), dict(top_k=2**63 - 1), dict(seed=-(2**63)), dict(logit_bias={5: -100.0}), dict(logprobs=-1)],
    ids=str,
)  # fmt: skip
def test_what_can(fields):
    validate(INPUTS, SamplingParams(**fields), vocab_size=100)


@pytest.mark.parametrize(("ids", "named"), [([5, 100], 100), ([-1, 5], -1), ([2**40], 2**40)])
def test_a_token_id_out_of_vocabulary_is_named(ids, named):
    with pytest.raises(RequestError, match=f"token id {named} of the prompt is out of vocabulary.* 0 to 99"):
        validate({"type": "token", "prompt_token_ids": ids}, SamplingParams(), vocab_size=100)
    validate({"type": "token", "prompt_token_ids": [0, 99]}, SamplingParams(), vocab_size=100)
