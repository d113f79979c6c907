# SPDX-License-Identifier: Apache-2.0
"""Sampling as users ask for it: what is drawn, when a request stops, and that neither depends on who else is in the batch."""

from collections import Counter

import numpy as np
import pytest
from vllm import SamplingParams
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import BeamSearchParams

from helpers.engines import engine, free_blocks
from helpers.tiny_models import logprobs
from tpu_inference.demo import MODEL

TEXT = "Once upon a time there was a little"
"""The demo model is not sure how to go on: a dozen tokens have a per cent or more each."""
STORY = "Once upon a time"
END = 1
"""The demo model's end token."""
DRAWS = 300
OPTIONS = dict(
    skip_tokenizer_init=False,
    max_num_seqs=12,
    max_num_batched_tokens=16,
    num_gpu_blocks_override=200,
    scheduling_policy="priority",
)


@pytest.fixture(scope="module")
def llm():
    with engine(MODEL, **OPTIONS) as llm:
        yield llm
        free, total = free_blocks(llm)
        assert free == total


@pytest.fixture(scope="module")
def probs(llm):
    """transformers' distribution of the token after TEXT."""
    return np.exp(logprobs(MODEL, llm.get_tokenizer().encode(TEXT))[-1].astype(np.float64))


def complete(llm, prompts, params):
    return llm.generate(prompts, params, use_tqdm=False)


def complete_one(llm, prompt, **params):
    """The only sequence of a request; greedy unless told otherwise."""
    return complete(llm, prompt, SamplingParams(**{"temperature": 0, **params}))[0].outputs[0]


def ids(output):
    return [list(sequence.token_ids) for sequence in output.outputs]


# ---------------------------------------------------------------------------------------------------- what is drawn


def first_tokens(llm, **params):
    """The first token under each of many seeds."""
    each = [SamplingParams(seed=seed, max_tokens=1, **params) for seed in range(DRAWS)]
    return [out.outputs[0].token_ids[0] for out in complete(llm, [TEXT] * DRAWS, each)]


def scaled(probs, temperature):
    weights = probs ** (1 / temperature)
    return weights / weights.sum()


def likeliest(probs, k):
    return set(np.argsort(-probs)[:k].tolist())


ALLOWED = {
    "top_k": lambda probs, k: likeliest(probs, k),
    "top_p": lambda probs, p: likeliest(probs, int(np.searchsorted(np.cumsum(-np.sort(-probs)), p)) + 1),
    "min_p": lambda probs, p: set(np.flatnonzero(probs >= p * probs.max()).tolist()),
}


@pytest.mark.parametrize(
    ("restriction", "temperature"),
    [
        (dict(top_k=4), 1.0),
        (dict(top_p=0.7), 1.0),
        (dict(min_p=0.2), 1.0),
        (dict(min_p=0.5), 2.0),
        (dict(top_k=5, top_p=0.6), 1.0),
        (dict(), 0.5),
    ],
    ids=str,
)
def test_draws_follow_transformers_probabilities(llm, probs, restriction, temperature):
    """Never outside the set, everything likely in it, and about as often as it should be."""
    left = scaled(probs, temperature)
    for name, value in restriction.items():  # each is applied to what the one before it left
        allowed = ALLOWED[name](left, value)
        assert 2 <= len(allowed) <= 20
        left = np.where(np.isin(np.arange(len(left)), list(allowed)), left, 0)
        left /= left.sum()
    drawn = Counter(first_tokens(llm, temperature=temperature, **restriction))
    allowed = set(np.flatnonzero(left).tolist())
    assert set(drawn) <= allowed
    assert {token for token in allowed if left[token] > 0.05} <= set(drawn)
    observed = np.array([drawn[token] / DRAWS for token in range(len(left))])
    # Half the sum of |error| of N draws is about sqrt(k / N) / 2.5 for k likely tokens.
    assert 0.5 * np.abs(observed - left).sum() < 1.5 * np.sqrt((left > 0.005).sum() / DRAWS)


