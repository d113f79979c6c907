# SPDX-License-Identifier: Apache-2.0
"""Every touch of what vLLM, torch and JAX do not promise to keep. Verified with vLLM 0.32.0, torch 2.13 and JAX 0.10.2.

| what | where | why | until |
|---|---|---|---|
| `torch.accelerator` made no-ops | `quiet_torch_accelerator` | vLLM calls it at shutdown and while loading; it fails once torchax is imported | vLLM asks the platform instead |
| `vllm.envs.environment_variables` extended | `envs.register_with_vllm` | else our variables are warned about and not forwarded by Ray | vLLM has a registration call |
| `VLLM_XLA_USE_SPMD=1` | `env_override` | else vLLM defaults to one process a device | vLLM lets a platform choose its executor |
| `DefaultModelLoader._prepare_weights` | `weight_files` | the one place that knows hubs, revisions and which files count | it is public |
| `ModelRegistry.register_model` with a class never built | `declare_architecture` | vLLM asks a PyTorch class what a model can do | a platform can answer |
| `get_engine_process_shutdown_timeout` wrapped | `grant_engine_shutdown_grace` | SIGTERM with requests running kills the engine at once, and the server hangs | the grace is not ROCm's alone |
| `gc.freeze` at exit | `skip_the_last_collection` | the interpreter collects garbage once more when a process ends, long after SIGTERM | vLLM's processes freeze it themselves |
| `terminate_if_errored` of the API server wrapped | `exit_with_error_when_engine_dies` | the server exits with 0 when its engine has died, which supervisors take for success | it exits with an error |
| `VLLM_WORKER_MULTIPROC_METHOD` | `choose_start_method` | vLLM forks the engine unless CUDA has started; it does not look at JAX | it asks the platform |
| `import torchax` | `import_torchax` | torchax 0.0.13 names ATen overloads that torch 2.13 has dropped | a torchax made for torch 2.13 |
| `Tensor.type_as` of torchax | `import_torchax` | torchax 0.0.13 changes the tensor itself, and knows no views | torchax returns another |
| `transformers_moe_forward` by its Python function | `operations_that_call_modules` | torch's dispatcher leaves torchax before the experts are called | it is a method again |
| DBRX's experts renamed | `as_loader_looks_for` | vLLM's class loads them by the names of before they became a module's | its `load_weights` finds them |
| which layers a quantization leaves out | `fp8_skips`, `awq_skips`, `gptq_skips`, `modelopt_skips`, `online_skips`, `compressed_tensors_target` | vLLM asks with its own modules at hand | a config answers for a name |
| one torch process, whole weights | `start_torch_alone` | vLLM's layers ask their process group how far they are divided; JAX divides them instead | layers take it from the config |
| `ModelConfig.use_mla` says no | `latents_put_up` | vLLM's classes of latent attention would ask for a backend of it; in their multi-head form they ask for ours | a class can be told |
| `vllm.ir` without its torch wrap | `start_torch_alone` | a custom op of torch's registry hides the arithmetic from torchax | torchax lowers `vllm_ir` ops |
| loading of custom logits processors | `custom_logits_processors` | vLLM drops them silently for TPU; the runner serves them | a platform can say that it does |
| `prometheus_client.mmap_dict` | `MetricFile` | the engine's metrics, in the files that prometheus_client's public collector reads | it has a writer that is not chosen by a variable at import |
| `ProfilerSession` of jaxlib | `start_trace`, `stop_trace`, `write_trace` | `jax.profiler.stop_trace` writes whatever size the trace has; here it is known before | JAX can limit a trace |
| `get_file_cache` of JAX's compilation cache wrapped | `use_jax_cache` | its entries are written in place, read unchecked and never replaced | JAX takes a cache of one's own |
| `ThinkingBudgetStateHolder`, one a request | `thinking_budget_state` | the state behind `thinking_token_budget` is part of vLLM's own sampler | it is public |
"""

