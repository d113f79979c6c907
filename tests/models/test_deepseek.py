# SPDX-License-Identifier: Apache-2.0
"""DeepSeek V2 and V3: what their configs mean, how their weights lie, and what is read of their checkpoints. Parity is in test_moe_models.py."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from helpers import quantized_models, tiny_models
from helpers.pytorch_models import Stepper, mesh, vllm_config
from tpu_inference.errors import TpuInferenceError
from tpu_inference.layers.common.build import BuildContext
from tpu_inference.layers.common.moe import Routing
from tpu_inference.layers.common.weights import leaves
from tpu_inference.layers.jax.decoder import pure_functions
from tpu_inference.models.common.checkpoint import CheckpointError
from tpu_inference.models.common.vllm_loader import implementation, load_model
from tpu_inference.models.jax.deepseek import DeepseekV2ForCausalLM, DeepseekV3ForCausalLM, attention_scale
from tpu_inference.runner.kv_cache_manager import abstract_kv_cache, uniform_layout

V3 = dict(n_group=8, topk_group=4, num_experts_per_tok=8, routed_scaling_factor=2.5)
EVEN = dict(
    hidden_size=128, intermediate_size=256, kv_lora_rank=32, q_lora_rank=64, qk_nope_head_dim=16, qk_rope_head_dim=8,
    v_head_dim=16, moe_intermediate_size=64,
)  # fmt: skip
"""Sizes that blocks of 32 divide, on two devices too."""


def config(kind="V3", **fields):
    import transformers

    common = dict(num_hidden_layers=4, num_attention_heads=4, hidden_size=64, rope_parameters=None)
    return getattr(transformers, f"Deepseek{kind}Config")(**{**common, **fields})


def built(kind="V3", shards=1, **fields):
    cls = {"V2": DeepseekV2ForCausalLM, "V3": DeepseekV3ForCausalLM}[kind]
    return cls(config(kind, **fields), BuildContext(mesh(shards), jnp.float32, 256, True))


@pytest.mark.parametrize(
    ("kind", "fields", "routing", "biased"),
    [
        ("V3", V3, Routing(8, True, "sigmoid", 8, 4, 2.5), True),
        ("V3", dict(V3, norm_topk_prob=False, n_group=None), Routing(8, False, "sigmoid", 1, 4, 2.5), True),
        ("V2", dict(num_experts_per_tok=6, n_group=1, topk_group=1), Routing(6, False, "softmax"), False),
        (
            "V2",
            dict(num_experts_per_tok=6, topk_method="group_limited_greedy", n_group=8, topk_group=3, routed_scaling_factor=16.0),
            Routing(6, False, "softmax", 8, 3, 16.0),
            False,
        ),
    ],
)  # fmt: skip
def test_routing(kind, fields, routing, biased):
    moe = built(kind, **fields).cfg.moe
    assert (moe.routing, moe.score_bias, moe.router_float32) == (routing, biased, True)


def test_scale_of_long_contexts():
    """Both of yarn's factors of queries and keys, as in transformers."""
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Attention

    yarn = dict(rope_type="yarn", rope_theta=1e4, factor=40.0, original_max_position_embeddings=64)
    for parameters in (dict(yarn, mscale=1.0, mscale_all_dim=0.7), yarn, dict(rope_type="default", rope_theta=1e4)):
        hf = config(rope_parameters=parameters)
        assert attention_scale(hf) == pytest.approx(DeepseekV3Attention(hf, 0).scaling)


def test_layers_with_experts():
    cfg = built(first_k_dense_replace=1, num_hidden_layers=6, moe_layer_freq=2).cfg
    assert cfg.moe_of_layer == (False, False, True, False, True, False)
    assert built(n_shared_experts=0).cfg.moe.shared_width == 0
    assert built("V2", n_routed_experts=0).cfg.moe is None


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        (dict(topk_method="random"), "topk_method='random'.*served are greedy"),
        (dict(scoring_func="tanh"), "scoring_func='tanh'"),
        (dict(hidden_act="gelu", n_group=3), "hidden_act='gelu'.*n_group=3.*must divide n_routed_experts=256"),
        (dict(is_causal=False), "is_causal=False"),
    ],
)
def test_fields_that_are_not_served(fields, said):
    with pytest.raises(TpuInferenceError, match=said):
        built(**fields)


