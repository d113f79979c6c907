# SPDX-License-Identifier: Apache-2.0
"""The runner's sampler on logits of a test's own, and vLLM's, which runs in torch on the CPU, for the same requests."""

from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import torch
from vllm import SamplingParams
from vllm.v1.core.sched.output import CachedRequestData, NewRequestData, SchedulerOutput
from vllm.v1.sample.logits_processor import (
    BatchUpdate,
    LogitBiasLogitsProcessor,
    LogitsProcessors,
    MinPLogitsProcessor,
    MinTokensLogitsProcessor,
)
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.sample.sampler import Sampler as VllmSampler

from tpu_inference.layers.common.sharding import make_mesh
from tpu_inference.runner.buckets import Bucket, BucketPlan
from tpu_inference.runner.compilation_manager import CompilationManager
from tpu_inference.runner.input_batch import InputBatch
from tpu_inference.runner.logits_processors import HostProcessors
from tpu_inference.runner.programs import StepPrograms
from tpu_inference.runner.requests import RequestStates
from tpu_inference.runner.sampler import PendingStep, Sampler

VOCAB, ROWS = 67, 8
_programs: dict[Any, StepPrograms] = {}


def config(mode: str = "raw_logprobs", *, processors: Any = None, reasoning: Any = None) -> Any:
    """As much of a VllmConfig as the sampler reads."""
    model = SimpleNamespace(logprobs_mode=mode, logits_processors=processors)
    scheduler = SimpleNamespace(max_num_seqs=ROWS)
    return SimpleNamespace(model_config=model, reasoning_config=reasoning, scheduler_config=scheduler)


def programs(mode: str, host: bool) -> StepPrograms:
    """Compiled as they are first needed, and kept for all tests."""
    if (mode, host) not in _programs:
        _programs[mode, host] = StepPrograms(
            SimpleNamespace(vocab_size=VOCAB), BucketPlan.build(ROWS, ROWS, on_tpu=True), make_mesh(jax.devices("cpu"), 1),
            CompilationManager(strict=False), kv_cache=None, num_groups=1, max_blocks=8, num_slots=ROWS, max_logprobs=-1,
            hidden=None, logprobs_mode=mode, host_processors=host,
        )  # fmt: skip
    return _programs[mode, host]


def params(**fields: Any) -> SamplingParams:
    """`bad_words_token_ids` and `eos` are what vLLM's front end would have made of words and of the model's config."""
    words, eos = fields.pop("bad_words_token_ids", None), fields.pop("eos", None)
    made = SamplingParams(**fields)
    made._bad_words_token_ids = words
    if eos is not None:
        made._all_stop_token_ids.add(eos)
    return made


class Runner:
    """The parts of the model runner around the sampler; a test is the scheduler, and the model."""

    def __init__(self, config: Any) -> None:
        self.processors = HostProcessors(config)
        self.states = RequestStates(
            max_num_seqs=ROWS, max_model_len=128, vocab_size=VOCAB, num_groups=1, max_blocks=8, seed=0,
            follow_all=bool(self.processors),
        )  # fmt: skip
        made = programs(config.model_config.logprobs_mode, bool(self.processors))
        self.sampler = Sampler(made, self.states, config, self.processors)

    def step(
        self,
        logits: dict[str, np.ndarray],
        *,
        new=(),
        resumed=None,
        finished=(),
        preempted=(),
        computed=None,
        grammar=None,
    ):
        """One step in which every request of `logits` (request -> [V]) samples.

        Args:
            new: (request, prompt, params) of those seen for the first time.
            resumed: request -> all of its tokens.
            computed: request -> tokens before the one that this step computes, of those that continue.

        Returns:
            The AsyncOutput, not waited for.
        """
        resumed, computed = resumed or {}, computed or {}
        data = [
            NewRequestData(
                req_id=r, prompt_token_ids=list(prompt), mm_features=[], sampling_params=p, pooling_params=None,
                block_ids=([1],), num_computed_tokens=len(prompt) - 1, lora_request=None,
            )
            for r, prompt, p in new
        ]  # fmt: skip
        going_on = [r for r in logits if r not in {entry[0] for entry in new}]
        cached = CachedRequestData(
            req_ids=going_on, resumed_req_ids=set(resumed), new_token_ids=[], all_token_ids=resumed,
            new_block_ids=[([1],) if r in resumed else None for r in going_on],
            num_computed_tokens=[len(resumed[r]) - 1 if r in resumed else computed[r] for r in going_on],
            num_output_tokens=[0] * len(going_on),
        )  # fmt: skip
        output = SchedulerOutput(
            scheduled_new_reqs=data, scheduled_cached_reqs=cached, num_scheduled_tokens=dict.fromkeys(logits, 1),
            total_num_scheduled_tokens=len(logits), scheduled_spec_decode_tokens={}, scheduled_encoder_inputs={},
            finished_req_ids=set(finished), free_encoder_mm_hashes=[], preempted_req_ids=set(preempted),
        )  # fmt: skip
        self.states.apply(output)
        self.sampler.follow()
        batch = InputBatch.build(self.states, output.num_scheduled_tokens)
        stacked = np.zeros((ROWS, VOCAB), np.float32)
        slots = np.full(ROWS, ROWS, np.int32)
        for row, req_id in enumerate(batch.req_ids):
            stacked[row], slots[row] = logits[req_id], self.states.slots[req_id]
        return self.sampler(PendingStep(batch, Bucket(ROWS, ROWS), jax.numpy.asarray(stacked), slots, {}), grammar)


