# SPDX-License-Identifier: Apache-2.0
"""The table of PyTorch models: a sample of it is checked again, and the page says what the results say."""

import json

import pytest

from helpers.architectures import NAMES
from helpers.pytorch_models import greedy_of, mesh, vllm_config
from helpers.scripts import load_script
from tpu_inference.errors import TpuInferenceError
from tpu_inference.models.common.refused import REFUSED
from tpu_inference.models.common.registry import choose_implementation, supported_architectures

table = load_script("model_table")
SAMPLE = ("GPT2LMHeadModel", "BloomForCausalLM", "FalconForCausalLM", "GPTNeoXForCausalLM", "Cohere2ForCausalLM",
          "GptOssForCausalLM", "DeepseekV3ForCausalLM", "GraniteForCausalLM")  # fmt: skip


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return tmp_path_factory.mktemp("architectures")


@pytest.mark.slow
@pytest.mark.parametrize("architecture", SAMPLE)
def test_a_sample(architecture, directory):
    """Layers scanned on two devices: what the table checks apart."""
    from helpers import architectures
    from tpu_inference.models.vllm.vllm_model_wrapper import load_vllm_model

    path = architectures.save(architecture, directory)
    _, expected = table.by_transformers(architectures.for_transformers(path))
    functions = load_vllm_model(vllm_config(path), mesh(2), dummy=False)
    _, tokens = greedy_of(functions, table.PROMPT, table.COUNT)
    assert tokens == expected


@pytest.mark.all_models
@pytest.mark.parametrize("architecture", NAMES)
def test_all(architecture, directory):
    kept = json.loads(table.RESULTS.read_text())["rows"][architecture]
    row = table.check(architecture, directory)
    assert table.passes(row) == table.passes(kept), row


def test_the_page_is_what_the_results_say():
    results = json.loads(table.RESULTS.read_text())
    assert table.PAGE.read_text() == table.render(results)
    assert set(results["rows"]) == set(NAMES)
    assert sum(map(table.passes, results["rows"].values())) >= 40


def test_what_is_refused_says_why():
    for architecture, reason in REFUSED.items():
        with pytest.raises(TpuInferenceError, match=architecture) as error:
            choose_implementation([architecture], "auto")
        assert reason in str(error.value)


def test_no_row_is_both_served_and_refused():
    assert not REFUSED.keys() & {*NAMES, *supported_architectures()}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("architecture", "workaround"),
    [("HunYuanMoEV1ForCausalLM", "operations_that_call_modules"), ("DbrxForCausalLM", "as_loader_looks_for")],
)
def test_what_is_worked_around_is_still_so(architecture, workaround, directory, monkeypatch):
    """Without it the model is not served: when it is, that function of compat can go."""
    from helpers import architectures
    from tpu_inference.compat.lowering import import_torchax, operations_that_call_modules
    from tpu_inference.layers.vllm import lowerings
    from tpu_inference.models.vllm import vllm_model_wrapper as wrapper

    path = architectures.save(architecture, directory)
    _, expected = table.by_transformers(architectures.for_transformers(path))  # before vLLM decorates its classes

    def tokens():
        functions = wrapper.load_vllm_model(vllm_config(path), mesh(1), dummy=False)
        return greedy_of(functions, table.PROMPT, table.COUNT)[1]

    with monkeypatch.context() as without:
        # torchax keeps what an earlier model of this process registered.
        environment, registered = import_torchax().default_env(), operations_that_call_modules()
        without.setattr(environment, "_ops", {k: v for k, v in environment._ops.items() if k not in registered})
        where = lowerings if hasattr(lowerings, workaround) else wrapper
        without.setattr(where, workaround, lambda *given: given[1] if given else {})
        with pytest.raises((AssertionError, KeyError)):
            tokens()
    assert tokens() == expected
