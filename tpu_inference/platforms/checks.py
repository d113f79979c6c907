# SPDX-License-Identifier: Apache-2.0
"""What a vLLM configuration may not ask for yet, as a table: refused before anything is loaded, all of it in one error."""

import dataclasses
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from vllm.utils.import_utils import resolve_obj_by_qualname

from tpu_inference import envs, tpu_info
from tpu_inference.config import TpuConfig
from tpu_inference.errors import ConfigError
from tpu_inference.logger import init_logger, log_once
from tpu_inference.models.common.kv_cache_dtype import QUANTIZED
from tpu_inference.platforms import flags

if TYPE_CHECKING:
    from vllm.config import ModelConfig, VllmConfig

logger = init_logger(__name__)

SERVED_DTYPES = [torch.bfloat16, torch.float32]
"""The first is what vLLM falls back to for a checkpoint of another type."""
CPU_ONLY_DTYPES = [torch.float16]
"""Served on the CPU backend when asked for: no TPU multiplies in float16."""


def is_served(dtype: torch.dtype) -> bool:
    return dtype in SERVED_DTYPES or (dtype in CPU_ONLY_DTYPES and tpu_info.detect_once().platform == "cpu")


@dataclass(frozen=True)
class Refusal:
    """`asked` returns what was asked for, or something false."""

    asked: Callable[["VllmConfig"], Any]
    what: str
    advice: str


def _of_model(get: Callable[["ModelConfig"], Any]) -> Callable[["VllmConfig"], Any]:
    """A question to the model's part of the configuration, which vLLM leaves out in some of its own checks."""
    return lambda config: config.model_config is not None and get(config.model_config)


def _more_than_one(size: int) -> int:
    return size if size > 1 else 0


def _unserved_cache_dtype(config: "VllmConfig") -> str | None:
    asked, model = config.cache_config.cache_dtype, config.model_config
    if model is None:  # nothing is served without one
        return None
    return None if asked in ("auto", str(model.dtype).removeprefix("torch."), *QUANTIZED) else asked


def _unserved_executor(config: "VllmConfig") -> str | None:
    """What is no executor of one process: vLLM's others, or a class of the user's that is not derived from `UniProcExecutor`."""
    backend = config.parallel_config.distributed_executor_backend
    if isinstance(backend, str) and "." in backend:
        backend = resolve_obj_by_qualname(backend)
    if not isinstance(backend, type):
        return None if backend in (None, "uni") else str(backend)
    from vllm.v1.executor.uniproc_executor import ExecutorWithExternalLauncher, UniProcExecutor

    own = issubclass(backend, UniProcExecutor) and not issubclass(backend, ExecutorWithExternalLauncher)
    return None if own else backend.__name__


def _default(owner: Any, name: str) -> Any:
    """Of a field of one of vLLM's config classes, which are dataclasses of pydantic's."""
    field = next(field for field in dataclasses.fields(owner) if field.name == name)
    default: Any = field.default
    factory: Any = field.default_factory
    if hasattr(default, "get_default"):
        return default.get_default(call_default_factory=True)
    return factory() if default is dataclasses.MISSING else default


def _changed(owner: Any, but: Sequence[str] = ()) -> str:
    """Names of the fields of `owner` that are not at their defaults, those in `but` left out."""
    names = (field.name for field in dataclasses.fields(owner) if field.name not in but)
    return ", ".join(name for name in names if getattr(owner, name) != _default(owner, name))


def _value(config: "VllmConfig", path: str) -> tuple[Any, Any]:
    """(value, default) of a field; twice None where there is no such part: vLLM leaves some out in its own checks, and another release has others."""
    *parts, name = path.split(".")
    owner: Any = config
    for part in parts:
        owner = getattr(owner, part, None)
    return (getattr(owner, name), _default(owner, name)) if hasattr(owner, name) else (None, None)


PROFILER_FIELDS = (
    "profiler torch_profiler_dir torch_profiler_with_stack delay_iterations max_iterations ignore_frontend".split()
)
"""Those that are served; `ignore_frontend` is set by the platform."""

