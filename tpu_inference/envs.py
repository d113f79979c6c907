# SPDX-License-Identifier: Apache-2.0
"""Every environment variable that is read here, each declared once.

`envs.NAME` reads, parses and checks the variable when it is asked for; a bad value is a `ConfigError` that names the variable and what
is allowed. The table in docs/configuration.md is generated from `ENV_VARS` by scripts/gen_env_docs.py.
"""

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tpu_inference.errors import ConfigError


@dataclass(frozen=True)
class EnvVar:
    """One variable. `parse` raises ValueError for what is not allowed; an empty value means unset."""

    name: str
    parse: Callable[[str], Any]
    allowed: str
    default: Any
    doc: str
    forward: bool = True
    """Whether worker processes on other hosts get the driver's value."""

    def read(self) -> Any:
        """The value now in the environment."""
        raw = os.environ.get(self.name, "").strip()
        if not raw:
            return self.default() if callable(self.default) else self.default
        try:
            return self.parse(raw)
        except ValueError:
            raise ConfigError(f"{self.name}={raw!r} is not valid: allowed is {self.allowed}.") from None


_BOOLS = {"0": False, "false": False, "1": True, "true": True}


def _bool(raw: str) -> bool:
    try:
        return _BOOLS[raw.lower()]
    except KeyError:
        raise ValueError from None


def _natural(raw: str) -> int:
    value = int(raw)
    if value < 0:
        raise ValueError
    return value


def _choice(*allowed: str) -> Callable[[str], str]:
    def parse(raw: str) -> str:
        if raw not in allowed:
            raise ValueError
        return raw

    return parse


def _matching(pattern: str) -> Callable[[str], str]:
    def parse(raw: str) -> str:
        if not re.fullmatch(pattern, raw):
            raise ValueError
        return raw

    return parse


def _names(raw: str) -> tuple[str, ...]:
    names = tuple(name.strip().lower() for name in raw.split(","))
    if not all(names):
        raise ValueError
    return names


def _positive(raw: str) -> float:
    value = float(raw)
    if not 0 < value < float("inf"):
        raise ValueError
    return value


def _slices(raw: str) -> tuple[tuple[int, ...], ...]:
    slices = tuple(tuple(int(n) for n in shape.lower().split("x")) for shape in raw.split(","))
    if any(n < 1 for shape in slices for n in shape):
        raise ValueError
    return slices


def _default_cache_path() -> str:
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.join("~", ".cache")
    return os.path.join(os.path.expanduser(cache), "vllm", "xla_cache")


_BOOL_VALUES = "0, 1, true or false"
_SLICE_VALUES = "slice shapes like `2x2,2x4`"

