# SPDX-License-Identifier: Apache-2.0
"""Named shapes: what tests compile, and what benchmarks measure."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from tpu_inference.kernels.flash_attention.api import flash_attention
from tpu_inference.kernels.flash_attention.config import Config, ShapeKey
from tpu_inference.kernels.forms import implementation_for


@dataclass(frozen=True)
class Spec:
    """A call of the op."""

    batch: int
    heads: int
    tokens: int
    head_dim: int
    kv_heads: int | None = None
    """As many as heads where None."""
    causal: bool = False
    sliding_window: int | None = None
    segmented: bool = False
    dtype: str = "bfloat16"
    donated: tuple[int, ...] = ()
    chips: tuple[str, ...] = ()
    """Those that the shape is of interest for; all where empty."""

    @property
    def about(self) -> str:
        heads = f"{self.heads} heads" + (f" on {self.kv_heads}" if self.kv_heads else "")
        kinds = ("causal" if self.causal else "", f"window {self.sliding_window}" if self.sliding_window else "")
        return ", ".join(x for x in (f"{self.batch} x {self.tokens} tokens, {heads} of {self.head_dim}", *kinds) if x)

    def arguments(self, device: jax.Device | None = None) -> tuple[jax.ShapeDtypeStruct, ...]:
        """q, k, v, and the segment ids of both."""
        del device
        q = jax.ShapeDtypeStruct((self.batch, self.heads, self.tokens, self.head_dim), self.dtype)
        kv = jax.ShapeDtypeStruct((self.batch, self.kv_heads or self.heads, self.tokens, self.head_dim), self.dtype)
        ids = jax.ShapeDtypeStruct((self.batch, self.tokens), jnp.int32)
        return (q, kv, kv, *([ids, ids] if self.segmented else []))

    @property
    def options(self) -> dict[str, Any]:
        return dict(scale=self.head_dim**-0.5, causal=self.causal, sliding_window=self.sliding_window)

    @property
    def useful_flops(self) -> float:
        """Of use: those of keys that are seen, by position."""
        pairs = self.tokens**2 / (2 if self.causal else 1)
        if self.sliding_window is not None:
            pairs = min(pairs, self.tokens * self.sliding_window * (1 if self.causal else 2))
        return 4 * self.batch * self.heads * self.head_dim * pairs

    @property
    def useful_bytes(self) -> int:
        """That must be moved: q, k, v and the output, once."""
        q, k, v = self.arguments()[:3]
        return (2 * q.size + k.size + v.size) * jnp.dtype(self.dtype).itemsize

    def function(self, device: jax.Device, config: Config | None = None) -> Callable:
        """The op as a device runs it."""
        return partial(flash_attention, **self.options, implementation=implementation_for(device), config=config)

    def key(self, device: jax.Device | None = None) -> ShapeKey:
        """Of tuned tables."""
        masks = dict(causal=self.causal, window=self.sliding_window, segmented=self.segmented)
        return ShapeKey.of(*self.arguments(device)[:2], **masks)

    def form(self, device: jax.Device) -> str:
        return str(implementation_for(device))

    def workload(self, device: jax.Device) -> Mapping[str, Mapping[int, Any]]:
        """Nothing that the kernel runs by is data, without segments."""
        return {}


SPECS = {
    "flash_1x16x4096x128": Spec(1, 16, 4096, 128),
    "flash_1x16x4096x128_causal": Spec(1, 16, 4096, 128, causal=True),
    "flash_1x16x4096x128_window": Spec(1, 16, 4096, 128, causal=True, sliding_window=1024),
    "flash_1x32x8192x128_gqa": Spec(1, 32, 8192, 128, kv_heads=8),
    "vit_1x16x1024x72": Spec(1, 16, 1024, 72),
    "vit_8x16x577x64": Spec(8, 16, 577, 64),
    "vit_packed_1x16x4096x80": Spec(1, 16, 4096, 80, segmented=True),
}
SHAPES = {name: spec for name, spec in SPECS.items() if not spec.segmented}
"""Those that can be measured: which blocks segments leave out is data."""
