# SPDX-License-Identifier: Apache-2.0
"""scripts/vllm_tests: what is selected, how results are kept, stand-ins; and a slice of vLLM's own tests."""

import json
import os
import subprocess
import sys
import tomllib
import types
from pathlib import Path

import pytest

from vllm_tests import plugin, report, results, standins
from vllm_tests.environment import Workplace
from vllm_tests.selection import REFUSAL, Selection

ROOT = Path(__file__).resolve().parent.parent
FILE = "tests/v1/core/test_output.py"


def write(path: Path, *lines: dict) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_a_pattern_names_tests_and_files():
    selection = Selection(("tests/*",), (("tests/a.py::test_b[x]", "why"), ("tests/lora/*", "no LoRA")), (), (), (), ())
    assert selection.cause("tests/a.py::test_b[x]") == "why"
    assert selection.cause("tests/a.py::test_bx") is None
    assert selection.cause("tests/lora/c.py") == selection.cause("tests/lora/c.py::test_d") == "no LoRA"


def test_only_a_listed_refusal_of_the_platform_excuses_a_failure():
    selection = Selection.load()
    assert "refused" in selection.refused(f"{REFUSAL}: LoRA: remove --enable-lora.")
    assert selection.refused(f"{REFUSAL}: something new: do without.") is None
    assert selection.refused("AssertionError: LoRA") is None


def test_every_cause_is_used():
    selection = Selection.load()
    given = {why for _, why in (*selection.not_applicable, *selection.refusals, *selection.messages)}
    declared = tomllib.loads((ROOT / "scripts/vllm_tests/selection.toml").read_text())["causes"]
    assert given == set(declared.values())


def test_files_without_engines_share_a_process(tmp_path):
    selection = Selection(("tests/**/*.py",), (("tests/a/no.py", "why"),), (), (), (), ("tests/a/*",))
    for name in ("a/one.py", "a/two.py", "a/no.py", "b.py"):
        write(tmp_path / "tests" / name)
    assert selection.group(selection.find(tmp_path)) == [["tests/a/one.py", "tests/a/two.py"], ["tests/b.py"]]


def test_what_stops_pytest_is_charged_to_the_test_that_ran(tmp_path):
    one, two = f"{FILE}::one", "tests/other.py::two"
    raw = write(
        tmp_path / "raw",
        {"collected": [one, two, f"{FILE}::three"]},
        {"start": one},
        {"id": one, "outcome": "pass", "cause": "", "seconds": 1},
        {"start": two},
    )
    paths = {FILE: tmp_path / "a", "tests/other.py": tmp_path / "b"}
    results.split(raw, paths, "killed")
    assert results.read(paths[FILE]).tests == {one: ("pass", ""), f"{FILE}::three": ("not run", "")}
    assert results.read(paths["tests/other.py"]).tests == {two: ("fail", "killed")}
    assert all(results.complete(path) for path in paths.values())
    assert not raw.exists() and not results.complete(raw)


def test_the_page_counts_what_is_applicable(tmp_path):
    place = Workplace(tmp_path)
    write(
        place.results(FILE),
        {"collected": [f"{FILE}::{name}" for name in "abcd"]},
        {"id": f"{FILE}::a", "outcome": "pass", "cause": "", "seconds": 1},
        {"id": f"{FILE}::b", "outcome": "fail", "cause": "a | b", "seconds": 1},
        {"id": f"{FILE}::c", "outcome": "fail", "cause": f"{REFUSAL}: LoRA: remove it", "seconds": 1},
    )
    page = write(tmp_path / "page.md")
    page.write_text(f"Head.\n{report.BEGIN}\nold\n{report.END}\nFoot.\n")
    assert "50.00 % of 2 applicable tests pass" in report.write(place, [FILE], page)
    text = page.read_text()
    assert text.startswith("Head.\n") and text.endswith("Foot.\n") and "old" not in text
    assert "| `v1/core/test_output.py::b` | a \\| b |" in text
    data = json.loads(page.with_suffix(".json").read_text())
    assert data["total"] == {"pass": 1, "fail": 1, "not applicable": 1, "not run": 1}