ENV_VARS: dict[str, EnvVar] = {
    var.name: var
    for var in (
        EnvVar(
            "JAX_PLATFORMS",
            _names,
            "a comma-separated list of JAX backends with `tpu` or `cpu` among them",
            (),
            "Which devices may be used; unset: a TPU where there is one, else the CPU. `cpu` ignores a TPU, `tpu` refuses to run without one.",
        ),
        EnvVar(
            "TPU_ACCELERATOR_TYPE",
            _matching(r"[A-Za-z0-9]+-\d+"),
            "a Cloud TPU accelerator type like `v6e-8`",
            None,
            "Accelerator type of the slice, where the machine does not show it (GKE sets it).",
        ),
        EnvVar("TPU_NAME", str, "any text", None, "Name of the TPU, for messages only."),
        EnvVar(
            "TPU_WORKER_ID",
            _natural,
            "a whole number from 0",
            0,
            "Which host of the slice this one is.",
            forward=False,  # each host has its own
        ),
        EnvVar(
            "TPU_USE_METADATA",
            _bool,
            _BOOL_VALUES,
            False,
            "Ask the GCE metadata server for the accelerator type when neither device files nor TPU_ACCELERATOR_TYPE tell.",
        ),
        EnvVar(
            "SKIP_JAX_PRECOMPILE",
            _bool,
            _BOOL_VALUES,
            False,
            "Skip warm-up: the server starts at once and compiles each shape when a request first needs it.",
        ),
        EnvVar(
            "VLLM_XLA_CHECK_RECOMPILATION",
            _bool,
            _BOOL_VALUES,
            False,
            "Raise an error when something compiles after warm-up; otherwise a warning names it.",
        ),
        EnvVar(
            "VLLM_XLA_CACHE_PATH",
            os.path.expanduser,
            "a path",
            _default_cache_path,
            "Directory of compiled programs, kept so that the next start need not compile (default: `$XDG_CACHE_HOME/vllm/xla_cache`).",
        ),
        EnvVar(
            "VLLM_CPU_KVCACHE_SPACE",
            _natural,
            "a whole number of GiB from 0",
            0,
            "KV cache on the CPU backend, in GiB; 0: a share of the free memory.",
        ),
        EnvVar(
            "MODEL_IMPL_TYPE",
            _choice("auto", "flax_nnx", "vllm"),
            "auto, flax_nnx or vllm",
            "auto",
            "Which implementation of a model to use, where `--model-impl` does not say: `flax_nnx` (JAX), `vllm` (vLLM's PyTorch class), or `auto`: "
            "JAX where there is a class for it.",
        ),
        EnvVar(
            "VLLM_MLA_DISABLE",
            _bool,
            _BOOL_VALUES,
            False,
            "Serve DeepSeek by vLLM's PyTorch class, which caches keys and values of every head, instead of the JAX class, "
            "which caches a latent a token.",
        ),
        EnvVar(
            "TPU_HEALTH_TIMEOUT",
            _natural,
            "a whole number of seconds from 0",
            60,
            "Seconds that the device may take to answer a tiny computation, which it is asked as often. If it does not, the engine process ends, and "
            "`/health` is 503. 0: it is not asked.",
        ),
        EnvVar(
            "TPU_PROFILE_MAX_STEPS",
            _natural,
            "a whole number from 0",
            100,
            "Steps after which a profile ends by itself, also where more are asked for. 0: no limit.",
        ),
        EnvVar(
            "TPU_PROFILE_MAX_SECONDS",
            _natural,
            "a whole number of seconds from 0",
            60,
            "Seconds after which a profile ends by itself, whatever it has seen: a trace stays in memory until then. 0: no limit.",
        ),
        EnvVar(
            "TPU_PROFILE_MAX_GIB",
            _positive,
            "a number of GiB above 0",
            1.0,
            "The largest trace that is written, and what a profile wants free on its disk, twice over, before it starts.",
        ),
        EnvVar(
            "TPU_METRICS_DIR",
            str,
            "a path",
            None,
            "Where an engine keeps its metrics for the API server, which makes a directory and sets this for its engine, whatever it was.",
            forward=False,
        ),
        EnvVar(
            "PROMETHEUS_MULTIPROC_DIR",
            str,
            "a path",
            None,
            "The same for all metrics, where there are several API servers; vLLM sets it.",
            forward=False,
        ),
        EnvVar(
            "PREFILL_SLICES", _slices, _SLICE_VALUES, (), "Slices for disaggregated prefill. Not served yet: refused."
        ),
        EnvVar(
            "DECODE_SLICES", _slices, _SLICE_VALUES, (), "Slices for disaggregated decode. Not served yet: refused."
        ),
    )
}


def __getattr__(name: str) -> Any:
    try:
        var = ENV_VARS[name]
    except KeyError:
        raise AttributeError(f"module {__name__!r} has no variable {name!r}") from None
    return var.read()


def invalid() -> dict[str, str]:
    """Variables whose value is not allowed now, with the message of each."""
    errors = {}
    for name, var in ENV_VARS.items():
        try:
            var.read()
        except ConfigError as error:
            errors[name] = str(error)
    return errors


def forwarded() -> list[str]:
    """Names of the variables that workers on other hosts get from the driver."""
    return [name for name, var in ENV_VARS.items() if var.forward]


def register_with_vllm() -> None:
    """Add our variables to vLLM's own table, so that it neither warns about them nor fails to forward them to workers.

    Names that vLLM has keep vLLM's reader. See compat: the table is not a documented interface.
    """
    import vllm.envs

    for name in forwarded():
        vllm.envs.environment_variables.setdefault(name, ENV_VARS[name].read)
