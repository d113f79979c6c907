# SPDX-License-Identifier: Apache-2.0
"""From a checkpoint to parameters on the devices: exactly, a slice at a time, and every problem at once."""

import json
import shutil
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from vllm.config import LoadConfig

from tpu_inference.errors import TpuInferenceError
from tpu_inference.layers.common.build import BuildContext
from tpu_inference.layers.common.mxfp4 import VALUES
from tpu_inference.layers.common.sharding import make_mesh
from tpu_inference.layers.common.weights import Piece, Source, WeightSpec, leaves, padded
from tpu_inference.layers.jax.decoder import pure_functions
from tpu_inference.models.common import loader, vllm_loader
from tpu_inference.models.common.checkpoint import Checkpoint, CheckpointError
from tpu_inference.models.common.loader import (
    check_tensors,
    dummy_bytes,
    dummy_codes,
    dummy_weight,
    expected_tensors,
    load_params,
    load_weight,
)
from tpu_inference.models.common.registry import model_class


@pytest.fixture(scope="module")
def llama(zoo):
    return Path(zoo("llama"))


@pytest.fixture(scope="module")
def tensors(llama):
    """The checkpoint as torch tensors."""
    return load_file(llama / "model.safetensors")


def mesh_of(shards):
    return make_mesh(jax.devices(), shards)