def test_top_k_of_one_is_greedy(llm):
    greedy = complete_one(llm, STORY, max_tokens=30).token_ids
    assert complete_one(llm, STORY, max_tokens=30, temperature=2.0, top_k=1).token_ids == greedy
    assert complete_one(llm, STORY, max_tokens=30, temperature=2.0, top_p=1e-6).token_ids == greedy
    assert complete_one(llm, STORY, max_tokens=30, temperature=2.0, min_p=1.0).token_ids == greedy
    assert complete_one(llm, STORY, max_tokens=30, temperature=2.0, seed=0).token_ids != greedy


def test_without_a_seed_every_request_differs(llm):
    """Hot enough that two streams which agree share their randomness."""
    outputs = complete(llm, [TEXT] * 8, SamplingParams(temperature=1.5, max_tokens=8))
    assert len({tuple(out.outputs[0].token_ids) for out in outputs}) == 8


# ------------------------------------------------------------------------------------------------ whoever is in the batch


def mixed_batch():
    """A dozen requests that differ in everything, all of which say what they want: (prompts, params)."""
    common = dict(max_tokens=24, ignore_eos=True)
    params = [
        SamplingParams(temperature=0, **common),
        SamplingParams(temperature=1.0, seed=7, **common),
        SamplingParams(temperature=1.5, seed=7, top_k=20, **common),
        SamplingParams(temperature=0.7, seed=8, top_p=0.8, **common),
        SamplingParams(temperature=1.2, seed=9, min_p=0.05, **common),
        SamplingParams(temperature=1.0, seed=2**40 + 3, min_tokens=5, max_tokens=24),
        SamplingParams(temperature=0, logprobs=2, **common),
        SamplingParams(temperature=2.0, seed=0, top_k=50, top_p=0.95, min_p=0.01, **common),
        SamplingParams(temperature=0, min_tokens=20, max_tokens=24),
        SamplingParams(temperature=0, repetition_penalty=1.4, frequency_penalty=0.5, **common),
        SamplingParams(
            temperature=1.0, seed=11, presence_penalty=1.0, logit_bias={300: 2.0}, bad_words=["fox"], **common
        ),
        SamplingParams(temperature=1.0, seed=12, allowed_token_ids=list(range(200, 900)), logprobs=1, **common),
    ]
    prompts = [f"{STORY}, there was a kind fox. " * (i % 4) + TEXT for i in range(len(params))]
    return prompts, params


def test_alone_and_among_a_dozen(llm):
    prompts, params = mixed_batch()
    alone = [ids(complete(llm, prompt, p)[0]) for prompt, p in zip(prompts, params, strict=True)]
    assert [ids(out) for out in complete(llm, prompts, params)] == alone
    backwards = complete(llm, prompts[::-1], params[::-1])
    assert [ids(out) for out in backwards[::-1]] == alone
    assert len({tuple(answer[0]) for answer in alone}) >= 11


def test_seeds_differ(llm):
    params = [SamplingParams(temperature=1.0, seed=seed, max_tokens=16) for seed in (1, 2, 1)]
    a, b, again = (ids(out) for out in complete(llm, [TEXT] * 3, params))
    assert a == again != b


def test_several_sequences_of_a_request(llm):
    params = SamplingParams(temperature=1.0, n=3, seed=5, max_tokens=16)
    (out,) = complete(llm, TEXT, params)
    assert sorted(sequence.index for sequence in out.outputs) == [0, 1, 2]
    assert len({tuple(answer) for answer in ids(out)}) == 3
    mixed, _ = complete(llm, [TEXT, STORY], [params, SamplingParams(temperature=0, max_tokens=9)])
    assert ids(mixed) == ids(out)
    with pytest.raises(VLLMValidationError, match="n must be 1"):
        SamplingParams(temperature=0, n=2)


# ------------------------------------------------------------------------------------------------ when a request stops


@pytest.mark.parametrize("count", [1, 2, 17])
def test_max_tokens(llm, count):
    out = complete_one(llm, STORY, max_tokens=count)
    assert len(out.token_ids) == count and out.finish_reason == "length"