@pytest.mark.parametrize(("heads", "shards", "slots"), [(4, 2, 2), (3, 2, 2), (4, 8, 1)])
def test_heads_are_divided_and_latents_are_on_every_device(heads, shards, slots):
    from tpu_inference.models.common.loader import model_functions

    model = built(shards=shards, num_attention_heads=heads, hidden_size=96, num_key_value_heads=heads)
    specs, where = pure_functions(model)[0], mesh(shards)
    by_name = {"/".join(sorted({n.rpartition("self_attn.")[2] for n in s.sources()})): s for s in leaves(specs)}
    shapes = {}
    for name in ("q_b_proj.weight", "kv_b_proj.weight", "kv_a_proj_with_mqa.weight/q_a_proj.weight", "o_proj.weight"):
        abstract = by_name[name].abstract(where)
        shapes[name] = abstract.sharding.shard_shape(abstract.shape)[1:]
    assert list(shapes.values()) == [
        (slots * 192, 1536),
        (slots * 128, 512),
        (1536 + 512 + 64 + 64, 96),
        (96, slots * 128),
    ]
    functions = model_functions(model, None, where)
    (pages,) = abstract_kv_cache(functions, uniform_layout(functions, 3), 16, jnp.float32, where).pages
    assert pages.shape == pages.sharding.shard_shape(pages.shape) == (4 * 3, 1, 1, 16, 512 + 64)


def test_layers_that_predict_further_tokens_are_not_read(zoo, tmp_path):
    """Those behind the last, of which the config says how many; another is left over."""
    path = zoo("deepseek-v3")
    tensors = load_file(f"{path}/model.safetensors")
    shutil.copy(f"{path}/config.json", tmp_path)
    more = {f"model.layers.{i}.eh_proj.weight": np.zeros((2, 2), np.float32) for i in (3, 4)}
    save_file(
        {**tensors, "model.layers.3.eh_proj.weight": more["model.layers.3.eh_proj.weight"]},
        tmp_path / "model.safetensors",
    )
    load_model(vllm_config(str(tmp_path), model_impl="auto"), mesh())
    save_file({**tensors, **more}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"left over: model\.layers\.4\.eh_proj") as error:
        load_model(vllm_config(str(tmp_path), model_impl="auto"), mesh())
    assert len(error.value.problems) == 1


@pytest.fixture(scope="module")
def blocks(tmp_path_factory):
    """(a checkpoint of fp8 blocks, its twin in bfloat16)."""
    directory = tmp_path_factory.mktemp("deepseek")
    tiny_models.build("deepseek-v3@8", **EVEN).save_pretrained(directory / "float32")
    return quantized_models.save(str(directory / "float32"), "fp8-block", directory)


@pytest.mark.parametrize(
    ("shards", "expert_parallel"), [(1, False), pytest.param(2, False, marks=pytest.mark.slow), (2, True)]
)
def test_blocks_of_fp8(blocks, shards, expert_parallel):
    """What is absorbed is dequantized, all else stays as it is, and answers are those of the same numbers in bfloat16."""
    options = dict(tensor_parallel_size=shards, enable_expert_parallel=expert_parallel, dtype="bfloat16")
    made, twin = (load_model(vllm_config(path, model_impl="auto", **options), mesh(shards)) for path in blocks)
    for run in range(2):
        layers = [f.params["layers"][run]["attention"] for f in (made, twin)]
        for name in ("k_up", "v_up"):
            a, b = (layer[name][...] for layer in layers)
            assert a.dtype == jnp.bfloat16 and a.any()
            np.testing.assert_array_equal(a, b)
        for name in ("down", "q", "o"):
            assert layers[0][name]["weight"][...].dtype == jnp.float8_e4m3fn
    prompt = tiny_models.prompts(1, seed=5)[0] + list(range(3, 40))
    logits, expected = (jax.nn.log_softmax(Stepper(f, len(prompt))(prompt)) for f in (made, twin))
    # Sums of blocks are scaled in float32 here, weights are in bfloat16 there.
    assert np.abs(logits - expected).mean() < 0.15 * np.abs(expected - expected.mean()).mean()


def test_whole_heads_where_latents_are_not_wanted(zoo, monkeypatch):
    path = zoo("deepseek-v3@8")
    monkeypatch.setenv("VLLM_MLA_DISABLE", "1")
    chosen = implementation(vllm_config(path, model_impl="auto"))
    assert chosen.kind == "vllm" and "VLLM_MLA_DISABLE" in chosen.why
    monkeypatch.setenv("MODEL_IMPL_TYPE", "flax_nnx")
    with pytest.raises(Exception, match="VLLM_MLA_DISABLE=1 asks for attention over whole heads"):
        vllm_config(path, model_impl="auto")


def test_vllms_class_attends_over_whole_heads(zoo):
    """Without VLLM_MLA_DISABLE too: it is made as if that were set."""
    functions = load_model(vllm_config(zoo("deepseek-v3@8")), mesh(), dummy=True)
    assert {(layer.latent, layer.num_kv_heads) for layer in functions.layers} == {(None, 8)}
