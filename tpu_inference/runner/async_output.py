# SPDX-License-Identifier: Apache-2.0
"""A step's result while it is still on its way to the host."""

from dataclasses import dataclass, field

import jax
import numpy as np
from vllm.v1.outputs import AsyncModelRunnerOutput, LogprobsLists, LogprobsTensors, ModelRunnerOutput

from tpu_inference.compat.sampling import raise_if_nans
from tpu_inference.layers.common.sampling_logprobs import Logprobs
from tpu_inference.runner.input_batch import InputBatch


@dataclass(frozen=True)
class StepLogprobs:
    """Logprobs of a step's rows on the device: of the likeliest tokens, and of the tokens that some rows named."""

    likeliest: Logprobs | None
    num_likeliest: int
    """Of the row that wants the most; -1 where no row wants any."""
    of_ids: Logprobs | None = None
    num_ids: dict[int, int] = field(default_factory=dict)
    """Row -> how many tokens it named."""

    @property
    def arrays(self) -> list[jax.Array]:
        return jax.tree.leaves((self.likeliest, self.of_ids))

    def to_lists(self, num_rows: int) -> LogprobsLists:
        """vLLM's arrays, a row a request, sampled or not; it reads as many columns of a row as its request asked for."""
        n, width = num_rows, 1 + max(self.num_likeliest, *self.num_ids.values(), 0)
        ids, logprobs = np.zeros((n, width), np.int32), np.full((n, width), -np.inf, np.float32)
        ranks = np.zeros(n, np.int32)
        if self.likeliest is not None:
            columns, found = self.num_likeliest + 1, self.likeliest
            ids[:, :columns] = np.asarray(found.token_ids)[:n, :columns]
            logprobs[:, :columns] = np.asarray(found.logprobs)[:n, :columns]
            ranks[:] = np.asarray(found.ranks)[:n]
        if self.of_ids is not None:
            found = [np.asarray(array) for array in (self.of_ids.token_ids, self.of_ids.logprobs, self.of_ids.ranks)]
            for row, count in self.num_ids.items():
                ids[row, : count + 1] = found[0][row, : count + 1]
                logprobs[row, : count + 1] = found[1][row, : count + 1]
                ranks[row] = found[2][row]
        return LogprobsLists(ids, logprobs, ranks)


class AsyncOutput(AsyncModelRunnerOutput):
    """Starts the device-to-host copies when made; `get_output` waits for them."""

    def __init__(
        self,
        batch: InputBatch,
        tokens: jax.Array,
        logprobs: StepLogprobs | None,
        prompt_logprobs: dict[str, LogprobsTensors | None],
        nans: jax.Array | None = None,
    ) -> None:
        """`nans`: int32 [rows], NaNs among each row's logits, where they are counted."""
        self._batch, self._tokens, self._logprobs = batch, tokens, logprobs
        self._prompt_logprobs, self._nans = prompt_logprobs, nans
        for array in (tokens, *(logprobs.arrays if logprobs is not None else ()), *(() if nans is None else (nans,))):
            array.copy_to_host_async()

    def get_output(self) -> ModelRunnerOutput:
        """Rows that did not reach their last token sampled nothing: their token list is empty.

        Raises RuntimeError for logits with NaNs where vLLM's VLLM_RAISE_ON_LOGIT_NANS asks for it.
        """
        batch, nans = self._batch, None
        if self._nans is not None:
            nans = dict(zip(batch.req_ids, np.asarray(self._nans)[: batch.num_rows].tolist(), strict=True))
            raise_if_nans(nans)
        tokens = np.asarray(self._tokens)[: batch.num_rows].tolist()
        return ModelRunnerOutput(
            req_ids=batch.req_ids,
            req_id_to_index={req_id: i for i, req_id in enumerate(batch.req_ids)},
            sampled_token_ids=[[t] if s else [] for t, s in zip(tokens, batch.samples.tolist(), strict=True)],
            logprobs=None if self._logprobs is None else self._logprobs.to_lists(batch.num_rows),
            prompt_logprobs_dict=self._prompt_logprobs,
            num_nans_in_logits=nans,
        )
