# SPDX-License-Identifier: Apache-2.0
"""From a checkpoint to parameters on the devices: each weight straight to its shards, a slice at a time."""

import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from tpu_inference.kernels.quantized_matmul import ZERO, Packed
from tpu_inference.kernels.ragged_paged_attention import storage_dtype
from tpu_inference.layers.common.cache_scales import CacheScaleSource
from tpu_inference.layers.common.heads import plan_heads
from tpu_inference.layers.common.mxfp4 import Mxfp4RowScaleSource, Mxfp4ScaleSource
from tpu_inference.layers.common.nvfp4 import Nvfp4ScaleSource, ScalarSource
from tpu_inference.layers.common.quantization import ScaleSource, has_nan_bytes, without_minus_zero
from tpu_inference.layers.common.weights import Piece, Source, WeightSpec, leaves, map_specs
from tpu_inference.layers.jax.decoder import Decoder, pure_functions
from tpu_inference.models.common.checkpoint import Checkpoint, CheckpointError, nan_problem
from tpu_inference.models.common.interface import AttentionLayer, ModelFunctions

_STEPS = 2.0
"""Standard deviation of dummy weights of one byte or less, which scales make 0.02 of."""
_CONSTANTS = {"zeros": 0.0, "ones": 1.0, "scales": 0.02 / _STEPS, "zero_points": float(ZERO)}
IGNORED = re.compile(r"rotary_emb\.inv_freq$|\.masked_bias$|\.attn\.bias$")
"""Buffers that old checkpoints carry and nothing reads."""


def expected_tensors(specs: Any) -> dict[str, Source]:
    """By name, every tensor of the checkpoint that the tree reads."""
    return {
        name.format(layer=layer, expert=expert): source
        for spec in leaves(specs)
        for name, source in spec.sources().items()
        for layer in spec.layer_indices
        for expert in spec.expert_indices
    }


def _expected_of(checkpoint: Checkpoint, specs: Any) -> dict[str, Source]:
    """`expected_tensors`, with the names that this checkpoint has scales of the KV cache by; those that it lacks are left out."""
    expected: dict[str, Source] = {}
    for name, source in expected_tensors(specs).items():
        if isinstance(source, CacheScaleSource):
            expected |= dict.fromkeys([other for other in source.names(name) if other in checkpoint.shapes], source)
        else:
            expected[name] = source
    return expected


_SCALES = (ScaleSource, Nvfp4ScaleSource, Mxfp4ScaleSource, Mxfp4RowScaleSource, ScalarSource, CacheScaleSource)


def wrong_scales(name: str, scales: np.ndarray, *, of_cache: bool = False) -> str | None:
    """What is wrong with them; None where nothing is."""
    # Bytes are exponents of MXFP4, and the last one is NaN.
    scales = np.where(scales == 255, np.nan, scales) if scales.dtype == np.uint8 else scales.astype(np.float32)
    if not np.isfinite(scales).all():
        return f"not finite: {name} has NaN or infinite scales"
    return f"not positive: {name}, a scale of the KV cache" if of_cache and not (scales > 0).all() else None


def check_tensors(
    checkpoint: Checkpoint, specs: Any, *, tied_head: str | None, unread: Sequence[str] = (), others: Sequence[str] = ()
) -> None:
    """Raises CheckpointError with every missing, left-over and mis-shaped tensor, and every scale that is no number.

    Args:
        tied_head: name of a head that is not read where it is tied to the embedding.
        unread: ends of names that a quantized checkpoint has and nothing reads.
        others: beginnings of names of tensors that are for something else than text, or of layers that nothing reads.
    """
    expected, found = _expected_of(checkpoint, specs), checkpoint.shapes
    problems = [f"missing: {name} {list(source.shape)}" for name, source in expected.items() if name not in found]
    problems += [
        f"mis-shaped: {name} is {list(found[name])}, the config asks for {list(source.shape)}"
        for name, source in expected.items()
        if name in found and not source.accepts(found[name])
    ]
    problems += [
        f"left over: {name} {list(shape)} is not read by this architecture"
        for name, shape in found.items()
        if name not in expected
        and name != tied_head
        and not (IGNORED.search(name) or name.endswith(tuple(unread)) or name.startswith(tuple(others)))
    ]
    problems += [
        problem
        for name, source in expected.items()
        if isinstance(source, _SCALES) and name in found
        if (problem := wrong_scales(name, checkpoint.read(name), of_cache=isinstance(source, CacheScaleSource)))
    ]
    if problems:  # only then: else values are looked at as they are loaded, and read once
        problems += [nan_problem(name) for name in expected if name in found and has_nan_bytes(checkpoint.read(name))]
        raise CheckpointError(checkpoint.where, problems)


def _fill(out: np.ndarray, spec: WeightSpec, checkpoint: Checkpoint, of: dict[str, Any], box: Sequence[slice]) -> None:
    """Fill `out` with the part `box` (a slice of each dimension) of the weight of one layer, and of one expert where it has them."""
    axis, window = spec.axis, box[spec.axis]
    start = 0
    for piece in spec.pieces:
        low, high = max(start, window.start), min(start + piece.size, window.stop)
        if low < high:
            target = [slice(None)] * out.ndim
            target[axis] = slice(low - window.start, high - window.start)
            out[tuple(target)] = _read(piece, checkpoint, of, box, axis, low - start, high - start)
        start += piece.size


