# SPDX-License-Identifier: Apache-2.0
"""Custom logits processors and thinking budgets, which work on the host: against vLLM's sampler with the same ones."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from vllm.utils.torch_utils import set_default_torch_dtype
from vllm.v1.sample.logits_processor import AdapterLogitsProcessor, BatchUpdate, LogitsProcessor
from vllm.v1.sample.thinking_budget_state import ThinkingBudgetStateHolder

from helpers.samplers import VOCAB, Runner, config, dense, params, vllm_sample


class Ban(LogitsProcessor):
    """Bans, of requests that say so, a token and the last output."""

    def __init__(self, vllm_config, device, is_pin_memory):
        self.bans = {}

    def is_argmax_invariant(self):
        return False

    def update_state(self, batch_update):
        if batch_update:
            for index in batch_update.removed:
                self.bans.pop(index, None)
            for index, p, _, outputs in batch_update.added:
                self.bans[index] = ((p.extra_args or {}).get("ban"), outputs)

    def apply(self, logits):
        for index, (token, outputs) in self.bans.items():
            if token is not None:
                logits[index, [token, *outputs[-1:]]] = -torch.inf
        return logits


class Flatten(LogitsProcessor):
    """Of no matter to what is likeliest."""

    def __init__(self, vllm_config, device, is_pin_memory):
        pass

    def is_argmax_invariant(self):
        return True

    def update_state(self, batch_update):
        pass

    def apply(self, logits):
        return logits * 0.5


class OfRequests(AdapterLogitsProcessor):
    """A function for each request that asks: prefers tokens of its prompt."""

    def is_argmax_invariant(self):
        return False

    def new_req_logits_processor(self, p):
        if not (p.extra_args or {}).get("prefer"):
            return None

        def prefer(prompt, outputs, logits):
            logits[prompt] += p.extra_args["prefer"] + len(outputs)
            return logits

        return prefer


def logits_of(seed):
    return np.random.default_rng(seed).normal(scale=3, size=VOCAB).astype(np.float32)


REQUESTS = {
    "plain": ([1, 2, 3], dict(temperature=0)),
    "bans": ([4, 5], dict(temperature=0, extra_args={"ban": 7}, repetition_penalty=1.5)),
    "prefers": ([6, 9, 9], dict(temperature=0, extra_args={"prefer": 2.5}, logit_bias={9: -3.0})),
    "draws": ([8], dict(temperature=0.8, seed=3, extra_args={"ban": 1}, top_k=20, min_p=0.01)),
}


@pytest.mark.parametrize(
    "custom", [[Ban], [Flatten], [Ban, Flatten, OfRequests]], ids=lambda c: " ".join(x.__name__ for x in c)
)
def test_processors_in_vllms_order(custom):
    """Five steps, the last two after a preemption: processors see outputs, and rows keep their own."""
    runner = Runner(config("processed_logits", processors=custom))
    made = {name: params(**fields, logprobs=-1, max_tokens=9) for name, (_, fields) in REQUESTS.items()}
    outputs = {name: [] for name in REQUESTS}
    for step in range(5):
        logits = {name: logits_of(10 * step + i) for i, name in enumerate(REQUESTS)}
        again = {} if step != 3 else {name: [*REQUESTS[name][0], *outputs[name]] for name in ("bans", "draws")}
        out = runner.step(
            logits,
            new=[(name, prompt, made[name]) for name, (prompt, _) in REQUESTS.items()] if step == 0 else (),
            preempted=list(again), resumed=again,
            computed={name: len(prompt) + len(outputs[name]) - 1 for name, (prompt, _) in REQUESTS.items()},
        ).get_output()  # fmt: skip
        triples = [(prompt, made[name], list(outputs[name])) for name, (prompt, _) in REQUESTS.items()]
        expected = vllm_sample(np.stack(list(logits.values())), triples, "processed_logits", custom=custom)
        for i, name in enumerate(REQUESTS):
            row, scores = out.req_id_to_index[name], np.empty(VOCAB, np.float32)
            scores[expected.logprobs_tensors.logprob_token_ids[i, 1:]] = expected.logprobs_tensors.logprobs[i, 1:]
            np.testing.assert_allclose(
                dense(out.logprobs, row), scores, rtol=1e-5, atol=1e-5, err_msg=f"{name}, step {step}"
            )
            (token,) = out.sampled_token_ids[row]
            if made[name].temperature == 0:
                assert token == expected.sampled_token_ids[i, 0]
            outputs[name].append(token)


def test_logits_are_float32_whatever_torchs_default_is():
    """The default is the model's type while programs compile in the background."""
    runner = Runner(config("processed_logits", processors=[Ban]))
    with set_default_torch_dtype(torch.bfloat16):
        made = params(temperature=0, extra_args={"ban": 7}, logprobs=-1)
        out = runner.step({"a": logits_of(0)}, new=[("a", [4, 5], made)], computed={"a": 1}).get_output()
    expected = logits_of(0)
    expected[7] = -np.inf
    np.testing.assert_array_equal(dense(out.logprobs, 0), expected)


def test_engines_without_processors_have_none_on_the_host():
    assert not Runner(config()).processors
    assert Runner(config(processors=[Flatten])).processors


# --------------------------------------------------------------------------------------------------- thinking budgets

START, END = [10], [20, 21]
REASONING = SimpleNamespace(reasoning_start_token_ids=START, reasoning_end_token_ids=END)


@pytest.mark.parametrize("budget", [0, 1, 4, 100])
@pytest.mark.parametrize("prompt", [[1, 2], [1, *START], [1, *START, 3, 4]], ids=str)
@pytest.mark.parametrize("returns", [False, True], ids=["", "preempted"])
def test_thinking_ends_where_vllm_ends_it(budget, prompt, returns):
    """Two steps in flight. The model starts to think at its second token, and would end by itself after its twelfth."""

    def logits(position):
        out = logits_of(position)
        out[[*START, *END]] = -20
        if position in (1, 12, 13):
            out[{1: START[0], 12: END[0], 13: END[1]}[position]] = 50
        return out

    p = params(temperature=0, thinking_token_budget=budget, max_tokens=30)
    holder = ThinkingBudgetStateHolder(REASONING, 1, 0, torch.device("cpu"), False)
    expected: list[int] = []
    holder.sync_batch(BatchUpdate(1, (), ((0, p, prompt, expected),), ()))
    for position in range(20):
        out = vllm_sample(logits(position)[None], [(prompt, p, expected)], "raw_logprobs", holder=holder)
        expected.append(int(out.sampled_token_ids[0, 0]))

    runner, waiting, got = Runner(config(reasoning=REASONING)), [], []
    for position in range(20):
        back = returns and position == 6
        if back:
            got += [w.get_output().sampled_token_ids[0][0] for w in waiting]
            waiting = []
        step = runner.step(
            {"a": logits(position)}, new=[("a", prompt, p)] if position == 0 else (), preempted=["a"] if back else (),
            resumed={"a": [*prompt, *got]} if back else None, computed={"a": len(prompt) + position - 1},
        )  # fmt: skip
        waiting.append(step)
        if len(waiting) > 1:
            got += waiting.pop(0).get_output().sampled_token_ids[0]
    got += [w.get_output().sampled_token_ids[0][0] for w in waiting]
    assert got == expected
    if budget < 8:
        at = expected.index(END[0])
        assert expected[at : at + 2] == END and at < 12, "the budget ended it"
