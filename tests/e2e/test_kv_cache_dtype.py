# SPDX-License-Identifier: Apache-2.0
"""A KV cache of one byte a number, through vLLM's engine."""

from functools import partial

import jax
import numpy as np
import pytest
import torch

from helpers import quantized_models
from helpers.engines import engine as any_engine
from helpers.engines import likeness, of_prompts, tokens
from helpers.tiny_models import prompts
from tpu_inference.models.common.checkpoint import CheckpointError

engine = partial(any_engine, enforce_eager=True)
"""Programs are compiled as they are needed: few are."""
COUNT = 12
IMPLEMENTATIONS = ["auto", pytest.param("vllm", marks=pytest.mark.slow)]


def runner(llm):
    return llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner


@pytest.fixture(scope="module")
def plain(zoo):
    answers = {}

    def answer(name):
        if name not in answers:
            with engine(zoo(name), dtype="float32") as llm:
                answers[name] = of_prompts(llm)
        return answers[name]

    return answer


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_probabilities_are_as_with_a_cache_of_the_models_type(zoo, plain, impl):
    """And a block takes a quarter of what float32 takes, in the arrays and by vLLM's count."""
    with engine(zoo("mistral@8"), kv_cache_dtype="fp8", model_impl=impl) as llm:
        run = runner(llm)
        assert {pages.dtype.itemsize for pages in run.kv_cache.pages} == {1}
        sizes = {spec.page_size_bytes for spec in run.get_kv_cache_spec().values()}
        held = sum(pages.nbytes for pages in run.kv_cache.pages)
        assert sizes == {16 * 2 * 80 * 2} and held == 400 * 3 * sizes.pop()
        found = of_prompts(llm)
    assert likeness(plain("mistral@8"), found) > 0.9


def test_half_the_bytes_hold_the_same_tokens(zoo):
    budget = dict(num_gpu_blocks_override=None, kv_cache_memory_bytes=2**21, dtype="bfloat16")
    blocks = {}
    for dtype in ("auto", "fp8_e4m3"):
        with engine(zoo("llama@8"), kv_cache_dtype=dtype, **budget) as llm:
            blocks[dtype] = llm.llm_engine.vllm_config.cache_config.num_gpu_blocks
    assert abs(blocks["fp8_e4m3"] - 2 * blocks["auto"]) <= 1


def test_a_prefix_that_is_cached_is_read_from_it(zoo):
    prompt = prompts(1, longest=61)[0] * 3 + list(range(5, 70))
    with engine(zoo("llama@8"), kv_cache_dtype="fp8") as llm:
        first, second = tokens(llm, [prompt], COUNT), tokens(llm, [prompt], COUNT)
    assert first == second


def with_scales(k, v, names):
    """A change of a checkpoint: each layer has these scales by these names."""

    def change(tensors):
        for layer in range(3):
            for name, value in zip(names, (k, v), strict=True):
                tensors[f"model.layers.{layer}.self_attn.{name}"] = torch.tensor(value)

    return change


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    ("kind", "names", "flags"),
    [
        ("fp8-tensor", ("k_proj.k_scale", "v_proj.v_scale"), dict(kv_cache_dtype="fp8")),
        ("fp8-channel-cache", ("k_scale", "v_scale"), {}),
    ],
)
def test_scales_of_the_checkpoint(zoo, tmp_path, kind, names, flags, impl):
    """With scales as large as these keys and values need, answers are as with a cache of the model's type; 1 would clip them all."""
    made, twin = quantized_models.save(zoo("llama@even"), kind, tmp_path, change=with_scales(0.5, 0.25, names))
    with engine(twin, dtype="bfloat16") as llm:
        expected = of_prompts(llm)
    with engine(made, dtype="bfloat16", model_impl=impl, **flags) as llm:
        run = runner(llm)
        assert {pages.dtype.itemsize for pages in run.kv_cache.pages} == {1}
        leaves = jax.tree_util.tree_leaves_with_path(run.functions.params)
        found = of_prompts(llm)
    scales = [np.asarray(x) for path, x in leaves if "kv_scales" in str(path) or ".attn.k_scale" in str(path)]
    assert scales and all(np.isin(x, (0.5, 0.25)).all() for x in scales)
    assert likeness(expected, found) > 0.9


@pytest.mark.parametrize("devices", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_latents(zoo, tmp_path, devices):
    """Of DeepSeek, with the checkpoint's k_scale: a byte a number, and answers are as with a cache of the model's type."""
    made, twin = quantized_models.save(
        zoo("deepseek-v3@8"), "fp8-tensor", tmp_path, change=with_scales(0.5, 0.25, ("k_scale", "v_scale"))
    )
    with engine(twin, dtype="bfloat16") as llm:
        expected = of_prompts(llm)
        whole = sum(pages.nbytes for pages in runner(llm).kv_cache.pages)
    with engine(made, dtype="bfloat16", kv_cache_dtype="fp8", tensor_parallel_size=devices) as llm:
        run = runner(llm)
        assert 2 * sum(pages.nbytes for pages in run.kv_cache.pages) == whole
        leaves = jax.tree_util.tree_leaves_with_path(run.functions.params)
        scales = [np.asarray(x) for path, x in leaves if "kv_scales" in str(path)]
        found = of_prompts(llm)
    assert scales and all((x[..., 0] == 0.5).all() for x in scales)
    assert likeness(expected, found) > 0.9


def test_on_two_devices(zoo, plain):
    with engine(zoo("llama@8"), kv_cache_dtype="fp8", tensor_parallel_size=2) as llm:
        found = of_prompts(llm)
    assert likeness(plain("llama@8"), found) > 0.9


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_scales_that_are_no_scales_are_named(zoo, tmp_path, impl):
    change = with_scales(float("nan"), -1.0, ("k_scale", "v_scale"))
    made, _ = quantized_models.save(zoo("llama@even"), "fp8-tensor", tmp_path, change=change)
    options = dict(dtype="bfloat16", kv_cache_dtype="fp8", model_impl=impl)
    with pytest.raises(CheckpointError) as caught, engine(made, **options):
        pass
    assert sum("not finite" in problem for problem in caught.value.problems) == 3
    assert sum("not positive" in problem for problem in caught.value.problems) == 3