def test_a_request_ends_where_the_context_does(llm):
    (out,) = complete(llm, STORY, SamplingParams(temperature=0, max_tokens=None, ignore_eos=True))
    length = llm.llm_engine.model_config.max_model_len
    assert len(out.prompt_token_ids) + len(out.outputs[0].token_ids) == length
    assert out.outputs[0].finish_reason == "length"


@pytest.mark.parametrize("include", [False, True])
def test_stop_strings(llm, include):
    text = complete_one(llm, STORY, max_tokens=40).text
    middle = text.index(" ", len(text) // 2)
    stop = text[middle - 3 : middle + 3]  # the end of a word and the start of the next: no token ends there
    out = complete_one(llm, STORY, max_tokens=40, stop=["never seen", stop], include_stop_str_in_output=include)
    assert out.text == text[: text.index(stop)] + (stop if include else "")
    assert (out.finish_reason, out.stop_reason) == ("stop", stop)
    assert len(out.token_ids) < 40


def test_stop_token_ids(llm):
    free = list(complete_one(llm, STORY, max_tokens=40).token_ids)
    stop = free[20]
    out = complete_one(llm, STORY, max_tokens=40, stop_token_ids=[stop, 1400])
    assert list(out.token_ids) == free[: free.index(stop) + 1]
    assert (out.finish_reason, out.stop_reason) == ("stop", stop)


@pytest.fixture(scope="module")
def greeting(llm):
    """(prompt, its greedy answer, which the model ends itself)."""
    prompt = llm.get_tokenizer().apply_chat_template(
        [{"role": "user", "content": "Hello"}], add_generation_prompt=True, tokenize=False
    )
    out = complete_one(llm, prompt, max_tokens=60)
    answer = list(out.token_ids)
    assert (out.finish_reason, out.stop_reason) == ("stop", None)
    assert answer[-1] == END and len(answer) > 4 and "<|end|>" not in out.text
    return prompt, answer


def test_ignore_eos(llm, greeting):
    prompt, answer = greeting
    out = complete_one(llm, prompt, max_tokens=len(answer) + 9, ignore_eos=True)
    assert list(out.token_ids[: len(answer)]) == answer
    assert len(out.token_ids) == len(answer) + 9 and out.finish_reason == "length"


@pytest.mark.parametrize("temperature", [0, 0.3])
def test_min_tokens_masks_the_end_token(llm, greeting, temperature):
    prompt, answer = greeting
    least = len(answer) + 5
    out = complete_one(llm, prompt, min_tokens=least, max_tokens=60, temperature=temperature, seed=1)
    assert len(out.token_ids) >= least and END not in out.token_ids[:least]
    exactly = complete_one(llm, prompt, min_tokens=len(answer) - 1, max_tokens=60)
    assert list(exactly.token_ids) == answer, "the end token is allowed as soon as there are min_tokens"


def test_min_tokens_masks_stop_token_ids(llm):
    free = list(complete_one(llm, STORY, max_tokens=40).token_ids)
    out = complete_one(llm, STORY, max_tokens=40, stop_token_ids=[free[4]], min_tokens=10)
    assert list(out.token_ids[:4]) == free[:4]
    assert free[4] not in out.token_ids[:10] and len(out.token_ids) >= 10


# --------------------------------------------------------------------------------------------------- logprobs, priorities


def test_logprobs_of_zero_is_the_sampled_token(llm, probs):
    out = complete_one(llm, TEXT, logprobs=0, temperature=1.0, seed=3, max_tokens=4)
    assert [list(entry) for entry in out.logprobs] == [[token] for token in out.token_ids]
    first = out.logprobs[0][out.token_ids[0]]
    assert first.logprob == pytest.approx(np.log(probs[out.token_ids[0]]), abs=1e-3)
    assert first.rank == 1 + (probs > probs[out.token_ids[0]]).sum()
    assert out.cumulative_logprob == pytest.approx(
        sum(entry[t].logprob for entry, t in zip(out.logprobs, out.token_ids, strict=True))
    )


def test_logprobs_are_of_the_raw_distribution(llm, probs):
    """Whatever temperature, top_k and min_tokens make of it."""
    out = complete_one(llm, TEXT, logprobs=5, temperature=2.0, top_k=2, seed=3, max_tokens=2, min_tokens=2)
    order = np.argsort(-probs)[:5].tolist()
    assert set(order) <= set(out.logprobs[0]) <= {*order, out.token_ids[0]}
    for token in order:
        assert out.logprobs[0][token].logprob == pytest.approx(np.log(probs[token]), abs=1e-3)


def test_requests_with_and_without_logprobs_share_a_batch(llm):
    asked = (None, 0, 3, None, 5)
    outputs = complete(llm, [STORY] * 5, [SamplingParams(temperature=0, max_tokens=5, logprobs=k) for k in asked])
    for k, out in zip(asked, outputs, strict=True):
        sequence = out.outputs[0]
        assert (sequence.logprobs is None) if k is None else ({len(e) for e in sequence.logprobs} == {max(k, 1)})


def test_the_more_urgent_request_goes_first(llm):
    """More requests than slots: of those that wait, the last and most urgent one is served first."""
    slots = OPTIONS["max_num_seqs"]
    add = llm.llm_engine.add_request
    running = [f"running {i}" for i in range(slots)]
    for i, name in enumerate(running):
        add(name, STORY, SamplingParams(temperature=0, max_tokens=10 + 5 * i, ignore_eos=True))
    for _ in range(6):  # each is prefilling or decoding
        llm.llm_engine.step()
    for name, priority in (("late", 9), ("normal", 5), ("urgent", 1)):
        add(name, TEXT, SamplingParams(temperature=0, max_tokens=4, ignore_eos=True), priority=priority)
    order = []
    while llm.llm_engine.has_unfinished_requests():
        order += [out.request_id for out in llm.llm_engine.step() if out.finished]
    assert [name for name in order if name in ("late", "normal", "urgent")] == ["urgent", "normal", "late"]
    assert sorted(name for name in order if name in running) == sorted(running)


# ------------------------------------------------------------------------------- what a request makes of the probabilities


def test_penalties_keep_words_from_coming_again(llm):
    def answer(**params):
        return complete_one(llm, STORY, max_tokens=60, ignore_eos=True, **params).token_ids

    free = answer()
    for params in (dict(presence_penalty=2.0, frequency_penalty=2.0), dict(repetition_penalty=2.0)):
        kept = answer(**params)
        first = next(i for i in range(60) if kept[i] != free[i])
        seen = {*llm.get_tokenizer().encode(STORY), *free[:first]}
        assert free[first] in seen and kept[first] not in free[:first], (
            "what changes is that a token does not come again"
        )


def test_biases_allowed_tokens_and_bad_words(llm):
    assert set(complete_one(llm, STORY, max_tokens=5, logit_bias={300: 100.0, 301: -100.0}).token_ids) == {300}
    assert set(complete_one(llm, STORY, max_tokens=20, allowed_token_ids=[300, 301, 302]).token_ids) <= {300, 301, 302}
    text = complete_one(llm, STORY, max_tokens=40).text
    words = text.split()
    bad = f"{words[3]} {words[4]}"
    without = complete_one(llm, STORY, max_tokens=40, bad_words=[f" {bad}", bad]).text
    assert bad in text and bad not in without
    assert without.split()[:3] == words[:3], "nothing changes before"


@pytest.mark.parametrize("count", [1, 20])
def test_logprob_token_ids(llm, probs, count):
    """Beside a request for the likeliest and one for none."""
    asked = list(range(5, 5 + count))
    common = dict(temperature=0, max_tokens=3)
    named, likeliest_, none = complete(
        llm, [TEXT] * 3,
        [SamplingParams(**common, logprob_token_ids=asked), SamplingParams(**common, logprobs=2), SamplingParams(**common)],
    )  # fmt: skip
    first = named.outputs[0].logprobs[0]
    assert set(first) == {*asked, named.outputs[0].token_ids[0]}
    for token in asked:
        assert first[token].logprob == pytest.approx(np.log(probs[token]), abs=1e-2)
    assert {len(entry) for entry in likeliest_.outputs[0].logprobs} == {2} and none.outputs[0].logprobs is None


def test_prompt_logprobs_in_chunks_and_with_a_prefix_cache(llm):
    """The prompt is longer than a step, and in the cache: each position is scored by transformers' distribution before it."""
    prompt = f"{STORY}, there was a kind fox named Mia who lived in a valley. " * 2
    complete_one(llm, prompt, max_tokens=1)
    tokens = llm.get_tokenizer().encode(prompt)
    expected = logprobs(MODEL, tokens)
    for _ in range(2):
        (out,) = complete(llm, prompt, SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=2))
        assert out.prompt_logprobs[0] is None and len(out.prompt_logprobs) == len(tokens)
        for i, entry in enumerate(out.prompt_logprobs[1:]):
            assert entry[tokens[i + 1]].logprob == pytest.approx(expected[i, tokens[i + 1]], abs=2e-3)
            assert set(np.argsort(-expected[i])[:1]) <= set(entry)