def dense(logprobs: Any, row: int) -> np.ndarray:
    """[V] of a row whose request asked for all."""
    out = np.full(VOCAB, np.nan, np.float32)
    out[logprobs.logprob_token_ids[row, 1 : VOCAB + 1]] = logprobs.logprobs[row, 1 : VOCAB + 1]
    return out


def vllm_sample(
    logits: np.ndarray,
    requests: list[tuple[list[int], SamplingParams, list[int]]],
    mode: str,
    *,
    custom: Any = (),
    holder: Any = None,
):
    """vLLM's SamplerOutput for float32 `logits` [R, V] of requests (prompt, params, outputs), with all logprobs.

    `custom`: classes of logits processors; `holder`: a thinking budget's state.
    """
    n, all_params = len(requests), [p for _, p, _ in requests]
    processors = LogitsProcessors(
        cls(config(), torch.device("cpu"), False)
        for cls in (MinTokensLogitsProcessor, LogitBiasLogitsProcessor, MinPLogitsProcessor, *custom)
    )
    added = [(i, p, prompt, outputs) for i, (prompt, p, outputs) in enumerate(requests)]
    for processor in processors.all:
        processor.update_state(BatchUpdate(n, (), added, ()))
    longest = max(len(prompt) for prompt, _, _ in requests)
    prompts = torch.tensor([[*prompt, *[VOCAB] * (longest - len(prompt))] for prompt, _, _ in requests])
    allowed = torch.zeros(n, VOCAB, dtype=torch.bool)
    for i, p in enumerate(all_params):
        if p.allowed_token_ids:
            allowed[i] = True
            allowed[i, p.allowed_token_ids] = False

    def column(name: str, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.tensor([getattr(p, name) for p in all_params], dtype=dtype)

    greedy = [p.temperature == 0 for p in all_params]
    top_k = torch.tensor([p.top_k if 0 < p.top_k < VOCAB else VOCAB for p in all_params], dtype=torch.int32)
    metadata = SamplingMetadata(
        temperature=column("temperature"), all_greedy=all(greedy), all_random=not any(greedy),
        top_p=column("top_p") if any(p.top_p < 1 for p in all_params) else None,
        top_k=top_k if bool((top_k < VOCAB).any()) else None, generators={}, max_num_logprobs=VOCAB, no_penalties=False,
        prompt_token_ids=prompts, frequency_penalties=column("frequency_penalty"), presence_penalties=column("presence_penalty"),
        repetition_penalties=column("repetition_penalty"), output_token_ids=[outputs for _, _, outputs in requests],
        allowed_token_ids_mask=allowed,
        bad_words_token_ids={i: p.bad_words_token_ids for i, p in enumerate(all_params) if p.bad_words_token_ids},
        logitsprocs=processors, thinking_budget_state_holder=holder,
    )  # fmt: skip
    with torch.compiler.set_stance(
        "force_eager"
    ):  # it would compile a comparison of two small tensors, for a second at a time
        return VllmSampler(mode)(torch.from_numpy(logits.copy()), metadata)