def test_the_page_keeps_what_it_says_of_files_that_have_no_results_here(tmp_path):
    one, two = FILE, "tests/v1/core/test_scheduler_e2e.py"
    page, first, second = tmp_path / "page.md", Workplace(tmp_path / "first"), Workplace(tmp_path / "second")
    page.write_text(f"{report.BEGIN}\n{report.END}\n")
    lines = [{"id": f"{one}::{name}", "outcome": name, "cause": "why", "seconds": 1} for name in results.OUTCOMES[:3]]
    write(first.results(one), *lines)
    write(second.results(two), {"id": f"{two}::a", "outcome": "pass", "cause": "", "seconds": 1})
    report.write(first, [one, two], page)
    before = json.loads(page.with_suffix(".json").read_text())
    report.write(second, [one, two], page)
    after = json.loads(page.with_suffix(".json").read_text())
    assert before["files"][two]["not run"] == 1 and after["files"][two]["pass"] == 1
    assert after["files"][one] == before["files"][one]
    assert after["failures"] == {f"{one}::fail": "why"} and after["not_applicable"] == {one: {"why": 1}}
    kept = {**after, "versions": {**after["versions"], "jax": "0"}}
    page.with_suffix(".json").write_text(json.dumps(kept))
    report.write(second, [one, two], page)
    assert json.loads(page.with_suffix(".json").read_text())["files"][one]["not run"] == 1


def test_vllms_runner_asks_for_no_graphs_unless_a_test_does(monkeypatch):
    class Runner:
        def __init__(self, model, **settings):
            self.settings = settings

    conftest = types.SimpleNamespace(HfRunner=type("HfRunner", (), {}), VllmRunner=Runner)
    monkeypatch.setitem(sys.modules, "tests.conftest", conftest)
    plugin.pytest_collection_finish(None)
    assert Runner("m", seed=1).settings == {"seed": 1, "compilation_config": {"mode": 0}}
    own = {"cudagraph_capture_sizes": [8]}
    assert Runner("m", compilation_config=own).settings == {"compilation_config": own}


def test_a_stand_in_is_found_under_its_name_and_speaks(tmp_path):
    import torch
    import transformers

    assert standins.prepare(tmp_path, ROOT, ["Qwen/Qwen3-0.6B"]) == ["Qwen/Qwen3-0.6B"]
    assert standins.prepare(tmp_path, ROOT, ["Qwen/Qwen3-0.6B"]) == []
    options = dict(cache_dir=tmp_path, local_files_only=True)
    tokenizer = transformers.AutoTokenizer.from_pretrained("Qwen/Qwen3-0.6B", **options)
    model = transformers.AutoModelForCausalLM.from_pretrained("Qwen/Qwen3-0.6B", **options).float().eval()
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hello"}], add_generation_prompt=True, tokenize=False
    )
    assert chat == "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
    ids = tokenizer(chat, return_tensors="pt").input_ids
    assert tokenizer.decode(ids[0]) == chat
    with torch.no_grad():
        logits = model(ids).logits[0]
        said = model.generate(ids, do_sample=False, max_new_tokens=32)[0, ids.shape[1] :]
    assert (logits.argmax(-1) != ids[0]).all(), "it repeats what it has just seen"
    assert len(set(said.tolist())) >= 8


@pytest.mark.slow
@pytest.mark.e2e
def test_a_slice_of_vllms_tests(tmp_path):
    """One file that needs no engine and one that starts some, from the package index to results."""
    files = [FILE, "tests/v1/core/test_scheduler_e2e.py"]
    place = Workplace(tmp_path)
    command = [sys.executable, "-m", "vllm_tests", "--directory", str(tmp_path)]
    env = {**os.environ, "PYTHONPATH": str(ROOT / "scripts")}
    env.pop("VLLM_ENABLE_V1_MULTIPROCESSING", None)
    subprocess.run([*command, *(a for file in files for a in ("--only", file))], env=env, check=True, timeout=600)
    for file in files:
        tests = results.read(place.results(file)).tests
        assert tests and {outcome for outcome, _ in tests.values()} == {"pass"}, tests
