# SPDX-License-Identifier: Apache-2.0
"""Architectures that vLLM knows and this engine does not serve, with why: refused before anything is loaded."""

_SPARSE = "its sparse attention (an indexer that picks tokens) exists as CUDA kernels only"
_LINEAR = "it has linear-attention layers, whose state is not served"
_OWN_KERNELS = "its layers are written for kernels of other platforms"

REFUSED: dict[str, str] = {
    "BailingMoeV2_5ForCausalLM": _LINEAR,
    "BailingMoeV3ForCausalLM": _LINEAR,
    "DeepseekV32ForCausalLM": _SPARSE,
    "DeepseekV4ForCausalLM": _SPARSE,
    "Gemma3nForCausalLM": "vLLM's text-only class is never given the embeddings of each layer, so its answers would be wrong",
    "Glm5NextForCausalLM": _SPARSE,
    "GlmMoeDsaForCausalLM": _SPARSE,
    "HYV4ForCausalLM": _OWN_KERNELS,
    "InklingForCausalLM": _OWN_KERNELS,
    "KimiLinearForCausalLM": _LINEAR,
    "MiniMaxM3SparseForCausalLM": _SPARSE,
    "OlmoHybridForCausalLM": _LINEAR,
    "Qwen3NextForCausalLM": _LINEAR,
    "Qwen3_5ForCausalLM": _LINEAR,
    "Qwen3_5MoeForCausalLM": _LINEAR,
    "Qwen4ExpForCausalLM": _OWN_KERNELS,
}