def specs_of(path, *, shards=1, scan=False, dtype=jnp.float32, **changes):
    """The specs of a checkpoint's model."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(path)
    for name, value in changes.items():
        setattr(config, name, value)
    module = model_class(config.architectures[0])(config, BuildContext(mesh_of(shards), dtype, 64, scan))
    return pure_functions(module)[0]


def problems_of(files, specs, tied_head=None):
    with pytest.raises(CheckpointError) as error:
        check_tensors(Checkpoint(map(str, files)), specs, tied_head=tied_head)
    assert all(problem in str(error.value) for problem in error.value.problems)
    assert f"({len(error.value.problems)} problem(s))" in str(error.value)
    return error.value.problems


def assert_same(a, b):
    a, b = jax.tree.leaves(a), jax.tree.leaves(b)
    assert len(a) == len(b) > 0
    for x, y in zip(a, b, strict=True):
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


class Spy(Checkpoint):
    """Counts what is read."""

    def __init__(self, files):
        super().__init__(files)
        self.reads = []

    def read(self, name, index=()):
        array = super().read(name, index)
        self.reads.append((name, array.nbytes))
        return array


# ---------------------------------------------------------------------------------------------------- all problems at once


def test_missing_left_over_and_mis_shaped_tensors_are_one_error(llama, tensors, tmp_path):
    changed = dict(tensors)
    del changed["model.norm.weight"], changed["model.layers.1.mlp.down_proj.weight"]
    changed["model.layers.0.self_attn.o_proj.weight"] = torch.ones(96, 7)
    changed["model.embed_tokens.weight"] = changed["model.embed_tokens.weight"].T.contiguous()
    changed["model.layers.7.self_attn.q_proj.weight"] = torch.ones(3)
    changed["vision.patch"] = torch.ones(2, 2)
    save_file(changed, tmp_path / "model.safetensors")
    problems = problems_of([tmp_path / "model.safetensors"], specs_of(llama))
    assert sorted(problems) == sorted(
        [
            "missing: model.norm.weight [96]",
            "missing: model.layers.1.mlp.down_proj.weight [96, 101]",
            "mis-shaped: model.layers.0.self_attn.o_proj.weight is [96, 7], the config asks for [96, 240]",
            "mis-shaped: model.embed_tokens.weight is [96, 331], the config asks for [331, 96]",
            "left over: model.layers.7.self_attn.q_proj.weight [3] is not read by this architecture",
            "left over: vision.patch [2, 2] is not read by this architecture",
        ]
    )


def test_old_buffers_are_no_problem(llama, tensors, tmp_path):
    changed = {**tensors, "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(40)}
    save_file(changed, tmp_path / "model.safetensors")
    check_tensors(Checkpoint([str(tmp_path / "model.safetensors")]), specs_of(llama), tied_head=None)


@pytest.mark.parametrize("scan", [False, True])
def test_what_is_expected_is_what_is_there(llama, tensors, scan):
    expected = {name: source.shape for name, source in expected_tensors(specs_of(llama, scan=scan)).items()}
    assert expected == {name: tuple(t.shape) for name, t in tensors.items()}


def test_corrupt_files_are_all_named(llama, tmp_path):
    whole = (llama / "model.safetensors").read_bytes()
    (tmp_path / "a.safetensors").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "b.safetensors").write_bytes(b"")
    (tmp_path / "c.safetensors").write_bytes(whole)
    (tmp_path / "d.bin").write_bytes(b"not a checkpoint")
    names = ["a.safetensors", "b.safetensors", "c.safetensors", "d.bin", "e.safetensors"]
    with pytest.raises(CheckpointError) as error:
        Checkpoint([str(tmp_path / name) for name in names])
    assert [problem.split()[0] for problem in error.value.problems] == [names[0], names[1], names[3], names[4]]
    assert str(tmp_path) in str(error.value)


def test_a_truncated_torch_file(tmp_path):
    torch.save({"a": torch.ones(1000)}, tmp_path / "whole.bin")
    data = (tmp_path / "whole.bin").read_bytes()
    (tmp_path / "model.bin").write_bytes(data[: len(data) // 2])
    with pytest.raises(CheckpointError, match=r"model\.bin is missing, corrupt or truncated"):
        Checkpoint([str(tmp_path / "model.bin")])


def test_no_files_at_all(llama):
    problems = problems_of([], specs_of(llama))
    assert len(problems) == len(expected_tensors(specs_of(llama)))


# --------------------------------------------------------------------------------------------------------------- file formats


@pytest.fixture(scope="module")
def sharded(zoo, llama, tmp_path_factory):
    """The same checkpoint in many files with an index."""
    import transformers

    path = tmp_path_factory.mktemp("sharded")
    transformers.AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32).save_pretrained(
        path, max_shard_size="150KB"
    )
    return path


@pytest.mark.parametrize("scan", [False, True])
def test_many_files_equal_one(llama, sharded, scan):
    files = sorted(map(str, sharded.glob("*.safetensors")))
    assert len(files) > 2
    specs = specs_of(llama, scan=scan)
    one, many = Checkpoint([str(llama / "model.safetensors")]), Checkpoint(files)
    check_tensors(many, specs, tied_head=None)
    assert_same(*(load_params(specs, checkpoint, mesh_of(1), progress=False) for checkpoint in (one, many)))


def test_a_file_that_the_index_names_is_missing(sharded, tmp_path):
    copy = shutil.copytree(sharded, tmp_path / "copy")
    files = sorted(copy.glob("*.safetensors"))
    files[1].unlink()
    files[2].write_bytes(files[2].read_bytes()[:100])
    with pytest.raises(CheckpointError) as error:
        Checkpoint(map(str, (files[0], *files[2:])))
    assert len(error.value.problems) == 2
    assert error.value.problems[0] == f"{files[1].name} is named in model.safetensors.index.json but missing"
    assert error.value.problems[1].startswith(files[2].name)


def test_the_index_of_the_other_format_does_not_count(tensors, tmp_path):
    save_file({"a": torch.ones(2)}, tmp_path / "model.safetensors")
    index = {"weight_map": {"a": "pytorch_model-00001-of-00002.bin"}}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    assert Checkpoint([str(tmp_path / "model.safetensors")]).shapes == {"a": (2,)}


@pytest.mark.parametrize("suffix", ["bin", "pt"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_torch_files_equal_safetensors(llama, tensors, tmp_path, suffix, dtype):
    cast = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    torch.save(cast, tmp_path / f"model.{suffix}")
    save_file(cast, tmp_path / "model.safetensors")
    specs = specs_of(llama, dtype=jnp.dtype(str(dtype).removeprefix("torch.")))
    loaded = []
    for name in (f"model.{suffix}", "model.safetensors"):
        checkpoint = Checkpoint([str(tmp_path / name)])
        check_tensors(checkpoint, specs, tied_head=None)
        loaded.append(load_params(specs, checkpoint, mesh_of(1), progress=False))
    assert_same(*loaded)


def test_torch_files_of_the_old_format(tmp_path):
    torch.save({"a": torch.arange(4.0)}, tmp_path / "model.bin", _use_new_zipfile_serialization=False)
    assert Checkpoint([str(tmp_path / "model.bin")]).read("a").tolist() == [0, 1, 2, 3]


def test_torch_files_of_parameters(tmp_path):
    torch.save({"a": torch.nn.Parameter(torch.arange(4.0))}, tmp_path / "model.bin")
    assert Checkpoint([str(tmp_path / "model.bin")]).read("a").tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("suffix", ["bin", "safetensors"])
def test_slices(tmp_path, suffix):
    tensor = torch.arange(24).reshape(4, 6).to(torch.bfloat16)
    path = tmp_path / f"model.{suffix}"
    save_file({"a": tensor}, path) if suffix == "safetensors" else torch.save({"a": tensor}, path)
    checkpoint = Checkpoint([str(path)])
    whole = checkpoint.read("a")
    assert whole.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(whole.astype(np.float32), np.arange(24.0).reshape(4, 6))
    part = checkpoint.read("a", (slice(1, 3), slice(2, 5)))
    np.testing.assert_array_equal(part.astype(np.float32), np.arange(24.0).reshape(4, 6)[1:3, 2:5])


# ------------------------------------------------------------------------------------------------------------------- contents


def test_a_checkpoint_is_cast_to_the_models_dtype(llama, tensors):
    params = load_params(
        specs_of(llama, dtype=jnp.bfloat16), Checkpoint([str(llama / "model.safetensors")]), mesh_of(1)
    )
    expected = tensors["model.embed_tokens.weight"].to(torch.bfloat16).float().numpy()
    embed = np.asarray(params["embed"][...])
    assert embed.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(embed.astype(np.float32), expected)


def test_stacked_layers_hold_what_single_ones_do(llama):
    checkpoint = Checkpoint([str(llama / "model.safetensors")])
    loop = load_params(specs_of(llama, scan=False), checkpoint, mesh_of(1), progress=False)
    scan = load_params(specs_of(llama, scan=True), checkpoint, mesh_of(1), progress=False)
    for i in range(3):
        assert_same(loop["layers"][i], jax.tree.map(lambda array, i=i: array[i], scan["layers"]))


def test_tied_embeddings_need_no_head(llama, tensors, tmp_path):
    tied = specs_of(llama, tie_word_embeddings=True)
    files = [llama / "model.safetensors"]
    assert problems_of(files, tied) == ["left over: lm_head.weight [331, 96] is not read by this architecture"]
    check_tensors(Checkpoint(map(str, files)), tied, tied_head="lm_head.weight")
    headless = {name: tensor for name, tensor in tensors.items() if name != "lm_head.weight"}
    save_file(headless, tmp_path / "model.safetensors")
    check_tensors(Checkpoint([str(tmp_path / "model.safetensors")]), tied, tied_head="lm_head.weight")
    assert problems_of([tmp_path / "model.safetensors"], specs_of(llama)) == ["missing: lm_head.weight [331, 96]"]


# ------------------------------------------------------------------------------------------------------------- bounded memory


def largest_shard(spec, mesh):
    """Bytes of one layer's part of a shard."""
    shape = spec.abstract(mesh).sharding.shard_shape(spec.device_shape)
    return int(np.prod(shape if spec.layers is None else shape[1:])) * 4


