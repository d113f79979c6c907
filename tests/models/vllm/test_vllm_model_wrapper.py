# SPDX-License-Identifier: Apache-2.0
"""vLLM's classes as pure functions: their logits are transformers', however they are divided, stacked and loaded."""

import json
from pathlib import Path
from shutil import copy

import numpy as np
import pytest
import torch

from helpers import tiny_models
from helpers.pytorch_models import logits_of, mesh, vllm_config
from tpu_inference.models.common.checkpoint import CheckpointError
from tpu_inference.models.vllm import vllm_model_wrapper
from tpu_inference.models.vllm.explain import LoweringError
from tpu_inference.models.vllm.vllm_model_wrapper import load_vllm_model, prepare
from tpu_inference.models.vllm.weights import DeviceState

SHARED = "model.layers.2.self_attn.rotary_emb.cos_sin_cache"
TOKENS = tiny_models.prompts(1, seed=5)[0] + list(range(40, 60))


def expected(path):
    return tiny_models.logprobs(path, TOKENS)


def found(path, shards=1, **options):
    functions = load_vllm_model(vllm_config(path, **options), mesh(shards), dummy=False)
    logits = torch.from_numpy(logits_of(functions, TOKENS))
    return functions, torch.log_softmax(logits, -1).numpy()


@pytest.mark.parametrize(
    ("name", "scanned"),
    [("llama@deep", (1, 1, 5)), ("gemma3@deep", (1, 3, 2)), ("qwen3", None)],
)
@pytest.mark.parametrize("shards", [1, 2])
def test_logits_are_those_of_transformers(zoo, name, scanned, shards):
    path = zoo(name if "@" in name else f"{name}@8")
    functions, logprobs = found(path, shards)
    np.testing.assert_allclose(logprobs, expected(path), atol=1e-3)
    assert functions.flat_kv == (scanned is not None)


def test_layers_that_repeat_are_found_and_others_left(zoo):
    traced, state = prepare(vllm_config(zoo("gemma3@deep")), mesh())
    (repeat,) = traced._repeats
    assert (repeat.path, repeat.first, repeat.period, repeat.groups) == ("model.layers", 1, 3, 2)
    shapes = state.abstract()
    stacked = [name for name in shapes if ".[" in name]
    assert len(stacked) >= 3 * 9 and all(shapes[name].shape[0] == 2 for name in stacked)
    # The table of the full layers' positions is one for all: torch counts it for the first of them.
    assert [name for name in shapes if name.startswith("model.layers.2.")] == [SHARED]


def test_a_loop_over_the_layers_gives_the_same(zoo):
    path = zoo("gemma3@deep")
    functions, logprobs = found(path, scan_layers=False)
    assert not functions.flat_kv and not any(".[" in name for name in functions.params)
    np.testing.assert_allclose(logprobs, expected(path), atol=1e-3)


def test_parameters_leave_the_host_one_by_one(zoo, monkeypatch):
    """What is read and not on the device yet is the parameters being assembled."""
    path, held = zoo("llama@deep"), []
    move = DeviceState._move

    def spy(self, owned):
        begun = [o for o in self._owned if o.tensor.numel() and self._missing[id(o)] < o.expected_numel]
        held.append(sum(o.tensor.numel() for o in begun))
        move(self, owned)

    monkeypatch.setattr(DeviceState, "_move", spy)
    functions, _ = found(path)
    total = sum(array.size for array in functions.params.values())
    assert len(held) > 30 and max(held) < total / 3


def test_the_module_holds_no_numbers_afterwards(zoo, monkeypatch):
    models = []
    build = vllm_model_wrapper.build
    monkeypatch.setattr(vllm_model_wrapper, "build", lambda *a: models.append(build(*a)) or models[-1])
    found(zoo("qwen3@8"))
    assert not any(parameter.numel() for parameter in models[0][0].parameters())


