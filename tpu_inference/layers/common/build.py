# SPDX-License-Identifier: Apache-2.0
"""What a model is built for: where it runs and in which precision."""

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jax.sharding import Mesh

from tpu_inference.layers.common.quantization import Quantization
from tpu_inference.layers.common.sharding import MODEL_AXIS


@dataclass(frozen=True)
class BuildContext:
    """Everything beside the checkpoint's own config that shapes a model's program."""

    mesh: Mesh
    """May hold devices of a topology description (ahead-of-time compilation)."""
    dtype: Any
    """Of weights and activations, and of the KV cache unless `kv_cache_dtype` says otherwise."""
    max_model_len: int
    """Longest request served, in tokens. Chooses among RoPE tables that depend on length."""
    scan_layers: bool | None = None
    """Stack the layers and scan over them, or loop; None: see `scans`."""
    quantization: Quantization | None = None
    """How linear layers' weights are stored, where they are quantized."""
    expert_parallel: bool = False
    """Experts are divided among the devices, instead of each expert's width."""

    kv_cache_dtype: Any = None
    """Of a KV cache of one byte a number, which has scales; None: `dtype`."""

    @property
    def shards(self) -> int:
        """Devices that the heads, the MLP and the vocabulary are divided among."""
        return self.mesh.shape[MODEL_AXIS]

    @property
    def platform(self) -> str:
        """ "tpu", "cpu", …: from the mesh, so that nothing initializes a backend."""
        return self.mesh.devices.flat[0].platform

    @property
    def scans(self) -> bool:
        """Whether layers are scanned. XLA's CPU backend copies each layer's slice of a stacked weight, which costs
        more than the layer itself (benchmarks/results/warm_up.md), so the loop is its default."""
        return self.platform == "tpu" if self.scan_layers is None else self.scan_layers

    @property
    def accumulate_dtype(self) -> Any:
        """What a matrix product yields before it is cast to `dtype`.

        The MXU accumulates bf16 products in f32 whatever the output type, and a bf16 output halves
        what tensor parallelism sums over the interconnect. XLA's CPU backend has a native bf16
        product only with an f32 result; with a bf16 one it converts the whole weight first.
        """
        return jnp.float32 if self.platform == "cpu" else self.dtype