@pytest.mark.parametrize("shards", [1, 2, 4])
@pytest.mark.parametrize("scan", [False, True])
def test_no_read_is_larger_than_a_shard(llama, shards, scan):
    mesh = mesh_of(shards)
    for spec in leaves(specs_of(llama, shards=shards, scan=scan)):
        spy = Spy([str(llama / "model.safetensors")])
        array = load_weight(spec, spy, mesh)
        assert max(size for _, size in spy.reads) <= largest_shard(spec, mesh)
        # And a sharded weight is read once in all, unless KV heads are copied.
        if spec.abstract(mesh).sharding.is_fully_replicated is False:
            names = Counter(name for name, _ in spy.reads)
            copies = {name for name in names if ".k_proj." in name or ".v_proj." in name}
            assert sum(size for name, size in spy.reads if name not in copies) <= array.nbytes


def test_one_shards_slices_at_a_time():
    """A stacked, sharded weight: each shard reads its rows of each layer, and nothing else."""
    mesh, reads = mesh_of(4), []
    whole = np.arange(3 * 8 * 5, dtype=np.float32).reshape(3, 8, 5)

    def read(name, index):
        reads.append((name, index))
        return whole[int(name)][index]

    spec = WeightSpec((8, 5), jnp.float32, ("mlp", None), (Source("{layer}", (8, 5)).piece(0, 8),)).stacked(3)
    array = load_weight(spec, SimpleNamespace(read=read), mesh)
    np.testing.assert_array_equal(np.asarray(array), whole)
    assert sorted((name, rows.start, rows.stop) for name, (rows, _) in reads) == [
        (str(layer), start, start + 2) for layer in range(3) for start in (0, 2, 4, 6)
    ]
    assert all(columns == slice(0, 5) for _, (_, columns) in reads)


