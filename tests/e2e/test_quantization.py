# SPDX-License-Identifier: Apache-2.0
"""Quantized checkpoints, and unquantized ones that are quantized at load, through vLLM's engine."""

import json
import shutil
from functools import cache, partial

import jax
import numpy as np
import pytest

from helpers import quantized_models
from helpers.engines import engine as any_engine
from helpers.engines import likeness, of_prompts, tokens
from helpers.quantized_models import KINDS
from helpers.tiny_models import prompts
from tpu_inference.errors import ConfigError, TpuInferenceError
from tpu_inference.models.common.checkpoint import CheckpointError

engine = partial(any_engine, max_num_seqs=8)
"""Few programs: many engines are started here."""
COUNT = 24
SUMS = "devices' parts are summed in bfloat16 as they arrive, which chooses other tokens now and then, and all others after"
PACKED = ("int4-group", "int4-zeros", "awq", "gptq", "nvfp4", "mxfp4")
REORDERED = "of two values in a byte one is multiplied before the other, which seldom chooses another token, and all others after"
IMPLEMENTATIONS = ["auto", pytest.param("vllm", marks=pytest.mark.slow)]
SLOW = set(KINDS) - {"fp8-block", "int8-channel", "int4-group"}


@pytest.fixture(scope="module")
def quantized(zoo, tmp_path_factory):
    """kind -> (the quantized checkpoint, its twin in bfloat16)."""
    directory = tmp_path_factory.mktemp("quantized")
    return lambda kind, **options: quantized_models.save(zoo("llama@even"), kind, directory, **options)


def runner(llm):
    return llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner


def by_path(params):
    """Arrays of the host."""
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(params)}


@cache
def answers(path, **options):
    """The same engine answers the same: that of a twin is asked once."""
    with engine(path, dtype="bfloat16", **options) as llm:
        return tokens(llm, prompts(6), COUNT)


@cache
def probabilities(path, **options):
    with engine(path, **options) as llm:
        return of_prompts(llm)


@pytest.mark.parametrize("kind", [pytest.param(k, marks=pytest.mark.slow if k in SLOW else ()) for k in KINDS])
def test_a_checkpoint_answers_as_its_twin_does(quantized, kind):
    made, twin = quantized(kind)
    expected, found = answers(twin), answers(made)
    assert_alike(expected, found, kind)


def assert_alike(expected, found, kind):
    if kind == "int8-activations":  # rounded, as the checkpoint asks for
        same = sum(a == b for x, y in zip(expected, found, strict=True) for a, b in zip(x[:4], y[:4], strict=True))
        assert same >= 0.5 * 4 * len(found)
    elif kind in PACKED:
        assert sum(a == b for a, b in zip(expected, found, strict=True)) >= len(found) - 1, REORDERED
    else:
        assert found == expected


@pytest.mark.parametrize("kind", [pytest.param(k, marks=pytest.mark.slow if k != "awq" else ()) for k in KINDS])
def test_pytorch_model_answers_as_its_twin_does(quantized, kind):
    made, twin = quantized(kind)
    assert_alike(answers(twin, model_impl="vllm"), answers(made, model_impl="vllm"), kind)


