# SPDX-License-Identifier: Apache-2.0
"""Which class serves which architecture: strings, so that nothing is imported before it is used."""

from importlib import import_module
from typing import Any

from tpu_inference.compat import declare_architecture
from tpu_inference.errors import TpuInferenceError

_HERE = "tpu_inference.models.jax"
_MODELS: dict[str, str] = {
    "LlamaForCausalLM": f"{_HERE}.llama:LlamaForCausalLM",
    "MistralForCausalLM": f"{_HERE}.mistral:MistralForCausalLM",
    "Qwen2ForCausalLM": f"{_HERE}.qwen:Qwen2ForCausalLM",
    "Qwen3ForCausalLM": f"{_HERE}.qwen:Qwen3ForCausalLM",
    "Gemma2ForCausalLM": f"{_HERE}.gemma:Gemma2ForCausalLM",
    "Gemma3ForCausalLM": f"{_HERE}.gemma:Gemma3ForCausalLM",
    "Phi3ForCausalLM": f"{_HERE}.phi3:Phi3ForCausalLM",
}


def supported_architectures() -> list[str]:
    """Architectures served, as they stand in a checkpoint's config.json."""
    return sorted(_MODELS)


def register_model(architecture: str, target: str) -> None:
    """Serve `architecture` by the class at `target` ("package.module:Class"), which takes (hf_config, BuildContext) as ours do.

    Call it from a `vllm.general_plugins` entry point, so that engine processes see it too. Replaces an earlier entry.

    Raises:
        ValueError: `target` is not of that form.
    """
    module, colon, name = target.partition(":")
    if not (module and colon and name.isidentifier()):
        raise ValueError(f"target={target!r} must be 'package.module:Class'")
    _MODELS[architecture] = target
    declare_architecture(architecture)


def find_architecture(architectures: list[str] | None) -> str:
    """The first of a checkpoint's `architectures` that is served; TpuInferenceError that lists what is."""
    for architecture in architectures or ():
        if architecture in _MODELS:
            return architecture
    named = f"architectures {architectures}" if architectures else "no architectures in its config.json"
    raise TpuInferenceError(
        f"The checkpoint has {named}; served are {', '.join(supported_architectures())}. "
        "Use one of those, or add yours with tpu_inference.models.common.registry.register_model."
    )


def model_class(architecture: str) -> Any:
    """The class that serves `architecture`."""
    module, _, name = _MODELS[architecture].partition(":")
    return getattr(import_module(module), name)