def test_beam_search_is_vllms_own(llm):
    (best,) = llm.beam_search([{"prompt": STORY}], BeamSearchParams(beam_width=4, max_tokens=12, ignore_eos=True))
    greedy = complete_one(llm, STORY, max_tokens=12, ignore_eos=True, logprobs=0)
    beams = [sequence.cum_logprob for sequence in best.sequences]
    assert len({tuple(sequence.tokens) for sequence in best.sequences}) == 4
    assert beams == sorted(beams, reverse=True) and beams[0] >= greedy.cumulative_logprob - 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["raw_logits", "processed_logprobs", "processed_logits"])
def test_modes_and_logprobs_of_the_whole_vocabulary(probs, mode):
    few = {"scan_layers": True, "background_compile": False, "token_buckets": [16]}
    with engine(MODEL, **{**OPTIONS, "additional_config": few}, max_logprobs=-1, logprobs_mode=mode) as other:
        asked = dict(logprobs=-1, max_tokens=2, temperature=1.0, top_k=10, seed=1)
        (out,) = complete(other, TEXT, SamplingParams(**asked, prompt_logprobs=-1))
        (few_of_them,) = complete(other, TEXT, SamplingParams(**{**asked, "logprobs": 3}))
    entry, vocab = out.outputs[0].logprobs[0], len(probs)
    assert len(entry) == vocab and all(len(position) == vocab for position in out.prompt_logprobs[1:])
    values = np.array([entry[token].logprob for token in range(vocab)])
    order = np.argsort(-probs)
    if mode == "raw_logits":
        np.testing.assert_allclose(values - values[order[0]], np.log(probs / probs.max()), atol=0.02)
    else:
        assert np.isfinite(values).sum() == 10 and set(np.flatnonzero(np.isfinite(values))) == set(order[:10])
        if mode == "processed_logprobs":
            np.testing.assert_allclose(
                np.exp(values[order[:10]]), probs[order[:10]] / probs[order[:10]].sum(), atol=1e-3
            )
    again = few_of_them.outputs[0].logprobs[0]
    assert len(again) in (3, 4) and all(again[t].logprob == pytest.approx(values[t]) for t in again)
    # Of a prompt nothing is processed.
    scored = np.array([out.prompt_logprobs[1][token].logprob for token in range(vocab)])
    assert np.isclose(np.exp(scored).sum(), 1, atol=1e-3) is np.bool_(mode.endswith("logprobs"))


def test_another_engine_draws_the_same(llm):
    """Other places in the batch, smaller chunks of prompts, no prefix cache, no async scheduling, another seed of its own."""
    prompts, params = mixed_batch()
    here = [ids(out) for out in complete(llm, prompts, params)]
    other = dict(async_scheduling=False, enable_prefix_caching=False, seed=123, long_prefill_token_threshold=5)
    with engine(MODEL, **OPTIONS, **other) as second:
        filler = [STORY] * 3
        greedy = [SamplingParams(temperature=0, max_tokens=12)] * 3
        there = complete(second, [*filler, *prompts[::-1]], [*greedy, *params[::-1]])
    assert [ids(out) for out in there[:2:-1]] == here
