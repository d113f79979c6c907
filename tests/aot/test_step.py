# SPDX-License-Identifier: Apache-2.0
"""The real TPU compiler takes the engine's step, sharded, without a TPU."""

import os
import re
from typing import Literal

os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import topologies

from helpers.tiny_models import FAMILIES
from tpu_inference.layers.common.build import BuildContext
from tpu_inference.layers.common.quantization import Quantization, Scheme
from tpu_inference.layers.common.sharding import make_mesh, shard_bytes
from tpu_inference.layers.common.weights import map_specs
from tpu_inference.layers.jax.decoder import pure_functions
from tpu_inference.models.common.loader import model_functions
from tpu_inference.models.common.registry import model_class
from tpu_inference.runner.buckets import Bucket, BucketPlan
from tpu_inference.runner.compilation_manager import CompilationManager
from tpu_inference.runner.kv_cache_manager import abstract_kv_cache, uniform_layout
from tpu_inference.runner.programs import StepPrograms

pytestmark = [pytest.mark.slow, pytest.mark.aot]
ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "gemma3": "Gemma3ForCausalLM",
    "qwen2-moe": "Qwen2MoeForCausalLM",
    "qwen3-moe": "Qwen3MoeForCausalLM",
    "gpt-oss": "GptOssForCausalLM",
    "llama4": "Llama4ForCausalLM",
    "deepseek-v3": "DeepseekV3ForCausalLM",
}


def programs(
    name: str, topology: str, tensor_parallel: int, scheme: Scheme | Literal["mxfp4"] | None = None, **sizes: int
) -> StepPrograms:
    """`scheme`: of linear layers and experts, or "mxfp4": of gpt-oss's experts alone."""
    import transformers

    kind, extra = FAMILIES[name]
    shape = dict(hidden_size=512, intermediate_size=1024, num_hidden_layers=4, num_attention_heads=8, head_dim=128)
    hf_config = getattr(transformers, kind)(
        **{**dict(vocab_size=2048, num_key_value_heads=2, max_position_embeddings=2048), **extra, **shape,
           **sizes, "layer_types": None}
    )  # fmt: skip
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    mesh = make_mesh(devices, tensor_parallel)
    of_experts, of_layers = ("mxfp4", None) if scheme == "mxfp4" else (None, scheme)
    quantization = scheme and Quantization(lambda layer: of_layers, hf_config.num_hidden_layers, experts=of_experts)
    ctx = BuildContext(mesh, jnp.bfloat16, 2048, quantization=quantization)
    module = model_class(ARCHITECTURES[name])(hf_config, ctx)
    specs, _, _ = pure_functions(module)
    model = model_functions(module, map_specs(lambda spec: spec.abstract(mesh), specs), mesh)
    assert model.flat_kv, "layers are scanned on TPU"
    layout = uniform_layout(model, num_blocks=512)
    return StepPrograms(
        model,
        BucketPlan.build(256, 32, on_tpu=True),
        mesh,
        CompilationManager(strict=False),
        kv_cache=abstract_kv_cache(model, layout, 16, model.kv_dtype, mesh),
        num_groups=1,
        max_blocks=129,
        num_slots=32,
        max_logprobs=20,
        hidden=model.hidden,
    )


@pytest.mark.parametrize(
    ("name", "topology"),
    [
        *((name, topology) for name in ("llama", "gemma3") for topology in ("v6e:2x2", "v5e:2x2")),
        ("qwen2-moe", "v5e:2x2"),
        ("gpt-oss", "v6e:2x2"),
        ("llama4", "v6e:2x2"),
    ],
)
def test_forward_compiles_with_the_cache_in_place(name, topology):
    case = programs(name, topology, 4).forward_case(Bucket(32, 32))
    memory = case.fn.lower(*case.args).compile().memory_analysis()
    pages = case.args[1].pages[0]
    per_device = pages.size * pages.dtype.itemsize // 4
    assert memory.alias_size_in_bytes >= per_device, "the KV cache is donated"
    assert memory.temp_size_in_bytes < per_device, "a temporary as large as the cache is a copy of it"


def test_sampling_compiles():
    made = programs("llama", "v6e:2x2", 4)
    for case in (made.greedy_case(32), made.sample_case(32), made.logprobs_case(32)):
        assert case.fn.lower(*case.args).compile().cost_analysis()["flops"] > 0


def test_weights_are_multiplied_where_they_lie():
    """No layer's weights are copied out of the stacked ones: that would cost as much as the product."""
    case = programs("llama", "v6e:2x2", 4).forward_case(Bucket(32, 32))
    text = case.fn.lower(*case.args).compile().as_text()
    # Inside fusions slices are read, not written: their operands are parameters of the fusion.
    slices = re.findall(r"^ *%\S+ = bf16\[1,\d{3,},\d{3,}\]\S* (?:fusion|dynamic-slice)\(%(\w+)", text, re.M)
    assert slices, "weights are sliced at all"
    assert all(operand.startswith("param") for operand in slices)


_INT8, _FP8 = Scheme("int8", activations="int8"), Scheme("float8_e4m3fn")
_BLOCK, _INT4 = Scheme("float8_e4m3fn", (128, 128)), Scheme("int8", (1, 64), packed=4)
_AWQ = Scheme(
    "int8", (1, 128), packed=4, layout="awq", zeros_name="qzeros", values_name="qweight", scales_name="scales"
)


