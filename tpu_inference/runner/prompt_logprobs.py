# SPDX-License-Identifier: Apache-2.0
"""Logprobs of prompt tokens, gathered over the chunks of a prefill."""

import jax
import numpy as np
from vllm.v1.outputs import LogprobsTensors

from tpu_inference.layers.common.sampling import Logprobs
from tpu_inference.runner.async_output import concatenate_prompt_logprobs
from tpu_inference.runner.input_batch import InputBatch
from tpu_inference.runner.programs import PROMPT_CHUNK, StepPrograms
from tpu_inference.runner.requests import Request, RequestStates


class PromptLogprobs:
    """Collects chunk by chunk; a preempted prefill starts anew, and a prompt is reported once."""

    def __init__(self, programs: StepPrograms) -> None:
        self._programs = programs
        self._parts: dict[str, list[Logprobs]] = {}

    def collect(
        self, states: RequestStates, batch: InputBatch, params, hidden: jax.Array
    ) -> dict[str, LogprobsTensors | None]:
        """Logprobs of the prompts that this step completes, from its `hidden` [T, d]."""
        self._parts = {req_id: parts for req_id, parts in self._parts.items() if req_id in states.requests}
        done: dict[str, LogprobsTensors | None] = {}
        wanted = [i for i, r in enumerate(batch.req_ids) if not states.requests[r].prompt_logprobs_done]
        if not wanted:
            return done
        on_host = np.asarray(hidden)
        starts = np.cumsum(batch.num_tokens) - batch.num_tokens
        for i in wanted:
            request = states.requests[batch.req_ids[i]]
            first, count = int(batch.num_computed[i]), int(batch.num_tokens[i])
            parts = self._parts.setdefault(request.req_id, []) if first else self._parts.pop(request.req_id, [])[:0]
            self._parts[request.req_id] = parts
            # The hidden state at position p predicts the token at p + 1; the last prompt token predicts output.
            count = min(count, len(request.prompt) - 1 - first)
            rows = on_host[starts[i] : starts[i] + max(count, 0)]
            parts.extend(self._score(params, rows, request.prompt[first + 1 : first + 1 + count]))
            if first + int(batch.num_tokens[i]) >= len(request.prompt):
                done[request.req_id] = self._finish(request)
        return done

    def _score(self, params, rows: np.ndarray, targets: np.ndarray) -> list[Logprobs]:
        parts = []
        for start in range(0, len(rows), PROMPT_CHUNK):
            chunk = rows[start : start + PROMPT_CHUNK]
            n = len(chunk)
            hidden = np.zeros((PROMPT_CHUNK, *rows.shape[1:]), rows.dtype)
            hidden[:n] = chunk
            padded = np.zeros(PROMPT_CHUNK, np.int32)
            padded[:n] = targets[start : start + n]
            scored = self._programs.prompt_logprobs(params, hidden, padded)
            parts.append(jax.tree.map(lambda array, n=n: np.asarray(array)[:n], scored))
        return parts

    def _finish(self, request: Request) -> LogprobsTensors | None:
        request.prompt_logprobs_done = True
        parts = self._parts.pop(request.req_id)
        if not parts:  # a prompt of one token has none
            return None
        width = request.params.prompt_logprobs + 1
        return concatenate_prompt_logprobs(
            [Logprobs(p.token_ids[:, :width], p.logprobs[:, :width], p.ranks) for p in parts]
        )