@pytest.mark.slow
@pytest.mark.parametrize("devices", [2, 8])
@pytest.mark.parametrize("kind", ["fp8-block", "fp8-block-128", "int4-zeros"])
def test_pytorch_model_on_several_devices(quantized, kind, devices):
    made, twin = quantized(kind)
    with engine(made, dtype="bfloat16", tensor_parallel_size=devices, model_impl="vllm") as llm:
        found = tokens(llm, prompts(6), 8)
        params = runner(llm).functions.params
    values = [leaf for name, leaf in params.items() if name.endswith("down_proj.weight")]
    assert values and all(leaf.sharding.shard_shape(leaf.shape)[-1] == leaf.shape[-1] // devices for leaf in values)
    expected = [answer[:8] for answer in answers(twin, model_impl="vllm")]
    assert sum(a[0] == b[0] for a, b in zip(expected, found, strict=True)) >= 4, SUMS


@pytest.mark.parametrize("where", ["two-devices", pytest.param("eight-devices", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "kind", [*(pytest.param(kind, marks=pytest.mark.slow) for kind in ("fp8-block", "fp8-block-128")), "int4-group"]
)
def test_on_several_devices(quantized, kind, where):
    made, twin = quantized(kind)
    devices = {"two-devices": 2, "eight-devices": 8}[where]
    with engine(made, dtype="bfloat16", tensor_parallel_size=devices) as llm:
        found = tokens(llm, prompts(6), 8)
    expected = [answer[:8] for answer in answers(twin)]
    assert sum(a[0] == b[0] for a, b in zip(expected, found, strict=True)) >= 4, SUMS


FOUR_BITS = [
    ("awq", "auto"),
    ("mxfp4", "auto"),
    *(pytest.param(kind, "auto", marks=pytest.mark.slow) for kind in ("int4-group", "int4-zeros", "gptq", "nvfp4")),
    *(pytest.param(kind, "vllm", marks=pytest.mark.slow) for kind in ("int4-group", "awq", "nvfp4")),
]


@pytest.mark.parametrize(("kind", "impl"), FOUR_BITS)
def test_two_values_of_four_bits_in_a_byte(zoo, tmp_path_factory, kind, impl):
    """Where columns are whole blocks: half the bytes, and the twin's answers."""
    made, twin = quantized_models.save(zoo("llama@blocks"), kind, tmp_path_factory.mktemp("packed"))
    with engine(made, dtype="bfloat16", model_impl=impl) as llm:
        found = tokens(llm, prompts(6), COUNT)
        leaves = jax.tree.leaves(runner(llm).functions.params)
    values = [leaf for leaf in leaves if leaf.dtype == np.uint8]
    per_layer = 256 * (8 + 2 * 2) * 32 + 256 * 256 + 3 * 256 * 512
    assert sum(leaf.size for leaf in values) == 3 * per_layer // 2
    assert not any(leaf.dtype in ("int8", "float8_e4m3fn") for leaf in leaves)
    with engine(twin, dtype="bfloat16", model_impl=impl) as llm:
        expected = tokens(llm, prompts(6), COUNT)
    assert_alike(expected, found, kind)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "impl"), [("int4-zeros", "auto"), ("mxfp4", "auto"), ("int4-zeros", "vllm")])
def test_two_values_in_a_byte_on_two_devices(zoo, tmp_path_factory, kind, impl):
    """Of o_proj a device has half a block of columns, which stays in bytes; of down_proj a whole one."""
    made, twin = quantized_models.save(zoo("llama@blocks"), kind, tmp_path_factory.mktemp("packed"))
    with engine(made, dtype="bfloat16", tensor_parallel_size=2, model_impl=impl) as llm:
        found = tokens(llm, prompts(6), 8)
        leaves = jax.tree.leaves(runner(llm).functions.params)
    assert {str(leaf.dtype) for leaf in leaves} >= {"uint8", "int8" if kind == "int4-zeros" else "float8_e4m3fn"}
    expected = [answer[:8] for answer in answers(twin, model_impl=impl)]
    assert sum(a[0] == b[0] for a, b in zip(expected, found, strict=True)) >= 4, SUMS


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    ("flags", "dtype"),
    [
        pytest.param(dict(quantization="fp8_per_channel"), "float8_e4m3fn", marks=pytest.mark.slow),
        (dict(quantization="online", quantization_config={"linear": "int8_per_channel_static"}), "int8"),
    ],
)
def test_rounded_at_load(zoo, flags, dtype, impl):
    """Answers begin as those of the whole weights do."""
    path = zoo("llama@even")
    expected = answers(path)
    with engine(path, dtype="bfloat16", model_impl=impl, **flags) as llm:
        found = tokens(llm, prompts(6), COUNT)
        params = runner(llm).functions.params
    # Of qkv, o, gate and up, and down: one of all layers by our class, one a layer by vLLM's, whose three layers are too few to stack.
    assert sum(leaf.dtype == dtype for leaf in jax.tree.leaves(params)) == (4 if impl == "auto" else 12)
    same = sum(a == b for x, y in zip(expected, found, strict=True) for a, b in zip(x[:3], y[:3], strict=True))
    assert same >= 6, "of 18; by chance it would be none"


def test_layers_that_are_to_be_left_as_they_are(zoo):
    quantization = {"linear": "int8_per_channel_static", "ignore": ["*.mlp.*"]}
    with engine(zoo("llama@even"), dtype="bfloat16", quantization="online", quantization_config=quantization) as llm:
        params = runner(llm).functions.params
        assert tokens(llm, prompts(1), 2)
    assert sum(leaf.dtype == "int8" for leaf in jax.tree.leaves(params)) == 2


def spoil(name, change):
    """A change of checkpoints: of the one tensor whose name ends so."""

    def apply(tensors):
        (found,) = [key for key in tensors if key.endswith(name)]
        if (new := change(tensors.pop(found))) is not None:
            tensors[found] = new

    return apply


