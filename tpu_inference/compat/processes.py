# SPDX-License-Identifier: Apache-2.0
"""How vLLM starts, watches and ends its processes."""

import atexit
import gc
import logging
import os
import sys
from typing import Any

from tpu_inference.logger import init_logger

logger = init_logger(__name__)

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
    """Let this process end without a last look for garbage: through all that vLLM and the compiler have made it takes two seconds.

    What is in cycles then ends with the process, its `__del__` unrun, as Python allows.
    """
    atexit.unregister(gc.freeze)  # a second call changes nothing
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
