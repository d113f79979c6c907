# SPDX-License-Identifier: Apache-2.0
"""From a step's logits to tokens on their way to the host. Which programs run is decided here, by what the batch's requests ask for."""

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import numpy as np
from vllm.config import VllmConfig
from vllm.v1.core.sched.output import GrammarOutput
from vllm.v1.outputs import LogprobsTensors

from tpu_inference.runner.async_output import AsyncOutput, StepLogprobs
from tpu_inference.runner.buckets import Bucket
from tpu_inference.runner.input_batch import InputBatch, sampling_sizes
from tpu_inference.runner.logits_processors import HostProcessors
from tpu_inference.runner.output_history import OutputHistory
from tpu_inference.runner.programs import MAX_LOGPROB_TOKEN_IDS, StepPrograms
from tpu_inference.runner.requests import Request, RequestStates
from tpu_inference.runner.slot_tables import SlotTables
from tpu_inference.runner.step_inputs import SamplingInputs
from tpu_inference.runner.structured_output import bad_word_rows, completed_words, grammar_rows
from tpu_inference.runner.thinking_budget import ThinkingBudgets


@dataclass(frozen=True)
class PendingStep:
    """What `execute_model` leaves for `sample_tokens`."""

    batch: InputBatch
    bucket: Bucket
    logits: jax.Array
    sample_slots: jax.Array
    prompt_logprobs: dict[str, LogprobsTensors | None]


PARTS = ("masks", "scale", "draw")
"""Of the sampler, in order: biases and masks; penalties, temperature and min_p; top-k, top-p and the draw."""


def neutralise(inputs: SamplingInputs, vocab_size: int, parts: Sequence[str]) -> None:
    """Leave in the views `inputs` only what these `parts` of the sampler need."""
    if "masks" not in parts:
        inputs.flags[:] = 0
    if "scale" not in parts:
        inputs.presence_penalty[:] = inputs.frequency_penalty[:] = inputs.min_p[:] = 0
        inputs.repetition_penalty[:] = 1
        inputs.forced_ids[:] = -1
        # What is drawn was scaled before; what is only masked is not drawn.
        inputs.temperature[:] = (inputs.temperature > 0) & ("draw" in parts)
    if "draw" not in parts:
        inputs.top_k[:], inputs.top_p[:] = vocab_size, 1


