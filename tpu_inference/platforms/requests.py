# SPDX-License-Identifier: Apache-2.0
"""What a request may not ask for yet. Anything not named here as served is refused, so a field that vLLM adds is never ignored silently."""

from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np
from vllm.exceptions import VLLMValidationError
from vllm.pooling_params import PoolingParams
from vllm.sampling_params import SamplingParams
from vllm.v1.sample.logits_processor import LogitsProcessor

# scripts/gen_support_table.py reads these three literals, so that docs/sampling.md says what is checked here.
SERVED = {
    "temperature": "below 1e-5 is greedy, as in vLLM",
    "top_k": "tokens tied with the last one kept are kept",
    "top_p": "tokens tied with the last one kept are kept",
    "min_p": "",
    "seed": "the same tokens whatever else is in the batch, after preemption, and after a restart",
    "presence_penalty": "",
    "frequency_penalty": "",
    "repetition_penalty": "",
    "logit_bias": "any number of tokens",
    "allowed_token_ids": "any number of tokens",
    "bad_words": "words of one token by the device alone; longer ones are looked for on the host",
    "min_tokens": "masks every stop token, any number of them",
    "stop_token_ids": "",
    "ignore_eos": "",
    "max_tokens": "",
    "logprobs": "0, a number up to `--max-logprobs`, or -1; of what `--logprobs-mode` says",
    "prompt_logprobs": "likewise; chunked prefill and prefix caching included, not with `skip_reading_prefix_cache=false`",
    "logprob_token_ids": "each request gets its own, or its likeliest, whoever else is in the batch",
    "structured_outputs": "JSON schema, regex, choice, grammar, structural tags: all of vLLM's backends",
    "thinking_token_budget": "needs `--reasoning-parser` or `--reasoning-config`, as in vLLM",
}
"""Fields that the runner honours, each with a remark for the documentation."""

FRONT_END = (
    "n stop detokenize skip_special_tokens spaces_between_special_tokens include_stop_str_in_output output_kind stream_interval flat_logprobs "
    "skip_clone output_text_buffer_length skip_reading_prefix_cache repetition_detection"
)
"""Fields that vLLM honours above the runner, whatever the platform."""

REASONS = {
    "extra_args": "nothing reads it without custom logits processors (--logits-processors, or a package that declares one)",
    "watermarking": "there is no watermark to apply: --watermark-config is refused",
    "routed_experts_prompt_start": "routed experts are not returned",
    "prompt_logprob_token_ids": "only vLLM's V2 model runner scores given tokens of a prompt: ask for prompt_logprobs",
    "prompt_logprob_start": "it belongs to prompt_logprob_token_ids, which is not served: ask for prompt_logprobs",
    "trace_decode_token_ids": "tokens are not replayed: send them as the prompt and ask for prompt_logprobs",
}
"""Fields that are not served: why, and what to do."""

WITH_PROCESSORS = frozenset({"extra_args"})
"""Fields that only custom logits processors read: served where there are any."""

_DEFAULTS = SamplingParams()
UNSERVED = tuple(
    name
    for name in SamplingParams.__struct_fields__
    if not name.startswith("_") and name not in SERVED and name not in FRONT_END.split()
)


class RequestError(VLLMValidationError, ValueError):
    """A request that is not served. vLLM's server answers 400 to the one base; callers of `LLM` may catch the other."""


def _is_set(value: Any, default: Any) -> bool:
    if isinstance(value, np.ndarray):
        return True
    return bool(value) and value != default


def _refuse_fields(params: SamplingParams, with_processors: bool) -> None:
    for name in UNSERVED:
        if with_processors and name in WITH_PROCESSORS:
            continue
        if _is_set(getattr(params, name), getattr(_DEFAULTS, name)):
            reason = REASONS.get(name, "this vLLM is newer than what is served")
            raise RequestError(
                f"{name} is not supported by tpu_inference ({reason}): leave it out of the request.", parameter=name
            )


def _refuse_values(params: SamplingParams) -> None:
    # Logits of what the cache holds already are not computed; left alone, vLLM sets the field for such requests.
    if params.prompt_logprobs is not None and params.skip_reading_prefix_cache is False:
        raise RequestError(
            "prompt_logprobs with skip_reading_prefix_cache=false is not supported: leave the latter out of the request.",
            parameter="skip_reading_prefix_cache",
        )


_ENCODER = msgspec.msgpack.Encoder(enc_hook=lambda _: None)


def _refuse_unsendable(params: SamplingParams) -> None:
    """Lone surrogates and integers beyond 64 bits are JSON, and no MessagePack, by which vLLM's front end sends them to the engine."""
    try:
        _ENCODER.encode(params)
    except UnicodeEncodeError as error:
        raise RequestError(f"a text in the request is not valid Unicode ({error.reason}).") from error
    except (OverflowError, RecursionError) as error:
        raise RequestError(f"a value in the request is out of range ({error}).") from error


def _refuse_inputs(inputs: Any, vocab_size: int | None) -> None:
    if (kind := inputs["type"]) != "token":
        raise RequestError(f"a prompt of type {kind!r} is not supported: give text or token ids.", parameter="prompt")
    # vLLM admits ids up to the larger of the tokenizer's and the model's vocabulary, and any when it has no tokenizer.
    ids = inputs["prompt_token_ids"]
    if vocab_size and ids and not (min(ids) >= 0 and max(ids) < vocab_size):
        outside = min(ids) if min(ids) < 0 else max(ids)
        raise RequestError(
            f"token id {outside} of the prompt is out of vocabulary: this model's are 0 to {vocab_size - 1}.",
            parameter="prompt_token_ids",
        )


def validate(
    inputs: Any,
    params: SamplingParams | PoolingParams,
    vocab_size: int | None = None,
    processors: Sequence[type[LogitsProcessor]] = (),
) -> None:
    """Raise a RequestError that names the first thing in the request that is not served, or that a custom logits processor refuses."""
    if isinstance(params, PoolingParams):
        raise RequestError("pooling requests are not supported: tpu_inference serves text generation.")
    _refuse_fields(params, bool(processors))
    _refuse_values(params)
    _refuse_unsendable(params)
    _refuse_inputs(inputs, vocab_size)
    for processor in processors:
        try:
            processor.validate_params(params)
        except ValueError as error:
            raise RequestError(str(error)) from error
