# SPDX-License-Identifier: Apache-2.0
"""The platform's configuration: complete, idempotent, and refusing what is not served."""

import copy

import pytest
import torch
from vllm.config import CacheConfig, VllmConfig
from vllm.distributed import cleanup_dist_env_and_memory
from vllm.engine.arg_utils import EngineArgs
from vllm.platforms import current_platform
from vllm.v1.executor.multiproc_executor import MultiprocExecutor
from vllm.v1.executor.uniproc_executor import UniProcExecutor

from tpu_inference import tpu_info
from tpu_inference.demo import MODEL
from tpu_inference.platforms.tpu_platform import WORKER, TpuPlatform, default_block_size


def config(**options):
    return EngineArgs(model=MODEL, **options).create_engine_config()


def test_vllm_chose_this_platform():
    assert type(current_platform) is TpuPlatform
    assert current_platform.is_tpu() and not current_platform.is_cpu()
    assert current_platform.supported_dtypes == [torch.bfloat16, torch.float32]
    assert current_platform.get_device_name() == "cpu"
    assert current_platform.get_device_total_memory() > 2**30
    assert current_platform.device_count() == 1


def test_float16_is_served_where_there_is_no_tpu():
    assert config(dtype="half").model_config.dtype == torch.float16
    v6e = tpu_info.Detection("tpu", "of this test", tpu_info.parse_accelerator_type("v6e-8").chip, 8)
    with tpu_info.assuming(v6e), pytest.raises(Exception, match="float16: use --dtype bfloat16 or --dtype float32"):
        config(dtype="half")


def test_the_users_own_executor_of_one_process_stays():
    class Own(UniProcExecutor):
        pass

    assert config(distributed_executor_backend=Own).parallel_config.distributed_executor_backend is Own


def test_vllms_clean_up_works_in_the_users_process():
    cleanup_dist_env_and_memory()  # raised "Cannot access accelerator device"


def test_a_configuration_without_a_model_has_no_cache_type_to_refuse():
    cache = VllmConfig(cache_config=CacheConfig(block_size=16, cache_dtype="bfloat16")).cache_config
    assert cache.cache_dtype == "bfloat16"


def test_configuration_is_complete_and_idempotent():
    done = config()
    assert done.parallel_config.worker_cls == WORKER
    assert done.parallel_config.distributed_executor_backend == "uni"
    assert done.compilation_config.mode == 0
    assert done.scheduler_config.async_scheduling
    assert done.cache_config.block_size == 16
    again = copy.deepcopy(done)
    TpuPlatform.check_and_update_config(again)
    assert (again.parallel_config, again.cache_config, again.compilation_config.mode) == (
        done.parallel_config,
        done.cache_config,
        done.compilation_config.mode,
    )


def test_the_users_block_size_stays():
    assert config(block_size=32).cache_config.block_size == 32


@pytest.mark.parametrize(
    ("max_model_len", "platform", "size"),
    [(100, "tpu", 64), (4096, "tpu", 128), (10**6, "tpu", 256), (10**6, "cpu", 16)],
)
def test_default_block_size(max_model_len, platform, size):
    assert default_block_size(max_model_len, platform) == size


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(pipeline_parallel_size=2), "pipeline parallelism.*use --tensor-parallel-size"),
        (dict(data_parallel_size=2), "data parallelism"),
        (dict(distributed_executor_backend="mp"), "executor 'mp'"),
        (dict(distributed_executor_backend=MultiprocExecutor), "executor 'MultiprocExecutor'"),
        (dict(enable_lora=True), "LoRA"),
        (dict(speculative_config={"method": "ngram", "num_speculative_tokens": 2}), "speculative decoding"),
        (dict(kv_cache_dtype="fp8_e5m2"), "KV cache of type 'fp8_e5m2'"),
        (
            dict(structured_outputs_config={"backend": "lm-format-enforcer"}),
            'lm-format-enforcer.*use .*"backend": "auto"',
        ),
        (dict(enable_prompt_embeds=True), "prompts given as embeddings"),
        (dict(model_impl="transformers"), "model_impl='transformers'"),
        (dict(additional_config={"typo": 1}), "unknown keys"),
        (
            dict(hf_overrides={"architectures": ["HYV4ForCausalLM"]}),
            "HYV4ForCausalLM is not served .* kernels of other platforms",
        ),
    ],
)
def test_what_is_not_served_is_refused_with_what_to_do(options, message):
    with pytest.raises(Exception, match=message):
        config(**options)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [("PREFILL_SLICES", "2x2", "disaggregated"), ("DECODE_SLICES", "2x2", "disaggregated")],
)
def test_variables_of_later_features_are_refused(monkeypatch, name, value, message):
    monkeypatch.setenv(name, value)
    with pytest.raises(Exception, match=message):
        config()


@pytest.mark.parametrize(
    ("flag", "variable", "kind"),
    [("auto", "auto", "flax_nnx"), ("auto", "vllm", "vllm"), ("vllm", "auto", "vllm"), ("vllm", "flax_nnx", "vllm")],
)
def test_which_implementation_serves(monkeypatch, flag, variable, kind):
    """The flag says, and where it does not, the variable."""
    from tpu_inference.models.common.vllm_loader import implementation

    monkeypatch.setenv("MODEL_IMPL_TYPE", variable)
    assert implementation(config(model_impl=flag)).kind == kind
