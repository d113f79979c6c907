# SPDX-License-Identifier: Apache-2.0
"""What a request may not ask for yet. Anything not named here as served is refused, so a field that vLLM adds is never ignored silently."""

from typing import Any

import numpy as np
from vllm.exceptions import VLLMValidationError
from vllm.pooling_params import PoolingParams
from vllm.sampling_params import SamplingParams

SERVED = frozenset(
    "temperature top_k top_p min_p seed logprobs prompt_logprobs stop_token_ids min_tokens ignore_eos max_tokens".split()
)
"""Fields that the runner honours."""

FRONT_END = frozenset(
    "n stop detokenize skip_special_tokens spaces_between_special_tokens include_stop_str_in_output output_kind stream_interval flat_logprobs "
    "skip_clone output_text_buffer_length skip_reading_prefix_cache repetition_detection".split()
)
"""Fields that vLLM honours above the runner, whatever the platform."""

RESERVED_STOP_IDS = 8
"""Room kept for the model's own end tokens, which vLLM adds after the request is checked."""

_DEFAULTS = SamplingParams()
UNSERVED = tuple(
    name for name in SamplingParams.__struct_fields__ if not name.startswith("_") and name not in SERVED | FRONT_END
)

_HINT = (
    " (If the request did not set it, the model's generation_config.json did: --generation-config vllm ignores that.)"
)
_HINTED = frozenset({"presence_penalty", "frequency_penalty", "repetition_penalty"})


class RequestError(VLLMValidationError, ValueError):
    """A request that is not served. vLLM's server answers 400 to the one base; callers of `LLM` may catch the other."""


def _is_set(value: Any, default: Any) -> bool:
    if isinstance(value, np.ndarray):
        return True
    return bool(value) and value != default


def _refuse_fields(params: SamplingParams) -> None:
    for name in UNSERVED:
        value = getattr(params, name)
        # A budget of 0 is false and still asks for something.
        if _is_set(value, getattr(_DEFAULTS, name)) or (name == "thinking_token_budget" and value is not None):
            hint = _HINT if name in _HINTED else ""
            raise RequestError(
                f"{name} is not supported by tpu_inference yet: leave it out of the request.{hint}", parameter=name
            )


def _refuse_values(params: SamplingParams) -> None:
    for name in ("logprobs", "prompt_logprobs"):
        if getattr(params, name) == -1:
            raise RequestError(f"{name}=-1 (the whole vocabulary) is not supported: ask for a number.", parameter=name)
    if params.min_tokens and params.stop_token_ids:
        from tpu_inference.runner.step_inputs import MAX_MASKED_STOP_IDS

        most = MAX_MASKED_STOP_IDS - RESERVED_STOP_IDS
        if len(params.stop_token_ids) > most:
            raise RequestError(
                f"min_tokens with {len(params.stop_token_ids)} stop_token_ids is not supported: give at most {most}.",
                parameter="stop_token_ids",
            )


def _refuse_inputs(inputs: Any, vocab_size: int | None) -> None:
    if (kind := inputs["type"]) != "token":
        raise RequestError(f"a prompt of type {kind!r} is not supported: give text or token ids.", parameter="prompt")
    # vLLM admits ids up to the larger of the tokenizer's and the model's vocabulary, and any when it has no tokenizer.
    ids = inputs["prompt_token_ids"]
    if vocab_size and ids and not (min(ids) >= 0 and max(ids) < vocab_size):
        raise RequestError(
            f"the prompt has token ids outside the model's vocabulary of {vocab_size}.", parameter="prompt_token_ids"
        )


def validate(inputs: Any, params: SamplingParams | PoolingParams, vocab_size: int | None = None) -> None:
    """Raise a RequestError that names the first thing in the request that is not served."""
    if isinstance(params, PoolingParams):
        raise RequestError("pooling requests are not supported: tpu_inference serves text generation.")
    _refuse_fields(params)
    _refuse_values(params)
    _refuse_inputs(inputs, vocab_size)
