# SPDX-License-Identifier: Apache-2.0
"""What cannot be served is refused before anything is lost: fields of a request, options of an engine, checkpoints."""

import json
import shutil
from pathlib import Path

import pytest
from vllm import SamplingParams
from vllm.engine.arg_utils import EngineArgs
from vllm.exceptions import VLLMValidationError

from helpers.engines import engine, free_blocks, scheduler
from helpers.tiny_models import greedy, prompts
from tpu_inference.demo import MODEL
from tpu_inference.models.common.registry import supported_architectures
from tpu_inference.models.common.vllm_loader import implementation
from tpu_inference.platforms.requests import UNSERVED

PROMPT = "Once upon a time there was a kind fox named Mia, who lived in a valley"
OPTIONS = dict(skip_tokenizer_init=False, max_num_seqs=12, max_num_batched_tokens=16, num_gpu_blocks_override=200)


@pytest.fixture(scope="module")
def started():
    with engine(MODEL, **OPTIONS) as llm:
        yield llm, answer(llm)


@pytest.fixture
def llm(started):
    """After each test nothing is left of its requests, in the scheduler or in the runner, and the engine answers as a fresh one."""
    llm, expected = started
    yield llm
    while llm.llm_engine.has_unfinished_requests():
        llm.llm_engine.step()
    assert answer(llm) == expected
    free, total = free_blocks(llm)
    assert free == total
    assert not scheduler(llm).requests
    runner = runner_of(llm)
    # The runner hears of the end of a request with the next step: only the probe's own is still known.
    assert len(runner.states.slots) <= 1 and len(runner.states.requests) <= 1
    assert not runner.prompt_logprobs._collected


def runner_of(llm):
    return llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner


def params(**fields):
    return SamplingParams(**{"temperature": 0, "max_tokens": 12, "ignore_eos": True, **fields})


def answer(llm, prompt=PROMPT, **fields):
    return list(llm.generate(prompt, params(**fields), use_tqdm=False)[0].outputs[0].token_ids)


# ------------------------------------------------------------------------------------------------ fields of a request

ASKED = dict(
    extra_args={"x": 1},
    routed_experts_prompt_start=3,
    watermarking=True,
    prompt_logprob_token_ids=[[5]] * 3,
    prompt_logprob_start=2,
    trace_decode_token_ids=[5, 6],
)
"""A value of every field that is not served."""


def test_every_unserved_field_is_asked_for():
    assert set(ASKED) == set(UNSERVED), "vLLM has other fields now: serve, refuse and test them"


@pytest.mark.parametrize("name", UNSERVED)
def test_an_unserved_field_is_refused_by_name(llm, name):
    with pytest.raises(VLLMValidationError, match=name):
        answer(llm, **{name: ASKED[name]})


@pytest.mark.parametrize("name", UNSERVED)
def test_the_default_of_an_unserved_field_is_served(llm, name):
    assert len(answer(llm, max_tokens=2, **{name: getattr(SamplingParams(), name)})) == 2


def test_one_bad_request_among_good_ones(llm):
    """`LLM.generate` takes all or nothing: the good ones before it do not stay behind."""
    batch = [params(), params(), params(extra_args={"x": 1}), params()]
    with pytest.raises(VLLMValidationError, match="extra_args"):
        llm.generate([PROMPT] * 4, batch, use_tqdm=False)
    assert not llm.llm_engine.has_unfinished_requests()


@pytest.mark.parametrize("fields", [dict(logprobs=-1), dict(prompt_logprobs=-1), dict(logprobs=21)], ids=str)
def test_too_many_logprobs(llm, fields):
    with pytest.raises(VLLMValidationError, match=next(iter(fields))):
        answer(llm, **fields)


def test_any_number_of_stop_tokens_is_masked(llm):
    stops = list(range(2, 1400))
    assert not set(answer(llm, min_tokens=6, max_tokens=6, stop_token_ids=stops)) & set(stops)


def test_prompt_logprobs_of_what_is_cached(llm):
    with pytest.raises(VLLMValidationError, match="skip_reading_prefix_cache"):
        answer(llm, prompt_logprobs=1, skip_reading_prefix_cache=False)


# -------------------------------------------------------------------------------------------------------------- aborts


def test_aborts_among_others_leave_them_alone(llm):
    """Requests that go while they wait, prefill and decode; the answers of those that stay are what they are alone."""
    add, step = llm.llm_engine.add_request, llm.llm_engine.step
    texts = [PROMPT[:k] for k in range(30, 70, 2)]
    expected = [answer(llm, text) for text in texts]
    for i, text in enumerate(texts):
        add(f"stays {i}", text, params())
        add(f"goes {i}", text + " and some more words", params(max_tokens=100, prompt_logprobs=1 if i % 2 else None))
    answers = {}
    for i in range(20):
        llm.llm_engine.abort_request([f"goes {(7 * i) % 20}"])
        answers.update({out.request_id: out.outputs[0].token_ids for out in step() if out.finished})
    while llm.llm_engine.has_unfinished_requests():
        answers.update({out.request_id: out.outputs[0].token_ids for out in step() if out.finished})
    assert [list(answers[f"stays {i}"]) for i in range(20)] == expected
    assert not any(name.startswith("goes") for name in answers)


