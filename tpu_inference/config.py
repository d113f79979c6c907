# SPDX-License-Identifier: Apache-2.0
"""Our own settings, from vLLM's `additional_config` (`--additional-config '{"token_buckets": [16, 256]}'`)."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tpu_inference.errors import ConfigError

if TYPE_CHECKING:
    from vllm.config import VllmConfig


def _sizes(value: Any) -> tuple[int, ...]:
    if not isinstance(value, list | tuple) or not value or any(type(n) is not int or n < 1 for n in value):
        raise ValueError("a list of positive whole numbers")
    if list(value) != sorted(set(value)):
        raise ValueError("a list that increases")
    return tuple(value)


def _bool(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError("true or false")
    return value


def _name(value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError("a name or a path")
    return value


def _setting(parse: Callable[[Any], Any], doc: str) -> Any:
    """A field that is None unless set; `parse` raises ValueError with what is allowed."""
    return dataclasses.field(default=None, metadata={"parse": parse, "doc": doc})


@dataclass(frozen=True)
class TpuConfig:
    """Checked settings; None leaves the choice to the default of the backend."""

    token_buckets: tuple[int, ...] | None = _setting(
        _sizes, "Token counts that programs are compiled for; the last must be max_num_batched_tokens."
    )
    scan_layers: bool | None = _setting(
        _bool, "Run repeated layers by one scanned program (default on TPU) or by a loop (default on the CPU)."
    )
    background_compile: bool | None = _setting(
        _bool,
        "Serve as soon as the first programs are compiled, the others follow meanwhile (default on the CPU), or compile all first (default on TPU).",
    )

    quantization: str | None = _setting(
        _name,
        "Rules by which weights are rounded as they are loaded: a ready-made file's name, or the path of a YAML file.",
    )

    @classmethod
    def parse(cls, settings: Any) -> "TpuConfig":
        """Settings from a dictionary; ConfigError names the key that is unknown or wrong."""
        if settings is None:
            return cls()
        if not isinstance(settings, dict):
            raise ConfigError(f"additional_config must be a dictionary, not {type(settings).__name__}.")
        fields = {field.name: field for field in dataclasses.fields(cls)}
        if unknown := sorted(set(map(str, settings)) - set(fields)):
            raise ConfigError(f"additional_config has unknown keys {unknown}: known are {sorted(fields)}.")
        values = {}
        for name, value in settings.items():
            try:
                values[name] = None if value is None else fields[name].metadata["parse"](value)
            except ValueError as error:
                raise ConfigError(f"additional_config {name}={value!r} is not valid: it must be {error}.") from None
        return cls(**values)

    @classmethod
    def from_vllm(cls, vllm_config: "VllmConfig") -> "TpuConfig":
        """Settings of a vLLM configuration."""
        return cls.parse(vllm_config.additional_config)
