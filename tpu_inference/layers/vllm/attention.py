# SPDX-License-Identifier: Apache-2.0
"""vLLM's attention layer over the paged op: what it asks of an attention backend, handed on to `layers.common`."""

from typing import Any

import jax
import jax.numpy as jnp
import torch
from vllm.model_executor.layers.quantization.kv_cache import BaseKVCacheMethod, KVCacheScaleParameter
from vllm.v1.attention.backend import AttentionBackend, AttentionImpl, AttentionLayer, AttentionType

from tpu_inference.compat.lowering import import_torchax
from tpu_inference.errors import TpuInferenceError
from tpu_inference.layers.common import alibi
from tpu_inference.layers.common.attention import attention
from tpu_inference.layers.common.heads import HeadPlan, plan_heads, take_slots
from tpu_inference.layers.vllm.context import StepContext, current_step


class TpuAttentionBackend(AttentionBackend):
    """Found by vLLM through `TpuPlatform.get_attn_backend_cls`."""

    supported_dtypes = [torch.bfloat16, torch.float32, torch.float16]  # noqa: RUF012

    @staticmethod
    def get_name() -> str:
        return "CUSTOM"  # vLLM looks every name up in an enum of its own

    @staticmethod
    def get_impl_cls() -> type["TpuAttentionImpl"]:
        return TpuAttentionImpl

    @staticmethod
    def get_builder_cls() -> type:
        # Asked for by layers whose attention is a variant of another's, as chunked local attention (Llama 4) is.
        raise TpuInferenceError(
            "Attention in local chunks is not served in vLLM's PyTorch classes: leave --model-impl at auto, which takes the JAX class of Llama 4."
        )


class TpuAttentionImpl(AttentionImpl):
    """The attention of one layer, told by the model how; `forward` is called while the model is traced."""

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        sinks: torch.Tensor | None = None,
        use_alibi_sqrt: bool = False,
        **others: Any,
    ) -> None:
        """Raises TpuInferenceError for what is not served."""
        unserved = sorted(name for name, value in others.items() if value not in (None, False, -1))
        if attn_type != AttentionType.DECODER:
            unserved.append(f"attn_type={attn_type}")
        if use_alibi_sqrt:
            unserved.append("use_alibi_sqrt")
        if unserved:
            raise TpuInferenceError(f"attention with {', '.join(unserved)} is not served by tpu_inference")
        self.num_heads, self.num_kv_heads = num_heads, num_kv_heads or num_heads
        self.head_size, self.scale = head_size, float(scale)
        self.alibi_slopes = None if alibi_slopes is None else [float(slope) for slope in alibi_slopes]
        self.sliding_window, self.soft_cap = sliding_window, logits_soft_cap or None
        self.kv_cache_dtype = kv_cache_dtype
        self.shares_with = kv_sharing_target_layer_name
        self.sinks = sinks

    @property
    def cached_head_size(self) -> int:
        """Head dim of the pages."""
        return self.head_size + (0 if self.alibi_slopes is None else alibi.FEATURES)

    def heads(self, shards: int) -> HeadPlan:
        """How the heads are laid out on `shards` devices."""
        return plan_heads(self.num_heads, self.num_kv_heads, shards)

    def forward(
        self,
        layer: AttentionLayer,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: Any,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """query [T, num_heads, head_size]; key and value of num_kv_heads, value perhaps of a smaller head. Fills `output`."""
        step, name = current_step(), layer.layer_name
        q = query.jax()
        if self.shares_with:
            k, v, scales = step.written[self.shares_with]
        else:
            k, v, scales = key.jax(), value.jax(), _cache_scales(layer)
        step.written[name] = (k, v, scales)
        # The kernels choose the precision of their products themselves.
        with jax.default_matmul_precision(None):
            out = self._attend(step, self.shares_with or name, layer, q, k, v, scales)
        width = output.shape[-1]
        output.copy_(import_torchax().interop.torch_view(out[..., :width].reshape(output.shape)))
        return output

    def _attend(
        self,
        step: StepContext,
        cached: str,
        layer: Any,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        scales: jax.Array | None,
    ):
        if short := k.shape[-1] - v.shape[-1]:
            v = jnp.pad(v, ((0, 0), (0, 0), (0, short)))
        if self.alibi_slopes is not None:
            slopes = jnp.asarray(self.alibi_slopes, jnp.float32)
            q, k, v = alibi.with_alibi(q, k, v, step.meta.positions, slopes, self.scale)
        plan = self.heads(step.mesh.shape["model"])
        sinks = None
        if self.sinks is not None:
            sinks = take_slots(layer.sinks_of_impl.jax()[None], plan.q_slots)[0].astype(jnp.float32)
        out, step.kv_cache = attention(
            take_slots(q, plan.q_slots), take_slots(k, plan.kv_slots), take_slots(v, plan.kv_slots),
            step.kv_cache, step.index_of_layer[cached] + step.layer_offset, step.meta,
            mesh=step.mesh, scale=self.scale, soft_cap=self.soft_cap, sliding_window=self.sliding_window, sinks=sinks,
            kv_scales=scales,
        )  # fmt: skip
        slot_of_head = {head: slot for slot, head in enumerate(plan.q_slots) if head is not None}
        return take_slots(out, [slot_of_head[head] for head in range(self.num_heads)])


class CacheScalesMethod(BaseKVCacheMethod):
    """Gives an attention layer the checkpoint's scales of its cache, `k_scale` and `v_scale`; -1 where the checkpoint has none."""

    def create_weights(self, layer: torch.nn.Module) -> None:
        layer.k_scale, layer.v_scale = KVCacheScaleParameter(), KVCacheScaleParameter()


def _cache_scales(layer: Any) -> jax.Array | None:
    """float32 [2] of K and V: 1 where the checkpoint has none, and the one that it has for both where it has one."""
    if not hasattr(layer, "k_scale"):
        return None
    k, v = layer.k_scale.jax(), layer.v_scale.jax()
    k, v = jnp.where(k > 0, k, v), jnp.where(v > 0, v, k)
    scales = jnp.stack([k, v]).astype(jnp.float32)
    return jnp.where(scales > 0, scales, 1.0)