def with_nan(values):
    """One of the values, negative, is no number."""
    values[1, 3] = -float("nan")
    return values


@pytest.mark.parametrize("impl", ["auto", "vllm"])
def test_scales_that_are_missing_or_no_numbers_are_named_together(quantized, impl):
    def change(tensors):
        spoil("layers.1.self_attn.k_proj.weight_scale_inv", lambda scales: None)(tensors)
        spoil("layers.2.mlp.down_proj.weight_scale_inv", lambda scales: scales * float("nan"))(tensors)
        spoil("layers.0.mlp.up_proj.weight", with_nan)(tensors)

    made, _ = quantized("fp8-block", change=change)
    with pytest.raises(CheckpointError) as caught, engine(made, dtype="bfloat16", model_impl=impl):
        pass
    problems = sorted(caught.value.problems)
    assert any("missing: model.layers.1.self_attn.k_proj.weight_scale_inv" in problem for problem in problems)
    assert any("not finite: model.layers.2.mlp.down_proj.weight_scale_inv" in problem for problem in problems)
    assert any("not a number: model.layers.0.mlp.up_proj.weight" in problem for problem in problems)
    if impl == "auto":
        assert len(problems) == 3


@pytest.mark.parametrize("impl", ["auto", "vllm"])
def test_values_that_are_no_numbers_are_named_together(quantized, impl):
    def change(tensors):
        spoil("layers.0.self_attn.q_proj.weight", with_nan)(tensors)
        spoil("layers.2.mlp.down_proj.weight", with_nan)(tensors)

    made, _ = quantized("fp8-tensor", change=change)
    with pytest.raises(CheckpointError) as caught, engine(made, dtype="bfloat16", model_impl=impl):
        pass
    assert len(caught.value.problems) == 2
    assert all("self_attn.q_proj.weight" in p or "down_proj.weight" in p for p in caught.value.problems)


_ACT_ORDER = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": True, "sym": True}


@pytest.mark.parametrize(
    ("kind", "options", "said"),
    [
        (_ACT_ORDER, {}, "desc_act=True"),
        ("int4-group", dict(hf_overrides={"intermediate_size": 128}, tensor_parallel_size=8), "groups of 32 columns"),
        (None, dict(quantization="int8_per_channel_weight_only"), "experts alone, of a model that has none"),
        (None, dict(quantization="fp8_per_block"), "fp8_per_block.*Served are"),
        (None, dict(quantization="online", quantization_config={"linear": "mxfp4"}), "at load by.*Served are"),
        (
            "int4-group",
            dict(hf_overrides={"intermediate_size": 128}, tensor_parallel_size=8, model_impl="vllm"),
            "groups of 32 columns",
        ),
    ],
)
def test_what_is_not_served(quantized, zoo, tmp_path, kind, options, said):
    if isinstance(kind, dict):
        made = shutil.copytree(zoo("llama@even"), tmp_path / "made")
        config = json.loads((made / "config.json").read_text())
        (made / "config.json").write_text(json.dumps({**config, "quantization_config": kind}))
    else:
        made = zoo("llama@even") if kind is None else quantized(kind)[0]
    with pytest.raises(Exception, match=f"(?s){said}"), engine(str(made), dtype="bfloat16", **options):
        pass


EXPERTS = [
    ("mixtral@even", "fp8-block", {}),
    ("mixtral@even", "int4-group", dict(tensor_parallel_size=2, enable_expert_parallel=True)),
    ("mixtral@even", "int8-channel", dict(tensor_parallel_size=2)),
    ("mixtral@even", "fp8-block-128", dict(tensor_parallel_size=2)),
    ("qwen3-moe@even-experts", "fp8-block", dict(tensor_parallel_size=2)),
    ("qwen2-moe@even-experts", "fp8-tensor", {}),
]
QUICK = ("mixtral@even", "fp8-block", "auto")


