# SPDX-License-Identifier: Apache-2.0
"""A step's result while it is still on its way to the host."""

from collections.abc import Sequence

import jax
import numpy as np
from vllm.v1.outputs import AsyncModelRunnerOutput, LogprobsLists, LogprobsTensors, ModelRunnerOutput

from tpu_inference.layers.common.sampling import Logprobs
from tpu_inference.runner.input_batch import InputBatch


class AsyncOutput(AsyncModelRunnerOutput):
    """Starts the device-to-host copies when made; `get_output` waits for them."""

    def __init__(
        self,
        batch: InputBatch,
        tokens: jax.Array,
        logprobs: Logprobs | None,
        num_logprobs: int,
        prompt_logprobs: dict[str, LogprobsTensors | None],
    ) -> None:
        self._batch = batch
        self._tokens = tokens
        self._logprobs = logprobs
        self._num_logprobs = num_logprobs
        self._prompt_logprobs = prompt_logprobs
        for array in jax.tree.leaves((tokens, logprobs)):
            array.copy_to_host_async()

    def get_output(self) -> ModelRunnerOutput:
        """Rows that did not reach their last token sampled nothing: their token list is empty."""
        batch = self._batch
        tokens = np.asarray(self._tokens)[: batch.num_rows].tolist()
        return ModelRunnerOutput(
            req_ids=batch.req_ids,
            req_id_to_index={req_id: i for i, req_id in enumerate(batch.req_ids)},
            sampled_token_ids=[[t] if s else [] for t, s in zip(tokens, batch.samples.tolist(), strict=True)],
            logprobs=self._logprobs_lists(batch.samples),
            prompt_logprobs_dict=self._prompt_logprobs,
        )

    def _logprobs_lists(self, samples: np.ndarray) -> LogprobsLists | None:
        if self._logprobs is None:
            return None
        n, width = len(samples), self._num_logprobs + 1
        lp = self._logprobs
        # vLLM finds a request's logprobs at its row, sampled or not.
        return LogprobsLists(
            np.asarray(lp.token_ids)[:n, :width], np.asarray(lp.logprobs)[:n, :width], np.asarray(lp.ranks)[:n]
        )


def concatenate_prompt_logprobs(parts: Sequence[Logprobs]) -> LogprobsTensors:
    """The chunks of one prompt as vLLM's tensors, [prompt_len - 1, K + 1]."""
    import torch

    def join(field: str) -> "torch.Tensor":
        return torch.from_numpy(np.concatenate([np.asarray(getattr(part, field)) for part in parts]))

    return LogprobsTensors(join("token_ids"), join("logprobs"), join("ranks"))
