# SPDX-License-Identifier: Apache-2.0
"""What vLLM's loaders and registry know of checkpoints and model classes."""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from tpu_inference.errors import TpuInferenceError


def weight_files(model_config: Any, load_config: Any) -> list[str]:
    """Paths of the checkpoint's weight files, found (and fetched from the hub where the model is a name) by vLLM's loader."""
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

    model = getattr(model_config, "model_weights", None) or model_config.model
    _, files, _, _ = DefaultModelLoader(load_config)._prepare_weights(
        model, None, model_config.revision, fall_back_to_pt=True, allow_patterns_overrides=None
    )
    return files


def require_safetensors(model_config: Any, load_config: Any) -> None:
    """Raise TpuInferenceError where vLLM would fall back to PyTorch files, which are pickles, though nobody has asked for them."""
    files = weight_files(model_config, load_config)
    others = sorted(os.path.basename(file) for file in files if not file.endswith(".safetensors"))
    if others:
        raise TpuInferenceError(
            f"{model_config.model} has no safetensors, only PyTorch files ({', '.join(others[:4])}), which are pickles and read only when "
            "asked for: use --load-format hf (also *.bin) or pt (*.pt), or convert the checkpoint."
        )


def declare_architecture(architecture: str, *, replace: bool = False) -> None:
    """Tell vLLM that `architecture` exists and generates text, unless it has a class of its own for it, which is not to be replaced.

    vLLM asks its registry what a model can do before any worker starts, by looking at a PyTorch class; ours is never built.
    """
    import torch
    from vllm import ModelRegistry

    known = architecture in ModelRegistry.get_supported_archs()
    if known and not replace:
        return

    class ServedByJax(torch.nn.Module):
        def __init__(self, vllm_config: Any, prefix: str = "") -> None:
            raise NotImplementedError(f"{architecture} is a JAX model")

        def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
            raise NotImplementedError

        def forward(self, input_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
            raise NotImplementedError

        def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
            raise NotImplementedError

    ModelRegistry.register_model(architecture, ServedByJax)


_STALE_NAMES = {"DbrxForCausalLM": (".experts.mlp.", ".experts.routed_experts.mlp.")}


def as_loader_looks_for(architecture: str, weights: Iterable[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
    """(name, tensor) of a checkpoint, so named that `load_weights` of vLLM's class finds the parameters that it has."""
    old, new = _STALE_NAMES.get(architecture, ("", ""))
    return ((name.replace(old, new) if old else name, tensor) for name, tensor in weights)


@contextmanager
def latents_put_up() -> Iterator[None]:
    """vLLM's classes that are made inside attend over keys and values of every head, put up from latents, as with VLLM_MLA_DISABLE=1."""
    from vllm.config import ModelConfig

    kept = ModelConfig.use_mla
    ModelConfig.use_mla = property(lambda self: False)
    try:
        yield
    finally:
        ModelConfig.use_mla = kept