@pytest.mark.parametrize(
    ("model", "kind", "options", "impl"),
    [
        pytest.param(*case, impl, marks=() if (*case[:2], impl) == QUICK else pytest.mark.slow)
        for case in EXPERTS
        for impl in ("auto", "vllm")
    ],
)
def test_quantized_experts(zoo, tmp_path, model, kind, options, impl):
    made, twin = quantized_models.save(zoo(model), kind, tmp_path)
    with engine(twin, dtype="bfloat16", enforce_eager=True) as llm:
        expected = of_prompts(llm)
    with engine(made, dtype="bfloat16", model_impl=impl, enforce_eager=True, **options) as llm:
        params = runner(llm).functions.params
        held = [leaf for leaf in jax.tree.leaves(params) if leaf.ndim >= 3 and leaf.dtype.itemsize == 1]
        found = of_prompts(llm)
    # Of all layers by our class; of each by vLLM's.
    layers = {"mixtral@even": 3, "qwen3-moe@even-experts": 2, "qwen2-moe@even-experts": 1}[model]
    assert sum(leaf.shape[-3] == 8 for leaf in held) >= (2 if impl == "auto" else 2 * layers), "w13 and w2"
    if devices := options.get("tensor_parallel_size"):
        part = 8 // devices if "enable_expert_parallel" in options else 8
        shards = {leaf.sharding.shard_shape(leaf.shape) for leaf in held if leaf.shape[-3] == 8}
        assert {shape[-3] for shape in shards} == {part}
    # Not 1: sums of bfloat16 are rounded elsewhere than in the twin, and choose other experts.
    assert likeness(expected, found) > 0.95


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    ("flag", "dtype"),
    [
        ("int8_per_channel_weight_only", "int8"),
        pytest.param("fp8_per_channel", "float8_e4m3fn", marks=pytest.mark.slow),
    ],
)
def test_experts_rounded_at_load(zoo, flag, dtype, impl):
    options = dict(dtype="bfloat16", enforce_eager=True, model_impl=impl)
    with engine(zoo("mixtral@even"), **options) as llm:
        plain, expected = by_path(runner(llm).functions.params), of_prompts(llm)
    with engine(zoo("mixtral@even"), quantization=flag, **options) as llm:
        rounded, found = by_path(runner(llm).functions.params), of_prompts(llm)
    held = {
        path: leaf for path, leaf in rounded.items() if leaf.ndim >= 3 and leaf.dtype == dtype and leaf.shape[-3] == 8
    }
    assert len(held) == (2 if impl == "auto" else 6)
    for path, values in held.items():
        of_scale = path.replace("_weight", "_weight_scale") if impl == "vllm" else path.replace("['w", "['s")
        scale, weight = rounded[of_scale], plain[path].astype(np.float32)
        assert scale.dtype == np.float32
        # Half of a step: of int8 it is the scale, of e4m3 an eighth of the power of two below, and 2**-9 near 0.
        half = scale / 2 if dtype == "int8" else np.maximum(np.abs(weight) / 16, scale * 2**-10)
        error = np.abs(values.astype(np.float32) * scale - weight)
        assert (error <= half + np.abs(weight) / 256).all(), "these weights are bfloat16, those rounded float32"
    # Sums of these models are large, and e4m3 has three bits: other experts are chosen now and then.
    assert likeness(expected, found) > (0.95 if dtype == "int8" else 0.6)


@pytest.mark.parametrize("impl", ["auto", "vllm"])
def test_all_that_is_wrong_with_experts_is_in_one_error(zoo, tmp_path, impl):
    def change(tensors):
        spoil("layers.1.mlp.experts.3.up_proj.weight_scale_inv", lambda scales: None)(tensors)
        spoil("layers.2.mlp.experts.0.down_proj.weight_scale_inv", lambda scales: scales * float("nan"))(tensors)
        spoil("layers.2.mlp.experts.7.gate_proj.weight_scale_inv", lambda scales: scales[:1, :1])(tensors)
        spoil("layers.1.mlp.experts.5.down_proj.weight", with_nan)(tensors)

    made, _ = quantized_models.save(zoo("qwen3-moe@even-experts"), "fp8-block", tmp_path, change)
    with pytest.raises(CheckpointError) as caught, engine(made, dtype="bfloat16", model_impl=impl):
        pass
    problems = "\n".join(caught.value.problems)
    for kind, name in (
        ("missing", "layers.1.mlp.experts.3.up_proj.weight_scale_inv"),
        ("not finite", "layers.2.mlp.experts.0.down_proj.weight_scale_inv"),
        ("mis-shaped", "layers.2.mlp.experts.7.gate_proj.weight_scale_inv"),
        ("not a number", "layers.1.mlp.experts.5.down_proj.weight"),
    ):
        assert f"{kind}: model.{name}" in problems, problems


