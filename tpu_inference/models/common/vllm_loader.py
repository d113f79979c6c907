# SPDX-License-Identifier: Apache-2.0
"""Loads the model that a VllmConfig names."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import jax.numpy as jnp
from jax.sharding import Mesh
from vllm.config import VllmConfig

from tpu_inference import envs
from tpu_inference.compat.checkpoints import require_safetensors, weight_files
from tpu_inference.config import TpuConfig
from tpu_inference.errors import TpuInferenceError
from tpu_inference.layers.common.build import BuildContext
from tpu_inference.layers.common.cache_scales import CacheScaleSource
from tpu_inference.layers.common.weights import map_specs
from tpu_inference.layers.jax.decoder import Decoder, pure_functions
from tpu_inference.logger import init_logger
from tpu_inference.models.common.checkpoint import Checkpoint, CheckpointError
from tpu_inference.models.common.interface import ModelFunctions
from tpu_inference.models.common.kv_cache_dtype import quantized_cache_dtype, refused_scheme, warn_of_missing_scales
from tpu_inference.models.common.loader import check_tensors, expected_tensors, load_params, model_functions
from tpu_inference.models.common.quantization import QuantizationError, quantization_of, refuse_rules_without_effect
from tpu_inference.models.common.registry import Implementation, choose_implementation, model_class

logger = init_logger(__name__)

LOAD_FORMATS = {
    "flax_nnx": ("auto", "hf", "safetensors", "pt", "dummy"),
    "vllm": ("auto", "hf", "safetensors", "pt", "mistral", "sharded_state", "dummy"),
}
PYTORCH = "tpu_inference.models.vllm.vllm_model_wrapper"
"""By name: torchax is imported where a PyTorch model is served, and nowhere else."""


def implementation(vllm_config: VllmConfig) -> Implementation:
    """What serves the model of `vllm_config`: as `--model-impl` says, else as MODEL_IMPL_TYPE does."""
    config = vllm_config.model_config
    flag = str(getattr(config.model_impl, "value", config.model_impl))
    wanted = envs.MODEL_IMPL_TYPE if flag == "auto" else flag
    return choose_implementation(config.architectures, wanted, latents=not envs.VLLM_MLA_DISABLE)


def refuse_quantization(vllm_config: VllmConfig) -> None:
    """Raises QuantizationError for a quantization that is not served, or not by the class that serves the model."""
    quantization = quantization_of(vllm_config)
    if quantization is None:
        return
    if quantized_cache_dtype(vllm_config) and (refused := refused_scheme(vllm_config.quant_config)):
        raise QuantizationError(refused)
    if quantization.experts and implementation(vllm_config).kind == "vllm":
        raise QuantizationError(f"{quantization.experts.upper()} of experts in vLLM's PyTorch class")
    if quantization.experts_alone and not vllm_config.model_config.is_moe:
        raise QuantizationError("Quantization of experts alone, of a model that has none,")


def build_model(vllm_config: VllmConfig, mesh: Mesh) -> Decoder:
    """The JAX model of `vllm_config`, abstract: specs in place of parameters.

    Raises:
        TpuInferenceError: an architecture or field that is not served.
    """
    model_config = vllm_config.model_config
    ctx = BuildContext(
        mesh,
        jnp.dtype(str(model_config.dtype).removeprefix("torch.")),
        model_config.max_model_len,
        TpuConfig.from_vllm(vllm_config).scan_layers,
        quantization_of(vllm_config),
        vllm_config.parallel_config.enable_expert_parallel,
        quantized_cache_dtype(vllm_config),
    )
    model = model_class(implementation(vllm_config).architecture)(model_config.hf_text_config, ctx)
    refuse_rules_without_effect(ctx.quantization)
    return model


def load_model(vllm_config: VllmConfig, mesh: Mesh, *, dummy: bool = False) -> ModelFunctions:
    """Parameters onto `mesh`, and the model's pure functions.

    Raises:
        TpuInferenceError: an architecture, field or load format that is not served; a checkpoint that does not fit (CheckpointError).
    """
    chosen, asked = implementation(vllm_config), vllm_config.load_config.load_format
    if asked not in (formats := LOAD_FORMATS[chosen.kind]):
        by_vllm = " (vLLM's PyTorch class reads it: --model-impl vllm)" if asked in LOAD_FORMATS["vllm"] else ""
        raise TpuInferenceError(f"load_format={asked!r} is not served; use one of {', '.join(formats)}{by_vllm}.")
    if asked == "auto" and not dummy:
        require_safetensors(vllm_config.model_config, vllm_config.load_config)
    kind = "Flax NNX" if chosen.kind == "flax_nnx" else "vLLM's PyTorch class, lowered by torchax"
    logger.info("Serving %s with %s: %s", chosen.architecture, kind, chosen.why)
    load = _load_jax_model if chosen.kind == "flax_nnx" else import_module(PYTORCH).load_vllm_model
    return load(vllm_config, mesh, dummy=dummy or asked == "dummy")


def abstract_model(vllm_config: VllmConfig, mesh: Mesh) -> ModelFunctions:
    """The model of `vllm_config` with shapes in place of parameters, as programs are compiled from. `mesh` may be of described devices.

    Raises:
        TpuInferenceError: an architecture or field that is not served.
    """
    if implementation(vllm_config).kind == "vllm":
        return import_module(PYTORCH).abstract_vllm_model(vllm_config, mesh)
    module = build_model(vllm_config, mesh)
    specs, _, _ = pure_functions(module)
    return model_functions(module, map_specs(lambda spec: spec.abstract(mesh), specs), mesh)


def _load_jax_model(vllm_config: VllmConfig, mesh: Mesh, *, dummy: bool) -> ModelFunctions:
    module = build_model(vllm_config, mesh)
    specs, _, _ = pure_functions(module)
    checkpoint = None if dummy else _checked_checkpoint(vllm_config, module)
    params = load_params(specs, checkpoint, mesh, progress=vllm_config.load_config.use_tqdm_on_load)
    return model_functions(module, params, mesh)


def _checked_checkpoint(vllm_config: VllmConfig, module: Decoder) -> Checkpoint:
    """The checkpoint, which has what `module` reads and nothing else; CheckpointError where it does not."""
    checkpoint, cfg, names = _checkpoint(vllm_config), module.cfg, module.cfg.names
    specs, _, _ = pure_functions(module)
    quantization = quantization_of(vllm_config)
    check_tensors(
        checkpoint,
        specs,
        tied_head=f"{names.lm_head}.weight" if cfg.tie_embeddings else None,
        unread=quantization.unread if quantization else (),
        others=[*names.unread, *(f"{names.layer.format(layer=cfg.num_layers + i)}." for i in range(cfg.layers_unread))],
    )
    if quantized_cache_dtype(vllm_config):
        sources = expected_tensors(specs).items()
        scales = [source.names(name) for name, source in sources if isinstance(source, CacheScaleSource)]
        warn_of_missing_scales(sum(not any(name in checkpoint.shapes for name in names) for names in scales))
    return checkpoint


def _checkpoint(vllm_config: VllmConfig) -> Checkpoint:
    return Checkpoint(weight_files(vllm_config.model_config, vllm_config.load_config))


def reload_params(vllm_config: VllmConfig, mesh: Mesh, source: str, let_go: Callable[[], None]) -> Any:
    """The parameters of the checkpoint `source`, for the model of `vllm_config`; `let_go` frees the old ones, once it is known that these fit.

    Raises:
        CheckpointError: every tensor that is missing, left over or of another shape, and every file that cannot be read; `let_go` was not called.
    """
    new = copy.copy(vllm_config)
    new.model_config, new.load_config = copy.copy(vllm_config.model_config), copy.copy(vllm_config.load_config)
    new.model_config.model = new.model_config.model_weights = source
    if new.load_config.load_format == "dummy":
        new.load_config.load_format = "auto"
    if implementation(vllm_config).kind == "flax_nnx":
        module = build_model(vllm_config, mesh)
        checkpoint = _checked_checkpoint(new, module)
        let_go()
        return load_params(pure_functions(module)[0], checkpoint, mesh, progress=False)
    if vllm_config.load_config.load_format == "dummy":
        raise TpuInferenceError(
            "A PyTorch model that started with dummy weights cannot be reloaded: start it from a checkpoint."
        )
    # vLLM's loaders stop at the first tensor that does not fit, and only when they come to it.
    _refuse_other_tensors(_checkpoint(new), _checkpoint(vllm_config))
    let_go()
    with _layers_kept(vllm_config):
        return import_module(PYTORCH).load_vllm_model(new, mesh, dummy=False).params


def _refuse_other_tensors(new: Checkpoint, old: Checkpoint) -> None:
    problems = [f"missing: {name} {list(shape)}" for name, shape in old.shapes.items() if name not in new.shapes]
    problems += [
        f"mis-shaped: {name} is {list(shape)}, and {list(old.shapes[name])} in {old.where}"
        for name, shape in new.shapes.items()
        if shape != old.shapes.get(name, shape)
    ]
    problems += [f"left over: {name} {list(shape)}" for name, shape in new.shapes.items() if name not in old.shapes]
    if problems:
        raise CheckpointError(new.where, problems)


@contextmanager
def _layers_kept(vllm_config: VllmConfig) -> Iterator[None]:
    """vLLM's table of attention layers stays that of the model that serves, whatever is built inside."""
    table = vllm_config.compilation_config.static_forward_context
    kept = dict(table)
    try:
        yield
    finally:
        table.clear()
        table.update(kept)
