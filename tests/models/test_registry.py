# SPDX-License-Identifier: Apache-2.0
"""Which class serves which architecture."""

import pytest

from tpu_inference.errors import TpuInferenceError
from tpu_inference.layers.jax.decoder import Decoder
from tpu_inference.models.common import registry


@pytest.fixture
def declared(monkeypatch):
    """What vLLM is told; the table is restored afterwards."""
    told = []
    monkeypatch.setattr(registry, "_MODELS", dict(registry._MODELS))
    monkeypatch.setattr(registry, "declare_architecture", told.append)
    return told


@pytest.mark.parametrize("architecture", registry.supported_architectures())
def test_every_entry_names_a_model(architecture):
    cls = registry.model_class(architecture)
    assert issubclass(cls, Decoder) and cls is not Decoder


def test_architectures_are_listed_in_order():
    names = registry.supported_architectures()
    assert names == sorted(names) and "LlamaForCausalLM" in names


def test_the_first_one_served_is_taken():
    assert registry.find_architecture(["NoSuch", "Qwen3ForCausalLM", "LlamaForCausalLM"]) == "Qwen3ForCausalLM"


def test_an_unknown_architecture_lists_what_is_served():
    with pytest.raises(TpuInferenceError) as error:
        registry.find_architecture(["T5ForConditionalGeneration"])
    message = str(error.value)
    for part in ("T5ForConditionalGeneration", "register_model", *registry.supported_architectures()):
        assert part in message


@pytest.mark.parametrize("architectures", [None, []])
def test_a_config_without_architectures(architectures):
    with pytest.raises(TpuInferenceError, match="no architectures in its config"):
        registry.find_architecture(architectures)


def test_a_registered_model_is_found(declared):
    registry.register_model("MyForCausalLM", "collections.abc:Mapping")
    assert declared == ["MyForCausalLM"]
    assert registry.find_architecture(["MyForCausalLM"]) == "MyForCausalLM"
    assert "MyForCausalLM" in registry.supported_architectures()
    from collections.abc import Mapping

    assert registry.model_class("MyForCausalLM") is Mapping


def test_registering_again_replaces(declared):
    registry.register_model("LlamaForCausalLM", "collections:OrderedDict")
    assert registry.model_class("LlamaForCausalLM").__name__ == "OrderedDict"


def test_registering_imports_nothing(declared):
    registry.register_model("MyForCausalLM", "no_such_module_anywhere:Class")
    with pytest.raises(ModuleNotFoundError, match="no_such_module_anywhere"):
        registry.model_class("MyForCausalLM")


@pytest.mark.parametrize(
    "target", ["", "module", "module.Class", ":Class", "module:", "module:1x", "module:a:B", "m:a b"]
)
def test_a_malformed_target_is_refused(declared, target):
    with pytest.raises(ValueError, match=r"package\.module:Class"):
        registry.register_model("MyForCausalLM", target)
    assert not declared and "MyForCausalLM" not in registry.supported_architectures()