def test_groups_of_experts_that_devices_would_cut(zoo, tmp_path):
    made, _ = quantized_models.save(zoo("qwen3-moe@even-experts"), "fp8-block", tmp_path)
    options = dict(dtype="bfloat16", tensor_parallel_size=4)
    for impl in ("auto", "vllm"):
        with pytest.raises(TpuInferenceError, match="groups of 32"), engine(made, model_impl=impl, **options):
            pass


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    ("model", "rules", "dtype", "least"),
    [
        ("llama@even", "int8_weights_activations", "int8", 0.8),
        pytest.param("llama@even", "int8_weights", "int8", 0.9, marks=pytest.mark.slow),
        pytest.param("llama@blocks", "int4_weights", "uint8", 0.55, marks=pytest.mark.slow),
        pytest.param("llama@even", "fp8", "float8_e4m3fn", 0.6, marks=pytest.mark.slow),
        pytest.param("llama@even", "fp8_weights_activations", "float8_e4m3fn", 0.8, marks=pytest.mark.slow),
        pytest.param("mixtral@even", "int8_weights_activations", "int8", 0.8, marks=pytest.mark.slow),
    ],
)
def test_rounded_at_load_by_rules(zoo, model, rules, dtype, least, impl):
    options = dict(dtype="bfloat16", enforce_eager=True, model_impl=impl)
    expected = probabilities(zoo(model), **options)
    with engine(zoo(model), additional_config={"quantization": rules}, **options) as llm:
        params = runner(llm).functions.params
        found = of_prompts(llm)
    assert sum(leaf.dtype == dtype for leaf in jax.tree.leaves(params)) == (4 if impl == "auto" else 12)
    assert likeness(expected, found) > least


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_rules_of_ones_own(zoo, tmp_path, impl):
    """The first rule that fits counts, and one without a type leaves layers as they are."""
    rules = tmp_path / "rules.yaml"
    rules.write_text(
        "- module_path: .*self_attn.*\n- {module_path: .*down_proj, weight_qtype: float8_e4m3fn, tile_size: 64}\n"
    )
    options = dict(dtype="bfloat16", enforce_eager=True, model_impl=impl)
    expected = probabilities(zoo("llama@even"), **options)
    by_loop = {"quantization": str(rules), "scan_layers": False}
    with engine(zoo("llama@even"), additional_config=by_loop, **options) as llm:
        leaves = jax.tree.leaves(runner(llm).functions.params)
        found = of_prompts(llm)
    dtypes = [str(leaf.dtype) for leaf in leaves]
    assert dtypes.count("float8_e4m3fn") == 3 and "int8" not in dtypes
    assert likeness(expected, found) > 0.8


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    ("model", "kind"),
    [
        ("llama@even", "nvfp4"),
        pytest.param("llama@even", "nvfp4-modelopt", marks=pytest.mark.slow),
        pytest.param("mixtral@even", "nvfp4", marks=pytest.mark.slow),
        ("llama@even", "mxfp4"),
        pytest.param("llama@even", "mxfp4-activations", marks=pytest.mark.slow),
        pytest.param("mixtral@even", "mxfp4", marks=pytest.mark.slow),
    ],
)
def test_floats_of_four_bits_are_as_their_twin(zoo, tmp_path, model, kind, impl):
    made, twin = quantized_models.save(zoo(model), kind, tmp_path)
    options = dict(dtype="bfloat16", enforce_eager=True)
    with engine(twin, **options) as llm:
        expected = of_prompts(llm)
    with engine(made, model_impl=impl, **options) as llm:
        assert "float8_e4m3fn" in {str(leaf.dtype) for leaf in jax.tree.leaves(runner(llm).functions.params)}
        found = of_prompts(llm)
    assert likeness(expected, found) > 0.95


@pytest.mark.parametrize("impl", ["auto", "vllm"])
def test_an_exponent_of_mxfp4_that_is_no_number(zoo, tmp_path, impl):
    made, _ = quantized_models.save(
        zoo("llama@even"), "mxfp4", tmp_path, spoil("layers.1.mlp.down_proj.weight_scale", lambda t: t.fill_(255))
    )
    with pytest.raises(CheckpointError) as caught, engine(made, dtype="bfloat16", model_impl=impl):
        pass
    assert len(caught.value.problems) == 1 and "down_proj.weight_scale has NaN" in caught.value.problems[0]


@pytest.mark.parametrize("impl", ["auto", "vllm"])
def test_rules_that_fit_no_layer(zoo, tmp_path, impl):
    rules = tmp_path / "rules.yaml"
    rules.write_text("- {module_path: model.layers.9.*, weight_qtype: int8}\n")
    options = dict(additional_config={"quantization": str(rules)}, model_impl=impl)
    with pytest.raises(ConfigError, match="fits the name of any layer"), engine(zoo("llama@even"), **options):
        pass