@pytest.mark.parametrize(
    ("scheme", "topology"),
    [
        (_INT8, "v6e:2x2"),
        (_FP8, "v6e:2x2"),
        (_BLOCK, "v6e:2x2"),
        (_INT4, "v6e:2x2"),
        (_AWQ, "tpu7x:2x2x1"),
        (_FP8, "v5e:2x2"),
        (_BLOCK, "tpu7x:2x2x1"),
    ],
)
def test_quantized_weights_stay_so_in_hbm(scheme, topology):
    case = programs("llama", topology, 4, scheme, hidden_size=2048, intermediate_size=8192).forward_case(Bucket(32, 32))
    memory = case.fn.lower(*case.args).compile().memory_analysis()
    stacks = [w for w in jax.tree.leaves(case.args[0]) if w.ndim == 3 and w.dtype.itemsize == 1]
    assert len(stacks) == 4, "qkv, o, gate and up, down"
    assert memory.temp_size_in_bytes < max(map(shard_bytes, stacks)) / 10, "the weights of one of four layers are more"


@pytest.mark.parametrize("scheme", [None, Scheme("float8_e4m3fn", (128, 128))], ids=["bfloat16", "fp8-block"])
def test_experts_are_multiplied_where_they_lie(scheme):
    """Neither all layers' are laid out anew, nor one layer's copied out of the stack."""
    sizes = dict(
        hidden_size=2048, num_experts=32, mlp_only_layers=[], moe_intermediate_size=768 if scheme is None else 1024
    )
    case = programs("qwen3-moe", "v6e:2x2", 4, scheme, **sizes).forward_case(Bucket(32, 32))
    stacks = [w for w in jax.tree.leaves(case.args[0]) if w.ndim == 4 and w.shape[3] > 100]
    assert len(stacks) == 2, "gate and up, down"
    memory = case.fn.lower(*case.args).compile().memory_analysis()
    assert memory.temp_size_in_bytes < min(map(shard_bytes, stacks)) / 4, "the experts of one of four layers"


@pytest.mark.parametrize("scheme", [None, "mxfp4"])
@pytest.mark.parametrize(("topology", "experts"), [("v6e:2x4", 16), ("tpu7x:2x2x1", 16), ("tpu7x:2x2x1", 128)])
def test_experts_of_odd_widths_are_multiplied_where_they_lie(topology, experts, scheme):
    """gpt-oss's: 360 columns of 2,880 outputs lie transposed, neither of which is whole lanes; 128 experts would be."""
    sizes = dict(hidden_size=2880, intermediate_size=2880, num_attention_heads=64, num_key_value_heads=8, head_dim=64)
    case = programs("gpt-oss", topology, 8, scheme, num_local_experts=experts, **sizes).forward_case(Bucket(32, 32))
    stacks = [w for w in jax.tree.leaves(case.args[0]) if w.ndim == 4 and w.shape[3] > 1]
    assert len(stacks) == 2 and all(w.dtype.itemsize == (1 if scheme else 2) for w in stacks), "gate and up, down"
    memory = case.fn.lower(*case.args).compile().memory_analysis()
    assert memory.temp_size_in_bytes < min(map(shard_bytes, stacks)) / 4, "the experts of one of four layers"


DEEPSEEK = dict(
    hidden_size=7168, intermediate_size=2304, num_attention_heads=8, num_key_value_heads=8, q_lora_rank=1536, kv_lora_rank=512,
    qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128, n_routed_experts=8, num_experts_per_tok=8, n_group=4, topk_group=4,
    moe_intermediate_size=2048, n_shared_experts=1, first_k_dense_replace=1,
)  # fmt: skip
"""V3's layers with the dense width, heads and experts that a device has of 64; a dense and three layers of experts."""


def test_latent_attention_reads_weights_and_latents_where_they_lie():
    """On one device of as many as DeepSeek V3 needs, in blocks of fp8: neither the cache nor what is absorbed is copied."""
    case = programs("deepseek-v3", "v6e:2x2", 1, _BLOCK, **DEEPSEEK).forward_case(Bucket(32, 32))
    compiled = case.fn.lower(*case.args).compile()
    memory, pages = compiled.memory_analysis(), case.args[1].pages[0]
    assert memory.alias_size_in_bytes >= shard_bytes(pages)
    assert "paged_decode" in compiled.as_text(), "the kernels serve it"
    up = 8 * 128 * 512 * 2
    assert memory.temp_size_in_bytes < 3 * 3 * up, "what is absorbed of the keys of three layers, and as much again"


def test_scanned_weights_are_not_copied_on_tpu7x():
    sizes = dict(hidden_size=4096, intermediate_size=14336, num_attention_heads=32, num_key_value_heads=8)
    case = programs("llama", "tpu7x:2x2x1", 8, **sizes).forward_case(Bucket(32, 32))
    temporaries = case.fn.lower(*case.args).compile().memory_analysis().temp_size_in_bytes
    assert temporaries < max(map(shard_bytes, jax.tree.leaves(case.args[0]))) / 10
