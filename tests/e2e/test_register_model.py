# SPDX-License-Identifier: Apache-2.0
"""An architecture that nobody knows, added from outside as docs/adding_a_model.md says."""

import sys

import pytest

from helpers.engines import engine, tokens
from helpers.tiny_models import greedy, prompts
from tpu_inference.models.common import registry

SOURCE = '''
"""A model of somebody else's package."""
from tpu_inference.layers.jax.config import decoder_config
from tpu_inference.layers.jax.decoder import Decoder


class OutsideForCausalLM(Decoder):
    def __init__(self, hf_config, ctx):
        super().__init__(decoder_config(hf_config, ctx.max_model_len, qkv_bias=True), ctx)
'''


@pytest.fixture
def outside(tmp_path, monkeypatch):
    (tmp_path / "outside_models.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(registry, "_MODELS", dict(registry._MODELS))
    registry.register_model("OutsideForCausalLM", "outside_models:OutsideForCausalLM")
    yield
    sys.modules.pop("outside_models", None)


def test_a_registered_architecture_is_served(zoo, outside):
    path = zoo("qwen2")
    batch = prompts(2, seed=5)
    with engine(path, hf_overrides={"architectures": ["OutsideForCausalLM"]}) as llm:
        assert tokens(llm, batch, 20) == [greedy(path, prompt, 20) for prompt in batch]