def _read(piece: Piece, checkpoint: Checkpoint, of: dict[str, Any], box, axis: int, low: int, high: int) -> Any:
    if piece.source is None:
        return 0

    def read(name: str, index: tuple[slice, ...] = ()) -> np.ndarray:
        return checkpoint.read(name, index if inside is None else (inside, *index))

    # Of a tensor that holds all experts, one.
    inside = None if "{expert}" in piece.source.name else of["expert"]
    index = list(box)
    index[axis] = slice(piece.start + low, piece.start + high)
    return piece.source.read(read, piece.source.name.format(**of), tuple(index))


def load_weight(spec: WeightSpec, checkpoint: Checkpoint, mesh: Mesh) -> jax.Array:
    """The array on its devices. Host memory beyond it: one shard of one weight."""

    def shard(index: tuple[slice, ...]) -> np.ndarray:
        full = [slice(*s.indices(n)[:2]) for s, n in zip(index, spec.device_shape, strict=True)]
        stacked, box = full[: -len(spec.shape)], full[-len(spec.shape) :]
        out = np.zeros([s.stop - s.start for s in full], spec.dtype)
        for at in np.ndindex(*out.shape[: len(stacked)]):
            found = [s.start + i for s, i in zip(stacked, at, strict=True)]
            layer = spec.layer if spec.layers is None else spec.first_layer + found[0]
            expert = None if spec.experts is None else found[-1]
            if expert in spec.expert_indices:
                _fill(out[at], spec, checkpoint, dict(layer=layer, expert=expert), box)
        return without_minus_zero(out)

    abstract = spec.abstract(mesh)
    return jax.make_array_from_callback(spec.device_shape, abstract.sharding, shard)


def dummy_weight(spec: WeightSpec, mesh: Mesh, seed: int) -> jax.Array:
    """A random array (or a constant, as the spec says) made where it stays."""
    abstract = spec.abstract(mesh)

    def make() -> jax.Array:
        if spec.init in ("int4", "e2m1"):
            return dummy_codes(jax.random.key(seed), abstract.shape, spec.init)
        if spec.init != "normal":
            return jnp.full(abstract.shape, _CONSTANTS[spec.init], abstract.dtype)
        if jnp.dtype(abstract.dtype).itemsize == 1:
            return dummy_bytes(jax.random.key(seed), abstract.shape, abstract.dtype)
        return (0.02 * jax.random.normal(jax.random.key(seed), abstract.shape, jnp.float32)).astype(abstract.dtype)

    return jax.jit(make, out_shardings=abstract.sharding)()


def dummy_bytes(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """Values of one byte with a standard deviation of `_STEPS`; none is -0 (`without_minus_zero`)."""
    values = (_STEPS * jax.random.normal(key, shape, jnp.float32)).astype(dtype)
    return jnp.where(values == 0, jnp.zeros((), dtype), values)


def dummy_codes(key: jax.Array, shape: tuple[int, ...], packed: Packed) -> jax.Array:
    """uint8 of two codes each, whose values are as often negative as positive and have a standard deviation of about `_STEPS`.

    None is 8, -0 of e2m1, which would be NaN (`without_minus_zero`): who does not know the kind may ask for either.
    """
    # 1, 1.5 and 3 of either sign; 1, 2 and 3.
    several = jnp.asarray([2, 3, 5, 10, 11, 13] if packed == "e2m1" else [5, 6, 7, 9, 10, 11])
    codes = several[jax.random.randint(key, (2, *shape), 0, len(several))]
    return (codes[0] | codes[1] << 4).astype(jnp.uint8)


def load_params(specs: Any, checkpoint: Checkpoint | None, mesh: Mesh, *, progress: bool = True) -> Any:
    """The tree with every spec replaced by its array; random ones without a checkpoint.

    Raises:
        CheckpointError: quantized values that are no numbers, once all were read.
    """
    bar = tqdm(total=len(leaves(specs)), desc="Loading weights", unit="array", disable=not progress)
    count = iter(range(len(leaves(specs))))

    def load(spec: WeightSpec) -> jax.Array:
        array = dummy_weight(spec, mesh, next(count)) if checkpoint is None else load_weight(spec, checkpoint, mesh)
        # Let the source go before the next is read, or the host holds several.
        array.block_until_ready()
        bar.update()
        return array

    with bar:
        params = map_specs(load, specs)
    if checkpoint is not None:
        checkpoint.refuse_nans()
    return params


def model_functions(module: Decoder, params: Any, mesh: Mesh) -> ModelFunctions:
    """What the runner needs of `module` with `params` in place of its specs."""
    _, forward, logits = pure_functions(module)
    cfg = module.cfg
    shards, mla = mesh.shape["model"], cfg.mla
    plan = plan_heads(cfg.num_heads, cfg.num_kv_heads, shards)
    kind = (shards, mla.kv_rank + mla.rope_dim, mla.kv_rank) if mla else (plan.num_kv_slots, cfg.head_dim, None)
    layers = tuple(
        AttentionLayer(f"model.layers.{i}.self_attn", window, *kind, chunk)
        for i, (window, chunk) in enumerate(
            zip(cfg.window_of_layer, cfg.chunk_of_layer or [None] * cfg.num_layers, strict=True)
        )
    )
    return ModelFunctions(
        params=params,
        forward=forward,
        logits=logits,
        layers=layers,
        platform=(device := mesh.devices.flat[0]).platform,
        kv_dtype=storage_dtype(module.kv_cache_dtype, device),
        flat_kv=module.scans,
        vocab_size=cfg.vocab_size,
        hidden=jax.ShapeDtypeStruct((1, cfg.hidden_size), module.dtype),
    )