REFUSALS: tuple[Refusal, ...] = (
    # Parallelism
    Refusal(
        lambda c: _more_than_one(c.parallel_config.pipeline_parallel_size),
        "pipeline parallelism (pipeline_parallel_size={})",
        "use --tensor-parallel-size",
    ),
    Refusal(
        lambda c: _more_than_one(c.parallel_config.data_parallel_size),
        "data parallelism (data_parallel_size={})",
        "start one server a replica",
    ),
    Refusal(lambda c: c.parallel_config.enable_eplb, "expert load balancing", "remove --enable-eplb"),
    Refusal(
        lambda c: _more_than_one(c.parallel_config.prefill_context_parallel_size),
        "context parallelism (prefill_context_parallel_size={})",
        "use --tensor-parallel-size",
    ),
    Refusal(
        lambda c: _more_than_one(c.parallel_config.decode_context_parallel_size),
        "context parallelism (decode_context_parallel_size={})",
        "use --tensor-parallel-size",
    ),
    Refusal(
        lambda c: _more_than_one(c.parallel_config.nnodes),
        "serving on several hosts (nnodes={})",
        "use a slice of one host",
    ),
    Refusal(lambda c: c.parallel_config.enable_dbo, "dual batch overlap", "remove --enable-dbo"),
    Refusal(
        _unserved_executor,
        "the executor {!r} (one process drives all devices of a host)",
        "remove --distributed-executor-backend, or give it uni, and leave VLLM_XLA_USE_SPMD unset",
    ),
    # Features
    Refusal(lambda c: c.lora_config, "LoRA", "remove --enable-lora, or merge the adapter into the checkpoint"),
    Refusal(lambda c: c.speculative_config, "speculative decoding", "remove --speculative-config"),
    Refusal(lambda c: c.kv_transfer_config, "KV connectors", "remove --kv-transfer-config"),
    Refusal(lambda c: c.ec_transfer_config, "encoder cache connectors", "remove --ec-transfer-config"),
    Refusal(
        # Its release 0.11.3, vLLM 0.32.0's own pin, imports a module that vLLM no longer has: the engine would end with the first request.
        lambda c: c.structured_outputs_config.backend == "lm-format-enforcer",
        "structured outputs by lm-format-enforcer, which this vLLM and its release of it cannot import",
        'use --structured-outputs-config \'{"backend": "auto"}\', or xgrammar, guidance or outlines',
    ),
    Refusal(lambda c: c.watermark_config, "watermarking", "remove the watermark configuration"),
    Refusal(lambda c: c.weight_transfer_config, "weight transfer", "remove --weight-transfer-config"),
    Refusal(
        lambda c: c.aux_output_config.enable_return_routed_experts,
        "returning routed experts",
        "remove --enable-return-routed-experts",
    ),
    Refusal(
        lambda c: c.offload_config.uva.cpu_offload_gb or c.offload_config.prefetch.offload_group_size,
        "weights offloaded to host memory",
        "remove --cpu-offload-gb and --offload-group-size, and use more devices",
    ),
    Refusal(
        lambda c: c.cache_config.kv_offloading_size,
        "a KV cache offloaded to host memory",
        "remove --kv-offloading-size",
    ),
    Refusal(
        _unserved_cache_dtype,
        "a KV cache of type {!r}",
        "use --kv-cache-dtype auto, which keeps it in the model's type, or fp8: there is a scale a layer, and none a token or head",
    ),
    Refusal(
        lambda c: c.cache_config.kv_cache_dtype_skip_layers,
        "KV cache types by layer",
        "remove --kv-cache-dtype-skip-layers",
    ),
    Refusal(
        # vLLM sets the one that is left out itself.
        lambda c: _changed(c.attention_config, ["backend", "sparse_mla_prefill_workspace_factor"]),
        "attention_config ({})",
        "remove it: there is one attention, whose form is chosen for the device",
    ),
    Refusal(
        # Where vLLM keeps these flags of models with state-space layers.
        lambda c: ", ".join(
            sorted({"gdn_prefill_backend", "kda_prefill_backend", "kda_decode_backend"} & set(c.additional_config))
        ),
        "the flags {}",
        "remove them: models with state-space layers are refused",
    ),
    Refusal(
        lambda c: c.profiler_config.profiler not in (None, "torch") and c.profiler_config.profiler,
        "the profiler {!r}",
        'use "torch", which makes /start_profile trace JAX and the devices',
    ),
    Refusal(
        lambda c: "://" in c.profiler_config.torch_profiler_dir and c.profiler_config.torch_profiler_dir,
        "profiles written to {}",
        "give a directory of this machine as torch_profiler_dir",
    ),
    Refusal(
        lambda c: _changed(c.profiler_config, PROFILER_FIELDS),
        "the profiler settings {}",
        "remove them: JAX has its own profiler",
    ),
    # The model
    Refusal(
        _of_model(lambda m: not is_served(m.dtype) and str(m.dtype).removeprefix("torch.")),
        "weights of type {}",
        "use --dtype bfloat16 or --dtype float32",
    ),
    Refusal(
        _of_model(lambda m: m.runner_type != "generate" and m.runner_type),
        "models run for {} rather than for generation",
        "use --runner generate with a generative model",
    ),
    Refusal(_of_model(lambda m: m.is_encoder_decoder), "encoder-decoder models", "use a decoder-only model"),
    Refusal(_of_model(lambda m: m.is_diffusion), "diffusion language models", "use an autoregressive model"),
    Refusal(
        _of_model(lambda m: m.is_multimodal_model),
        "models with multimodal input",
        "use a text-only checkpoint of the family",
    ),
    Refusal(
        _of_model(lambda m: m.is_hybrid or m.is_attention_free),
        "state-space (Mamba-like) layers",
        "use a model of attention layers only",
    ),
    Refusal(
        _of_model(lambda m: m.enable_prompt_embeds), "prompts given as embeddings", "remove --enable-prompt-embeds"
    ),
    Refusal(_of_model(lambda m: m.enable_trace_replay), "trace replay", "remove --enable-trace-replay"),
    Refusal(_of_model(lambda m: m.return_sampling_mask), "returned sampling masks", "remove --return-sampling-mask"),
    Refusal(
        _of_model(lambda m: m.model_impl not in ("auto", "vllm") and str(m.model_impl)),
        "model_impl={!r}",
        "use --model-impl auto or vllm",
    ),
    # The environment
    Refusal(
        lambda c: envs.PREFILL_SLICES or envs.DECODE_SLICES,
        "disaggregated serving (PREFILL_SLICES, DECODE_SLICES)",
        "unset both variables",
    ),
)


