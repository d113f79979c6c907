# SPDX-License-Identifier: Apache-2.0
"""Loads the model that a VllmConfig names."""

import jax.numpy as jnp
from jax.sharding import Mesh
from vllm.config import VllmConfig

from tpu_inference.compat import weight_files
from tpu_inference.config import TpuConfig
from tpu_inference.errors import TpuInferenceError
from tpu_inference.layers.common.build import BuildContext
from tpu_inference.layers.jax.decoder import Decoder, pure_functions
from tpu_inference.logger import init_logger
from tpu_inference.models.common.checkpoint import Checkpoint
from tpu_inference.models.common.interface import ModelFunctions
from tpu_inference.models.common.loader import check_tensors, load_params, model_functions
from tpu_inference.models.common.registry import find_architecture, model_class

logger = init_logger(__name__)

LOAD_FORMATS = ("auto", "hf", "safetensors", "pt", "dummy")


def build_model(vllm_config: VllmConfig, mesh: Mesh) -> Decoder:
    """The model of `vllm_config`, abstract: specs in place of parameters.

    Raises:
        TpuInferenceError: an architecture or field that is not served.
    """
    model_config = vllm_config.model_config
    ctx = BuildContext(
        mesh,
        jnp.dtype(str(model_config.dtype).removeprefix("torch.")),
        model_config.max_model_len,
        TpuConfig.from_vllm(vllm_config).scan_layers,
    )
    return model_class(find_architecture(model_config.hf_config.architectures))(model_config.hf_text_config, ctx)


def load_model(vllm_config: VllmConfig, mesh: Mesh, *, dummy: bool = False) -> ModelFunctions:
    """Parameters onto `mesh`, and the model's pure functions.

    Raises:
        TpuInferenceError: an architecture, field or load format that is not served; a checkpoint that does not fit (CheckpointError).
    """
    model_config, load_config = vllm_config.model_config, vllm_config.load_config
    if load_config.load_format not in LOAD_FORMATS:
        raise TpuInferenceError(
            f"load_format={load_config.load_format!r} is not served; use one of {', '.join(LOAD_FORMATS)}."
        )
    module = build_model(vllm_config, mesh)
    specs, _, _ = pure_functions(module)
    checkpoint = None
    if not dummy and load_config.load_format != "dummy":
        checkpoint = Checkpoint(weight_files(model_config, load_config))
        names = module.cfg.names
        check_tensors(checkpoint, specs, tied_head=f"{names.lm_head}.weight" if module.cfg.tie_embeddings else None)
    architecture = find_architecture(model_config.hf_config.architectures)
    logger.info("Serving %s with %s (Flax NNX)", architecture, type(module).__name__)
    params = load_params(specs, checkpoint, mesh, progress=load_config.use_tqdm_on_load)
    return model_functions(module, params, mesh)
