# SPDX-License-Identifier: Apache-2.0
"""vLLM's own PyTorch class of a model as pure JAX functions: its module is traced through torchax, and nothing of torch runs in a step."""

import copy
import inspect
import re
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import torch
from jax.sharding import Mesh
from vllm.config import ModelConfig, VllmConfig, set_current_vllm_config
from vllm.forward_context import set_forward_context
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.model_loader import get_model_loader
from vllm.model_executor.model_loader.utils import initialize_model
from vllm.utils.torch_utils import set_default_torch_dtype

from tpu_inference.compat.checkpoints import as_loader_looks_for, latents_put_up
from tpu_inference.compat.lowering import import_torchax, start_torch_alone
from tpu_inference.config import TpuConfig
from tpu_inference.errors import TpuInferenceError
from tpu_inference.kernels.quantized_matmul import ZERO
from tpu_inference.kernels.ragged_paged_attention import KV_PAGES_AXES, kv_pages_shape, storage_dtype
from tpu_inference.layers.common.attention import KVCache, KVCacheLayout
from tpu_inference.layers.common.attention_metadata import AttentionMetadata
from tpu_inference.layers.common.build import BuildContext
from tpu_inference.layers.common.sharding import MODEL_AXIS, named_sharding
from tpu_inference.layers.vllm import lowerings
from tpu_inference.layers.vllm.attention import TpuAttentionImpl
from tpu_inference.layers.vllm.context import StepContext, step_context
from tpu_inference.layers.vllm.linear import use_shells
from tpu_inference.layers.vllm.moe import use_expert_shells
from tpu_inference.layers.vllm.placement import DIVIDED, WHOLE
from tpu_inference.layers.vllm.quantization import SCALES, ZERO_POINTS, TpuQuantizationConfig
from tpu_inference.logger import init_logger
from tpu_inference.models.common.checkpoint import CheckpointError
from tpu_inference.models.common.interface import AttentionLayer, ModelFunctions
from tpu_inference.models.common.kv_cache_dtype import quantized_cache_dtype, warn_of_missing_scales
from tpu_inference.models.common.loader import dummy_bytes, dummy_codes
from tpu_inference.models.common.quantization import QuantizationError, quantization_of, refuse_rules_without_effect
from tpu_inference.models.vllm.exchange import Places
from tpu_inference.models.vllm.explain import explain
from tpu_inference.models.vllm.quantized_weights import HeldForm
from tpu_inference.models.vllm.repeat import Repeat, find_repeats
from tpu_inference.models.vllm.weights import DeviceState, State, register_loose_tensors

logger = init_logger(__name__)
CACHE_SCALES_NAMES = re.compile(r"\.[kv]_scale$")
ZERO_POINTS_NAMES = re.compile(rf"[._]{ZERO_POINTS}({DIVIDED}|{WHOLE})?$")
SCALES_NAMES = re.compile(rf"[._]{SCALES}({DIVIDED}|{WHOLE})?$")


