# SPDX-License-Identifier: Apache-2.0
"""Logits with NaNs: a corrupt checkpoint, or a device that fails."""

import shutil

import pytest
from safetensors.torch import load_file, save_file

from helpers.engines import engine, tokens


@pytest.fixture(scope="module")
def corrupt(zoo, tmp_path_factory):
    """A checkpoint with NaNs in three rows of its head."""
    path = tmp_path_factory.mktemp("corrupt") / "model"
    shutil.copytree(zoo("llama"), path)
    tensors = load_file(path / "model.safetensors")
    tensors["lm_head.weight"][5:8] = float("nan")
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    return str(path)


def corrupted(llm):
    return {m.name: m.value for m in llm.get_metrics() if "corrupted" in m.name}


def test_they_end_neither_the_request_nor_the_engine(corrupt):
    with engine(corrupt, disable_log_stats=False) as llm:
        assert [len(answer) for answer in tokens(llm, [[3, 4], [5]], 4)] == [4, 4]
        assert corrupted(llm) == {}, "nobody has asked for it"


def test_requests_that_have_them_are_counted(corrupt, monkeypatch):
    monkeypatch.setenv("VLLM_COMPUTE_NANS_IN_LOGITS", "1")
    with engine(corrupt, disable_log_stats=False) as llm:
        tokens(llm, [[3, 4], [5]], 4)
        assert corrupted(llm) == {"vllm:corrupted_requests": 2}


def test_they_are_an_error_where_that_is_asked_for(corrupt, monkeypatch):
    monkeypatch.setenv("VLLM_RAISE_ON_LOGIT_NANS", "1")
    with engine(corrupt) as llm, pytest.raises(RuntimeError, match=r"NaNs detected in logits: \{'0[^']*': 3\}"):
        tokens(llm, [[3, 4]], 4)
