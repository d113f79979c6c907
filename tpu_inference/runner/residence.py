# SPDX-License-Identifier: Apache-2.0
"""Where the weights and the KV cache are, and which weights these are: sleep, wake-up, and reloading in place.

Programs are compiled from shapes, not from arrays, so that both can go and come while the programs stay.
"""

import hashlib
from collections.abc import Collection
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
import psutil

from tpu_inference.errors import TpuInferenceError
from tpu_inference.logger import init_logger
from tpu_inference.models.common.vllm_loader import reload_params
from tpu_inference.runner.kv_cache_manager import allocate_kv_cache
from tpu_inference.runner.startup_report import format_bytes

if TYPE_CHECKING:
    from tpu_inference.runner.tpu_runner import TPUModelRunner

logger = init_logger(__name__)

WEIGHTS, KV_CACHE = TAGS = ("weights", "kv_cache")
"""vLLM's names of what sleeps."""
RELOAD = 'load them with collective_rpc("reload_weights")'


def abstract(tree: Any) -> Any:
    """Shapes and shardings of a tree of arrays: what programs are compiled from, without keeping the arrays."""
    return jax.tree.map(
        lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=array.sharding), tree
    )  # fmt: skip


def to_host(tree: Any) -> Any:
    """The tree in host memory; each array leaves the devices once it is copied. What was one array stays one."""
    moved: dict[int, np.ndarray] = {}

    def move(array: jax.Array) -> np.ndarray:
        if id(array) not in moved:
            moved[id(array)] = np.array(array)  # a copy also where the device is the host
            array.delete()
        return moved[id(array)]

    return jax.tree.map(move, tree)


def to_devices(tree: Any, like: Any) -> Any:
    """The tree on the devices, as the abstract tree `like` says."""
    moved: dict[int, jax.Array] = {}

    def move(array: np.ndarray, target: jax.ShapeDtypeStruct) -> jax.Array:
        if id(array) not in moved:
            # Of its own memory: on the CPU backend the host's copy would else be shared, and stay.
            moved[id(array)] = jax.device_put(array, target.sharding, may_alias=False)
        return moved[id(array)]

    return jax.block_until_ready(jax.tree.map(move, tree, like))


def delete(tree: Any) -> None:
    """Let go of the device memory of arrays, whoever else knows them."""
    for array in {id(array): array for array in jax.tree.leaves(tree)}.values():
        array.delete()


def checksums(tree: Any) -> dict[str, str]:
    """Path of each array -> SHA-256 of its bytes, type and shape."""

    def digest(array: Any) -> str:
        array = np.asarray(array)
        header = f"{array.dtype}{array.shape}".encode()
        return hashlib.sha256(header + np.ascontiguousarray(array).tobytes()).hexdigest()

    return {jax.tree_util.keystr(path): digest(array) for path, array in jax.tree_util.tree_leaves_with_path(tree)}