class TracedModule:
    """A module without numbers, called with those of a state."""

    _one_at_a_time = threading.RLock()
    """The module's parameters are exchanged while it is traced, and vLLM's forward context is one for all threads."""

    def __init__(self, model: torch.nn.Module, vllm_config: VllmConfig, mesh: Mesh) -> None:
        self.model, self._vllm_config, self._mesh = model, vllm_config, mesh
        self._places = Places(model)
        parameters = inspect.signature(model.forward).parameters.values()
        required = {p.name for p in parameters if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD}
        self._nothing = dict.fromkeys(required - {"input_ids", "positions"})
        self._repeats: list[Repeat] = []
        attention = _attention_layers(vllm_config)
        found = {name: layer for name, layer in attention.items() if not layer.impl.shares_with}
        self.layers = tuple(self._layer(name, layer) for name, layer in found.items())
        self._index_of_layer = {name: index for index, name in enumerate(found)}
        self._shares = len(found) < len(attention)

    def _layer(self, name: str, layer: Any) -> AttentionLayer:
        impl: TpuAttentionImpl = layer.impl
        heads = impl.heads(self._mesh.shape[MODEL_AXIS]).num_kv_slots
        return AttentionLayer(name, impl.sliding_window, heads, impl.cached_head_size)

    def _call(self, method: Callable[..., torch.Tensor], state: State, *args: jax.Array) -> jax.Array:
        torchax = import_torchax()
        view = torchax.interop.torch_view
        stacked = tuple(f"{repeat.path}.[" for repeat in self._repeats)
        with ExitStack() as stack:
            stack.enter_context(self._one_at_a_time)
            stack.enter_context(set_current_vllm_config(self._vllm_config))
            stack.enter_context(set_forward_context(None, self._vllm_config, slot_mapping={}))
            stack.enter_context(set_default_torch_dtype(self._vllm_config.model_config.dtype))
            # No effect on bf16; float32 products would otherwise be rounded to bf16 on TPU.
            stack.enter_context(jax.default_matmul_precision("highest"))
            stack.enter_context(torch.no_grad())
            stack.enter_context(torchax.default_env())
            stack.enter_context(torch.device("jax"))
            tensors = {name: view(array) for name, array in state.items() if not name.startswith(stacked)}
            stack.enter_context(self._places.holding(tensors))
            try:
                return method(*map(view, args)).jax()
            except Exception as error:
                if (explained := explain(error, self.model)) is error:
                    raise
                raise explained from error

    def _context(self, state: State, kv_cache: KVCache, meta: AttentionMetadata) -> StepContext:
        stacks = {repeat.path: repeat.by_position(state) for repeat in self._repeats}
        return StepContext(self._mesh, kv_cache, meta, self._index_of_layer, stacks=stacks)

    def forward(self, state: State, kv_cache: KVCache, token_ids: jax.Array, meta: AttentionMetadata):
        """Token ids [T] -> (hidden states [T, d], kv_cache). Raises LoweringError for operations that JAX has no form of."""
        with step_context(self._context(state, kv_cache, meta)) as step:
            hidden = self._call(self._run, state, token_ids, meta.positions)
        return hidden, step.kv_cache

    def _run(self, token_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids=token_ids, positions=positions, **self._nothing)

    def logits(self, state: State, hidden: jax.Array) -> jax.Array:
        """float32 [N, vocab_size] of hidden states [N, d]."""
        return self._call(self.model.compute_logits, state, hidden).astype(jnp.float32)

    def functions(self, state: State) -> ModelFunctions:
        """What the runner needs, with the arrays (or their shapes) of `state`."""
        config = self._vllm_config.model_config
        self._places = Places(self.model)  # once more: some models get parameters only while they are loaded
        if not self.layers:
            raise TpuInferenceError(
                f"{type(self.model).__name__} has no attention layer with a KV cache: it is not served."
            )
        device = self._mesh.devices.flat[0]
        hidden = jax.ShapeDtypeStruct((1, config.get_hidden_size()), _jax_dtype(config))
        return ModelFunctions(
            params=state,
            forward=self.forward,
            logits=self.logits,
            layers=self.layers,
            platform=device.platform,
            kv_dtype=storage_dtype(quantized_cache_dtype(self._vllm_config) or hidden.dtype, device),
            flat_kv=bool(self._repeats),
            vocab_size=jax.eval_shape(self.logits, state, hidden).shape[-1],
            hidden=hidden,
        )

    def find_repeats(self, shapes: State) -> list[Repeat]:
        """Which layers can be scanned over, found by tracing the module once; from here on they are."""
        if self._shares or len({(layer.num_kv_heads, layer.head_dim) for layer in self.layers}) > 1:
            return []  # one pool of pages for all layers, as scanned ones need, holds heads of one shape

        def trace(observe: Callable[[StepContext, State], None]) -> None:
            def observed(state: State, kv_cache: KVCache, token_ids: jax.Array, meta: AttentionMetadata):
                with step_context(self._context(state, kv_cache, meta)) as step:
                    observe(step, state)
                    return self._call(self._run, state, token_ids, meta.positions)

            jax.eval_shape(observed, shapes, *self._smallest_step())

        self._repeats = find_repeats(self.model, trace)
        return self._repeats

    def _smallest_step(self) -> tuple[KVCache, jax.ShapeDtypeStruct, AttentionMetadata]:
        int32 = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.int32)  # noqa: E731
        first, count = self.layers[0], len(self.layers)
        device = self._mesh.devices.flat[0]
        size = self._vllm_config.cache_config.block_size
        shape = kv_pages_shape(count, size, first.num_kv_heads, first.head_dim, device.platform)
        dtype = storage_dtype(quantized_cache_dtype(self._vllm_config) or jnp.float32, device)
        pages = jax.ShapeDtypeStruct(shape, dtype, sharding=named_sharding(self._mesh, KV_PAGES_AXES))
        layout = KVCacheLayout(tuple(range(count)), (0,) * count, 1, True)
        return KVCache((pages,), layout), int32(8), AttentionMetadata(int32(8), int32(3), int32(2), int32(1, 2, 1))


