# SPDX-License-Identifier: Apache-2.0
"""Which class serves which architecture: strings, so that nothing is imported before it is used."""

from dataclasses import dataclass
from importlib import import_module
from typing import Any, Literal

from tpu_inference.compat.checkpoints import declare_architecture
from tpu_inference.errors import TpuInferenceError
from tpu_inference.models.common.refused import REFUSED

_HERE = "tpu_inference.models.jax"
_MODELS: dict[str, str] = {
    "LlamaForCausalLM": f"{_HERE}.llama:LlamaForCausalLM",
    "MistralForCausalLM": f"{_HERE}.mistral:MistralForCausalLM",
    "Qwen2ForCausalLM": f"{_HERE}.qwen:Qwen2ForCausalLM",
    "Qwen3ForCausalLM": f"{_HERE}.qwen:Qwen3ForCausalLM",
    "Gemma2ForCausalLM": f"{_HERE}.gemma:Gemma2ForCausalLM",
    "Gemma3ForCausalLM": f"{_HERE}.gemma:Gemma3ForCausalLM",
    "Phi3ForCausalLM": f"{_HERE}.phi3:Phi3ForCausalLM",
    "MixtralForCausalLM": f"{_HERE}.mixtral:MixtralForCausalLM",
    "Qwen2MoeForCausalLM": f"{_HERE}.qwen_moe:Qwen2MoeForCausalLM",
    "Qwen3MoeForCausalLM": f"{_HERE}.qwen_moe:Qwen3MoeForCausalLM",
    "GptOssForCausalLM": f"{_HERE}.gpt_oss:GptOssForCausalLM",
    "Llama4ForCausalLM": f"{_HERE}.llama4:Llama4ForCausalLM",
    "Llama4ForConditionalGeneration": f"{_HERE}.llama4:Llama4ForConditionalGeneration",
    "DeepseekV2ForCausalLM": f"{_HERE}.deepseek:DeepseekV2ForCausalLM",
    "DeepseekV3ForCausalLM": f"{_HERE}.deepseek:DeepseekV3ForCausalLM",
}
_OF_LATENTS = ("DeepseekV2ForCausalLM", "DeepseekV3ForCausalLM")
"""Those of `_MODELS` that VLLM_MLA_DISABLE leaves to vLLM's classes."""

TEXT_ONLY = ("Llama4ForConditionalGeneration",)
"""Architectures of `_MODELS` that take images too, and are served without."""

Kind = Literal["flax_nnx", "vllm"]


@dataclass(frozen=True)
class Implementation:
    """Which code serves a checkpoint."""

    kind: Kind
    """A JAX class of this table, or vLLM's PyTorch class."""
    architecture: str
    why: str


def choose_implementation(architectures: list[str] | None, wanted: str, *, latents: bool = True) -> Implementation:
    """What serves a checkpoint of these `architectures`.

    Args:
        wanted: "flax_nnx" or "vllm"; "auto" takes a JAX class where there is one, and vLLM's class otherwise.
        latents: whether latent attention may be served as such: not with VLLM_MLA_DISABLE=1, which vLLM's classes put up into whole heads.

    Raises:
        TpuInferenceError: there is none, or it is known not to work (`refused.REFUSED`).
    """
    ours = next((name for name in architectures or () if name in _MODELS), None)
    if ours in _OF_LATENTS and not latents:
        if wanted == "flax_nnx":
            raise TpuInferenceError(
                f"VLLM_MLA_DISABLE=1 asks for attention over whole heads, which the JAX class of {ours} has not: "
                "unset it, or unset MODEL_IMPL_TYPE for vLLM's PyTorch class."
            )
        return Implementation("vllm", ours, "VLLM_MLA_DISABLE=1 asks for attention over whole heads")
    if wanted == "flax_nnx" or (wanted == "auto" and ours) or not architectures:
        asked = "MODEL_IMPL_TYPE=flax_nnx" if wanted == "flax_nnx" else "there is a JAX class for it"
        return Implementation("flax_nnx", ours or find_architecture(architectures), asked)
    if reason := REFUSED.get(architectures[0]):
        raise TpuInferenceError(f"{architectures[0]} is not served by tpu_inference: {reason}.")
    why = "there is no JAX class for it" if wanted == "auto" else "vLLM's PyTorch class is asked for"
    return Implementation("vllm", architectures[0], why)


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


def declare_text_only() -> None:
    """Tell vLLM that the architectures of `TEXT_ONLY` take text: it refuses requests with images, and asks for no processor of them."""
    for architecture in TEXT_ONLY:
        declare_architecture(architecture, replace=True)


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
