# SPDX-License-Identifier: Apache-2.0
"""This step's ragged batch: a pure function of the persistent state and the schedule."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from tpu_inference.layers.common.sampling_processors import MASKS_STOPS
from tpu_inference.runner.buckets import Bucket
from tpu_inference.runner.requests import NEUTRAL, RequestStates
from tpu_inference.runner.step_inputs import SamplingInputs, Sizes, StepInputs


@dataclass(frozen=True)
class InputBatch:
    """Rows of a step: requests with one token first, so that kernels can treat decodes apart."""

    req_ids: list[str]
    slots: np.ndarray
    """int32 [rows]"""
    num_tokens: np.ndarray
    """int32 [rows]: tokens scheduled"""
    num_computed: np.ndarray
    """int32 [rows]: tokens whose KV is in the cache already"""
    samples: np.ndarray
    """bool [rows]: the step reaches the request's last token, so its successor is sampled"""

    @property
    def num_rows(self) -> int:
        return len(self.req_ids)

    @property
    def total_tokens(self) -> int:
        return int(self.num_tokens.sum())

    @classmethod
    def build(cls, states: RequestStates, num_scheduled: Mapping[str, int]) -> "InputBatch":
        """The batch of the scheduled requests."""
        req_ids = sorted(num_scheduled, key=lambda req_id: num_scheduled[req_id] > 1)
        n = len(req_ids)
        slots = np.fromiter((states.slots[r] for r in req_ids), np.int32, n)
        num_tokens = np.fromiter((num_scheduled[r] for r in req_ids), np.int32, n)
        num_computed = states.num_computed[slots]
        samples = num_computed + num_tokens >= states.num_known[slots]
        return cls(req_ids, slots, num_tokens, num_computed, samples)

    def pack(self, states: RequestStates, bucket: Bucket, sizes: Sizes) -> np.ndarray:
        """The packed `StepInputs` of this batch, padded to `bucket`."""
        buffer, out = StepInputs.allocate(sizes)
        n, t = self.num_rows, self.total_tokens
        ends = np.cumsum(self.num_tokens, dtype=np.int32)
        slots = np.repeat(self.slots, self.num_tokens)
        positions = np.arange(t, dtype=np.int32) + np.repeat(
            self.num_computed - ends + self.num_tokens, self.num_tokens
        )
        known = positions < states.num_known[slots]
        out.token_ids[:t] = states.token_ids[slots, np.where(known, positions, 0)]
        out.token_slots[:] = -1
        out.token_slots[:t] = np.where(known, -1, slots)
        out.positions[:t] = positions
        out.query_start_loc[1 : n + 1] = ends
        out.query_start_loc[n + 1 :] = t
        out.seq_lens[:n] = self.num_computed + self.num_tokens
        out.logits_indices[:n] = ends - 1
        out.sample_slots[:] = states.max_num_seqs
        out.sample_slots[:n] = np.where(self.samples, self.slots, states.max_num_seqs)
        states.block_tables.gather(self.slots, out.block_tables)
        return buffer

    def masks_stops(self, states: RequestStates) -> np.ndarray:
        """bool [rows]: the request is too short to end (`min_tokens`)."""
        outputs = self.num_computed + self.num_tokens - states.num_prompt[self.slots]
        return outputs < states.min_tokens[self.slots]

    def needs_sampling_inputs(self, states: RequestStates) -> bool:
        """Whether any row is more than a plain argmax."""
        return bool(states.more_than_argmax[self.slots].any() or self.masks_stops(states).any())

    def pack_sampling(
        self, states: RequestStates, rows: int, forced_ids: Mapping[int, int] | None = None
    ) -> np.ndarray:
        """The packed `SamplingInputs` of this batch, padded to `rows`; `forced_ids` maps rows to the only token they may sample."""
        buffer, out = SamplingInputs.allocate(sampling_sizes(rows))
        n, slots = self.num_rows, self.slots
        for name, neutral in NEUTRAL.items():
            column = getattr(out, name)
            column[:n] = getattr(states, name)[slots]
            column[n:] = states.vocab_size if name == "top_k" else neutral
        out.slots[:] = states.max_num_seqs  # none, of rows that pad the batch
        out.slots[:n] = slots
        out.step[:n] = self.num_computed + self.num_tokens
        out.flags[:n] |= np.where(self.masks_stops(states), MASKS_STOPS, 0)
        out.forced_ids[:] = -1
        for row, token in (forced_ids or {}).items():
            out.forced_ids[row] = token
        return buffer


def sampling_sizes(rows: int) -> Sizes:
    """Dimension sizes of `SamplingInputs`."""
    return {"rows": rows}