def _refused_flags(config: "VllmConfig") -> list[str]:
    """What is wrong with flags that need no more than a look at their value. Empty and zero values ask for nothing."""
    found = []
    for name, (path, advice) in flags.REFUSED.items():
        if path:
            value, default = _value(config, path)
            if value and value != default:
                found.append(f"--{name.replace('_', '-')} ({value}): {advice}")
    return found


def warn_of_flags_without_effect(config: "VllmConfig") -> None:
    """A flag that was set and changes nothing is named in the log."""
    for name, (path, why) in flags.WITHOUT_EFFECT.items():
        if path:
            value, default = _value(config, path)
            if value != default:
                log_once(logger, logging.WARNING, "--%s has no effect: %s.", name.replace("_", "-"), why)


def refuse_unserved(config: "VllmConfig") -> None:
    """Raise a ConfigError that names everything in the configuration that is not served, and what to do instead."""
    asked = ((refusal, refusal.asked(config)) for refusal in REFUSALS)
    found = [f"{refusal.what.format(value)}: {refusal.advice}" for refusal, value in asked if value]
    found += _refused_flags(config)
    if found:
        raise ConfigError("tpu_inference does not serve this yet: " + "; ".join(found) + ".")
    TpuConfig.from_vllm(config)
    warn_of_flags_without_effect(config)
    if config.model_config is not None:
        from tpu_inference.models.common.vllm_loader import implementation, refuse_quantization

        implementation(config)
        refuse_quantization(config)
