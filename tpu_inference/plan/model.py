# SPDX-License-Identifier: Apache-2.0
"""A model's config, read and checked before anything is built from it."""

from dataclasses import dataclass
from typing import Any

from tpu_inference.errors import ConfigError
from tpu_inference.models.common.registry import find_architecture

REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
"""Of config.json. transformers would fill in another model's where they are missing."""
MAX_HEAD_DIM = 512
"""A page of more does not fit beside the kernels' other arrays."""


@dataclass(frozen=True)
class ModelInfo:
    """What is asked of a config before vLLM reads it."""

    name: str
    architecture: str
    num_heads: int
    head_dim: int

    def tensor_parallel_sizes(self, at_most: int) -> list[int]:
        """Numbers of devices that vLLM lets the heads be divided among."""
        return [n for n in range(1, at_most + 1) if self.num_heads % n == 0]


def read_model(name: str) -> ModelInfo:
    """Read `name`'s config.json, from its directory, the local hub cache or the hub.

    Raises:
        ConfigError: there is none, it lacks fields, or its heads are of a size that is not served.
        TpuInferenceError: an architecture that is not served.
    """
    fields = _fields(name)
    architecture = find_architecture(fields.get("architectures"))
    missing = [field for field in REQUIRED if type(fields.get(field)) is not int or fields[field] < 1]
    if missing:
        raise ConfigError(
            f"The config.json of {name!r} lacks {', '.join(missing)} (whole numbers from 1): complete it from the checkpoint's own."
        )
    heads = fields["num_attention_heads"]
    return ModelInfo(name, architecture, heads, _head_dim(fields, heads))


def _fields(name: str) -> dict[str, Any]:
    from transformers import PretrainedConfig

    try:
        fields, _ = PretrainedConfig.get_config_dict(name)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
    else:
        if fields:
            return fields
        reason = "the directory has none."
    raise ConfigError(
        f"No config.json of {name!r}: {reason} Give a directory that has one, or a name on the Hugging Face hub."
    )


def _head_dim(fields: dict[str, Any], heads: int) -> int:
    head_dim = fields.get("head_dim") or fields["hidden_size"] // heads
    if not fields.get("head_dim") and fields["hidden_size"] % heads:
        nearest = fields["hidden_size"] // heads * heads
        raise ConfigError(
            f"hidden_size={fields['hidden_size']} is not divided by num_attention_heads={heads}, and the config has no head_dim: "
            f"the nearest that is, is hidden_size={nearest or heads}."
        )
    if head_dim % 2 or not 2 <= head_dim <= MAX_HEAD_DIM:
        nearest = min(max(head_dim // 2 * 2, 2), MAX_HEAD_DIM)
        raise ConfigError(
            f"head_dim={head_dim} is not served: it must be even (rotary embeddings turn pairs) and at most {MAX_HEAD_DIM}; "
            f"the nearest is {nearest}."
        )
    return head_dim


def check_tensor_parallel(model: ModelInfo, asked: int | None, num_devices: int, where: str) -> int:
    """The tensor parallel size to plan with: what is asked, if it can be, else the largest that can.

    Raises:
        ConfigError: more than the slice has, or not a divisor of the heads; with the nearest that works.
    """
    possible = model.tensor_parallel_sizes(num_devices)
    if asked is None:
        return possible[-1]
    if asked in possible:
        return asked
    nearest = min(possible, key=lambda size: (abs(size - asked), -size))
    too_few, uneven = (
        f"{where} has {num_devices} devices",
        f"the model's {model.num_heads} attention heads are not divided by it",
    )
    reason = too_few if asked > num_devices else uneven
    raise ConfigError(
        f"--tensor-parallel-size {asked} is not possible: {reason}. The nearest that works here is {nearest}; possible are {possible}."
    )
