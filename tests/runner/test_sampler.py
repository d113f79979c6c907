# SPDX-License-Identifier: Apache-2.0
"""The runner's sampler against vLLM's own: the same requests, the same logits."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm.sampling_params import StructuredOutputsParams
from vllm.v1.core.sched.output import GrammarOutput

from helpers.samplers import ROWS, VOCAB, Runner, config, dense, params, vllm_sample

CHI_SQUARE_9999 = [0, 15.14, 18.42, 21.11, 23.51, 25.74, 27.86, 29.88, 31.83, 33.72, 35.56, 37.37]
"""Quantile by degrees of freedom."""

token = st.integers(0, VOCAB - 1)
some_tokens = st.lists(token, min_size=1, max_size=12)
FIELDS = dict(
    temperature=st.sampled_from([0, 0, 0.5, 1.0, 1.7]),
    presence_penalty=st.sampled_from([0, 0, 0.5, -2.0, 2.0]),
    frequency_penalty=st.sampled_from([0, 0, 0.25, -1.0, 2.0]),
    repetition_penalty=st.sampled_from([1, 1, 0.5, 1.3, 5.0]),
    logit_bias=st.none() | st.dictionaries(token, st.floats(-100, 100, width=32), max_size=VOCAB),
    allowed_token_ids=st.none() | st.lists(token, min_size=1, max_size=VOCAB, unique=True),
    bad_words_token_ids=st.none() | st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=3), max_size=6),
    min_tokens=st.integers(0, 8),
    stop_token_ids=st.none() | st.lists(token, max_size=VOCAB - 2, unique=True),
    eos=st.none() | token,
    top_k=st.sampled_from([0, 0, 1, 5, 40, VOCAB]),
    top_p=st.sampled_from([1.0, 1.0, 0.93, 0.4]),
    min_p=st.sampled_from([0.0, 0.0, 0.02, 0.3]),
    structured=st.booleans(),
)
requests = st.lists(
    st.tuples(some_tokens, st.fixed_dictionaries(FIELDS), st.lists(st.integers(0, 3) | token, max_size=10)),
    min_size=1,
    max_size=ROWS,
)


def made(fields, **more):
    structured = fields.pop("structured", False)
    p = params(**fields, max_tokens=50, logprobs=-1, seed=1, **more)
    if structured:
        p.structured_outputs = StructuredOutputsParams(regex=".")
    return p


def logits_of(seed, rows=ROWS):
    return np.random.default_rng(seed).normal(scale=3, size=(rows, VOCAB)).astype(np.float32)


def bitmask_of(allowed):
    """bool [R, V] as the scheduler sends it."""
    bits = np.zeros((len(allowed), -(-VOCAB // 32) * 32), bool)
    bits[:, :VOCAB] = allowed
    return np.packbits(bits, axis=1, bitorder="little").view(np.int32)


def without_impossible(scores):
    """-inf where float32 has no probability left: vLLM drops those of a request without top_p if another of the batch has it, and here none does."""
    with np.errstate(invalid="ignore"):  # a row that allows nothing
        weights = np.exp(scores - scores.max())
        return np.where(weights / weights.sum() > 0, scores, -np.inf)


# Fixed examples: at the edge of top-p two orders of adding up may differ by a token, and no draw of examples may decide on that.
@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    requests,
    st.integers(0, 2**16),
    st.sampled_from(["raw_logprobs", "raw_logits", "processed_logprobs", "processed_logits"]),
)
def test_logits_logprobs_and_greedy_tokens_are_vllms(cases, seed, mode):
    """Mixed batches, grammars among them, in one program; each request in the middle of its outputs."""
    rng, n = np.random.default_rng(seed), len(cases)
    logits = logits_of(seed, n)
    all_params = [made(dict(fields)) for _, fields, _ in cases]
    allowed = rng.random((n, VOCAB)) < rng.choice([0.03, 0.5], n)[:, None]
    allowed[:, 5] |= ~allowed.any(1)
    masked = [i for i in range(n) if all_params[i].structured_outputs is not None]
    rng.shuffle(masked)
    grammar = GrammarOutput([f"r{i}" for i in masked], bitmask_of(allowed[masked])) if masked else None

    runner = Runner(config(mode))
    names = [f"r{i}" for i in range(n)]
    first = dict(zip(names, logits_of(1, n), strict=True))
    news = [(name, case[0], p) for name, case, p in zip(names, cases, all_params, strict=True)]
    runner.step(first, new=news)
    back = {name: [*prompt, *outputs] for name, (prompt, _, outputs) in zip(names, cases, strict=True)}
    out = runner.step(
        dict(zip(names, logits, strict=True)), resumed=back, preempted=names, grammar=grammar
    ).get_output()

    reference = logits.copy()
    reference[masked] = np.where(allowed[masked], logits[masked], -np.inf)
    triples = [(prompt, p, list(outputs)) for (prompt, _, outputs), p in zip(cases, all_params, strict=True)]
    expected = vllm_sample(reference, triples, mode)
    scores = np.empty((n, VOCAB), np.float32)
    ids = expected.logprobs_tensors.logprob_token_ids.numpy()[:, 1:]
    np.put_along_axis(scores, ids, expected.logprobs_tensors.logprobs.numpy()[:, 1:], 1)
    for i, name in enumerate(names):
        row = out.req_id_to_index[name]
        found, wanted = dense(out.logprobs, row), scores[i]
        if mode.startswith("processed"):
            found, wanted = without_impossible(found), without_impossible(wanted)
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5, err_msg=str(all_params[i]))
        (sampled,) = out.sampled_token_ids[row]
        if all_params[i].temperature == 0:
            assert sampled == expected.sampled_token_ids[i, 0]
        elif mode.startswith("processed") and np.isfinite(scores[i]).any():
            assert np.isfinite(scores[i, sampled])


@pytest.mark.parametrize(
    "fields",
    [
        dict(presence_penalty=1.0, frequency_penalty=0.5, repetition_penalty=1.4),
        dict(logit_bias={1: 2.0, 2: -3.0, 60: 4.0}, top_k=9, temperature=0.8),
        dict(allowed_token_ids=list(range(0, VOCAB, 3)), top_p=0.8, repetition_penalty=0.7),
        dict(bad_words_token_ids=[[4], [3, 9], [2, 2]], min_tokens=9, stop_token_ids=[1, 60], min_p=0.05),
    ],
    ids=lambda fields: " ".join(fields),
)
def test_draws_follow_vllms_distribution(fields):
    """Chi-square of 4000 draws over bins that expect 5 or more; beyond its 0.9999 quantile would be a false alarm once in ten thousand."""
    prompt, outputs, n = [5, 6, 7, 7], [8, 3, 9, 9, 3], 4000
    logits = logits_of(3, 1) / 6
    p = made({"temperature": 1.0, **fields})
    expected = vllm_sample(logits, [(prompt, p, list(outputs))], "processed_logprobs").logprobs_tensors
    probs = np.zeros(VOCAB)
    probs[expected.logprob_token_ids.numpy()[0, 1:]] = np.exp(expected.logprobs.numpy()[0, 1:].astype(np.float64))
    runner, counts = Runner(config()), np.zeros(VOCAB)
    for start in range(0, n, ROWS):
        names = [f"{start} {i}" for i in range(ROWS)]
        seeded = [made({"temperature": 1.0, **fields}) for _ in names]
        for i, each in enumerate(seeded):
            each.seed, each.logprobs = start + i, None
        gone = list(runner.states.slots)
        runner.step(
            dict.fromkeys(names, logits[0]),
            new=[(r, prompt, q) for r, q in zip(names, seeded, strict=True)],
            finished=gone,
        )
        out = runner.step(
            dict.fromkeys(names, logits[0]), preempted=names, resumed={name: [*prompt, *outputs] for name in names}
        ).get_output()
        np.add.at(counts, [tokens[0] for tokens in out.sampled_token_ids], 1)
    assert not counts[probs == 0].any()
    order = np.argsort(-probs)
    bins = np.minimum(np.arange(VOCAB), 11)  # the likeliest tokens, and all others together
    observed, weight = (np.bincount(bins, weights=x[order], minlength=12) for x in (counts, n * probs))
    filled = weight >= 5
    assert filled.sum() >= 4
    chi_square = ((observed - weight)[filled] ** 2 / weight[filled]).sum()
    assert chi_square < CHI_SQUARE_9999[filled.sum() - 1], (observed, weight)


# ------------------------------------------------------------------------------------------- state, as requests come and go


class Story:
    """A request whose tokens vLLM's sampler knows: its logits depend on its name and its position alone."""

    def __init__(self, name, prompt, fields):
        self.name, self.prompt, self.outputs = name, list(prompt), []
        self.params = made({**fields, "temperature": 0})
        self.params.logprobs = None
        self.seed = sum(map(ord, name))

    def logits(self):
        # Few likely tokens, so that they repeat and penalties matter.
        logits = logits_of(self.seed + 97 * len(self.outputs), 1)[0]
        logits[:4] += 6
        return logits

    def next_token(self):
        out = vllm_sample(self.logits()[None], [(self.prompt, self.params, list(self.outputs))], "raw_logprobs")
        return int(out.sampled_token_ids[0, 0])


