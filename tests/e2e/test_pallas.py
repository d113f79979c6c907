# SPDX-License-Identifier: Apache-2.0
"""The engine through the kernels that a TPU runs, interpreted."""

import pytest

from helpers import tiny_models
from helpers.engines import engine, tokens
from tpu_inference.layers.common import attention
from tpu_inference.runner import tpu_runner

pytestmark = [pytest.mark.slow, pytest.mark.interpret]


def test_greedy_tokens_equal_transformers(zoo, monkeypatch):
    """Two prompts prefilled in chunks beside each other, then decoded together."""
    monkeypatch.setattr(attention, "implementation_for", lambda device: "pallas_interpret")
    path = zoo("llama@d128")
    prompts = [list(range(3, 26)), [7, 5, 9]]
    with engine(path, max_num_seqs=2, max_num_batched_tokens=32, num_gpu_blocks_override=20, max_model_len=64) as llm:
        found = tokens(llm, prompts, 12)
    assert found == [tiny_models.greedy(path, prompt, 12) for prompt in prompts]
    assert len(set(found[0])) > 4


def test_what_the_kernels_do_not_serve_is_warned_of(zoo, monkeypatch):
    warnings = []
    monkeypatch.setattr(tpu_runner, "implementation_for", lambda device: "pallas")
    monkeypatch.setattr(tpu_runner.logger, "warning", lambda message, *args: warnings.append(message % args))
    with engine(zoo("llama"), enforce_eager=True):
        assert any("80 dimensions" in warning and "--block-size" in warning for warning in warnings)