@pytest.mark.parametrize("shards", [1, 2, 4, 8])
@pytest.mark.parametrize("axis", [0, 1])
def test_pieces_land_where_they_should_on_any_number_of_shards(shards, axis):
    """Fused, padded and reordered pieces, along either dimension."""
    rng = np.random.default_rng(0)
    stored = {"a": rng.normal(size=(6, 3)), "b": rng.normal(size=(9, 3))}
    if axis:
        stored = {name: array.T for name, array in stored.items()}
    stored = {name: array.astype(np.float32) for name, array in stored.items()}
    a, b = (Source(name, array.shape) for name, array in stored.items())
    pieces = (b.piece(4, 5), *padded(a, 6, 7), a.piece(1, 2), Piece(1), b.piece(0, 1))
    shape, axes = ((16, 3), ("mlp", None)) if axis == 0 else ((3, 16), (None, "mlp"))
    spec = WeightSpec(shape, jnp.float32, axes, pieces, axis)
    fake = SimpleNamespace(read=lambda name, index: stored[name][index])

    def take(name, start, size):
        return np.take(stored[name], range(start, start + size), axis)

    zeros = np.zeros((1, 3) if axis == 0 else (3, 1), np.float32)
    parts = [take("b", 4, 5), take("a", 0, 6), zeros, take("a", 1, 2), zeros, take("b", 0, 1)]
    array = load_weight(spec, fake, mesh_of(shards))
    np.testing.assert_array_equal(np.asarray(array), np.concatenate(parts, axis))
    assert len({shard.data.shape for shard in array.addressable_shards}) == 1
    assert array.addressable_shards[0].data.shape[axis] == 16 // shards


# -------------------------------------------------------------------------------------------------------------- dummy weights


def test_dummy_weights():
    mesh = mesh_of(2)
    spec = WeightSpec((64, 32), jnp.float32, ("mlp", "embed"), (Piece(64),))
    array = dummy_weight(spec, mesh, 1)
    assert array.sharding.is_equivalent_to(spec.abstract(mesh).sharding, 2)
    assert 0.015 < float(array.std()) < 0.025 and abs(float(array.mean())) < 0.002
    assert_same(array, dummy_weight(spec, mesh, 1))
    assert (np.asarray(array) != np.asarray(dummy_weight(spec, mesh, 2))).mean() > 0.9
    for init, value in (("zeros", 0), ("ones", 1)):
        constant = dummy_weight(WeightSpec((4,), jnp.bfloat16, (None,), (Piece(4),), init=init), mesh, 1)
        assert constant.dtype == jnp.bfloat16 and (np.asarray(constant) == value).all()


def test_dummy_parameters_have_the_shapes_of_loaded_ones(llama):
    specs = specs_of(llama, shards=2, scan=True)
    params = load_params(specs, None, mesh_of(2), progress=False)
    for array, spec in zip(jax.tree.leaves(params), leaves(specs), strict=True):
        assert (array.shape, array.dtype) == (spec.device_shape, spec.dtype)
    embed, head = np.asarray(params["embed"][...]), np.asarray(params["lm_head"][...])
    assert embed.shape == head.shape and (embed != head).mean() > 0.9, "each has a seed of its own"


# ------------------------------------------------------------------------------------------------------------- load_model


