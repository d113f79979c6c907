# SPDX-License-Identifier: Apache-2.0
"""Output tokens on the host, for the few things there that depend on them: bad words of several tokens, thinking budgets, custom processors.

A step is sampled after its forward program has been dispatched, so that waiting here for the tokens of the step before keeps the host, not the
device: they are there when the forward program begins. vLLM waits for them next in any case.
"""

from dataclasses import dataclass

import jax
import numpy as np

from tpu_inference.runner.input_batch import InputBatch
from tpu_inference.runner.requests import RequestStates

MAX_WAITING = 3
"""Steps whose tokens nobody has asked for; older ones are fetched, which no longer waits."""


@dataclass(frozen=True)
class _Sampled:
    tokens: jax.Array
    rows: list[tuple[int, list[int]]]
    """(row, where its token goes): the list that the request had then, not one that it was given since."""

    def append(self) -> None:
        tokens = np.asarray(self.tokens)
        for row, outputs in self.rows:
            outputs.append(int(tokens[row]))


class OutputHistory:
    """Keeps `Request.outputs` of the requests that follow theirs."""

    def __init__(self) -> None:
        self._waiting: list[_Sampled] = []

    def catch_up(self) -> None:
        """Wait until every step that was sampled is in the lists."""
        for sampled in self._waiting:
            sampled.append()
        self._waiting.clear()

    def record(self, states: RequestStates, batch: InputBatch, tokens: jax.Array) -> None:
        """A step's `tokens` [R] are on their way."""
        following = np.flatnonzero(batch.samples & states.follows_outputs[batch.slots]).tolist()
        rows = [(row, states.requests[batch.req_ids[row]].outputs) for row in following]
        if rows:
            tokens.copy_to_host_async()
            self._waiting.append(_Sampled(tokens, rows))
        if len(self._waiting) > MAX_WAITING:
            self._waiting.pop(0).append()
