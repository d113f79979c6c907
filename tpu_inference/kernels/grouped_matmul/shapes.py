# SPDX-License-Identifier: Apache-2.0
"""Named shapes of the op: what it is measured on."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tpu_inference.kernels.forms import implementation_for
from tpu_inference.kernels.grouped_matmul.api import grouped_matmul
from tpu_inference.kernels.grouped_matmul.config import Config, ShapeKey, config_for
from tpu_inference.kernels.grouped_matmul.pallas import NAME
from tpu_inference.kernels.grouped_matmul.units import units


def random_group_sizes(tokens: int, top_k: int, experts: int, local: int) -> np.ndarray:
    """int32 [local]: rows of the first experts where each token chooses `top_k` of `experts`; always the same. Spare experts have none."""
    scores = np.random.default_rng(0).random((tokens, experts))
    chosen = np.argpartition(scores, top_k - 1, axis=1)[:, :top_k]
    return np.bincount(chosen.ravel(), minlength=max(experts, local))[:local].astype(np.int32)


@dataclass(frozen=True)
class GroupedShape:
    """A product of a layer of experts, as one device sees it."""

    about: str
    tokens: int
    top_k: int
    experts: int
    """Of the layer, from which tokens choose at random."""
    local: int
    """Of the device: the first ones."""
    out: int
    columns: int
    dtype: str = "bfloat16"
    weight_dtype: str = "bfloat16"
    scales: tuple[int, int] | None = None
    """Rows and columns of weights that share a scale; 0 columns for all of them."""
    chips: tuple[str, ...] = ()
    """Those that the shape is of interest for; all where empty."""
    donated: tuple[int, ...] = ()

    @property
    def group_sizes(self) -> np.ndarray:
        return random_group_sizes(self.tokens, self.top_k, self.experts, self.local)

    @property
    def rows(self) -> int:
        """Of x, those of experts elsewhere among them, as the layer has it."""
        return self.tokens * self.top_k

    @property
    def useful_bytes(self) -> int:
        """Weights of experts that have tokens, rows and outputs, once."""
        sizes = self.group_sizes
        weights = (sizes > 0).sum() * self.out * self.columns * jnp.dtype(self.weight_dtype).itemsize
        return int(weights + sizes.sum() * (self.out + self.columns) * jnp.dtype(self.dtype).itemsize)

    @property
    def useful_flops(self) -> int:
        return 2 * int(self.group_sizes.sum()) * self.out * self.columns

    def arguments(self, device: jax.Device | None = None) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Of `function`, by position."""
        del device
        arguments = (
            jax.ShapeDtypeStruct((self.rows, self.columns), self.dtype),
            jax.ShapeDtypeStruct((self.local, self.out, self.columns), self.weight_dtype),
            jax.ShapeDtypeStruct((self.local,), jnp.int32),
        )
        if self.scales is None:
            return arguments
        rows, columns = self.scales
        grid = (self.local, self.out // rows, self.columns // (columns or self.columns))
        return *arguments, jax.ShapeDtypeStruct(grid, jnp.float32)

    def function(self, device: jax.Device, config: Config | None = None) -> Callable:
        """The op as a device runs it."""

        def function(x: Any, weights: Any, group_sizes: Any, scales: Any = None) -> Any:
            implementation = implementation_for(device)
            return grouped_matmul(x, weights, group_sizes, scales=scales, implementation=implementation, config=config)

        return function

    def key(self, device: jax.Device | None = None) -> ShapeKey:
        """Of tuned tables."""
        return ShapeKey.of(*self.arguments(device)[:2])

    def form(self, device: jax.Device) -> str:
        return str(implementation_for(device))

    def workload(self, device: jax.Device) -> Mapping[str, Mapping[int, Any]]:
        """The kernel's scalar-prefetch arguments. Good for configs of as many rows a block as the heuristic's."""
        form = implementation_for(device)
        if form != "pallas":
            return {}
        config = config_for(self.key(), form.chip).within(self.key(), self.rows)
        values = units(self.group_sizes, -(-self.rows // config.block_rows), config.block_rows, np)
        return {NAME: dict(enumerate(values))}


def _both(name: str, about: str, width: int, hidden: int, **layer: Any) -> dict[str, GroupedShape]:
    return {
        f"{name}_gate_up": GroupedShape(f"{about}, gate and up", out=2 * width, columns=hidden, **layer),
        f"{name}_down": GroupedShape(f"{about}, down", out=hidden, columns=width, **layer),
    }


_QWEN = dict(width=768, hidden=2048, top_k=8, experts=128, local=128)
_DEEPSEEK = dict(width=2048, hidden=7168, top_k=8, experts=256, local=32)
_QWEN_LARGE = dict(width=1536, hidden=4096, top_k=8, experts=128, local=8)
_MIXTRAL = dict(width=1024, hidden=6144, top_k=2, experts=8, local=8)
_FP8_BLOCKS = dict(weight_dtype="float8_e4m3fn", scales=(128, 128))
_INT8 = dict(weight_dtype="int8", scales=(1, 0))
_FP8 = dict(weight_dtype="float8_e4m3fn", scales=(1, 0))
SHAPES: Mapping[str, GroupedShape] = {
    **_both("qwen3_30b_a3b_b64", "Qwen3-30B-A3B, 64 tokens", **_QWEN, tokens=64),
    **_both("qwen3_30b_a3b_b1024", "Qwen3-30B-A3B, 1024 tokens", **_QWEN, tokens=1024),
    **_both("deepseek_v3_ep8_b1024", "DeepSeek V3 on 8 devices, 1024 tokens", **_DEEPSEEK, tokens=1024),
    **_both(
        "qwen3_235b_fp8_ep16_b64",
        "Qwen3-235B-A22B on 16 devices, fp8 in blocks, 64 tokens",
        **_QWEN_LARGE,
        **_FP8_BLOCKS,
        tokens=64,
    ),
    **_both(
        "deepseek_v3_fp8_ep64_b64",
        "DeepSeek V3 on 64 devices, fp8 in blocks, 64 tokens",
        **{**_DEEPSEEK, "local": 4},
        **_FP8_BLOCKS,
        tokens=64,
    ),
    **_both(
        "mixtral_8x22b_int8_tp16_b64", "Mixtral 8x22B on 16 devices, int8, 64 tokens", **_MIXTRAL, **_INT8, tokens=64
    ),
    "gpt_oss_120b_fp8_tp8_b64_gate_up": GroupedShape(
        "gpt-oss-120b on 8 devices, fp8, 64 tokens, gate and up", 64, 4, 128, 129, 720, 2880, **_FP8
    ),
}