import atexit
import gc
import logging
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from types import ModuleType
from typing import Any

from tpu_inference.errors import TpuInferenceError
from tpu_inference.logger import init_logger

logger = init_logger(__name__)


def quiet_torch_accelerator() -> None:
    """Make the calls that vLLM makes on "the accelerator" do nothing: torch has none here, JAX holds the device."""
    import torch

    def nothing(*args: object, **kwargs: object) -> None:
        return None

    for name in ("empty_cache", "empty_host_cache", "synchronize"):
        if hasattr(torch.accelerator, name):
            setattr(torch.accelerator, name, nothing)


def weight_files(model_config: Any, load_config: Any) -> list[str]:
    """Paths of the checkpoint's weight files, found (and fetched from the hub where the model is a name) by vLLM's loader."""
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

    model = getattr(model_config, "model_weights", None) or model_config.model
    _, files, _, _ = DefaultModelLoader(load_config)._prepare_weights(
        model, None, model_config.revision, fall_back_to_pt=True, allow_patterns_overrides=None
    )
    return files


def require_safetensors(model_config: Any, load_config: Any) -> None:
    """Raise TpuInferenceError where vLLM would fall back to PyTorch files, which are pickles, though nobody has asked for them."""
    files = weight_files(model_config, load_config)
    others = sorted(os.path.basename(file) for file in files if not file.endswith(".safetensors"))
    if others:
        raise TpuInferenceError(
            f"{model_config.model} has no safetensors, only PyTorch files ({', '.join(others[:4])}), which are pickles and read only when "
            "asked for: use --load-format hf (also *.bin) or pt (*.pt), or convert the checkpoint."
        )