def test_an_id_used_again_right_after_an_abort(llm):
    expected = answer(llm, max_tokens=6)
    llm.llm_engine.add_request(
        "same", "Hello there, what is the capital of France?", params(max_tokens=100, logprobs=2)
    )
    for _ in range(4):
        llm.llm_engine.step()
    llm.llm_engine.abort_request(["same"])
    llm.llm_engine.add_request("same", PROMPT, params(max_tokens=6))
    done = []
    while llm.llm_engine.has_unfinished_requests():
        done += [out for out in llm.llm_engine.step() if out.finished]
    assert [list(out.outputs[0].token_ids) for out in done] == [expected]


# --------------------------------------------------------------------------------------------------- options, checkpoints


@pytest.mark.parametrize(
    ("options", "what", "advice"),
    [
        (dict(pipeline_parallel_size=2), "pipeline parallelism", "--tensor-parallel-size"),
        (dict(enable_lora=True), "LoRA", "remove --enable-lora"),
        (dict(quantization="fp8"), "(?i)fp8|quantization", "unquantized|quantization"),
        (dict(kv_cache_dtype="int8_per_token_head"), "KV cache of type 'int8_per_token_head'", "--kv-cache-dtype auto"),
        (
            dict(speculative_config={"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 3}),
            "speculative decoding",
            "remove --speculative-config",
        ),
        (dict(cpu_offload_gb=1), "offloaded", "remove --cpu-offload-gb"),
        (
            dict(kv_transfer_config={"kv_connector": "ExampleConnector", "kv_role": "kv_both"}),
            "KV connectors",
            "remove --kv-transfer-config",
        ),
        (dict(runner="pooling", convert="embed"), "pooling", "--runner generate"),
        (dict(model_impl="transformers"), "model_impl", "--model-impl auto"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_an_unserved_option_is_refused_with_what_to_do(options, what, advice):
    with pytest.raises(Exception, match=what) as error:
        EngineArgs(MODEL, **options).create_engine_config()
    assert error.match(advice)


def test_all_unserved_options_are_in_one_error():
    with pytest.raises(Exception, match="LoRA") as error:
        EngineArgs(MODEL, enable_lora=True, kv_cache_dtype="fp8_e5m2", cpu_offload_gb=1).create_engine_config()
    assert error.match("KV cache of type") and error.match("offloaded")


def test_an_unknown_load_format(zoo):
    with pytest.raises(Exception, match=r"load_format.*safetensors"), engine(zoo("llama"), load_format="gguf"):
        pass


@pytest.fixture
def copy(zoo, tmp_path):
    """A copy of the tiny Llama checkpoint, to be spoilt."""
    return Path(shutil.copytree(zoo("llama"), tmp_path / "copy"))


def test_no_jax_class_where_one_is_asked_for(copy, monkeypatch):
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "architectures": ["FalconForCausalLM"]}))
    monkeypatch.setenv("MODEL_IMPL_TYPE", "flax_nnx")
    with pytest.raises(Exception, match="served are") as error:
        EngineArgs(str(copy), skip_tokenizer_init=True).create_engine_config()
    assert all(error.match(name) for name in supported_architectures())


@pytest.mark.parametrize("architectures", [None, []], ids=str)
def test_without_architectures_vllms_own_choice_is_served(copy, architectures):
    """vLLM names one after the model type, as on other platforms."""
    config = json.loads((copy / "config.json").read_text())
    del config["architectures"]
    if architectures is not None:
        config["architectures"] = architectures
    (copy / "config.json").write_text(json.dumps(config))
    chosen = implementation(EngineArgs(str(copy), skip_tokenizer_init=True).create_engine_config())
    assert (chosen.kind, chosen.architecture) == ("vllm", "LlamaModel")


def test_config_with_an_architecture_that_nobody_knows(copy):
    """vLLM's own registry is asked before ours, and names what is wrong."""
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "architectures": ["UnheardOfForCausalLM"]}))
    with pytest.raises(Exception, match=r"UnheardOfForCausalLM.*not supported"):
        EngineArgs(str(copy), skip_tokenizer_init=True).create_engine_config()


def test_a_checkpoint_of_another_model_then_the_right_one(zoo, copy):
    """All that does not fit is in the error; a failed start does not hinder the next one."""
    shutil.copy(Path(zoo("qwen2")) / "model.safetensors", copy / "model.safetensors")
    with pytest.raises(Exception, match="cannot be loaded") as error, engine(str(copy)):
        pass
    # Qwen2 has biases, and here another head size.
    for layer in range(3):
        assert error.match(rf"left over: model\.layers\.{layer}\.self_attn\.q_proj\.bias")
        assert error.match(rf"mis-shaped: model\.layers\.{layer}\.self_attn\.q_proj\.weight")
    (prompt,) = prompts(1, seed=3)
    with engine(zoo("llama"), max_num_seqs=4, max_num_batched_tokens=16) as llm:
        out = llm.generate({"prompt_token_ids": prompt}, params(detokenize=False), use_tqdm=False)
    assert list(out[0].outputs[0].token_ids) == greedy(zoo("llama"), prompt, 12)


@pytest.mark.parametrize("damage", ["truncated", "empty", "gone"])
def test_a_damaged_checkpoint(copy, damage):
    weights = copy / "model.safetensors"
    content = weights.read_bytes()
    if damage == "gone":
        weights.unlink()
    else:
        weights.write_bytes(content[: len(content) // 2] if damage == "truncated" else b"")
    expected = (
        r"(?i)cannot find any model weights|no .*weights" if damage == "gone" else r"model\.safetensors is .*truncated"
    )
    with pytest.raises(Exception, match=expected), engine(str(copy)):
        pass
