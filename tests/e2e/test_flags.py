# SPDX-License-Identifier: Apache-2.0
"""Flags of vLLM's scheduler and caches, many at once: the same tokens, and what they are for."""

import pytest
import zmq

from helpers import tiny_models
from helpers.engines import engine, scheduler, tokens
from helpers.server import free_port

pytestmark = [pytest.mark.slow, pytest.mark.e2e]

PROMPTS = tiny_models.prompts(5, seed=9)
COUNT = 10


def test_the_schedulers_flags(zoo):
    path, port = zoo("llama"), free_port()
    options = dict(
        scheduling_policy="priority", max_num_active_seqs=2, watermark=0.1, prefill_schedule_interval=2, enable_chunked_prefill=False,
        max_num_batched_tokens=256, long_prefill_token_threshold=0, prefix_caching_hash_algo="sha256_cbor", max_num_scheduled_tokens=256,
        prefix_match_unit=16, disable_hybrid_kv_cache_manager=True, scheduler_reserve_full_isl=False,
        kv_events_config={"enable_kv_cache_events": True, "publisher": "zmq", "endpoint": f"tcp://*:{port}"},
    )  # fmt: skip
    with engine(path, **options) as llm, zmq.Context() as context, context.socket(zmq.SUB) as events:
        assert scheduler(llm).max_num_active_reqs == 2
        events.connect(f"tcp://127.0.0.1:{port}")
        events.subscribe(b"")
        assert tokens(llm, PROMPTS, COUNT) == [tiny_models.greedy(path, prompt, COUNT) for prompt in PROMPTS]
        tokens(llm, [list(range(3, 60))], COUNT)
        assert events.poll(10_000), "no event of the KV cache was published"


def test_without_its_sliding_window_a_context_is_as_long_as_the_window(zoo):
    path = zoo("mistral")
    with engine(path, disable_sliding_window=True, max_model_len=None) as llm:
        assert llm.llm_engine.model_config.max_model_len == 24
        prompts = [prompt[:10] for prompt in PROMPTS]
        assert tokens(llm, prompts, COUNT) == [tiny_models.greedy(path, prompt, COUNT) for prompt in prompts]