def declare_architecture(architecture: str, *, replace: bool = False) -> None:
    """Tell vLLM that `architecture` exists and generates text, unless it has a class of its own for it, which is not to be replaced.

    vLLM asks its registry what a model can do before any worker starts, by looking at a PyTorch class; ours is never built.
    """
    import torch
    from vllm import ModelRegistry

    known = architecture in ModelRegistry.get_supported_archs()
    if known and not replace:
        return

    class ServedByJax(torch.nn.Module):
        def __init__(self, vllm_config: Any, prefix: str = "") -> None:
            raise NotImplementedError(f"{architecture} is a JAX model")

        def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
            raise NotImplementedError

        def forward(self, input_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
            raise NotImplementedError

        def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
            raise NotImplementedError

    ModelRegistry.register_model(architecture, ServedByJax)


START_METHOD = "VLLM_WORKER_MULTIPROC_METHOD"


def jax_has_started() -> bool:
    """Whether JAX has a backend, hence threads, in this process; imports nothing."""
    bridge = sys.modules.get("jax._src.xla_bridge")
    return bridge is not None and bridge.backends_are_initialized()


def choose_start_method() -> None:
    """Leave vLLM's default (fork: the engine has everything imported, and a script needs no main guard) while that is safe.

    A child forked from a process where JAX runs threads inherits their locks for ever: spawn it then, whatever is set.
    """
    if os.environ.get(START_METHOD) == "spawn" or not jax_has_started():
        return
    if START_METHOD in os.environ:
        logger.warning(
            "%s is now spawn, not fork: JAX has started in this process and does not survive a fork", START_METHOD
        )
    os.environ[START_METHOD] = "spawn"


def keep_torch_to_one_thread_if_forked() -> None:
    """In an engine that was forked: torch's thread pool, if the parent used it, is not there, and waiting for it would be for ever."""
    import multiprocessing

    import torch

    if isinstance(multiprocessing.current_process(), multiprocessing.context.ForkProcess):
        torch.set_num_threads(1)


ENGINE_GRACE_SECONDS = 15.0
"""For the engine process to tell of aborted requests and to let go of the device, once told to end."""


def grant_engine_shutdown_grace() -> None:
    """Give the engine process time to end before it is killed, as vLLM does for ROCm alone.

    Killed at once, it never reports the requests it aborts: the server waits for their connections for ever, and a TPU may stay held.
    """
    from vllm.v1.engine import utils

    original = utils.get_engine_process_shutdown_timeout
    if getattr(original, "grants_grace", False):
        return

    def with_grace(request_timeout: float | None, process_timeout: float | None) -> float | None:
        if request_timeout == 0 and process_timeout == 0:
            return ENGINE_GRACE_SECONDS
        return original(request_timeout, process_timeout)

    with_grace.grants_grace = True  # type: ignore[attr-defined]
    utils.get_engine_process_shutdown_timeout = with_grace


def skip_the_last_collection() -> None:
    """Let this process end without a last look for garbage: through all that vLLM and the compiler have made it takes two seconds."""
    atexit.register(gc.freeze)


_SERVER_MODULES = (
    "vllm.entrypoints.launchers.launcher",
    "vllm.entrypoints.serve.exception_handling.handlers.vllm_error",
)


def exit_with_error_when_engine_dies() -> None:
    """Let an API server that ends because its engine has died exit with 1; in other processes nothing."""
    loaded = [module for name in _SERVER_MODULES if (module := sys.modules.get(name))]
    if not loaded or hasattr(loaded[0].terminate_if_errored, "exits_with_error"):
        return
    original, died = loaded[0].terminate_if_errored, []

    def terminate_if_errored(server: Any, engine: Any) -> None:
        original(server, engine)
        if server.should_exit and engine.errored:
            died.append(engine)

    def leave() -> None:
        if died:
            logger.error("The engine has died: see above. The server ends with status 1.")
            logging.shutdown()
            sys.stdout.flush()
            os._exit(1)

    terminate_if_errored.exits_with_error = True  # type: ignore[attr-defined]
    for module in loaded:
        module.terminate_if_errored = terminate_if_errored  # type: ignore[attr-defined]
    atexit.register(leave)


class _DroppedOverload:
    """Stands where torchax names an overload that torch no longer has: nothing ever calls it."""


@contextmanager
def _dropped_overloads_tolerated() -> Iterator[None]:
    from torch._ops import OpOverloadPacket

    original = OpOverloadPacket.__getattr__

    def tolerant(packet: Any, name: str) -> Any:
        try:
            return original(packet, name)
        except AttributeError:
            if name.startswith("_"):
                raise
            return _DroppedOverload()

    OpOverloadPacket.__getattr__ = tolerant
    try:
        yield
    finally:
        OpOverloadPacket.__getattr__ = original


def import_torchax() -> ModuleType:
    """torchax with its lowerings and decompositions. Only processes that serve a PyTorch model import it."""
    if "torchax" not in sys.modules:
        with _dropped_overloads_tolerated():
            for name in ("torchax", "torchax.decompositions", "torchax.ops.jaten", "torchax.ops.jtorch"):
                import_module(name)
        quiet_torch_accelerator()  # its import makes "jax" torch's accelerator
        torchax = sys.modules["torchax"]
        for tensor in (torchax.tensor.Tensor, torchax.view.View):
            tensor.type_as = lambda self, other: self.to(other.dtype)
        # It warns of every `.data`, which vLLM's norms read.
        logging.getLogger("torchax.tensor").setLevel(logging.ERROR)
    return sys.modules["torchax"]


def operations_that_call_modules() -> dict[Any, Callable[..., Any]]:
    """vLLM's operations that call back into a model's modules, each with its Python function: torch's dispatcher would leave torchax on the way.

    Those of modules that are imported by now.
    """
    import torch

    experts = sys.modules.get("vllm.model_executor.models.transformers.moe")
    return (
        {} if experts is None else {torch.ops.vllm.transformers_moe_forward.default: experts._transformers_moe_forward}
    )


def counts_nans() -> bool:
    """Whether vLLM's environment asks for NaNs among logits to be counted (VLLM_COMPUTE_NANS_IN_LOGITS, VLLM_RAISE_ON_LOGIT_NANS)."""
    import vllm.envs

    return vllm.envs.VLLM_COMPUTE_NANS_IN_LOGITS


def raise_if_nans(counts: dict[str, int]) -> None:
    """RuntimeError for requests with NaNs, where vLLM's environment asks for it."""
    import vllm.envs

    if vllm.envs.VLLM_RAISE_ON_LOGIT_NANS:
        from vllm.v1.worker.utils import raise_if_nan_logits

        raise_if_nan_logits(counts)


def fp8_skips(config: Any, layer: str) -> bool:
    """Whether vLLM's Fp8Config leaves the linear layer of that name as it is."""
    from vllm.model_executor.layers.quantization.utils.quant_utils import is_layer_skipped

    return is_layer_skipped(layer, config.ignored_layers, match_mode=config.ignored_layers_match_mode)


def awq_skips(config: Any, layer: str) -> bool:
    """Whether vLLM's AutoAWQConfig leaves the linear layer of that name as it is."""
    from vllm.model_executor.layers.quantization.utils.quant_utils import is_layer_skipped

    return is_layer_skipped(layer, config.modules_to_not_convert, match_mode="substring")


def gptq_skips(config: Any, layer: str) -> bool:
    """Whether vLLM's AutoGPTQConfig leaves the linear layer of that name as it is."""
    from vllm.model_executor.layers.quantization.utils.gptq_utils import get_dynamic_override, is_layer_gptq_quantized

    left = get_dynamic_override(config, layer_name=layer) is False
    return left or not is_layer_gptq_quantized(layer, config.modules_in_block_to_quantize)


def modelopt_skips(config: Any, layer: str) -> bool:
    """Whether vLLM's ModelOpt config leaves the linear layer of that name as it is."""
    return config.is_layer_excluded(layer)


def online_skips(config: Any, layer: str) -> bool:
    """Whether vLLM's OnlineQuantizationConfig leaves the linear layer of that name as it is."""
    from vllm.model_executor.layers.quantization.compressed_tensors.utils import should_ignore_layer

    return should_ignore_layer(layer, config.ignored_layers, use_fnmatch=True)


def compressed_tensors_target(config: Any, layer: str) -> str | None:
    """The key of `config.target_scheme_map` that a linear layer of that name has; None where it is not quantized."""
    import torch
    from vllm.model_executor.layers.quantization.compressed_tensors.utils import (
        find_matched_target,
        should_ignore_layer,
    )

    if should_ignore_layer(layer, config.ignore):
        return None
    return find_matched_target(layer, torch.nn.Linear(1, 1), config.target_scheme_map)


_STALE_NAMES = {"DbrxForCausalLM": (".experts.mlp.", ".experts.routed_experts.mlp.")}


def as_loader_looks_for(architecture: str, weights: Iterable[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
    """(name, tensor) of a checkpoint, so named that `load_weights` of vLLM's class finds the parameters that it has."""
    old, new = _STALE_NAMES.get(architecture, ("", ""))
    return ((name.replace(old, new) if old else name, tensor) for name, tensor in weights)


def jax_cache_interface() -> type:
    """The base class of what JAX keeps compiled programs in: `get(key)`, `put(key, value)` and `_path`."""
    from jax._src.compilation_cache_interface import CacheInterface

    return CacheInterface


def use_jax_cache(path: str, make: Callable[[str], Any]) -> None:
    """Let JAX's compilation cache be `make(path)` wherever its directory is `path`."""
    from jax._src import compilation_cache

    original = getattr(compilation_cache.get_file_cache, "of_jax", compilation_cache.get_file_cache)

    def get_file_cache(asked: str) -> Any:
        return (make(asked), asked) if asked == path else original(asked)

    get_file_cache.of_jax = original  # type: ignore[attr-defined]
    compilation_cache.get_file_cache = get_file_cache


@cache
def _rendezvous() -> str:
    """A file where the process group of one meets, as long as the process lives."""
    directory = tempfile.mkdtemp(prefix="tpu-inference-")
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    return f"file://{directory}/store"


def start_torch_alone(vllm_config: Any) -> None:
    """What vLLM's PyTorch classes need around them: a process group of one, and operations that are plain torch."""
    import vllm.ir
    from vllm.config import set_current_vllm_config
    from vllm.distributed import (
        destroy_model_parallel,
        ensure_model_parallel_initialized,
        init_distributed_environment,
    )

    vllm.ir.set_default_torch_wrap(False)
    vllm_config.kernel_config.ir_op_priority.set_default()
    # Which groups there are depends on the model: those of one served before in this process may not do.
    destroy_model_parallel()
    with set_current_vllm_config(vllm_config):
        init_distributed_environment(
            world_size=1, rank=0, local_rank=0, distributed_init_method=_rendezvous(), backend="gloo"
        )
        ensure_model_parallel_initialized(1, 1)


@contextmanager
def latents_put_up() -> Iterator[None]:
    """vLLM's classes that are made inside attend over keys and values of every head, put up from latents, as with VLLM_MLA_DISABLE=1."""
    from vllm.config import ModelConfig

    kept = ModelConfig.use_mla
    ModelConfig.use_mla = property(lambda self: False)
    try:
        yield
    finally:
        ModelConfig.use_mla = kept


def thinking_budget_state(reasoning_config: Any, params: Any, prompt: list[int]) -> Any:
    """vLLM's `ThinkingBudgetStateHolder` of one request, at index 0."""
    import torch
    from vllm.v1.sample.logits_processor import BatchUpdate
    from vllm.v1.sample.thinking_budget_state import ThinkingBudgetStateHolder

    holder = ThinkingBudgetStateHolder(reasoning_config, 1, 0, torch.device("cpu"), False)
    holder.sync_batch(BatchUpdate(batch_size=1, removed=(), added=((0, params, prompt, []),), moved=()))
    return holder


def custom_logits_processors(given: Sequence[Any] | None) -> list[type]:
    """Classes of the logits processors that installed packages declare and that `--logits-processors` names, in vLLM's order.

    vLLM loads them on every platform but TPU, whose first runner did not serve them.
    """
    from vllm.v1.sample import logits_processor

    return logits_processor._load_logitsprocs_plugins() + logits_processor._load_logitsprocs_by_fqcns(given)


@cache
def loaded_logits_processors(given: tuple[Any, ...]) -> tuple[type, ...]:
    """`custom_logits_processors`, loaded once: every request is checked against them."""
    return tuple(custom_logits_processors(given))


class MetricFile:
    """Numbers in a memory-mapped file, as prometheus_client keeps those of one kind of metric for one of several processes."""

    def __init__(self, path: str) -> None:
        from prometheus_client.mmap_dict import MmapedDict

        self._values = MmapedDict(path)

    def key(self, metric: str, name: str, labels: dict[str, str], help_text: str) -> str:
        """The key of the line `name{labels}` of `metric`."""
        from prometheus_client.mmap_dict import mmap_key

        return mmap_key(metric, name, list(labels), list(labels.values()), help_text)

    def write(self, key: str, value: float, timestamp: float) -> None:
        """Seconds since the epoch decide between processes where only the latest counts, else 0."""
        self._values.write_value(key, value, timestamp)


def start_trace(*, python: bool) -> Any:
    """Start tracing this process and its devices, `python` calls too. Returns the session for `stop_trace`."""
    import jax
    from jax._src.lib import _profiler

    jax.devices()  # libtpu must have started, or no TPU operation is traced
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = int(python)
    options.raise_error_on_start_failure = True  # another trace of this process may run
    return _profiler.ProfilerSession(options)


def stop_trace(session: Any) -> bytes:
    """The trace, still in memory."""
    return session.stop()


def write_trace(session: Any, trace: bytes, directory: str) -> None:
    """Write it for TensorBoard and XProf, below `directory`/plugins/profile/."""
    session.export(trace, directory)
