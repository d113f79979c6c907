# SPDX-License-Identifier: Apache-2.0
"""Logprobs of prompt tokens, gathered over the chunks of a prefill."""

import jax
import numpy as np
from vllm.v1.outputs import LogprobsTensors

from tpu_inference.runner.input_batch import InputBatch
from tpu_inference.runner.programs import StepPrograms
from tpu_inference.runner.requests import Request, RequestStates


class _Collected:
    """Of one prompt, by position: a chunk that is computed again after preemption is written again."""

    def __init__(self, positions: int, width: int) -> None:
        self.token_ids = np.zeros((positions, width), np.int32)
        self.logprobs = np.zeros((positions, width), np.float32)
        self.ranks = np.zeros(positions, np.int32)

    def to_tensors(self) -> LogprobsTensors:
        import torch

        return LogprobsTensors(*map(torch.from_numpy, (self.token_ids, self.logprobs, self.ranks)))


class PromptLogprobs:
    """Collects chunk by chunk, and reports a prompt once, with its last chunk."""

    def __init__(self, programs: StepPrograms) -> None:
        self._programs = programs
        self._collected: dict[str, _Collected] = {}

    def collect(
        self, states: RequestStates, batch: InputBatch, params, hidden: jax.Array
    ) -> dict[str, LogprobsTensors | None]:
        """Logprobs of the prompts that this step completes, from its `hidden` [T, d]."""
        self._collected = {req_id: found for req_id, found in self._collected.items() if req_id in states.requests}
        done: dict[str, LogprobsTensors | None] = {}
        wanted = [i for i, r in enumerate(batch.req_ids) if not states.requests[r].prompt_logprobs_done]
        if not wanted:
            return done
        on_host = np.asarray(hidden)
        starts = np.cumsum(batch.num_tokens) - batch.num_tokens
        for i in wanted:
            request = states.requests[batch.req_ids[i]]
            first, count = int(batch.num_computed[i]), int(batch.num_tokens[i])
            # The hidden state at position p predicts the token at p + 1; the last prompt token predicts output.
            scored = max(min(count, len(request.prompt) - 1 - first), 0)
            self._score(states, request, params, first, on_host[starts[i] : starts[i] + scored])
            if first + count >= len(request.prompt):
                done[request.req_id] = self._finish(request)
        return done

    def _score(self, states: RequestStates, request: Request, params, first: int, hidden: np.ndarray) -> None:
        """Logprobs of the tokens after positions `first`, first + 1, … with these hidden states."""
        asked = request.params.prompt_logprobs
        wanted = states.vocab_size if asked == -1 else asked
        found = self._collected.get(request.req_id)
        if found is None:
            found = self._collected[request.req_id] = _Collected(len(request.prompt) - 1, wanted + 1)
        size = self._programs.prompt_chunk_for(wanted)
        for start in range(0, len(hidden), size):
            n = len(hidden[start : start + size])
            chunk, targets = np.zeros((size, *hidden.shape[1:]), hidden.dtype), np.zeros(size, np.int32)
            chunk[:n] = hidden[start : start + n]
            at = slice(first + start, first + start + n)
            targets[:n] = request.prompt[at.start + 1 : at.stop + 1]
            scored = self._programs.prompt_logprobs(wanted, params, chunk, targets)
            found.token_ids[at] = np.asarray(scored.token_ids)[:n, : wanted + 1]
            found.logprobs[at] = np.asarray(scored.logprobs)[:n, : wanted + 1]
            found.ranks[at] = np.asarray(scored.ranks)[:n]

    def _finish(self, request: Request) -> LogprobsTensors | None:
        request.prompt_logprobs_done = True
        found = self._collected.pop(request.req_id)
        return found.to_tensors() if len(found.ranks) else None  # a prompt of one token has none