events = st.lists(
    st.tuples(st.sampled_from(["run", "run", "run", "preempt", "abort", "add"]), st.integers(0, 99)), max_size=14
)


@settings(max_examples=25, deadline=None)
@given(requests, events, st.integers(0, 99))
def test_state_follows_requests_that_come_go_and_return(cases, happenings, seed):
    """Two steps in flight, as async scheduling has them; every greedy token is the one that vLLM's sampler draws from the whole text."""
    runner, rng = Runner(config()), np.random.default_rng(seed)
    running, waiting, preempted, in_flight = [], [], [], []
    for i, (prompt, fields, _) in enumerate(cases):
        waiting.append(Story(f"a{i}", prompt, {k: v for k, v in fields.items() if k != "structured"}))
    started = set()

    def resolve():
        out, expected = in_flight.pop(0)
        got = (
            {r: t[0] for r, t in zip(out.req_ids, out.sampled_token_ids, strict=True)}
            if (out := out.get_output())
            else {}
        )
        assert got == expected

    finished: set[str] = set()
    for what, number in [*happenings, ("run", 0), ("run", 0)]:
        out_of_slots: list[str] = []
        if what == "preempt" and running:
            story = running.pop(number % len(running))
            preempted.append(story)
            out_of_slots.append(story.name)
        if what == "abort" and running:
            finished.add(running.pop(number % len(running)).name)
        if what == "add":
            prompt, fields, _ = cases[number % len(cases)]
            waiting.append(
                Story(
                    f"n{len(started)}{number}{len(waiting)}",
                    prompt,
                    {k: v for k, v in fields.items() if k != "structured"},
                )
            )
        new, resumed = [], {}
        for queue in (preempted, waiting):
            while queue and len(running) < ROWS and (queue is waiting or queue[0].name not in out_of_slots):
                story = queue.pop(0)
                running.append(story)
                if story.name in started:
                    resumed[story.name] = [*story.prompt, *story.outputs]
                else:
                    new.append((story.name, story.prompt, story.params))
                    started.add(story.name)
        rng.shuffle(running)
        scheduled = running[: 1 + number % ROWS] if number % 3 == 0 else running
        scheduled = [s for s in running if s in scheduled or s.name in resumed or any(s.name == n[0] for n in new)]
        if not scheduled:
            continue
        out = runner.step(
            {s.name: s.logits() for s in scheduled}, new=new, resumed=resumed, finished=finished, preempted=out_of_slots,
            computed={s.name: len(s.prompt) + len(s.outputs) - 1 for s in scheduled},
        )  # fmt: skip
        finished = set()
        expected = {s.name: s.next_token() for s in scheduled}
        for story in scheduled:
            story.outputs.append(expected[story.name])
        in_flight.append((out, expected))
        if len(in_flight) > 1:
            resolve()
    while in_flight:
        resolve()
