# SPDX-License-Identifier: Apache-2.0
"""Every flag of vLLM's engine is served, refused or said to do nothing; what the table says is refused, is."""

import dataclasses
import logging
from collections import Counter

import pytest
from vllm.config.mamba import MambaBackendEnum, MambaConfig
from vllm.engine.arg_utils import AsyncEngineArgs, EngineArgs

from tpu_inference.demo import MODEL
from tpu_inference.platforms import flags

EXAMPLES = {
    "attention_backend": "FLASH_ATTN",
    "attention_config": {"flash_attn_version": 3},
    "collect_detailed_traces": ["all"],
    "convert": "embed",
    "cpu_distributed_timeout_seconds": 9,
    "cpu_offload_gb": 1,
    "cudagraph_capture_sizes": [1, 2],
    "data_parallel_size": 2,
    "decode_context_parallel_size": 2,
    "device_ids": [0],
    "diffusion_config": {"canvas_length": 8},
    "distributed_executor_backend": "mp",
    "distributed_timeout_seconds": 9,
    "ec_transfer_config": {"ec_connector": "ECExampleConnector", "ec_role": "ec_consumer"},
    "engram_config": {},
    "gdn_prefill_backend": "triton",
    "io_processor_plugin": "prithvi",
    "jit_monitor_mode": "error",
    "kda_decode_backend": "triton",
    "kda_prefill_backend": "triton",
    "kv_cache_dtype_skip_layers": ["0"],
    "kv_offloading_size": 1.0,
    "kv_transfer_config": {"kv_connector": "ExampleConnector", "kv_role": "kv_both"},
    "linear_backend": "cutlass",
    "mamba_backend": "flashinfer",
    "mamba_block_size": 16,
    "mamba_cache_dtype": "float32",
    "mamba_cache_mode": "align",
    "mamba_cache_philox_rounds": 4,
    "mamba_config": MambaConfig(backend=MambaBackendEnum.FLASHINFER, ssu_algorithm="simple"),
    "mamba_ssm_cache_dtype": "float32",
    "mamba_ssu_algorithm": "simple",
    "max_parallel_loading_workers": 2,
    "model_class_overrides": {"NobodysForCausalLM": "module:Class"},
    "model_loader_extra_config": {"enable_multithread_load": True},
    "moe_backend": "triton",
    "nnodes": 2,
    "numa_bind_cpus": ["0"],
    "numa_bind_nodes": [0],
    "offload_group_size": 1,
    "pipeline_parallel_size": 2,
    "pooler_config": {"pooling_type": "LAST"},
    "prefill_context_parallel_size": 2,
    "pt_load_map_location": "cuda",
    "replayssm_buffer_len": 8,
    "sleep_preserve_parameter_names": ["lm_head*"],
    "sparse_indexer_topk_backend": "triton",
    "speculative_config": {"method": "ngram", "num_speculative_tokens": 2},
    "ubatch_size": 2,
    "watermark_config": {"key": 1},
    "weight_transfer_config": {"backend": "nccl"},
}
"""A value that asks for the flag; where there is none, True does."""


ALSO = {
    "collect_detailed_traces": dict(otlp_traces_endpoint="http://127.0.0.1:1"),
    "decode_context_parallel_size": dict(tensor_parallel_size=2),
    "enable_eplb": dict(tensor_parallel_size=2, enable_expert_parallel=True),
    "enable_mamba_cache_stochastic_rounding": dict(mamba_ssm_cache_dtype="float16"),
    "mamba_cache_philox_rounds": dict(enable_mamba_cache_stochastic_rounding=True, mamba_ssm_cache_dtype="float16"),
    "mamba_config": dict(mamba_backend="flashinfer"),
    "mamba_ssu_algorithm": dict(mamba_backend="flashinfer"),
    "nnodes": dict(tensor_parallel_size=2),
    "numa_bind_cpus": dict(numa_bind=True, numa_bind_nodes=[0]),
    "numa_bind_nodes": dict(numa_bind=True),
}
"""What vLLM wants to be set with it."""
BY_VLLM = set(
    "decode_context_parallel_size enable_cumem_allocator enable_elastic_ep enable_eplb enable_fault_tolerance "
    "enable_trace_replay engram_config ray_workers_use_nsight return_sampling_mask".split()
)
"""Flags for which vLLM's own checks of this platform, or of the value, come first."""


def config(**options):
    return EngineArgs(model=MODEL, **options).create_engine_config()


def every_flag():
    own = {**flags.SERVED, **flags.WITHOUT_EFFECT, **flags.REFUSED}
    assert len(own) == len(flags.SERVED) + len(flags.WITHOUT_EFFECT) + len(flags.REFUSED), "a flag is in two tables"
    return [*own, *(name for names in flags.PART_OF.values() for name in names.split())]


def test_every_flag_of_vllm_is_in_one_table():
    counts = Counter(every_flag())
    assert [name for name, count in counts.items() if count > 1] == []
    assert set(counts) == {field.name for field in dataclasses.fields(AsyncEngineArgs)}


@pytest.mark.parametrize("name", flags.REFUSED)
def test_what_the_table_refuses_is_refused(name):
    with pytest.raises(Exception, match=r".") as caught:
        config(**{name: EXAMPLES.get(name, True)}, **ALSO.get(name, {}))
    by_vllm = "tpu_inference does not serve this yet" not in str(caught.value)
    assert by_vllm == (name in BY_VLLM), caught.value


def test_a_flag_without_effect_is_named_in_the_log(caplog, monkeypatch):
    from tpu_inference import logger

    monkeypatch.setattr(logger, "_seen", set())
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    config(safetensors_load_strategy="eager", optimization_level=0)
    said = {record.getMessage() for record in caplog.records if "has no effect" in record.getMessage()}
    assert sorted(message.split()[0] for message in said) == ["--optimization-level", "--safetensors-load-strategy"]


def test_what_vllm_sets_itself_for_a_model_is_not_refused():
    """As it does for gpt-oss."""
    assert config(max_cudagraph_capture_size=1024)


def test_every_group_is_of_a_flag_that_is_refused():
    assert set(flags.PART_OF) - {"models with multimodal input"} <= set(flags.REFUSED)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(profiler="cuda"), "the profiler 'cuda'"),
        (dict(profiler="torch", torch_profiler_dir="gs://bucket/x"), "profiles written to gs://bucket/x"),
        (dict(profiler="torch", torch_profiler_dir="/tmp/x", torch_profiler_with_memory=True), "profiler_with_memory"),
    ],
)
def test_profilers_that_are_not_jaxs_are_refused(settings, message):
    with pytest.raises(Exception, match=message):
        config(profiler_config=settings)


def test_a_profile_leaves_the_api_server_out():
    done = config(profiler_config=dict(profiler="torch", torch_profiler_dir="/tmp/x"))
    assert done.profiler_config.ignore_frontend
