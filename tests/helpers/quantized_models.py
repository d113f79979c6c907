# SPDX-License-Identifier: Apache-2.0
"""Quantized checkpoints made of tiny ones, and beside each its twin: the same numbers in bfloat16."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

LINEAR = re.compile(r"layers\.\d+\..*_proj\.weight$")
FP8 = torch.float8_e4m3fn
Tensors = dict[str, torch.Tensor]


def _scales(weight: torch.Tensor, block: tuple[int, int], greatest: float) -> torch.Tensor:
    """Powers of two, so that what values mean is exact in bfloat16; [ceil(rows / block), ceil(columns / block)]."""
    rows, columns = (-(-n // b) for n, b in zip(weight.shape, block, strict=True))
    padded = torch.zeros(rows * block[0], columns * block[1])
    padded[: weight.shape[0], : weight.shape[1]] = weight
    top = padded.reshape(rows, block[0], columns, block[1]).abs().amax(dim=(1, 3))
    return torch.exp2(torch.ceil(torch.log2(top / greatest)))


def _every(scales: torch.Tensor, block: tuple[int, int], shape: torch.Size) -> torch.Tensor:
    return scales.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)[: shape[0], : shape[1]]


def _pack(values: torch.Tensor, bits: int) -> torch.Tensor:
    """int32 [rows, columns * bits / 32] of signed values."""
    fields = (values.to(torch.int64) + 2 ** (bits - 1)).reshape(values.shape[0], -1, 32 // bits)
    words = (fields << torch.arange(0, 32, bits)).sum(-1)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def _quantize(name: str, weight: torch.Tensor, how: dict[str, Any]) -> tuple[Tensors, torch.Tensor]:
    """(what the checkpoint holds, what it means)."""
    block = tuple(size or whole for size, whole in zip(how["block"], weight.shape, strict=True))
    scales = _scales(weight, block, how["greatest"])
    every, base = _every(scales, block, weight.shape), name.removesuffix("weight")
    values = weight / every
    values = (
        values.to(FP8)
        if how["dtype"] == FP8
        else values.round().clamp(-how["greatest"] - 1, how["greatest"]).to(torch.int8)
    )
    meant = values.float() * every
    stored = {
        base + how.get("scales_name", "weight_scale"): scales.reshape(-1) if how["block"] == (None, None) else scales
    }
    if bits := how.get("packed"):
        stored |= {base + "weight_packed": _pack(values, bits), base + "weight_shape": torch.tensor(weight.shape)}
    else:
        stored[name] = values
    return stored, meant


def _compressed(layout: str, weights: dict[str, Any], activations: dict[str, Any] | None = None) -> dict[str, Any]:
    group = {
        "targets": ["Linear"],
        "weights": {"symmetric": True, "dynamic": False, **weights},
        "input_activations": activations,
    }
    return {
        "quant_method": "compressed-tensors", "format": layout, "ignore": ["lm_head"], "config_groups": {"group_0": group},
        "quantization_status": "compressed", "global_compression_ratio": None, "kv_cache_scheme": None,
    }  # fmt: skip


_DYNAMIC_INT8 = {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True, "symmetric": True}
_DYNAMIC_FP8 = {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True, "symmetric": True}
KINDS: dict[str, dict[str, Any]] = {
    "fp8-tensor": dict(dtype=FP8, greatest=448.0, block=(None, None), config={"quant_method": "fp8", "activation_scheme": "dynamic"}),
    "fp8-block": dict(
        dtype=FP8, greatest=448.0, block=(32, 32), scales_name="weight_scale_inv",
        config={"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [32, 32]},
    ),
    "fp8-channel": dict(
        dtype=FP8, greatest=448.0, block=(1, None),
        config=_compressed("float-quantized", {"num_bits": 8, "type": "float", "strategy": "channel"}, _DYNAMIC_FP8),
    ),
    "int8-channel": dict(
        dtype=torch.int8, packed=8, greatest=127.0, block=(1, None),
        config=_compressed("pack-quantized", {"num_bits": 8, "type": "int", "strategy": "channel"}),
    ),
    "int8-activations": dict(
        dtype=torch.int8, greatest=127.0, block=(1, None),
        config=_compressed("int-quantized", {"num_bits": 8, "type": "int", "strategy": "channel"}, _DYNAMIC_INT8),
    ),
    "int4-group": dict(
        dtype=torch.int8, packed=4, greatest=7.0, block=(1, 32),
        config=_compressed("pack-quantized", {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32}),
    ),
}  # fmt: skip
"""By name: how weights of linear layers are stored, and what config.json says of it."""


def save(
    path: str, kind: str, directory: Path, change: Callable[[Tensors], None] = lambda tensors: None
) -> tuple[str, str]:
    """(the checkpoint at `path` quantized, its twin). `change` may spoil the tensors before they are written."""
    made = directory / f"{Path(path).name}-{kind}", directory / f"{Path(path).name}-{kind}-twin"
    quantized: Tensors = {}
    twin: Tensors = {}
    for name, tensor in load_file(Path(path) / "model.safetensors").items():
        if LINEAR.search(name):
            stored, meant = _quantize(name, tensor.float(), KINDS[kind])
            quantized |= {key: value.contiguous() for key, value in stored.items()}
            twin[name] = meant.bfloat16()
            assert torch.equal(twin[name].float(), meant), "the twin is exact"
        else:
            quantized[name] = twin[name] = tensor.bfloat16()
    change(quantized)
    for where, tensors, extra in zip(
        made, (quantized, twin), ({"quantization_config": KINDS[kind]["config"]}, {}), strict=True
    ):
        shutil.rmtree(where, ignore_errors=True)
        where.mkdir(parents=True)
        config = json.loads((Path(path) / "config.json").read_text())
        (where / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16", **extra}))
        save_file(tensors, where / "model.safetensors", metadata={"format": "pt"})
    return str(made[0]), str(made[1])
