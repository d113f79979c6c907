# SPDX-License-Identifier: Apache-2.0
"""From the model's layers to vLLM's specs, and from vLLM's decision to arrays."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
import torch
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    KVCacheTensor,
    MLAAttentionSpec,
    SlidingWindowSpec,
)

from tpu_inference.errors import TpuInferenceError
from tpu_inference.kernels.ragged_paged_attention import kv_pages_shape
from tpu_inference.layers.common.attention import KVCache, KVCacheLayout
from tpu_inference.layers.common.sharding import make_mesh
from tpu_inference.models.common.interface import AttentionLayer
from tpu_inference.runner.kv_cache_manager import (
    abstract_kv_cache,
    allocate_kv_cache,
    kv_cache_specs,
    layout_from_config,
    uniform_layout,
)

BLOCK, HEADS, DIM, NUM_BLOCKS = 16, 4, 8, 10
SHAPE = dict(block_size=BLOCK, num_kv_heads=HEADS, head_size=DIM, dtype=torch.float32)
PAGE = FullAttentionSpec(**SHAPE).page_size_bytes


def model(*windows, flat=False):
    layers = tuple(AttentionLayer(f"layer{i}", window, HEADS, DIM) for i, window in enumerate(windows))
    return SimpleNamespace(layers=layers, flat_kv=flat, platform="cpu")


def group(*names, window=None, block_size=BLOCK):
    shape = {**SHAPE, "block_size": block_size}
    spec = FullAttentionSpec(**shape) if window is None else SlidingWindowSpec(**shape, sliding_window=window)
    return KVCacheGroupSpec(list(names), spec)


def tensor(*names, offset=0, layer_stride=PAGE * NUM_BLOCKS, block_stride=PAGE):
    return KVCacheTensor(100 * PAGE * NUM_BLOCKS, list(names), layer_stride, block_stride, offset)


def config(tensors, groups):
    return KVCacheConfig(num_blocks=NUM_BLOCKS, kv_cache_tensors=tensors, kv_cache_groups=groups)


def test_specs():
    specs = kv_cache_specs(model(None, 24), BLOCK, torch.float32)
    assert list(specs) == ["layer0", "layer1"]
    assert type(specs["layer0"]) is FullAttentionSpec
    assert type(specs["layer1"]) is SlidingWindowSpec and specs["layer1"].sliding_window == 24
    for spec in specs.values():
        assert (spec.block_size, spec.num_kv_heads, spec.head_size) == (BLOCK, HEADS, DIM)
        # What vLLM reckons a page to be is what a page is.
        page = jax.ShapeDtypeStruct(kv_pages_shape(1, BLOCK, HEADS, DIM, "cpu"), jnp.float32)
        assert spec.page_size_bytes == page.size * page.dtype.itemsize


def test_latents_are_on_every_device():
    """One latent a token, of which vLLM counts each device's copy; the array has one, and no device a part of it."""
    layers = tuple(AttentionLayer(f"layer{i}", None, 2, 40, latent=24) for i in range(3))
    latents = SimpleNamespace(layers=layers, flat_kv=True, platform="tpu")
    spec = kv_cache_specs(latents, BLOCK, torch.bfloat16)["layer1"]
    assert type(spec) is MLAAttentionSpec and (spec.num_kv_heads, spec.head_size) == (1, 128)
    abstract = abstract_kv_cache(latents, uniform_layout(latents, 5), BLOCK, jnp.bfloat16, make_mesh(jax.devices(), 2))
    (pages,) = abstract.pages
    assert pages.shape == pages.sharding.shard_shape(pages.shape) == (15, 1, 1, BLOCK, 128)
    assert 15 * spec.page_size_bytes == 2 * pages.size * pages.dtype.itemsize
    assert MLAAttentionSpec.merge([spec, spec]).page_size_bytes == spec.page_size_bytes


def test_one_group_has_a_slot_a_layer():
    names = ["layer0", "layer1", "layer2"]
    layout = layout_from_config(config([tensor(*names)], [group(*names)]), names, flat=False)
    assert layout == KVCacheLayout((0, 1, 2), (0, 0, 0), NUM_BLOCKS, False)
    assert layout.num_slots == 3