def test_a_tensor_that_the_checkpoint_lacks_is_named(zoo, tmp_path):
    from safetensors.torch import load_file, save_file

    source = zoo("qwen3@8")
    weights = load_file(f"{source}/model.safetensors")
    del weights["model.layers.1.mlp.down_proj.weight"]
    save_file(weights, tmp_path / "model.safetensors")
    copy(f"{source}/config.json", tmp_path)
    with pytest.raises(CheckpointError, match=r"missing: model\.layers\.1\.mlp\.down_proj\.weight"):
        load_vllm_model(vllm_config(str(tmp_path)), mesh(), dummy=False)


def save_sharded_state(path, directory):
    """As vLLM's own example does on one rank."""
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.model_loader import get_model_loader
    from vllm.model_executor.model_loader.sharded_state_loader import ShardedStateLoader

    config = vllm_config(path)
    model, _ = vllm_model_wrapper.build(config, mesh())
    with set_current_vllm_config(config):
        get_model_loader(config.load_config).load_weights(model, config.model_config)
        ShardedStateLoader.save_model(model, str(directory), max_size=1 << 18)
    copy(f"{path}/config.json", directory)


@pytest.mark.parametrize("shards", [1, 2])
def test_a_sharded_state_of_one_rank(zoo, tmp_path, shards):
    path = zoo("llama@deep")
    save_sharded_state(path, tmp_path)
    assert len(list(tmp_path.glob("model-rank-0-part-*.safetensors"))) > 1
    _, logprobs = found(str(tmp_path), shards, load_format="sharded_state")
    np.testing.assert_allclose(logprobs, expected(path), atol=1e-3)


def test_a_sharded_state_of_several_ranks_is_refused(zoo, tmp_path):
    copy(f"{zoo('qwen3@8')}/config.json", tmp_path)
    for rank in range(4):
        (tmp_path / f"model-rank-{rank}-part-0.safetensors").touch()
    with pytest.raises(CheckpointError, match=r"saved by 4 ranks.*tensor_parallel_size=1"):
        load_vllm_model(vllm_config(str(tmp_path), load_format="sharded_state"), mesh(), dummy=False)


def test_code_of_a_checkpoint_runs_where_vllms_flag_allows_it(zoo, tmp_path):
    source = zoo("llama@deep")
    config = json.loads(Path(source, "config.json").read_text())
    config |= {"model_type": "shepherd", "auto_map": {"AutoConfig": "configuration_shepherd.ShepherdConfig"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "configuration_shepherd.py").write_text(
        "from transformers import LlamaConfig\n\n\nclass ShepherdConfig(LlamaConfig):\n    model_type = 'shepherd'\n"
    )
    copy(f"{source}/model.safetensors", tmp_path)
    with pytest.raises(ValueError, match=r"trust.remote.code"):
        vllm_config(str(tmp_path))
    _, logprobs = found(str(tmp_path), trust_remote_code=True)
    np.testing.assert_allclose(logprobs, expected(source), atol=1e-3)


def test_random_weights_need_no_checkpoint(zoo, tmp_path):
    copy(f"{zoo('llama@deep')}/config.json", tmp_path)
    functions = load_vllm_model(vllm_config(str(tmp_path), load_format="dummy"), mesh(2), dummy=True)
    logits = logits_of(functions, TOKENS)
    assert logits.shape == (len(TOKENS), tiny_models.VOCAB_SIZE) and np.isfinite(logits).all() and logits.std() > 0


def test_an_operation_without_a_lowering_is_named_with_its_place(zoo, monkeypatch):
    from vllm.model_executor.models.qwen3 import Qwen3Attention

    forward = Qwen3Attention.forward

    def strange(self, positions, hidden_states):
        return forward(self, positions, torch.special.airy_ai(hidden_states))

    monkeypatch.setattr(Qwen3Attention, "forward", strange)
    with pytest.raises(LoweringError) as error:
        found(zoo("qwen3@8"), scan_layers=False)
    message = str(error.value)
    assert "airy_ai" in message and "model.layers.0.self_attn (Qwen3Attention)" in message
    assert f"{__file__}:" in message and "docs/pytorch_models.md" in message
