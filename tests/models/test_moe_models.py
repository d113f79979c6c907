# SPDX-License-Identifier: Apache-2.0
"""JAX models with experts, step by step, against transformers on the same float32 weights: one device or many, experts or their widths divided."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from helpers import tiny_models
from helpers.pytorch_models import Stepper, mesh, vllm_config
from tpu_inference.errors import TpuInferenceError
from tpu_inference.layers.common.build import BuildContext
from tpu_inference.layers.common.mxfp4 import dequantize
from tpu_inference.layers.common.weights import leaves
from tpu_inference.layers.jax.decoder import pure_functions
from tpu_inference.models.common.registry import model_class
from tpu_inference.models.common.vllm_loader import load_model

NAMES = ("mixtral", "qwen2-moe", "qwen3-moe", "gpt-oss", "deepseek-v2", "deepseek-v3", "llama4")
PROMPT, ANSWER = 40, 16
CASES = [
    pytest.param("qwen2-moe", 2, True, True, id="qwen2-moe, experts on two devices, scanned"),
    pytest.param("gpt-oss", 1, False, True, id="gpt-oss, one device, scanned"),
    pytest.param("llama4", 2, False, True, id="llama4, widths on two devices, scanned"),
    pytest.param("deepseek-v3", 2, True, True, id="deepseek-v3, experts on two devices, scanned"),
    pytest.param("deepseek-v2", 1, False, True, id="deepseek-v2, one device, scanned"),
    *(
        pytest.param(name, 8, whole, False, id=f"{name}, {what} on eight devices, looped", marks=pytest.mark.slow)
        for name in NAMES
        for whole, what in ((True, "experts"), (False, "widths"))
    ),
]


def hf_config(path, **changes):
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(path)
    for name, value in changes.items():
        setattr(config, name, value)
    return config


def built(path, *, shards=1, expert_parallel=False, scan=True, **changes):
    config = hf_config(path, **changes)
    ctx = BuildContext(mesh(shards), jnp.float32, 256, scan, expert_parallel=expert_parallel)
    return model_class(config.architectures[0])(config, ctx)


def check(functions, path):
    """Log-probabilities of a prompt, then greedy tokens one by one."""
    prompt = tiny_models.prompts(1, seed=5, longest=PROMPT)[0] + list(range(3, 20))
    answer = tiny_models.greedy(path, prompt, ANSWER)
    assert len(set(answer)) > ANSWER // 2, "these tokens prove little: they repeat"
    step = Stepper(functions, len(prompt) + ANSWER)
    logits = step(prompt)
    got = [int(logits[-1].argmax())]
    for token in answer[:-1]:
        got.append(int(step([token])[-1].argmax()))
    assert got == answer
    expected = tiny_models.logprobs(path, prompt)
    np.testing.assert_allclose(np.asarray(jax.nn.log_softmax(logits)), expected, atol=2e-3)


@pytest.mark.parametrize(("name", "shards", "expert_parallel", "scan"), CASES)
def test_against_transformers(zoo, name, shards, expert_parallel, scan):
    path = zoo(f"{name}@8")
    config = vllm_config(
        path, scan_layers=scan, model_impl="auto", tensor_parallel_size=shards, enable_expert_parallel=expert_parallel
    )
    check(load_model(config, mesh(shards)), path)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in NAMES if name != "llama4"])
def test_vllms_class_with_experts_divided(zoo, name):
    path = zoo(f"{name}@8")
    config = vllm_config(path, tensor_parallel_size=2, enable_expert_parallel=True)
    functions = load_model(config, mesh(2))
    divided = [
        a for a in jax.tree.leaves(functions.params) if a.ndim > 2 and a.sharding.spec and "model" in a.sharding.spec
    ]
    assert divided, "no device has experts of its own"
    check(functions, path)


def test_vllms_class_of_llama_4_is_refused(zoo):
    with pytest.raises(TpuInferenceError, match="local chunks is not served in vLLM's PyTorch classes"):
        load_model(vllm_config(zoo("llama4@8")), mesh())


def test_experts_lie_as_asked(zoo):
    """[layers, experts, out, in]: widths are padded to divide; experts stay whole."""
    for expert_parallel, shape in ((False, (3, 8, 12, 96)), (True, (3, 1, 86, 96))):
        specs = leaves(pure_functions(built(zoo("mixtral"), shards=8, expert_parallel=expert_parallel))[0])
        (spec,) = (s for s in specs if s.experts and s.axis == 0)
        abstract = spec.abstract(mesh(8))
        assert abstract.sharding.shard_shape(abstract.shape) == shape


@pytest.mark.parametrize("implementation", ["auto", "vllm"])
def test_experts_that_devices_do_not_divide_are_refused(zoo, implementation):
    path = zoo("mixtral@8")
    config = vllm_config(path, model_impl=implementation, enable_expert_parallel=True, tensor_parallel_size=2)
    config.model_config.hf_config.num_local_experts = 7
    with pytest.raises(TpuInferenceError, match="7 experts on 2 devices"):
        load_model(config, mesh(2), dummy=True)


def test_layers_of_both_kinds_are_scanned_in_runs(zoo):
    model = built(zoo("qwen3-moe"), mlp_only_layers=[0, 1], num_hidden_layers=5)
    assert model.cfg.runs() == [range(2), range(2, 5)]
    assert len(model.layers) == 2
    names = {layer for spec in leaves(pure_functions(model)[0]) if spec.experts for layer in spec.layer_indices}
    assert names == {2, 3, 4}


@pytest.mark.parametrize("shards", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_spare_expert_behind_128(tmp_path, shards):
    """Of odd widths on a device, so many would lie along the lanes of a TPU. No checkpoint has it, and no token goes to it."""
    tiny_models.build("gpt-oss@8", num_local_experts=128).save_pretrained(tmp_path)
    functions = load_model(vllm_config(str(tmp_path), model_impl="auto", tensor_parallel_size=shards), mesh(shards))
    stacks = [leaf for leaf in jax.tree.leaves(functions.params) if leaf.ndim == 4]
    assert {leaf.shape[1] for leaf in stacks} == {129}
    assert not any(leaf[:, 128].any() for leaf in stacks)
    check(functions, str(tmp_path))


def test_another_clamp_of_gpt_oss_is_refused(zoo):
    with pytest.raises(TpuInferenceError, match="swiglu_limit"):
        built(zoo("gpt-oss"), swiglu_limit=5.0)


@pytest.fixture(scope="module")
def mxfp4(tmp_path_factory):
    """(gpt-oss with its experts in MXFP4, what these mean in float32)."""
    from safetensors.numpy import load_file, save_file

    made, twin = (tmp_path_factory.mktemp(name) for name in ("mxfp4", "float32"))
    tiny_models.build("gpt-oss@8", intermediate_size=64).save_pretrained(twin)
    tensors, rng = load_file(twin / "model.safetensors"), np.random.default_rng(7)
    packed = {name: tensor for name, tensor in tensors.items() if not name.endswith("_proj") or ".experts." not in name}
    for name in tensors.keys() - packed.keys():
        experts, columns, rows = tensors[name].shape
        blocks = rng.integers(0, 256, (experts, rows, columns // 32, 16), dtype=np.uint8)
        scales = rng.integers(123, 127, (experts, rows, columns // 32), dtype=np.uint8)
        packed |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        both = zip(blocks, scales, strict=True)
        tensors[name] = np.stack([np.ascontiguousarray(dequantize(*expert).T) for expert in both])
    save_file(packed, made / "model.safetensors", {"format": "pt"})
    save_file(tensors, twin / "model.safetensors", {"format": "pt"})
    config = json.loads((twin / "config.json").read_text())
    (made / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "mxfp4"}}))
    return str(made), str(twin)


@pytest.mark.parametrize(("shards", "expert_parallel"), [(8, False), (4, True)])
def test_mxfp4_is_what_it_means(mxfp4, shards, expert_parallel):
    """Experts as float8 with a scale a row, half of the twin's bytes."""
    models = [
        load_model(
            vllm_config(
                path,
                dtype="bfloat16",
                model_impl="auto",
                tensor_parallel_size=shards,
                enable_expert_parallel=expert_parallel,
            ),
            mesh(shards),
        )
        for path in mxfp4
    ]
    made, twin = (
        {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(m.params)}
        for m in models
    )
    values = {name for name, leaf in made.items() if leaf.dtype == "float8_e4m3fn"}
    assert len(values) == 2 and len(made) == len(twin) + 2
    for name, leaf in twin.items():
        found = made[name].astype(np.float32)
        if name in values:
            found = found * made[name.replace("'w13'", "'s13'").replace("'w2'", "'s2'")]
        np.testing.assert_array_equal(found, leaf.astype(np.float32))
    found, expected = (jax.nn.log_softmax(Stepper(m, 24)(list(range(3, 27)))) for m in models)
    np.testing.assert_allclose(found, expected, atol=0.02)


def test_mxfp4_by_vllms_class_is_refused(mxfp4):
    with pytest.raises(Exception, match="MXFP4"):
        load_model(vllm_config(mxfp4[0], dtype="bfloat16"), mesh())


def test_quantized_experts_in_one_tensor_are_refused(zoo):
    with pytest.raises(TpuInferenceError, match="quantized weights of all experts together"):
        config = vllm_config(zoo("gpt-oss"), dtype="bfloat16", model_impl="auto", quantization="fp8_per_channel")
        load_model(config, mesh(), dummy=True)
