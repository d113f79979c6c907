# SPDX-License-Identifier: Apache-2.0
"""Environment variables: typed, checked, known to vLLM."""

import pytest

from tpu_inference import envs
from tpu_inference.errors import ConfigError


@pytest.mark.parametrize(
    ("name", "raw", "value"),
    [
        ("SKIP_JAX_PRECOMPILE", "1", True),
        ("SKIP_JAX_PRECOMPILE", "false", False),
        ("JAX_PLATFORMS", "tpu,cpu", ("tpu", "cpu")),
        ("TPU_WORKER_ID", "3", 3),
        ("PREFILL_SLICES", "2x2,2x4", ((2, 2), (2, 4))),
        ("MODEL_IMPL_TYPE", "flax_nnx", "flax_nnx"),
        ("VLLM_CPU_KVCACHE_SPACE", "", 0),
    ],
)
def test_values(monkeypatch, name, raw, value):
    monkeypatch.setenv(name, raw)
    assert getattr(envs, name) == value


@pytest.mark.parametrize(
    ("name", "raw"),
    [
        ("SKIP_JAX_PRECOMPILE", "maybe"),
        ("VLLM_XLA_CHECK_RECOMPILATION", "2"),
        ("TPU_WORKER_ID", "-1"),
        ("TPU_ACCELERATOR_TYPE", "v6e"),
        ("MODEL_IMPL_TYPE", "jax"),
        ("PREFILL_SLICES", "2xtwo"),
        ("JAX_PLATFORMS", "tpu,,cpu"),
    ],
)
def test_bad_values_name_the_variable_and_what_is_allowed(monkeypatch, name, raw):
    monkeypatch.setenv(name, raw)
    with pytest.raises(ConfigError, match=f"{name}=.*allowed is "):
        getattr(envs, name)
    assert list(envs.invalid()) == [name]


def test_unknown_names_are_attribute_errors():
    with pytest.raises(AttributeError, match="NO_SUCH"):
        _ = envs.NO_SUCH


def test_vllm_knows_our_variables(monkeypatch):
    import vllm.envs

    envs.register_with_vllm()
    assert set(envs.forwarded()) <= set(vllm.envs.environment_variables)
    monkeypatch.setenv("SKIP_JAX_PRECOMPILE", "1")
    assert vllm.envs.environment_variables["SKIP_JAX_PRECOMPILE"]() is True
