# SPDX-License-Identifier: Apache-2.0
"""NaNs among logits: counted for each request, and raised where vLLM's environment asks for it."""

from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest

from tpu_inference.compat import sampling
from tpu_inference.runner.async_output import AsyncOutput
from tpu_inference.runner.programs import _count_nans


def _output() -> AsyncOutput:
    """Two requests and a row of padding; the second request and the padding hold NaNs."""
    logits = jnp.array([[0.0, 1.0, 2.0], [jnp.nan, 1.0, jnp.nan], [jnp.nan] * 3], jnp.float32)
    batch = SimpleNamespace(req_ids=["sound", "broken"], num_rows=2, samples=np.array([True, True]))
    return AsyncOutput(batch, jnp.array([2, 0, 0], jnp.int32), None, {}, _count_nans(logits))


def test_counts_are_per_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_RAISE_ON_LOGIT_NANS", raising=False)
    output = _output().get_output()
    assert output.num_nans_in_logits == {"sound": 0, "broken": 2}
    assert output.sampled_token_ids == [[2], [0]]


def test_raises_for_the_broken_request_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_RAISE_ON_LOGIT_NANS", "1")
    with pytest.raises(RuntimeError, match=r"\{'broken': 2\}"):
        _output().get_output()


def test_raising_turns_counting_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_COMPUTE_NANS_IN_LOGITS", raising=False)
    monkeypatch.delenv("VLLM_RAISE_ON_LOGIT_NANS", raising=False)
    assert not sampling.counts_nans()
    monkeypatch.setenv("VLLM_RAISE_ON_LOGIT_NANS", "1")
    assert sampling.counts_nans()
