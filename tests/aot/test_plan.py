# SPDX-License-Identifier: Apache-2.0
"""The planner's answers, from the real TPU compiler, without a TPU."""

import json
import os
import re
import subprocess
import sys

import pytest

from helpers.plans import save_config

pytestmark = [pytest.mark.slow, pytest.mark.aot]
SMALL = ("--max-model-len", "512", "--max-num-seqs", "16", "--max-num-batched-tokens", "64", "--context", "128")


def plan(*arguments: str, code: int = 0) -> str:
    """The planner's output."""
    command = [sys.executable, "-m", "tpu_inference.plan", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env={**os.environ})
    assert done.returncode == code, done.stderr[-3000:] + done.stdout[-3000:]
    assert "Traceback" not in done.stderr
    return done.stdout


def answer(*arguments: str, code: int = 0) -> dict:
    return json.loads(plan(*arguments, "--json", code=code))


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """name -> a directory with a config.json."""
    directory = tmp_path_factory.mktemp("configs")
    return lambda name: save_config(name, directory / name)


@pytest.mark.parametrize("where", ["v6e:2x2", "tpu7x:2x2x1"])
def test_memory_and_times_of_a_tiny_model(config, where):
    chip, topology = where.split(":")
    found = answer("--model", config("tiny"), "--chip", chip, "--topology", topology, *SMALL, "--batch", "4")
    assert found["fits"] is True
    assert found["devices"] == {"v6e": 4, "tpu7x": 8}[chip]
    assert found["tensor_parallel"] == 4, "its heads; tpu7x has two devices a chip"
    hbm = found["hbm_bytes_per_device"]
    assert hbm["limit"] == hbm["weights"] + hbm["kv_cache"] + hbm["temporaries"] + hbm["free"]
    assert found["requests_held"]["512"] * 512 == found["kv_tokens"] > 1e6
    assert len(found["compiled"]) < found["programs"]
    by_load = {(s["step"], s["decoding_requests"], s["context"]): s for s in found["steps"]}
    few, many = by_load["decode", 4, 512], by_load["decode", 16, 512]
    for step in (few, many):
        kinds = step["schedule_us_by_kind"]
        assert 0 < sum(kinds.values()) == pytest.approx(step["schedule_us"][0], rel=0.02)
        assert kinds["attention"] > 0 and kinds["matmul"] > 0
        assert step["step_us"][0] < step["step_us"][1]
        assert step["ici_collectives"] > 0
    assert many["schedule_us_by_kind"]["attention"] > few["schedule_us_by_kind"]["attention"]
    assert by_load["decode", 16, 128]["step_us"][0] <= many["step_us"][0]


def test_collectives_on_another_core(tmp_path):
    """On tpu7x all-reduces of wide layers are asynchronous calls, which jaxlib does not read."""
    layers = 2
    model = save_config("llama-8b", tmp_path, num_hidden_layers=layers, vocab_size=2048)
    found = answer("--model", model, "--chip", "tpu7x", "--topology", "2x2x1", *SMALL, "--batch", "16")
    (step,) = [s for s in found["steps"] if s["step"] == "decode" and s["context"] == 128]
    assert step["ici_collectives"] == 2 * layers + 1, "of each layer's two row-parallel products, and of the embedding"