def test_layers_of_different_groups_with_one_address_share_a_slot():
    """Gemma's kind: two of three layers see a window. Tensors of the groups overlay each other."""
    full, sliding = ["layer2", "layer5"], ["layer0", "layer1", "layer3", "layer4"]
    names = [f"layer{i}" for i in range(6)]
    tensors = [tensor(*full), tensor(*sliding[:2]), tensor(*sliding[2:])]
    groups = [group(*full), group(*sliding[:2], window=24), group(*sliding[2:], window=24)]
    layout = layout_from_config(config(tensors, groups), names, flat=False)
    assert layout.num_slots == 2
    assert layout.slot_of_layer == (0, 1, 0, 0, 1, 1)
    assert layout.group_of_layer == (1, 1, 0, 2, 2, 0)
    # No two layers share both: one group's block ids are unique.
    assert len(set(zip(layout.slot_of_layer, layout.group_of_layer, strict=True))) == len(names)


def test_tensors_side_by_side_do_not_share():
    tensors = [tensor("layer0"), tensor("layer1", offset=PAGE * NUM_BLOCKS)]
    groups = [group("layer0"), group("layer1", window=24)]
    layout = layout_from_config(config(tensors, groups), ["layer0", "layer1"], flat=True)
    assert (layout.slot_of_layer, layout.flat) == ((0, 1), True)


def test_blocks_of_all_layers_side_by_side():
    """vLLM's block-outermost order: layers a page apart."""
    names = ["layer0", "layer1"]
    placed = tensor(*names, layer_stride=PAGE, block_stride=2 * PAGE)
    assert layout_from_config(config([placed], [group(*names)]), names, flat=False).slot_of_layer == (0, 1)


@pytest.mark.parametrize(
    ("tensors", "groups"),
    [
        ([tensor("layer0")], [group("layer0", "layer1")]),
        ([tensor("layer0", "layer1")], [group("layer0")]),
    ],
)
def test_a_layer_without_a_place_is_named(tensors, groups):
    with pytest.raises(TpuInferenceError, match=r"no place for layers \['layer1'\]"):
        layout_from_config(config(tensors, groups), ["layer0", "layer1"], flat=False)


def test_different_block_sizes_are_refused():
    tensors = [tensor("layer0"), tensor("layer1")]
    groups = [group("layer0"), group("layer1", window=24, block_size=2 * BLOCK)]
    with pytest.raises(TpuInferenceError, match=r"\[16, 32\].*--disable-hybrid-kv-cache-manager"):
        layout_from_config(config(tensors, groups), ["layer0", "layer1"], flat=False)


def test_uniform_layout():
    layout = uniform_layout(model(None, 24, None, flat=True), 7)
    assert layout == KVCacheLayout((0, 1, 2), (0, 0, 0), 7, True)


@pytest.mark.parametrize("flat", [False, True])
def test_arrays(flat):
    """As many bytes in a flat pool as in arrays of slots; sharded by heads; zeros."""
    mesh = make_mesh(jax.devices(), 2)
    layout = KVCacheLayout((0, 1, 0), (0, 0, 1), 5, flat)
    abstract = abstract_kv_cache(model(None, None, 24), layout, BLOCK, jnp.float32, mesh)
    cache = allocate_kv_cache(abstract)
    assert len(cache.pages) == (1 if flat else 2)
    assert sum(pages.nbytes for pages in cache.pages) == 2 * 5 * PAGE
    for pages, expected in zip(cache.pages, abstract.pages, strict=True):
        assert (pages.shape, pages.dtype) == (expected.shape, expected.dtype)
        assert pages.sharding.is_equivalent_to(expected.sharding, pages.ndim)
        assert {shard.data.shape[2] for shard in pages.addressable_shards} == {HEADS // 2}
        assert not pages.any()
    assert cache.layout == layout


def test_layers_find_their_pages():
    layout = KVCacheLayout((0, 1, 0), (0, 0, 1), 5, False)
    assert [KVCache((), layout).locate(i) for i in range(3)] == [(0, 0, 0), (1, 0, 0), (0, 0, 1)]
    flat = KVCache((), KVCacheLayout((0, 1, 0), (0, 0, 1), 5, True))
    found = [jax.jit(lambda layer: flat.locate(layer)[1:])(i) for i in range(3)]
    assert [tuple(map(int, pair)) for pair in found] == [(0, 0), (5, 0), (0, 1)]
