# SPDX-License-Identifier: Apache-2.0
"""Parts of vLLM's sampler, and what its environment asks of logits."""

from collections.abc import Sequence
from functools import cache
from typing import Any


def counts_nans() -> bool:
    """Whether vLLM's environment asks for NaNs among logits to be counted (VLLM_COMPUTE_NANS_IN_LOGITS, VLLM_RAISE_ON_LOGIT_NANS)."""
    import vllm.envs

    return vllm.envs.VLLM_COMPUTE_NANS_IN_LOGITS


def raise_if_nans(counts: dict[str, int]) -> None:
    """RuntimeError for requests with NaNs, where vLLM's environment asks for it."""
    import vllm.envs

    if vllm.envs.VLLM_RAISE_ON_LOGIT_NANS:
        from vllm.v1.worker.utils import raise_if_nan_logits

        raise_if_nan_logits(counts)


def thinking_budget_state(reasoning_config: Any, params: Any, prompt: list[int]) -> Any:
    """vLLM's `ThinkingBudgetStateHolder` of one request, at index 0."""
    import torch
    from vllm.v1.sample.logits_processor import BatchUpdate
    from vllm.v1.sample.thinking_budget_state import ThinkingBudgetStateHolder

    holder = ThinkingBudgetStateHolder(reasoning_config, 1, 0, torch.device("cpu"), False)
    holder.sync_batch(BatchUpdate(batch_size=1, removed=(), added=((0, params, prompt, []),), moved=()))
    return holder


def custom_logits_processors(given: Sequence[Any] | None) -> list[type]:
    """Classes of the logits processors that installed packages declare and that `--logits-processors` names, in vLLM's order.

    vLLM loads them on every platform but TPU, whose first runner did not serve them.
    """
    from vllm.v1.sample import logits_processor

    return logits_processor._load_logitsprocs_plugins() + logits_processor._load_logitsprocs_by_fqcns(given)


@cache
def loaded_logits_processors(given: tuple[Any, ...]) -> tuple[type, ...]:
    """`custom_logits_processors`, loaded once: every request is checked against them."""
    return tuple(custom_logits_processors(given))