def _attention_layers(vllm_config: VllmConfig) -> dict[str, Any]:
    layers = vllm_config.compilation_config.static_forward_context
    return {name: layer for name, layer in layers.items() if isinstance(layer, Attention)}


def _undivided(vllm_config: VllmConfig) -> VllmConfig:
    """The configuration as torch sees it: one device with the whole model. JAX divides it."""
    alone = copy.copy(vllm_config)
    alone.parallel_config = copy.copy(vllm_config.parallel_config)
    alone.parallel_config.tensor_parallel_size = alone.parallel_config.world_size = 1
    alone.parallel_config.enable_expert_parallel = False
    alone.device_config = copy.copy(vllm_config.device_config)
    alone.device_config.device = torch.device("cpu")  # where the module is built; vLLM has None for TPU
    if quantization_of(vllm_config) is not None:
        # Names are those of vLLM's modules there, and of the checkpoint in the configuration as it is.
        asked = copy.copy(alone)
        asked.quant_config = copy.deepcopy(vllm_config.quant_config)
        alone.quant_config = TpuQuantizationConfig(
            quantization_of(asked),
            asked.quant_config.apply_vllm_mapper if asked.quant_config else lambda mapper: None,
            shards=vllm_config.parallel_config.tensor_parallel_size,
            expert_parallel=vllm_config.parallel_config.enable_expert_parallel,
            cache_scales=quantized_cache_dtype(vllm_config) is not None,
        )
    return alone


def build(vllm_config: VllmConfig, mesh: Mesh, expert_parallel: bool = False) -> tuple[torch.nn.Module, BuildContext]:
    """vLLM's module, its parameters allocated and not written, its layers computing by ours."""
    start_torch_alone(vllm_config)
    model_config = vllm_config.model_config
    scan_layers = TpuConfig.from_vllm(vllm_config).scan_layers
    ctx = BuildContext(
        mesh, _jax_dtype(model_config), model_config.max_model_len, scan_layers, expert_parallel=expert_parallel
    )
    vllm_config.compilation_config.static_forward_context.clear()
    with set_default_torch_dtype(model_config.dtype), torch.device("cpu"), latents_put_up():
        model = initialize_model(vllm_config).eval().requires_grad_(False)
    lowerings.register()
    for layer in _attention_layers(vllm_config).values():
        if layer.impl.sinks is not None:
            layer.register_parameter("sinks_of_impl", layer.impl.sinks)
    if isinstance(vllm_config.quant_config, TpuQuantizationConfig):
        refuse_rules_without_effect(vllm_config.quant_config.quantization)
    use_shells(model, mesh, ctx.accumulate_dtype)
    use_expert_shells(model, mesh, ctx.accumulate_dtype, expert_parallel=ctx.expert_parallel)
    register_loose_tensors(model)
    return model, ctx


def _jax_dtype(model_config: ModelConfig) -> Any:
    return jnp.dtype(str(model_config.dtype).removeprefix("torch."))


def random_array(name: str, array: jax.ShapeDtypeStruct) -> jax.Array:
    """Dummy weights, made where they stay."""
    seed = sum(map(ord, name))

    def make() -> jax.Array:
        if CACHE_SCALES_NAMES.search(name):
            return jnp.ones(array.shape, array.dtype)
        if SCALES_NAMES.search(name):
            return jnp.full(array.shape, 0.01, array.dtype)
        if ZERO_POINTS_NAMES.search(name):
            return jnp.full(array.shape, ZERO, array.dtype)
        if array.dtype == jnp.uint8:  # codes of four bits, of one kind or the other
            return dummy_codes(jax.random.key(seed), array.shape, "int4")
        if array.dtype.itemsize == 1 and array.dtype != bool:  # values, which those scales make 0.02 of
            return dummy_bytes(jax.random.key(seed), array.shape, array.dtype)
        if not jnp.issubdtype(array.dtype, jnp.floating):
            return jnp.zeros(array.shape, array.dtype)
        return (0.02 * jax.random.normal(jax.random.key(seed), array.shape, jnp.float32)).astype(array.dtype)

    return jax.jit(make, out_shardings=array.sharding)()