class Sampler:
    """Owns what outlives a step: the last tokens and the token tables on the device, output tokens and processors on the host."""

    def __init__(
        self, programs: StepPrograms, states: RequestStates, vllm_config: VllmConfig, processors: HostProcessors
    ) -> None:
        self._programs, self._states, self._processors = programs, states, processors
        self._reports_processed = vllm_config.model_config.logprobs_mode.startswith("processed")
        self.last_tokens = programs.make_last_tokens()
        self.tables = SlotTables(programs)
        self._history, self._budgets = OutputHistory(), ThinkingBudgets(vllm_config)

    def follow(self) -> None:
        """Take note of the requests that the scheduler's last word brought and took; before the step's forward program."""
        self.tables.follow(self._states)
        self._budgets.keep(self._states.requests)

    def __call__(self, step: PendingStep, grammar: GrammarOutput | None) -> AsyncOutput:
        """Sample a step; the result is on its way to the host when this returns."""
        states, batch, rows, programs = self._states, step.batch, step.bucket.rows, self._programs
        logits = step.logits
        if grammar is not None:
            logits = programs.mask(rows, logits, grammar_rows(grammar, batch, rows, programs.mask_words))
        allowed, forced = logits, {}
        if following := self._following(batch):
            self._history.catch_up()
            logits = self._without_bad_words(following, rows, logits)
            forced = self._forced_tokens(following)
        if self._processors:
            self._history.catch_up()
            tokens, processed = self._sample_with_host(step, logits, forced)
        elif forced or batch.needs_sampling_inputs(states):
            words = batch.pack_sampling(states, rows, forced)
            tokens, processed = self._sample(rows, logits, step.sample_slots, words)
        else:
            tokens, self.last_tokens = programs.sample_greedy(rows, logits, step.sample_slots, self.last_tokens)
            processed = logits
        self._history.record(states, batch, tokens)
        logprobs = self._logprobs(batch, rows, processed if self._reports_processed else allowed, tokens)
        return AsyncOutput(batch, tokens, logprobs, step.prompt_logprobs, programs.nans(rows, step.logits))

    def _sample(self, rows: int, logits: jax.Array, sample_slots, words: np.ndarray):
        tokens, self.last_tokens, self.tables.tables, processed = self._programs.sample(
            rows, logits, sample_slots, self.last_tokens, self.tables.tables, words
        )
        return tokens, processed

    # What depends on output tokens.

    def _following(self, batch: InputBatch) -> list[tuple[int, Request]]:
        """(row, request) of the rows that sample and depend on their outputs."""
        states = self._states
        rows = np.flatnonzero(batch.samples & states.follows_outputs[batch.slots]).tolist()
        return [(row, states.requests[batch.req_ids[row]]) for row in rows]

    def _without_bad_words(self, following: Sequence[tuple[int, Request]], rows: int, logits: jax.Array) -> jax.Array:
        banned = {
            row: completed_words(request.outputs, request.bad_words)
            for row, request in following
            if request.has_long_bad_words
        }
        bitmask = bad_word_rows(banned, rows, self._programs.mask_words, self._states.vocab_size)
        return logits if bitmask is None else self._programs.mask(rows, logits, bitmask)

    def _forced_tokens(self, following: Sequence[tuple[int, Request]]) -> dict[int, int]:
        found = ((row, self._budgets.forced_token(request)) for row, request in following)
        return {row: token for row, token in found if token is not None}

    # Custom logits processors.

    def _sample_with_host(self, step: PendingStep, logits: jax.Array, forced: dict[int, int]):
        """The sampler in up to three parts, each with the others' parameters neutral, and the processors on the host between them."""
        host, batch, rows = self._processors, step.batch, step.bucket.rows
        host.follow(self._states)
        todo = list(PARTS)

        def run(*parts: str, slots):
            words = batch.pack_sampling(self._states, rows, forced)
            neutralise(SamplingInputs.views(words, sampling_sizes(rows)), self._states.vocab_size, parts)
            return self._sample(rows, logits, slots, words)

        nowhere = np.full(rows, self._states.max_num_seqs, np.int32)
        for processors, last in ((host.before_penalties, "masks"), (host.after_temperature, "scale")):
            if processors:
                cut = todo.index(last) + 1
                parts, todo = todo[:cut], todo[cut:]
                _, processed = run(*parts, slots=nowhere)
                logits = host.apply(processors, batch.slots, np.asarray(processed))
        return run(*todo, slots=step.sample_slots)

    # Logprobs.

    def _logprobs(self, batch: InputBatch, rows: int, logits: jax.Array, tokens: jax.Array) -> StepLogprobs | None:
        states, programs = self._states, self._programs
        wanted = int(np.max(states.num_logprobs[batch.slots]))
        likeliest = programs.logprobs(rows, wanted, logits, tokens) if wanted >= 0 else None
        naming = np.flatnonzero(states.names_tokens[batch.slots]).tolist()
        asked = {row: states.requests[batch.req_ids[row]].params.logprob_token_ids for row in naming}
        if not asked:
            return None if likeliest is None else StepLogprobs(likeliest, wanted)
        others = np.full((rows, MAX_LOGPROB_TOKEN_IDS), states.vocab_size, np.int32)
        for row, ids in asked.items():
            others[row, : len(ids)] = ids
        of_ids = programs.logprobs_of(rows, logits, tokens, others)
        return StepLogprobs(likeliest, wanted, of_ids, {row: len(ids) for row, ids in asked.items()})
