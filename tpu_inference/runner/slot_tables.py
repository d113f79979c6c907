# SPDX-License-Identifier: Apache-2.0
"""What requests say of each token of the vocabulary: rows that the host makes when a request is given a slot, and the device keeps.

From then on the sampler counts its own tokens, so that neither history nor biases cross to the device again. A request that returns after
preemption gets a slot like a new one: its row is made from the tokens that the scheduler sends along.
"""

import jax
import numpy as np

from tpu_inference.layers.common.sampling_processors import IN_PROMPT, IS_STOP, TokenTables
from tpu_inference.runner.programs import StepPrograms
from tpu_inference.runner.requests import Request, RequestStates


def _ids(token_ids, vocab_size: int) -> np.ndarray:
    """Those that are in the vocabulary: an id that is no token says nothing, and a negative one would count from its end."""
    ids = np.fromiter(token_ids, np.int64)
    return ids[(ids >= 0) & (ids < vocab_size)]


def table_row(request: Request, tokens: np.ndarray, vocab_size: int) -> np.ndarray:
    """The row of `TokenTables` of a request with `tokens` so far: int32 [2, V], as `write_row` takes it."""
    row, params = np.zeros((2, vocab_size), np.int32), request.params
    seen, bias = row[0], row[1].view(np.float32)
    if request.has_penalties:
        seen += np.bincount(tokens[len(request.prompt) :], minlength=vocab_size).astype(np.int32)
        seen[request.prompt] |= IN_PROMPT
    if params.min_tokens:
        seen[_ids(params.all_stop_token_ids, vocab_size)] |= IS_STOP
    if params.allowed_token_ids:
        bias[:] = -np.inf
        bias[_ids(params.allowed_token_ids, vocab_size)] = 0
    for token, value in (params.logit_bias or {}).items():
        bias[token] += value
    bias[_ids((word[0] for word in request.bad_words if len(word) == 1), vocab_size)] = -np.inf
    return row


class SlotTables:
    """The device's `TokenTables`, kept in step with who has which slot."""

    def __init__(self, programs: StepPrograms) -> None:
        self._programs = programs
        self.tables: TokenTables = programs.make_tables()

    def follow(self, states: RequestStates) -> None:
        """Write the rows of the requests that were given a slot since the last call."""
        admitted, states.admitted = states.admitted, []
        for request in admitted:
            slot = states.slots.get(request.req_id)
            if slot is None or states.requests.get(request.req_id) is not request or not request.uses_tables:
                continue
            tokens = states.token_ids[slot, : states.num_known[slot]]
            row = table_row(request, tokens, states.vocab_size)
            self.tables = self._programs.write_row(self.tables, np.int32(slot), row)

    @property
    def arrays(self) -> list[jax.Array]:
        """For whoever counts bytes or waits."""
        return jax.tree.leaves(self.tables)
