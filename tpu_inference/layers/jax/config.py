# SPDX-License-Identifier: Apache-2.0
"""What a decoder is made of: the one description that its layers are built from."""

from dataclasses import dataclass, field
from typing import Any

from tpu_inference.errors import TpuInferenceError
from tpu_inference.layers.common.moe import Routing
from tpu_inference.layers.common.rope import Rope, rope_from_config

KINDS = ("full_attention", "sliding_attention", "chunked_attention")
ACTIVATIONS = ("silu", "gelu", "gelu_pytorch_tanh", "gelu_new", "relu")


@dataclass(frozen=True)
class WeightNames:
    """Names in the checkpoint; those of a layer are relative to `layer`. A name alone instead of several: the checkpoint fuses them."""

    embed: str = "model.embed_tokens"
    layer: str = "model.layers.{layer}"
    norm: str = "model.norm"
    lm_head: str = "lm_head"
    qkv: tuple[str, ...] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    o: str = "self_attn.o_proj"
    q_norm: str = "self_attn.q_norm"
    k_norm: str = "self_attn.k_norm"
    sinks: str = "self_attn.sinks"
    gate_up: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj")
    down: str = "mlp.down_proj"
    attention_norms: tuple[str, ...] = ("input_layernorm",)
    """Before attention, and after it where there are two."""
    mlp_norms: tuple[str, ...] = ("post_attention_layernorm",)
    """Before the MLP, and after it where there are two."""
    unread: tuple[str, ...] = ()
    """Beginnings of the names of tensors that are of other modalities than text."""


@dataclass(frozen=True)
class ExpertNames:
    """Names in the checkpoint, relative to `WeightNames.layer`. Names without "{expert}" are of tensors that hold all experts."""

    router: str = "mlp.gate"
    router_score_bias: str = "mlp.gate.e_score_correction_bias"
    gate_up: tuple[str, ...] = ("mlp.experts.{expert}.gate_proj.weight", "mlp.experts.{expert}.up_proj.weight")
    """A name alone: the checkpoint fuses them."""
    down: str = "mlp.experts.{expert}.down_proj.weight"
    gate_up_bias: str | None = None
    down_bias: str | None = None
    shared_gate_up: tuple[str, ...] = ("mlp.shared_experts.gate_proj", "mlp.shared_experts.up_proj")
    shared_down: str = "mlp.shared_experts.down_proj"
    shared_gate: str | None = None
    """A Linear of one output, whose sigmoid is the shared expert's weight; None: it has none."""


@dataclass(frozen=True)
class MoEConfig:
    """A layer of experts."""

    num_experts: int
    width: int
    """Of one expert."""
    routing: Routing
    activation: str = "silu"
    """A key of `layers.common.moe.ACTIVATIONS`."""
    shared_width: int = 0
    """Of the expert that every token goes to; 0: there is none."""
    router_bias: bool = False
    router_float32: bool = False
    """Whether the router multiplies in float32 whatever the model's type (DeepSeek)."""
    score_bias: bool = False
    """Whether scores have a bias for the choice alone (DeepSeek V3)."""
    transposed: bool = False
    """Whether the checkpoint stores experts as [in, out]."""
    weigh_input: bool = False
    """Whether weights go on what experts take in (Llama 4)."""
    names: ExpertNames = field(default_factory=ExpertNames)


@dataclass(frozen=True)
class MLAConfig:
    """Attention over latents (DeepSeek)."""

    q_rank: int
    """Of what queries are made from; 0: of the hidden state itself."""
    kv_rank: int
    """Of a token's latent, of which its keys and values are made."""
    nope_dim: int
    """Of a head's query and key: the part that is not rotated."""
    rope_dim: int
    value_dim: int
    pairs: bool = True
    """Whether neighbours are rotated together, instead of halves."""
    down_bias: bool = False

    @property
    def qk_dim(self) -> int:
        """Of a head's query."""
        return self.nope_dim + self.rope_dim


