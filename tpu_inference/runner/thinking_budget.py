# SPDX-License-Identifier: Apache-2.0
"""`thinking_token_budget`: the tokens that end a request's thinking are forced when its budget is spent, as vLLM's own state decides."""

from dataclasses import dataclass
from typing import Any

import torch
from vllm.config import VllmConfig

from tpu_inference.compat.sampling import thinking_budget_state
from tpu_inference.runner.requests import Request


@dataclass
class _Followed:
    outputs: list[int]
    """The list that `state` has seen; a request that returns to a slot has another."""
    length: int
    state: Any


class ThinkingBudgets:
    """One of vLLM's states for each request with a budget; it looks at all output tokens, at every step."""

    def __init__(self, vllm_config: VllmConfig) -> None:
        self._config = vllm_config.reasoning_config
        self._ends = [] if self._config is None else list(self._config.reasoning_end_token_ids or [])
        # The state writes a huge logit to the token it forces: only the end tokens' columns are looked at.
        self._logits = torch.zeros(1, max(self._ends, default=0) + 1)
        self._followed: dict[str, _Followed] = {}

    def keep(self, requests: dict[str, Request]) -> None:
        """Forget the requests that are gone."""
        if self._followed:
            self._followed = {req_id: f for req_id, f in self._followed.items() if req_id in requests}

    def forced_token(self, request: Request) -> int | None:
        """The token that `request`, with all of its outputs known, must sample next; None where it may sample any."""
        if request.params.thinking_token_budget is None or not self._ends:
            return None
        followed = self._followed.get(request.req_id)
        if followed is None or len(request.outputs) < followed.length:
            state = thinking_budget_state(self._config, request.params, request.prompt.tolist())
            followed = self._followed[request.req_id] = _Followed(request.outputs, 0, state)
        followed.outputs, followed.length = request.outputs, len(request.outputs)
        followed.state.update_state([request.outputs], None)
        logits = followed.state.apply_to_logits(self._logits.zero_(), False, None)
        return next((token for token in self._ends if logits[0, token] > 0), None)
