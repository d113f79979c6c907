# SPDX-License-Identifier: Apache-2.0
"""Persistent state of the requests in flight: one slot each, in NumPy arrays that a step slices."""

from dataclasses import dataclass, field

import numpy as np
from vllm.sampling_params import SamplingParams
from vllm.v1.core.sched.output import CachedRequestData, NewRequestData, SchedulerOutput

from tpu_inference.layers.common.sampling_processors import HAS_BIAS, KEEPS_ONE
from tpu_inference.runner.block_table import BlockTables

GREEDY_EPSILON = 1e-5
"""vLLM's bound: a lower temperature is greedy."""

NEUTRAL: dict[str, float] = dict(
    temperature=0, top_p=1, min_p=0, top_k=0, seed=0, presence_penalty=0, frequency_penalty=0, repetition_penalty=1, flags=0
)  # fmt: skip
"""Columns that a batch slices for its sampler, and what rows that are only padding have there (`top_k`: the vocabulary)."""


@dataclass
class Request:
    """What a step needs of a request beyond the arrays; outlives its slot (a preempted request has none)."""

    req_id: str
    params: SamplingParams
    prompt: np.ndarray
    """int32 [prompt_len]"""
    seed: int
    prompt_logprobs_done: bool
    follows_outputs: bool = False
    """Something on the host looks at its output tokens."""
    outputs: list[int] = field(default_factory=list)
    """Output tokens, of a request that `follows_outputs`; a new list each time that it is given a slot."""

    @property
    def has_bias(self) -> bool:
        """Whether it changes the logits of given tokens, whatever the text."""
        params = self.params
        return bool(params.logit_bias or params.allowed_token_ids or any(len(w) == 1 for w in self.bad_words))

    @property
    def has_penalties(self) -> bool:
        params = self.params
        return bool(params.presence_penalty or params.frequency_penalty or params.repetition_penalty != 1)

    @property
    def bad_words(self) -> list[list[int]]:
        """Token ids of each word."""
        return self.params.bad_words_token_ids or []

    @property
    def has_long_bad_words(self) -> bool:
        """Whether a word has more than one token, so that the text before decides."""
        return any(len(word) > 1 for word in self.bad_words)

    @property
    def uses_tables(self) -> bool:
        """Whether it needs its row of `TokenTables`."""
        return self.has_bias or self.has_penalties or self.params.min_tokens > 0