def vllm_config(path, load_format="auto", **changes):
    """The part of a VllmConfig that loading reads."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(path)
    for name, value in changes.items():
        setattr(config, name, value)
    return SimpleNamespace(
        model_config=SimpleNamespace(
            model=str(path),
            revision=None,
            hf_config=config,
            hf_text_config=config,
            architectures=config.architectures,
            model_impl="auto",
            dtype=torch.float32,
            max_model_len=64,
        ),
        parallel_config=SimpleNamespace(enable_expert_parallel=False),
        load_config=LoadConfig(load_format=load_format, use_tqdm_on_load=False),
        cache_config=SimpleNamespace(cache_dtype="auto"),
        quant_config=None,
        additional_config={"scan_layers": False, "background_compile": False},
    )


def test_load_model(llama):
    model = vllm_loader.load_model(vllm_config(llama), mesh_of(2))
    assert [(layer.name, layer.sliding_window) for layer in model.layers] == [
        (f"model.layers.{i}.self_attn", None) for i in range(3)
    ]
    assert (model.layers[0].num_kv_heads, model.layers[0].head_dim, model.vocab_size, model.flat_kv) == (
        2,
        80,
        331,
        False,
    )
    expected = load_params(specs_of(llama, shards=2), Checkpoint([str(llama / "model.safetensors")]), mesh_of(2))
    assert_same(model.params, expected)


def test_torch_files_are_loaded_when_asked_for_only(llama, tensors, tmp_path):
    shutil.copy(llama / "config.json", tmp_path)
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    with pytest.raises(TpuInferenceError, match=r"no safetensors.*pytorch_model\.bin.*--load-format hf"):
        vllm_loader.load_model(vllm_config(tmp_path), mesh_of(1))
    asked = [vllm_config(llama), vllm_config(tmp_path, "hf")]
    assert_same(*(vllm_loader.load_model(config, mesh_of(1)).params for config in asked))


@pytest.mark.parametrize(("load_format", "dummy"), [("dummy", False), ("auto", True)])
def test_load_model_with_dummy_weights_reads_no_checkpoint(llama, tmp_path, monkeypatch, load_format, dummy):
    shutil.copy(llama / "config.json", tmp_path)
    # Each would be a compilation; test_dummy_weights looks at the numbers.
    monkeypatch.setattr(loader, "dummy_weight", lambda spec, mesh, seed: jax.device_put(np.full(1, seed, np.float32)))
    model = vllm_loader.load_model(vllm_config(tmp_path, load_format), mesh_of(1), dummy=dummy)
    seeds = [int(leaf[0]) for leaf in jax.tree.leaves(model.params)]
    assert seeds == list(range(len(seeds))) and len(seeds) == 21


def test_load_model_checks_the_checkpoint(llama):
    with pytest.raises(CheckpointError, match=r"mis-shaped: lm_head\.weight"):
        vllm_loader.load_model(vllm_config(llama, vocab_size=332), mesh_of(1))


def test_load_formats_that_are_not_served(llama):
    with pytest.raises(TpuInferenceError, match="load_format='tensorizer' is not served; use one of auto"):
        vllm_loader.load_model(vllm_config(llama, "tensorizer"), mesh_of(1))


def test_dummy_bytes_have_no_minus_zero():
    """It would be NaN to kernels that read the bits in another format."""
    values = np.asarray(dummy_bytes(jax.random.key(0), (256, 1024), "float8_e4m3fn"))
    plain = np.asarray((2 * jax.random.normal(jax.random.key(0), (256, 1024))).astype("float8_e4m3fn"))
    assert (plain.view(np.uint8) == 0x80).any(), "rounding makes some"
    assert not (values.view(np.uint8) == 0x80).any()
    np.testing.assert_array_equal(values.astype(np.float32), plain.astype(np.float32))


@pytest.mark.parametrize("packed", ["int4", "e2m1"])
def test_dummy_codes_are_as_large_as_dummy_bytes(packed):
    stored = np.asarray(dummy_codes(jax.random.key(0), (64, 512), packed))
    codes = np.concatenate([stored & 15, stored >> 4], axis=1)
    values = VALUES[codes] if packed == "e2m1" else codes.astype(np.float32) - 8
    assert stored.dtype == np.uint8 and not (codes == 8).any(), "-0 of e2m1 would be NaN"
    assert abs(values.mean()) < 0.05 and 1.9 < values.std() < 2.3