class Residence:
    """Of one runner's weights and KV cache. A part that sleeps is None in the runner, which then takes no step."""

    def __init__(self, runner: "TPUModelRunner") -> None:
        self._runner = runner
        self._on_host: Any = None
        """The weights while they sleep at level 1."""
        self.version = 1
        """Of the weights: one more after every reload."""
        self.source: str = runner.model_config.model

    @property
    def _params(self) -> Any:
        return self._runner.functions.params

    @_params.setter
    def _params(self, params: Any) -> None:
        self._runner.functions = replace(self._runner.functions, params=params)

    def why_absent(self) -> str:
        """What keeps the runner from taking a step."""
        if self._runner.kv_cache is None:
            return "The engine sleeps: wake it up before it is asked to run a step."
        if self._on_host is not None:
            return "The weights sleep: wake them up before a step is run."
        return f"There are no weights, since sleep level 2 or a reload that failed: {RELOAD}."

    def sleep(self, level: int) -> None:
        """Level 1: weights to host memory, KV cache dropped. Level 2: both dropped.

        Raises:
            TpuInferenceError: another level, or too little host memory for the weights.
        """
        if level not in (1, 2):
            raise TpuInferenceError(
                f"Sleep level {level} is not known: use 1 (weights to host memory) or 2 (weights dropped)."
            )
        before = self.device_bytes()
        if level == 1 and self._params is not None:
            needed, free = (
                sum(array.nbytes for array in jax.tree.leaves(self._params)),
                psutil.virtual_memory().available,
            )
            if needed > free:
                raise TpuInferenceError(
                    f"Sleep level 1 needs {format_bytes(needed)} of host memory for the weights, and {format_bytes(free)} are free: use level 2."
                )
            self._on_host = to_host(self._params)
            self._params = None
        self.discard(TAGS if level == 2 else (KV_CACHE,))
        logger.info(
            "Sleeping at level %d: %s of device memory are free again",
            level,
            format_bytes(before - self.device_bytes()),
        )

    def discard(self, tags: Collection[str]) -> None:
        """Drop what is named, without a copy."""
        self._check(tags)
        if WEIGHTS in tags:
            self._let_weights_go()
        if KV_CACHE in tags and self._runner.kv_cache is not None:
            delete(self._runner.kv_cache)
            self._runner.kv_cache = None

    def wake_up(self, tags: Collection[str] | None) -> None:
        """Bring back what is named, or all.

        Raises:
            TpuInferenceError: the KV cache cannot wake, since it would start the engine without weights.
        """
        tags = TAGS if tags is None else tags
        self._check(tags)
        runner = self._runner
        if WEIGHTS in tags and self._on_host is not None:
            self._params = to_devices(self._on_host, runner.programs.abstract_params)
            self._on_host = None
        if KV_CACHE in tags:
            if self._params is None and self._on_host is None:
                raise TpuInferenceError(
                    f'The weights were dropped: wake_up(tags=["weights"]), {RELOAD}, then wake_up(tags=["kv_cache"]).'
                )
            if runner.kv_cache is None:
                runner.kv_cache = allocate_kv_cache(runner.programs.abstract_kv_cache)

    @staticmethod
    def _check(tags: Collection[str]) -> None:
        if unknown := sorted(set(tags) - set(TAGS)):
            raise TpuInferenceError(
                f"Nothing is called {', '.join(unknown)}: what sleeps and wakes is {' and '.join(TAGS)}."
            )

    def _let_weights_go(self) -> None:
        self._on_host = None
        if self._params is not None:
            delete(self._params)
            self._params = None

    def device_bytes(self) -> int:
        """Of weights and KV cache, over all devices."""
        return sum(array.nbytes for array in jax.tree.leaves((self._params, self._runner.kv_cache)))

    def reload(self, path: str | None) -> dict[str, Any]:
        """Replace the weights by those of a checkpoint: default, the one that the engine started with. Returns `info`.

        Nothing is compiled. All names and shapes are compared first, and what does not fit is one error, after which the old weights still serve.
        They leave the devices before the new ones come, so there is room for either.

        Raises:
            CheckpointError: everything that does not fit.
        """
        runner = self._runner
        runner.compilation.wait()  # programs that compile meanwhile look at the model that is built here
        source = path or runner.model_config.model
        self._params = reload_params(runner.vllm_config, runner.mesh, source, self._let_weights_go)
        self.version, self.source = self.version + 1, source
        runner.metrics.weights_version(self.version)
        logger.info(
            "Weights of %s serve from now on, version %d. Reset the prefix cache: it holds what the old ones made.",
            source,
            self.version,
        )
        return self.info()

    def info(self) -> dict[str, Any]:
        """Version and source of the weights."""
        return {"version": self.version, "source": self.source}

    def checksums(self) -> dict[str, str]:
        """Of the weights, wherever they are."""
        return checksums(self._params if self._on_host is None else self._on_host)
