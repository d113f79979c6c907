# SPDX-License-Identifier: Apache-2.0
"""Custom logits processors: torch code on the host, which sees the logits of every step of an engine that has any.

Correct, and slow: the logits come to the host and go back, and the device waits meanwhile. No other engine pays for it. To vLLM's interface
the batch is the slots: a request keeps its index as long as it has its slot, so nothing ever moves.
"""

from collections.abc import Sequence

import numpy as np
import torch
from vllm.config import VllmConfig
from vllm.v1.sample.logits_processor import AdapterLogitsProcessor, BatchUpdate, LogitsProcessor

from tpu_inference.compat.sampling import custom_logits_processors
from tpu_inference.runner.requests import Request, RequestStates


class HostProcessors:
    """The processors of one engine, and which requests they know."""

    def __init__(self, vllm_config: VllmConfig) -> None:
        classes = custom_logits_processors(vllm_config.model_config.logits_processors)
        made = [cls(vllm_config, torch.device("cpu"), False) for cls in classes]
        self.before_penalties = [p for p in made if not p.is_argmax_invariant()]
        """May change what is likeliest: greedy rows see them."""
        self.after_temperature = [p for p in made if p.is_argmax_invariant()]
        self._known: dict[int, tuple[Request, list[int]]] = {}
        """Slot -> who was there at the last step, and the outputs it was announced with."""

    def __bool__(self) -> bool:
        return bool(self.before_penalties or self.after_temperature)

    def follow(self, states: RequestStates) -> None:
        """Tell the processors who came and went, and that there are new output tokens."""
        now = {slot: states.requests[req_id] for req_id, slot in states.slots.items()}
        # A request that was given a slot again has another list of outputs: it is announced anew.
        same = {slot for slot, (r, outputs) in self._known.items() if now.get(slot) is r and r.outputs is outputs}
        removed = sorted((slot for slot in self._known if slot not in now), reverse=True)
        added = [
            (slot, request.params, request.prompt.tolist(), request.outputs)
            for slot, request in sorted(now.items())
            if slot not in same
        ]
        update = BatchUpdate(self._batch_size(now), removed, added, ()) if removed or added else None
        for processor in (*self.before_penalties, *self.after_temperature):
            processor.update_state(update)
        self._known = {slot: (request, request.outputs) for slot, request in now.items()}

    @staticmethod
    def _batch_size(slots: dict[int, Request]) -> int:
        return max(slots, default=-1) + 1

    def apply(self, processors: Sequence[LogitsProcessor], slots: np.ndarray, logits: np.ndarray) -> np.ndarray:
        """`logits` float32 [R, V], whose leading rows are those of `slots`, as the processors leave them."""
        active = [p for p in processors if not (isinstance(p, AdapterLogitsProcessor) and not p.req_info)]
        if not active:
            return logits
        rows = self._batch_size({slot: r for slot, (r, _) in self._known.items()})
        # Said, as torch's default type is another while a thread traces the model for programs compiled in the background.
        batch = torch.zeros(rows, logits.shape[1], dtype=torch.float32)
        index = torch.from_numpy(slots.astype(np.int64))
        batch[index] = torch.from_numpy(logits[: len(slots)].copy())
        for processor in active:
            batch = processor.apply(batch)
        out = logits.copy()
        out[: len(slots)] = batch[index].numpy()
        return out
