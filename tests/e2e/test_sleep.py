# SPDX-License-Identifier: Apache-2.0
"""Sleep and wake-up, and new weights in place, through an in-process engine: the same programs, the same tokens."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from helpers.engines import engine, free_blocks, scheduler, tokens
from helpers.tiny_models import prompts

pytestmark = [pytest.mark.slow, pytest.mark.e2e]

PROMPTS = prompts(3, seed=5)
COUNT = 12


def worker(llm):
    return llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker


def rpc(llm, method, *args, **kwargs):
    (answer,) = llm.collective_rpc(method, args=args, kwargs=kwargs)
    return answer


def changed(source, directory, change):
    """A copy of a checkpoint whose tensors `change` has changed in place."""
    shutil.copytree(source, directory)
    file = Path(directory) / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})
    return str(directory)


def swap_layers(tensors):
    """Other text, from a checkpoint of the same shapes."""
    for name in [name for name in tensors if ".layers.0." in name]:
        other = name.replace(".layers.0.", ".layers.2.")
        tensors[name], tensors[other] = tensors[other], tensors[name]


def break_it(tensors):
    del tensors["model.norm.weight"]
    tensors["lm_head.weight"] = tensors["lm_head.weight"][:-1]
    tensors["extra.weight"] = np.zeros(3, np.float32)


@pytest.fixture(scope="module", params=[("llama", "auto"), ("qwen2@8", "vllm")], ids=["jax", "pytorch"])
def served(request, zoo):
    name, impl = request.param
    path = zoo(name)
    with engine(
        path,
        worker_extension_cls="helpers.worker_extension.ForTests",
        enable_sleep_mode=True,
        model_impl=impl,
        max_num_seqs=4,
        disable_log_stats=False,
    ) as llm:
        yield llm, path


@pytest.fixture
def llm(served):
    return served[0]


@pytest.fixture
def compiled(llm):
    """No program is compiled by what the test does."""
    compilation = worker(llm).model_runner.compilation
    before = len(compilation)
    yield
    assert len(compilation) == before and compilation.late_compiles == 0


@pytest.mark.usefixtures("compiled")
def test_level_1_gives_the_memory_back_and_wakes_as_it_was(llm):
    runner = worker(llm).model_runner
    expected, sums = tokens(llm, PROMPTS, COUNT), rpc(llm, "compute_weight_checksums")
    held, arrays = runner.residence.device_bytes(), [*runner.kv_cache.pages]
    llm.sleep(level=1)
    assert held > 0 and runner.residence.device_bytes() == 0
    assert all(array.is_deleted() for array in arrays)
    assert rpc(llm, "compute_weight_checksums") == sums, "the host has them"
    assert llm.llm_engine.is_sleeping()
    assert llm.wake_up(tags=["weights"]) is False and runner.kv_cache is None
    assert llm.wake_up(tags=["kv_cache"]) is True
    assert runner.residence.device_bytes() == held
    assert tokens(llm, PROMPTS, COUNT) == expected


@pytest.mark.usefixtures("compiled")
def test_level_2_needs_the_weights_again(llm):
    expected = tokens(llm, PROMPTS, COUNT)
    llm.sleep(level=2)
    with pytest.raises(Exception, match=r"weights were dropped.*reload_weights"):
        llm.wake_up()
    assert llm.llm_engine.is_sleeping()
    llm.wake_up(tags=["weights"])
    before = rpc(llm, "weights_info")["version"]
    assert rpc(llm, "reload_weights")["version"] == before + 1
    assert llm.wake_up(tags=["kv_cache"])
    assert tokens(llm, PROMPTS, COUNT) == expected


def test_the_prefix_cache_is_empty_after_sleep(llm):
    prompt = [list(range(3, 60))]
    tokens(llm, prompt, 1)
    llm.sleep(level=1)
    llm.wake_up()
    free, blocks = free_blocks(llm)
    assert free == blocks
    tokens(llm, prompt, 1)
    assert scheduler(llm).kv_cache_manager.prefix_cache_stats.hits == 0


@pytest.mark.usefixtures("compiled")
def test_the_cache_alone_can_be_released(llm):
    expected = tokens(llm, PROMPTS, COUNT)
    llm.sleep(level=0)
    assert llm.reset_prefix_cache()
    llm.llm_engine.engine_core.engine_core.model_executor.discard(("kv_cache",))
    assert worker(llm).model_runner.kv_cache is None
    assert llm.wake_up(tags=["kv_cache"])
    assert tokens(llm, PROMPTS, COUNT) == expected


@pytest.mark.parametrize("level", [3, -2])
def test_unknown_levels_and_tags_are_refused(llm, level):
    with pytest.raises(Exception, match=f"level {level} is not known"):
        rpc(llm, "sleep", level)
    with pytest.raises(Exception, match="Nothing is called cuda"):
        rpc(llm, "wake_up", ["cuda"])


@pytest.mark.usefixtures("compiled")
def test_new_weights_in_place_and_back(served, tmp_path):
    llm, path = served
    old, version = tokens(llm, PROMPTS, COUNT), rpc(llm, "weights_info")["version"]
    sums = rpc(llm, "compute_weight_checksums")
    other = changed(path, tmp_path / "other", swap_layers)
    assert rpc(llm, "reload_weights", other) == {"version": version + 1, "source": other}
    assert llm.reset_prefix_cache()
    assert rpc(llm, "compute_weight_checksums") != sums
    new = tokens(llm, PROMPTS, COUNT)
    assert new != old
    rpc(llm, "reload_weights", weights_path=path)
    assert llm.reset_prefix_cache()
    assert tokens(llm, PROMPTS, COUNT) == old
    assert rpc(llm, "compute_weight_checksums") == sums
    assert rpc(llm, "weights_info") == {"version": version + 2, "source": path}


def test_weights_that_do_not_fit_are_one_error_and_the_old_ones_serve(served, tmp_path):
    llm, path = served
    old, info = tokens(llm, PROMPTS, COUNT), rpc(llm, "weights_info")
    broken = changed(path, tmp_path / "broken", break_it)
    with pytest.raises(Exception) as caught:
        rpc(llm, "reload_weights", broken)
    for found in ("3 problem", "missing: model.norm.weight", "mis-shaped: lm_head.weight", "left over: extra.weight"):
        assert found in str(caught.value)
    assert rpc(llm, "weights_info") == info
    assert tokens(llm, PROMPTS, COUNT) == old


def test_what_is_no_checkpoint_is_refused(llm, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({}))
    with pytest.raises(Exception, match=r"(?i)weights"):
        rpc(llm, "reload_weights", str(tmp_path))
    assert tokens(llm, PROMPTS, 1)


def test_a_lora_adapter_is_refused_by_name(llm):
    with pytest.raises(Exception, match=r"LoRA adapters are not served.*merge"):
        rpc(llm, "add_lora", object())
    assert rpc(llm, "list_loras") == set()


def test_the_workers_extension_is_there(llm):
    assert rpc(llm, "count_devices") == 1


def test_the_engine_answers_that_its_device_is_well(llm):
    rpc(llm, "check_health")


def test_the_engines_own_metrics_are_with_vllms(llm):
    """`LLM.get_metrics` shows what `/metrics` would."""
    before = steps_so_far(llm)
    tokens(llm, [[5, 6, 7]], 4)
    assert steps_so_far(llm) >= before + 4
    (host,) = (m for m in own_metrics(llm) if m.name == "vllm:tpu_step_host_seconds")
    assert host.count == steps_so_far(llm) and host.sum > 0


def own_metrics(llm):
    """Of this engine: others of this process are still there."""
    name = llm.llm_engine.model_config.served_model_name
    return [m for m in llm.get_metrics() if m.name.startswith("vllm:tpu_") and m.labels["model_name"] == name]


def steps_so_far(llm):
    return sum(m.value for m in own_metrics(llm) if m.name == "vllm:tpu_steps")
