# SPDX-License-Identifier: Apache-2.0
"""What the planner is asked, and what it refuses: exit code 2, one message, no traceback."""

import json
from pathlib import Path

import pytest

from helpers.plans import save_config
from tpu_inference.errors import ConfigError
from tpu_inference.plan.__main__ import main
from tpu_inference.plan.arguments import parse
from tpu_inference.plan.model import check_tensor_parallel, read_model
from tpu_inference.plan.slices import TOPOLOGIES, find_slice, parse_slice
from tpu_inference.tpu_info import CHIPS

SLICE = ("--chip", "v6e", "--topology", "2x4")


@pytest.fixture
def tiny(tmp_path):
    return save_config("tiny", tmp_path / "tiny")


def test_options_reach_the_server_under_their_names():
    question = parse(["--model", "m", *SLICE, "-tp", "4", "--max-model-len", "8192", "--gpu-memory-utilization", "0.8"])
    assert question.engine == {"max_model_len": 8192, "gpu_memory_utilization": 0.8}
    assert (question.tensor_parallel, [str(s) for s in question.slices]) == (4, ["v6e:2x4"])


def test_experts_are_divided_when_asked_for_only():
    assert parse(["--model", "m", *SLICE]).engine == {}
    assert parse(["--model", "m", *SLICE, "--enable-expert-parallel"]).engine == {"enable_expert_parallel": True}


def test_rounding_at_load_is_asked_for_as_of_a_server():
    rules = {"linear": "int8_per_channel_static"}
    asked = parse(["--model", "m", *SLICE, "-q", "online", "--quantization-config", json.dumps(rules)])
    assert asked.engine == {"quantization": "online", "quantization_config": rules}


def test_slices_to_compare_are_taken_once_and_prices_by_chip():
    question = parse(
        ["--model", "m", "--compare", "v5e:2x4", "v6e:2x2", "v5e:2x4", "--price", "v6e=2.7", "v5litepod=1"]
    )
    assert [str(s) for s in question.slices] == ["v5e:2x4", "v6e:2x2"]
    assert question.prices == {"v6e": 2.7, "v5e": 1.0}


def test_the_smallest_slice_that_has_the_devices():
    assert str(find_slice("v6e", None, 8)) == "v6e:2x4"
    assert str(find_slice("tpu7x", None, 8)) == "tpu7x:2x2x1"


def test_every_chip_has_slices_and_tpu7x_two_devices_a_chip():
    assert set(TOPOLOGIES) == set(CHIPS)
    where = parse_slice("tpu7x:2x2x1")
    assert (where.num_chips, where.num_devices, where.num_hosts) == (4, 8, 1)
    assert parse_slice("v6e:8x8").num_hosts == 16
    assert where.program_hbm < where.chip.hbm_bytes_per_device


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--chip", "v9", "--topology", "2x4"), "'v9' is not known: known are v3, v4, v5e"),
        (("--chip", "v6e", "--topology", "3x3"), "'3x3' of v6e is not known: known are 1x1, 2x2, 2x4"),
        (("--chip", "v5e", "-tp", "1000"), "No slice of v5e has 1000 devices; the largest known is v5e:16x16"),
        ((), "Say which slice"),
        (("--compare", "v6e"), "write CHIP:TOPOLOGY"),
        (("--compare", "v6e:2x2", "--chip", "v6e"), "leave out --chip"),
        ((*SLICE, "--price", "v6e"), "write CHIP=DOLLARS"),
        ((*SLICE, "--price", "v6e=-1"), "write CHIP=DOLLARS"),
        ((*SLICE, "--price", "v5e=1"), "which no slice asked about is made of"),
        ((*SLICE, "--no-times", "--price", "v6e=1"), "leave out --no-times"),
        ((*SLICE, "--max-num-seqs", "0"), "--max-num-seqs"),
        ((*SLICE, "--additional-config", "[1]"), "invalid JSON object value"),
        ((*SLICE, "--gpu-memory-utilization", "1.5"), "not above 0 and up to 1"),
        ((*SLICE, "--export-cache", "d"), "--export-cache is not offered. "),
        ((*SLICE, "--turbo"), "unrecognized arguments: --turbo"),
    ],
)
def test_refused_before_anything_is_loaded(capsys, arguments, message):
    assert main(["--model", "m", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_no_config_says_where_to_get_one(capsys, tmp_path):
    assert main(["--model", str(tmp_path), *SLICE]) == 2
    assert "Give a directory that has one" in capsys.readouterr().err


def edited(path: str, **fields) -> str:
    file = Path(path) / "config.json"
    config = {**json.loads(file.read_text()), **fields}
    file.write_text(json.dumps({name: value for name, value in config.items() if value is not None}))
    return path


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(architectures=["MambaForCausalLM"]), "served are DeepseekV2ForCausalLM"),
        (dict(architectures=None), "no architectures in its config.json"),
        (dict(hidden_size=None, num_hidden_layers=None), "lacks hidden_size, num_hidden_layers"),
        (dict(head_dim=81), "the nearest is 80"),
        (dict(head_dim=1024), "the nearest is 512"),
        (dict(head_dim=None, hidden_size=257), "the nearest that is, is hidden_size=256"),
    ],
)
def test_configs_that_are_not_served(capsys, tiny, fields, message):
    assert main(["--model", edited(tiny, **fields), *SLICE]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_tensor_parallel_sizes(tiny):
    model = read_model(tiny)
    assert (model.num_heads, model.head_dim) == (4, 128)
    assert check_tensor_parallel(model, None, 8, "v6e:2x4") == 4
    assert check_tensor_parallel(model, 2, 8, "v6e:2x4") == 2
    with pytest.raises(
        ConfigError, match=r"4 attention heads are not divided by it\. The nearest that works here is 4"
    ):
        check_tensor_parallel(model, 3, 8, "v6e:2x4")
    with pytest.raises(ConfigError, match=r"v6e:1x1 has 1 devices\. The nearest that works here is 1"):
        check_tensor_parallel(model, 8, 1, "v6e:1x1")


def test_a_plot_without_matplotlib_says_how_to_install_it(monkeypatch, capsys):
    from tpu_inference.plan import plot

    monkeypatch.setattr(plot.importlib.util, "find_spec", lambda name: None)
    assert main(["--model", "m", *SLICE, "--plot", "a.png"]) == 2
    assert "pip install 'tpu-inference[plot]'" in capsys.readouterr().err


def test_a_plot_of_another_format_or_nowhere(monkeypatch, capsys):
    from tpu_inference.plan import plot

    monkeypatch.setattr(plot.importlib.util, "find_spec", lambda name: True)
    assert main(["--model", "m", *SLICE, "--plot", "a.txt"]) == 2
    assert ".png, .svg, .pdf" in capsys.readouterr().err
    assert main(["--model", "m", *SLICE, "--plot", "/nowhere/a.png"]) == 2
    assert "there is no directory /nowhere" in capsys.readouterr().err