def load_vllm_model(vllm_config: VllmConfig, mesh: Mesh, *, dummy: bool) -> ModelFunctions:
    """Weights onto `mesh`, and the model's pure functions.

    Raises:
        TpuInferenceError: what the model asks of its layers is not served; a checkpoint that lacks weights (CheckpointError).
        ValueError: weights that no layer of the model has.
    """
    traced, state = prepare(vllm_config, mesh)
    if dummy:
        return traced.functions(state.fill(random_array))
    sharded = vllm_config.load_config.load_format == "sharded_state"
    if sharded:
        _check_is_of_one_rank(vllm_config.model_config)
        if quantization_of(vllm_config) is not None:
            raise QuantizationError("A sharded state of a quantized model")
    state.stream()
    quantization = quantization_of(vllm_config)
    quantized_cache = quantized_cache_dtype(vllm_config) is not None
    held = None if quantization is None else HeldForm(quantization, cache_scales=quantized_cache)
    with set_current_vllm_config(vllm_config), _names_loaded(traced.model, held) as loaded:
        get_model_loader(vllm_config.load_config).load_weights(traced.model, vllm_config.model_config)
    if not sharded:  # there vLLM's loader asks the module for its names itself, and misses none
        state.check(vllm_config.model_config.model, loaded, held.problems() if held else ())
    if quantized_cache:
        warn_of_missing_scales(2 * len(traced.layers) - len(held.cache_scales if held else ()))
    return traced.functions(state.finish())


def _check_is_of_one_rank(model_config: ModelConfig) -> None:
    """A sharded state's files are one rank's each. To PyTorch there is one rank here, and vLLM's loader would take its part for the whole."""
    where = Path(model_config.model_weights or model_config.model)
    if others := sorted(where.glob("model-rank-[1-9]*-part-*.safetensors")):
        ranks = 1 + max(int(path.name.split("-")[2]) for path in others)
        raise CheckpointError(
            str(where),
            [f"saved by {ranks} ranks, and a sharded state is read from one: save it with tensor_parallel_size=1, or load the original checkpoint"],
        )  # fmt: skip


@contextmanager
def _names_loaded(model: torch.nn.Module, held: HeldForm | None) -> Iterator[set[str]]:
    """Filled with the names that the model's `load_weights`, given tensors as `held` has them, says it has loaded, before vLLM's loader adds any."""
    names: set[str] = set()
    load = model.load_weights

    def load_weights(weights: Iterable[tuple[str, torch.Tensor]], *args: Any, **kwargs: Any) -> Any:
        weights = weights if held is None else held.of(weights)
        loaded = load(as_loader_looks_for(type(model).__name__, weights), *args, **kwargs)
        names.update(loaded or ())
        return loaded

    model.load_weights = load_weights
    try:
        yield names
    finally:
        del model.load_weights


def abstract_vllm_model(vllm_config: VllmConfig, mesh: Mesh) -> ModelFunctions:
    """The functions of `load_vllm_model` over shapes instead of arrays."""
    traced, state = prepare(vllm_config, mesh)
    return traced.functions(state.abstract())


def prepare(vllm_config: VllmConfig, mesh: Mesh) -> tuple[TracedModule, DeviceState]:
    """The module, and the place for its weights, before any is read.

    Raises:
        TpuInferenceError: what the model asks of its layers is not served.
    """
    alone = _undivided(vllm_config)
    model, ctx = build(alone, mesh, vllm_config.parallel_config.enable_expert_parallel)
    state = DeviceState(model, mesh)
    traced = TracedModule(model, alone, mesh)
    if ctx.scans and (repeats := traced.find_repeats(state.abstract())):
        for repeat in repeats:
            logger.info(
                "%d layers of %s from the %d. on are scanned in groups of %d",
                repeat.groups * repeat.period, repeat.path, repeat.first + 1, repeat.period,
            )  # fmt: skip
        state.stack(repeats)
    return traced, state