def test_experts_are_divided_among_the_devices(config):
    options = ("--chip", "v6e", "--topology", "2x2", "-tp", "4", *SMALL, "--no-times", "--enable-expert-parallel")
    found = answer("--model", config("tiny-moe"), *options)
    layers, hidden, width, experts, heads, kv_heads, vocabulary = 3, 256, 128, 8, 4, 2, 512
    # Two KV heads on four devices are copied; norms, routers and one dense layer's MLP are the rest.
    divided = 2 * experts * 3 * width * hidden + 3 * 512 * hidden + 2 * vocabulary * hidden
    divided += layers * (2 * heads + 2 * 2 * kv_heads) * 128 * hidden
    whole = 2 * experts * hidden + (2 * layers + 1) * hidden + 2 * layers * 128
    assert found["fits"] is True
    assert found["hbm_bytes_per_device"]["weights"] == 2 * (divided // 4 + whole)


def test_a_step_of_experts_is_followed_and_takes_what_their_kernel_takes(tmp_path):
    """Two scanned layers of real width, the share of one device of four; everything else of the model is narrow."""
    code = """
import json, sys
from tpu_inference.plan.environment import prepare
prepare()
import jax
from jax.sharding import SingleDeviceSharding
from tpu_inference.kernels.grouped_matmul.shapes import GroupedShape
from tpu_inference.plan.arguments import parse
from tpu_inference.plan.engine import server_config
from tpu_inference.plan.jobs import step_job
from tpu_inference.plan.steps import Load
from tpu_inference.runner.buckets import Bucket
from tpu_inference.tools import schedule
question = parse(sys.argv[1:])
where = question.slices[0]
steps = {}
for tokens in 16, 64:
    load = Load("decode", tokens, 0, 128)
    (step,) = step_job(server_config(question, where, 4), where, Bucket(tokens, tokens), [load], True).steps
    steps[tokens] = step.unknown, step.kinds["matmul"]
device, alone = where.devices()[0], 0.0
for out, columns in (1536, 2048), (2048, 768):
    shape = GroupedShape("", tokens=64, top_k=8, experts=128, local=32, out=out, columns=columns)
    on = SingleDeviceSharding(device)
    jitted = jax.jit(shape.function(device), in_shardings=on, out_shardings=on)
    with schedule.workload(shape.workload(device)):
        _, recorded = schedule.record(lambda: jitted.lower(*shape.arguments()).compile())
    (kernel,) = recorded.time("v6e").kernels
    alone += kernel.microseconds
print(json.dumps([steps, alone]))
"""
    experts = dict(hidden_size=2048, moe_intermediate_size=768, num_experts=128, num_experts_per_tok=8)
    model = save_config("tiny-moe", tmp_path, **experts)
    options = ("--max-model-len", "512", "--max-num-seqs", "64", "--enable-expert-parallel")
    arguments = ["--model", model, "--chip", "v6e", "--topology", "2x2", "-tp", "4", *options]
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    steps, alone = json.loads(done.stdout.splitlines()[-1])
    assert [unknown for unknown, _ in steps.values()] == ["", ""]
    (_, few), (_, many) = steps["16"], steps["64"]
    assert many > 1.3 * few, "64 tokens choose nearly all of the experts, 16 two thirds"
    layers = 2
    assert layers * alone == pytest.approx(many, rel=0.1), "with the matmuls that are not of experts"


def test_8b_fits_eight_chips_of_v6e_and_not_one_of_v5e(config):
    fits = answer(
        "--model", config("llama-8b"), "--chip", "v6e", "--topology", "2x4", "--max-model-len", "8192", "--no-times"
    )
    assert fits["fits"] is True and fits["max_num_batched_tokens"] == 1024 and fits["block_size"] == 128
    # 8.03 billion parameters of two bytes on eight devices; a token's K and V of 32 layers, one head of 128 a device.
    assert fits["hbm_bytes_per_device"]["weights"] == pytest.approx(2 * 8.03e9 / 8, rel=0.01)
    assert fits["hbm_bytes_per_device"]["kv_cache"] == fits["kv_blocks"] * 128 * 32 * 2 * 128 * 2
    too_large = answer(
        "--model", config("llama-8b"), "--chip", "v5e", "--topology", "1x1", "--max-model-len", "8192", code=1
    )
    assert too_large["fits"] is False and "About 2 devices" in too_large["why_not"]
    assert too_large["margin_bytes"] < 0 and not too_large["compiled"]


def test_v3_takes_the_xla_form_and_says_so(config):
    found = answer("--model", config("tiny"), "--chip", "v3", "--topology", "2x2", *SMALL, "--no-times")
    assert found["fits"] is True and found["compiled"]
    assert any("XLA form" in note and "v4 and later" in note for note in found["notes"])


def test_one_request_that_is_too_long(config):
    where = ("--model", config("llama-8b"), "--chip", "v6e", "--topology", "1x1")
    found = answer(*where, "--gpu-memory-utilization", "0.6", "--max-model-len", "131072", code=1)
    shorter = re.search(r"lower --max-model-len to (\d+)", found["why_not"])
    assert shorter and 1024 < int(shorter[1]) < 131072


def test_a_comparison_ranks_and_what_is_hopeless_is_told_without_compiling(config):
    text = plan("--model", config("llama-70b"), "--compare", "v5e:2x4", "v6e:1x1", "v6e:2x2", "--no-times", code=1)
    ranked = text.partition("Ranked\n")[2].splitlines()
    assert [line.split()[0] for line in ranked[1:4]] == ["v5e:2x4", "v6e:2x2", "v6e:1x1"], "by what is missing"
    assert "Compiled here" not in text


def test_the_largest_programs_temporaries_are_the_engines(config):
    """Compiled over a cache of serving size instead of the engine's small one."""
    code = """
import sys
from tpu_inference.plan.environment import prepare
prepare()
from tpu_inference.plan import jobs
from tpu_inference.plan.arguments import parse
from tpu_inference.plan.engine import build_engine, server_config
question = parse(sys.argv[1:])
engine = build_engine(server_config(question, question.slices[0], 2), question.slices[0])
_, program = jobs.compile_forward(engine, jobs.Compiler(question.slices[0], False), engine.runner.plan.buckets[-1])
print("needs", program.sizes.needs, engine.runner.temporary_bytes())
"""
    arguments = ["--model", config("tiny"), "--chip", "v6e", "--topology", "2x2", *SMALL]
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=600)
    ours, engines = map(int, re.search(r"needs (\d+) (\d+)", done.stdout).groups())
    assert ours == pytest.approx(engines, rel=0.01, abs=2**20)


def test_hbm_of_every_chip_is_what_the_compiler_says():
    code = """
from tpu_inference.plan.environment import prepare
prepare()
import re, jax, jax.numpy as jnp
from tpu_inference.plan.slices import PROGRAM_HBM_GIB, TOPOLOGIES, parse_slice
from jax.sharding import SingleDeviceSharding
for chip, shapes in TOPOLOGIES.items():
    where = parse_slice(f"{chip}:{shapes[0]}")
    devices = where.devices()
    assert len(devices) == where.num_devices, where
    on = SingleDeviceSharding(devices[0])
    large = jax.jit(lambda x: x + 1, in_shardings=on, out_shardings=on).lower(jax.ShapeDtypeStruct((1 << 38,), jnp.int8))
    try:
        large.compile()
    except jax.errors.JaxRuntimeError as error:
        assert float(re.search(r"available HBM \\(([\\d.]+)G\\)", str(error))[1]) == PROGRAM_HBM_GIB[chip], chip
    else:
        raise AssertionError(chip)
print("done")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.stdout.endswith("done\n"), done.stderr[-2000:]
