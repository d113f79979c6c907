# SPDX-License-Identifier: Apache-2.0
"""vLLM's PyTorch classes on the engine: the tokens of transformers, by the same programs as the JAX classes."""

import subprocess
import sys

import pytest

from helpers.engines import engine, tokens
from helpers.tiny_models import chosen, prompts
from tpu_inference.models.common.vllm_loader import implementation

COUNT = 48
FEW_PROGRAMS = dict(max_num_seqs=4, max_num_batched_tokens=16)


def runner(llm):
    return llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner


def check(path, batch, got):
    for prompt, answer in zip(batch, got, strict=True):
        assert answer == chosen(path, prompt, answer)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gemma2@tied", "llama", "qwen3"])
def test_twins(zoo, name):
    """The same checkpoint by both classes: equal tokens, equal programs."""
    path, batch, programs = zoo(name), prompts(9, seed=6), {}
    for kind in ("flax_nnx", "vllm"):
        with engine(path, model_impl="auto" if kind == "flax_nnx" else "vllm", **FEW_PROGRAMS) as llm:
            assert implementation(llm.llm_engine.vllm_config).kind == kind
            check(path, batch, tokens(llm, batch, COUNT))
            programs[kind] = set(runner(llm).compilation._programs)
    assert programs["flax_nnx"] == programs["vllm"]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "tp"), [("llama@deep", 8), ("gemma3@deep", 2)])
def test_tensor_parallel(zoo, name, tp):
    path, batch = zoo(name), prompts(5, seed=7)
    with engine(path, model_impl="vllm", tensor_parallel_size=tp, **FEW_PROGRAMS) as llm:
        assert runner(llm).functions.flat_kv == name.endswith("deep")
        check(path, batch, tokens(llm, batch, COUNT))


@pytest.mark.slow
def test_pt_files(zoo, tmp_path):
    import shutil

    import torch
    from safetensors.torch import load_file

    source = zoo("qwen3")
    torch.save(load_file(f"{source}/model.safetensors"), tmp_path / "model.pt")
    shutil.copy(f"{source}/config.json", tmp_path)
    batch = prompts(3, seed=9)
    with engine(str(tmp_path), model_impl="vllm", load_format="pt", **FEW_PROGRAMS) as llm:
        check(source, batch, tokens(llm, batch, 16))


ONLY_WHEN_SERVED = """
import sys
sys.path.insert(0, {tests!r})
import helpers.pytorch_models as p
from tpu_inference.models.common.vllm_loader import load_model
load_model(p.vllm_config({path!r}, model_impl="auto"), p.mesh())
assert "torchax" not in sys.modules, "a JAX model imported torchax"
load_model(p.vllm_config({path!r}), p.mesh())
assert "torchax" in sys.modules
"""


@pytest.mark.slow
def test_torchax_is_imported_for_pytorch_models_only(zoo):
    tests = next(path for path in sys.path if path.endswith("tests"))
    script = ONLY_WHEN_SERVED.format(tests=tests, path=zoo("llama"))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
