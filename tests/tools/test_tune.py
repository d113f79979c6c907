# SPDX-License-Identifier: Apache-2.0
"""The tuner: its search, its tables, and that kernels read them."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import jax.numpy as jnp
import pytest

from tpu_inference.kernels import tuned
from tpu_inference.kernels.collectives import config as collectives
from tpu_inference.kernels.flash_attention import config as flash
from tpu_inference.kernels.forms import chip_of, implementation_for
from tpu_inference.kernels.grouped_matmul import config as grouped
from tpu_inference.kernels.mla import config as mla
from tpu_inference.kernels.quantized_matmul import config as quantized
from tpu_inference.kernels.ragged_paged_attention import config as paged
from tpu_inference.kernels.ragged_paged_attention.shapes import SHAPES
from tpu_inference.tools.kernel_report.store import PAGE
from tpu_inference.tools.tune import sample, store
from tpu_inference.tools.tune.__main__ import main
from tpu_inference.tools.tune.measure import Cost, Tuned
from tpu_inference.tools.tune.sample import CONTEXTS, with_other_contexts
from tpu_inference.tools.tune.search import descend
from tpu_inference.tools.tune.spaces import PARTS

ROOT = Path(__file__).resolve().parent.parent.parent
V6E = SimpleNamespace(platform="tpu", device_kind="TPU v6 lite")
TABLES = sorted((ROOT / "tpu_inference/kernels").glob("*/tuned/*.json"))


@dataclass(frozen=True)
class Point:
    x: int = 0
    y: int = 0


def test_descent_finds_the_bottom_and_scores_nothing_twice():
    seen = []

    def score(p):
        seen.append(p)
        return 1 + (p.x - 3) ** 2 + (p.y - p.x) ** 2

    found = descend(Point(), {"x": range(6), "y": range(6)}, lambda p: p.x != 5, score)
    assert found.scores[found.best] == min(found.scores.values()) < 3
    assert len(seen) == len(set(seen)) == len(found.scores)
    assert all(p.x != 5 for p in seen), "an impossible one is not scored"


def test_descent_looks_past_one_value_that_gains_nothing_and_no_further():
    of = {0: 100, 1: 101, 2: 90, 3: 95, 4: 95, 5: 1}
    found = descend(Point(), {"x": range(6)}, lambda p: True, lambda p: of[p.x])
    assert found.best == Point(2)
    assert Point(5) not in found.scores


def test_descent_stays_where_nothing_gains_more_than_noise():
    found = descend(Point(), {"x": range(3)}, lambda p: True, lambda p: 100 - 0.2 * p.x)
    assert found.best == Point()


def a_search(new, old=(100.0, 110.0)):
    costs, start = ({"shape": Cost(times, 3, 0, 1.0)} for times in (new, old))
    fields = dict(pages_per_item=4, slots=7, piece=256)
    return Tuned("decode", "q4_kv1", fields, {**fields, "slots": 5}, costs, start, 9)


@pytest.mark.parametrize(
    ("new", "kept"), [((90.0, 99.0), True), ((99.0, 109.0), False), ((90.0, 112.0), False), ((100.0, 110.0), False)]
)
def test_only_what_gains_and_loses_nowhere_is_kept(new, kept, tmp_path):
    assert store.worth_keeping(a_search(new)) == kept
    store.write_table("op", "v6e", a_search((50.0, 50.0)), tmp_path)
    store.write_table("op", "v6e", a_search(new), tmp_path)
    table = json.loads(store.table_path("op", "v6e", tmp_path).read_text())
    if not kept:
        assert table == {}, "an entry that no longer gains goes"
    else:
        entry = table["q4_kv1"]["decode"]
        assert entry["config"]["slots"] == 7
        assert entry["gain"] == 0.1
        assert {"jax", "libtpu", "date"} <= entry.keys()


def test_a_tuned_entry_is_used_for_its_part_alone(monkeypatch):
    key = SHAPES["decode_tp8_64x1k"].key(V6E)
    entry = {"decode": {"config": dict(pages_per_item=2, slots=9, piece=256)}}
    monkeypatch.setattr(tuned, "table", lambda op, chip: {str(key): entry} if (op, chip) == (paged.OP, "v6e") else {})
    for chip in ("v5e", None):
        assert paged.config_for(key, chip) == paged.heuristic(key, chip)
    found = paged.config_for(key, "v6e")
    assert found == replace(paged.heuristic(key, "v6e"), decode=paged.DecodeConfig(2, 9, 256))
    assert paged.config_for(replace(key, page_size=16), "v6e").decode.slots != 9


@pytest.mark.parametrize(
    ("config", "key", "part", "fields"),
    [
        (mla, mla.ShapeKey(16, 512, 64, 128, "bfloat16", "bfloat16"), "decode", dict(pages_per_item=2, slots=9)),
        (mla, mla.ShapeKey(16, 512, 64, 128, "bfloat16", "bfloat16"), "prefill", dict(block_tokens=32)),
        (grouped, grouped.ShapeKey(8, 1536, 2048, "bfloat16", "int8"), "blocks", dict(block_rows=256, block_out=384, slots=5)),
    ],
)  # fmt: skip
def test_latents_and_experts_read_their_tables(config, key, part, fields, monkeypatch):
    entry = {part: {"config": fields}}
    monkeypatch.setattr(tuned, "table", lambda op, chip: {str(key): entry} if (op, chip) == (config.OP, "v6e") else {})
    start = config.heuristic(key, "v6e")
    expected = (
        grouped.Config(**fields)
        if config is grouped
        else replace(start, **{part: replace(getattr(start, part), **fields)})
    )
    assert config.config_for(key, "v6e") == expected != start
    for chip in ("v5e", None):
        assert config.config_for(key, chip) == config.heuristic(key, chip)


def test_what_the_tuner_writes_is_what_kernels_read(monkeypatch, tmp_path):
    store.write_table("op", "v6e", a_search((50.0, 50.0)), tmp_path)
    monkeypatch.setattr(tuned.resources, "files", lambda package: tmp_path)
    monkeypatch.setattr(tuned, "table", tuned.table.__wrapped__)  # not from, nor into, the cache of other tests
    assert tuned.lookup("op", "v6e", "q4_kv1", "decode") == dict(pages_per_item=4, slots=7, piece=256)
    for missing in (
        ("other", "v6e", "q4_kv1", "decode"),
        ("op", "v5e", "q4_kv1", "decode"),
        ("op", "v6e", "q4_kv1", "x"),
    ):
        assert tuned.lookup(*missing) is None


@pytest.mark.parametrize("name", ["decode_tp8_64x1k", "decode_fp8_tp1_64x8k"])
def test_searches_of_decode_are_on_short_and_long_contexts(name):
    found = with_other_contexts({name: SHAPES[name]})
    assert found[name] is SHAPES[name]
    for context in CONTEXTS:
        assert any(sorted(shape.lengths)[0] == context for shape in found.values())
    widths = {shape.table_width for other, shape in found.items() if other != name}
    assert len(widths) == 1, "short rows have the tables of a server of long ones"


def test_the_same_seed_draws_the_same_shapes(monkeypatch):
    monkeypatch.setattr(sample, "device_of", lambda chip: V6E)
    for op in sample.DRAW:
        drawn = [sample.draw(op, "v6e", 6, seed, set()) for seed in (3, 3, 4)]
        assert list(drawn[0]) == list(drawn[1]) != list(drawn[2])
        key = str(next(iter(drawn[0].values())).key(V6E))
        assert all(str(shape.key(V6E)) != key for shape in sample.draw(op, "v6e", 6, 3, {key}).values())


def test_the_form_tells_the_chip():
    form = implementation_for(V6E)
    assert (form, chip_of(form)) == ("pallas", "v6e")
    assert chip_of("pallas") is None
    assert tuned.lookup(paged.OP, None, "any", "decode") is None


def test_paged_key_names_what_blocks_depend_on():
    assert str(SHAPES["decode_fp8_tp1_64x8k"].key(V6E)) == "q32_kv8_d128_page128_bfloat16_float8_e4m3b11fnuz"
    key = flash.ShapeKey(16, 8, 577, 577, 72, "bfloat16", True, 128)
    assert str(key) == "q16_kv8_577x577_d72_bfloat16_causal_window128"


@pytest.mark.parametrize("path", TABLES, ids=lambda path: f"{path.parts[-3]}-{path.stem}")
def test_committed_entries_are_configs_that_gain(path):
    make = {
        paged.OP: dict(decode=paged.DecodeConfig, prefill=paged.PrefillConfig), mla.OP: dict(decode=mla.DecodeConfig, prefill=mla.PrefillConfig),
        flash.OP: dict(blocks=flash.Config), grouped.OP: dict(blocks=grouped.Config), quantized.OP: dict(blocks=quantized.Config),
    }[path.parts[-3]]  # fmt: skip
    for parts in json.loads(path.read_text(encoding="utf-8")).values():
        for part, entry in parts.items():
            make[part](**entry["config"])
            assert entry["gain"] >= store.LEAST_GAIN
            assert {"jax", "libtpu", "date"} <= entry.keys()
            assert entry["figures"].keys() == entry["heuristic"].keys()


def test_committed_page_is_what_the_committed_records_make():
    text = (ROOT / PAGE).read_text(encoding="utf-8")
    assert store.page(text, ROOT / store.RECORDS) == text


def test_blocks_of_quantized_weights_are_whole_lanes():
    (part,) = (part for part in PARTS if part.op == quantized.OP)
    key = quantized.ShapeKey(64, 3584, 4096, "int4", 32)
    for block in (128, 384, 1024):
        blocks = part.axes(key, quantized.Config(block))["block_out"]
        assert blocks and all(n % quantized.LANES == 0 for n in blocks)


@pytest.mark.parametrize("part", PARTS, ids=lambda part: f"{part.op}-{part.name}")
def test_axes_are_parameters_with_possible_values(part):
    if part.op == paged.OP:
        key = paged.ShapeKey.of(8, 128, "bfloat16", SimpleNamespace(shape=(9, 2, 2, 128, 128), dtype=jnp.bfloat16))
    elif part.op == grouped.OP:
        key = grouped.ShapeKey(8, 1536, 2048, "bfloat16", "bfloat16")
    elif part.op == mla.OP:
        key = mla.ShapeKey(16, 512, 64, 128, "bfloat16", "bfloat16")
    elif part.op == quantized.OP:
        key = quantized.ShapeKey(64, 3584, 4096, "int8")
    elif part.op == collectives.OP:
        key = collectives.ShapeKey(8, 128, 4096, 2048, "bfloat16")
    else:
        key = flash.ShapeKey(8, 2, 1024, 1024, 128, "bfloat16")
    start = part.read(part.heuristic(key, "v6e"))
    assert part.possible(key, start)
    for name, values in part.axes(key, start).items():
        tried = [fields for value in values if part.possible(key, fields := replace(start, **{name: value}))]
        assert len(tried) > 1, name


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--op", "nothing", "--all"],
            "op 'nothing' is not known; known are: collectives, flash_attention, grouped_matmul, mla, quantized_matmul, ragged",
        ),
        (["--op", paged.OP, "--all", "--part", "x"], "'x' is not known; known are: decode, prefill"),
        (["--op", paged.OP, "--all", "--chip", "v1"], "chip 'v1' is not known; known are: v4, "),
        (["--op", paged.OP, "--shape", "x"], "'x' is not known; known are: decode_tp1_64x1k, "),
    ],
)
def test_unknown_names_list_the_known(arguments, message, capsys):
    assert main(arguments) == 2
    assert message in capsys.readouterr().err