class RequestStates:
    """Slots 0..max_num_seqs-1, and what the scheduler told of the requests in them.

    Ids of sampled tokens are not kept here but for requests that ask something of the host which depends on them (`Request.outputs`): the
    last one of each slot stays on the device, and when a request returns after preemption the scheduler sends all of its tokens again.
    """

    def __init__(
        self,
        *,
        max_num_seqs: int,
        max_model_len: int,
        vocab_size: int,
        num_groups: int,
        max_blocks: int,
        seed: int,
        follow_all: bool = False,
    ) -> None:
        """`follow_all`: the outputs of every request are looked at on the host (custom logits processors)."""
        n = max_num_seqs
        self.max_num_seqs = n
        self.vocab_size = vocab_size
        self.token_ids = np.zeros((n, max_model_len), np.int32)
        self.num_known = np.zeros(n, np.int32)
        """Leading entries of `token_ids` that are valid; later tokens are on the device."""
        self.num_computed = np.zeros(n, np.int32)
        self.num_prompt = np.zeros(n, np.int32)
        self.temperature = np.zeros(n, np.float32)
        self.top_p = np.ones(n, np.float32)
        self.min_p = np.zeros(n, np.float32)
        self.top_k = np.full(n, vocab_size, np.int32)
        self.seed = np.zeros(n, np.uint32)
        self.min_tokens = np.zeros(n, np.int32)
        self.presence_penalty = np.zeros(n, np.float32)
        self.frequency_penalty = np.zeros(n, np.float32)
        self.repetition_penalty = np.ones(n, np.float32)
        self.flags = np.zeros(n, np.int32)
        self.more_than_argmax = np.zeros(n, bool)
        self.num_logprobs = np.full(n, -1, np.int32)
        """Requested logprobs of the likeliest tokens; -1 for none."""
        self.follows_outputs = np.zeros(n, bool)
        """`Request.follows_outputs`, so that a step need not look at every request."""
        self.names_tokens = np.zeros(n, bool)
        """Logprobs of tokens that the request names."""
        self.admitted: list[Request] = []
        """Requests that were given a slot since the runner last looked."""
        self._follow_all = follow_all
        self.block_tables = BlockTables(num_groups, n, max_blocks)
        self.requests: dict[str, Request] = {}
        self.slots: dict[str, int] = {}
        self._free = list(range(n - 1, -1, -1))
        self._seeds = np.random.default_rng(seed)

    def apply(self, output: SchedulerOutput) -> None:
        """Follow what the scheduler decided: drop, add, resume and extend requests."""
        for req_id in output.finished_req_ids:
            self._release(req_id)
            self.requests.pop(req_id, None)
        for req_id in output.preempted_req_ids or ():
            self._release(req_id)
        for new in output.scheduled_new_reqs:
            self._add(new)
        self._extend(output.scheduled_cached_reqs)

    def _release(self, req_id: str) -> None:
        slot = self.slots.pop(req_id, None)
        if slot is not None:
            self._free.append(slot)

    def _add(self, new: NewRequestData) -> None:
        params = new.sampling_params
        assert params is not None and new.prompt_token_ids is not None, "validate_request admits text generation only"
        self._release(new.req_id)
        request = Request(
            new.req_id,
            params,
            np.asarray(new.prompt_token_ids, np.int32),
            seed=int(self._seeds.integers(2**32)) if params.seed is None else params.seed % 2**32,
            prompt_logprobs_done=params.prompt_logprobs is None,
        )
        request.follows_outputs = (
            self._follow_all or request.has_long_bad_words or params.thinking_token_budget is not None
        )
        self.requests[new.req_id] = request
        self._occupy(request, request.prompt, new.num_computed_tokens, new.block_ids)

    def _occupy(
        self, request: Request, tokens: np.ndarray, num_computed: int, block_ids: tuple[list[int], ...]
    ) -> None:
        """Give the request a slot holding `tokens`."""
        slot = self.slots[request.req_id] = self._free.pop()
        self.token_ids[slot, : len(tokens)] = tokens
        self.num_known[slot] = len(tokens)
        self.num_computed[slot] = num_computed
        self.num_prompt[slot] = len(request.prompt)
        self.block_tables.assign(slot, block_ids)
        self._take_parameters(slot, request)
        request.outputs = tokens[len(request.prompt) :].tolist() if request.follows_outputs else []
        self.admitted.append(request)

    def _take_parameters(self, slot: int, request: Request) -> None:
        params = request.params
        greedy = params.temperature < GREEDY_EPSILON
        self.temperature[slot] = 0.0 if greedy else params.temperature
        self.top_p[slot] = params.top_p
        self.min_p[slot] = params.min_p
        self.top_k[slot] = min(params.top_k, self.vocab_size) if params.top_k > 0 else self.vocab_size
        self.seed[slot] = request.seed
        self.min_tokens[slot] = params.min_tokens
        self.presence_penalty[slot] = params.presence_penalty
        self.frequency_penalty[slot] = params.frequency_penalty
        self.repetition_penalty[slot] = params.repetition_penalty
        self.flags[slot] = HAS_BIAS * request.has_bias | KEEPS_ONE * (params.structured_outputs is not None)
        self.more_than_argmax[slot] = not greedy or request.has_bias or request.has_penalties
        self.num_logprobs[slot] = self._num_logprobs(params)
        self.follows_outputs[slot] = request.follows_outputs
        self.names_tokens[slot] = bool(params.logprob_token_ids)

    def _num_logprobs(self, params: SamplingParams) -> int:
        if params.logprobs is None or params.logprob_token_ids:
            return -1
        return self.vocab_size if params.logprobs == -1 else params.logprobs

    def _extend(self, cached: CachedRequestData) -> None:
        for i, req_id in enumerate(cached.req_ids):
            blocks = cached.new_block_ids[i]
            if req_id in cached.resumed_req_ids:
                self._release(req_id)
                tokens = np.asarray(cached.all_token_ids[req_id], np.int32)
                assert blocks is not None
                self._occupy(self.requests[req_id], tokens, cached.num_computed_tokens[i], blocks)
                continue
            slot = self.slots[req_id]
            self.num_computed[slot] = cached.num_computed_tokens[i]
            if blocks is not None:
                self.block_tables.append(slot, blocks)