@dataclass(frozen=True)
class DecoderConfig:
    """A decoder-only transformer."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    eps: float
    activation: str
    scale: float
    """Factor on attention scores."""
    ropes: tuple[Rope, ...]
    """Kinds of rotary embedding, and below which one each layer uses."""
    rope_of_layer: tuple[int, ...]
    window_of_layer: tuple[int | None, ...]
    tie_embeddings: bool
    chunk_of_layer: tuple[int | None, ...] = ()
    """Tokens of a chunk that attention stays within, in those layers where it does; one size. Empty: in none."""
    interleaved_rope: bool = False
    """Whether rotated dimensions are neighbours (Llama 4), not of two halves."""
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    norm_offset: float = 0.0
    embed_scale: float = 1.0
    attention_soft_cap: float | None = None
    logits_soft_cap: float | None = None
    sinks: bool = False
    """Whether each head has the score of one more key, which has no value (gpt-oss)."""
    names: WeightNames = field(default_factory=WeightNames)
    moe: MoEConfig | None = None
    moe_of_layer: tuple[bool, ...] = ()
    """Which layers have experts in the place of the MLP; empty: none."""
    mla: MLAConfig | None = None
    layers_unread: int = 0
    """Layers that the checkpoint has behind the last and nothing reads."""

    @property
    def chunk(self) -> int | None:
        """The size of all layers' chunks; None where attention has none."""
        return next((chunk for chunk in self.chunk_of_layer if chunk), None)

    def runs(self) -> list[range]:
        """Layers that follow each other and are alike, which one scan can run."""
        kinds = self.moe_of_layer or (False,) * self.num_layers
        starts = [i for i in range(self.num_layers) if i == 0 or kinds[i] != kinds[i - 1]]
        return [range(start, stop) for start, stop in zip(starts, [*starts[1:], self.num_layers], strict=True)]


def decoder_config(hf: Any, max_model_len: int, **choices: Any) -> DecoderConfig:
    """The common reading of a transformers config; a family passes what it does differently as `choices`.

    Raises:
        TpuInferenceError: a field that the layers do not serve.
    """
    head_dim = getattr(hf, "head_dim", None) or hf.hidden_size // hf.num_attention_heads
    activation = getattr(hf, "hidden_act", None) or hf.hidden_activation
    if activation not in ACTIVATIONS:
        raise TpuInferenceError(f"hidden_act={activation!r} is not served; served are {', '.join(ACTIVATIONS)}.")
    kinds = layer_kinds(hf)
    rope_keys = [kind if kind in hf.rope_parameters else None for kind in kinds]
    unique = list(dict.fromkeys(rope_keys))
    fields = dict(
        vocab_size=hf.vocab_size,
        hidden_size=hf.hidden_size,
        intermediate_size=hf.intermediate_size,
        num_layers=hf.num_hidden_layers,
        num_heads=hf.num_attention_heads,
        num_kv_heads=getattr(hf, "num_key_value_heads", None) or hf.num_attention_heads,
        head_dim=head_dim,
        eps=hf.rms_norm_eps,
        activation=activation,
        scale=head_dim**-0.5,
        ropes=tuple(rope_from_config(hf, head_dim, max_model_len, key) for key in unique),
        rope_of_layer=tuple(unique.index(key) for key in rope_keys),
        window_of_layer=tuple(hf.sliding_window if kind == "sliding_attention" else None for kind in kinds),
        chunk_of_layer=tuple(hf.attention_chunk_size if kind == "chunked_attention" else None for kind in kinds),
        tie_embeddings=bool(hf.tie_word_embeddings),
    )
    return DecoderConfig(**{**fields, **choices})


def layer_kinds(hf: Any) -> list[str]:
    """ "full_attention", "sliding_attention" or "chunked_attention" of each layer: the config's list, else its `sliding_window` for all."""
    kinds = getattr(hf, "layer_types", None)
    if kinds is None:
        everywhere = "sliding_attention" if getattr(hf, "sliding_window", None) else "full_attention"
        kinds = [everywhere] * hf.num_hidden_layers
    unknown = sorted(set(kinds) - set(KINDS))
    if unknown or len(kinds) != hf.num_hidden_layers:
        raise TpuInferenceError(
            f"layer_types must name one of {', '.join(KINDS)} for each of {hf.num_hidden_layers} layers; "
            f"it has {len(kinds)} entries{', among them ' + ', '.join(unknown) if unknown else ''}."
        )
    return list(kinds)
