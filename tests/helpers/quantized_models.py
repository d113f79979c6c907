# SPDX-License-Identifier: Apache-2.0
"""Quantized checkpoints made of tiny ones, and beside each its twin: the same numbers in bfloat16."""

import json
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

LINEAR = re.compile(r"layers\.\d+\..*(_proj|_proj_with_mqa|\.w[123])\.weight$")
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


def words_of(fields: torch.Tensor, dim: int, order: Sequence[int] = range(8)) -> torch.Tensor:
    """Unsigned fields of four bits in int32 words along `dim`; `order` says which neighbour each field, from the lowest, is of."""
    moved = fields.to(torch.int64).movedim(dim, -1)
    groups = moved.reshape(*moved.shape[:-1], -1, 8)[..., list(order)]
    words = (groups << torch.arange(0, 32, 4)).sum(-1).movedim(-1, dim)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def _with_zeros(name: str, weight: torch.Tensor, how: dict[str, Any]) -> tuple[Tensors, torch.Tensor]:
    """(what the checkpoint holds, what it means) of four-bit values with zero points, or GPTQ's without."""
    (_, size), base, layout = how["block"], name.removesuffix("weight"), how["layout"]
    scales = _scales(weight, (1, size), 7.0)
    zeros = torch.randint(6, 10, scales.shape) if layout != "gptq" else torch.full(scales.shape, 8)
    values = (
        (weight / _every(scales, (1, size), weight.shape)).round() + _every(zeros, (1, size), weight.shape)
    ).clamp(0, 15)
    meant = (values - _every(zeros, (1, size), weight.shape)) * _every(scales, (1, size), weight.shape)
    if layout == "awq":
        stored = {
            "qweight": words_of(values.T, 1, AWQ_ORDER),
            "qzeros": words_of(zeros.T, 1, AWQ_ORDER),
            "scales": scales.T.half(),
        }
    elif layout == "gptq":
        stored = {
            "qweight": words_of(values.T, 0), "qzeros": words_of(zeros.T - 1, 1), "scales": scales.T.half(),
            "g_idx": torch.arange(weight.shape[1], dtype=torch.int32) // size,
        }  # fmt: skip
    else:
        stored = {
            "weight_packed": words_of(values, 1), "weight_zero_point": words_of(zeros, 0), "weight_scale": scales,
            "weight_shape": torch.tensor(weight.shape),
        }  # fmt: skip
    return {base + key: value for key, value in stored.items()}, meant


_E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])


def _nvfp4(name: str, weight: torch.Tensor, how: dict[str, Any]) -> tuple[Tensors, torch.Tensor]:
    """(what the checkpoint holds, what it means)."""
    (_, size), base, whole = how["block"], name.removesuffix("weight"), 0.125
    scales = _scales(weight, (1, size), 6.0) / whole
    every = _every(scales * whole, (1, size), weight.shape)
    codes = (_E2M1 - (weight / every).abs()[..., None]).abs().argmin(-1)
    meant = _E2M1[codes] * every * weight.sign()
    codes = (codes + 8 * (weight < 0)).to(torch.uint8)
    packed, scales = codes[:, ::2] | (codes[:, 1::2] << 4), scales.to(FP8)
    assert (scales.float() * whole == every[:, ::size]).all()
    if how["layout"] == "nvfp4-modelopt":
        stored = {"weight": packed, "weight_scale": scales, "weight_scale_2": torch.tensor(whole), "input_scale": torch.tensor(1.0)}  # fmt: skip
    else:
        stored = {
            "weight_packed": packed, "weight_scale": scales, "weight_global_scale": torch.tensor([1 / whole]),
            "input_global_scale": torch.tensor([1.0]),
        }  # fmt: skip
    return {base + key: value for key, value in stored.items()}, meant


def _mxfp4(name: str, weight: torch.Tensor, size: int) -> tuple[Tensors, torch.Tensor]:
    """(what the checkpoint holds, what it means)."""
    base, exponents = name.removesuffix("weight"), _scales(weight, (1, size), 6.0).log2().ceil()
    every = _every(exponents.exp2(), (1, size), weight.shape)
    codes = (_E2M1 - (weight / every).abs()[..., None]).abs().argmin(-1)
    meant = _E2M1[codes] * every * weight.sign()
    codes = (codes + 8 * (weight < 0)).to(torch.uint8)
    packed = codes[:, ::2] | (codes[:, 1::2] << 4)
    return {base + "weight_packed": packed, base + "weight_scale": (exponents + 127).to(torch.uint8)}, meant


def _quantize(name: str, weight: torch.Tensor, how: dict[str, Any]) -> tuple[Tensors, torch.Tensor]:
    """(what the checkpoint holds, what it means)."""
    if how.get("layout", "").startswith("nvfp4"):
        return _nvfp4(name, weight, how)
    if how.get("layout") == "mxfp4":
        return _mxfp4(name, weight, how["block"][1])
    if "layout" in how:
        return _with_zeros(name, weight, how)
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
    "int4-zeros": dict(
        layout="compressed-tensors", block=(1, 32),
        config=_compressed("pack-quantized", {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32, "symmetric": False}),
    ),
    "awq": dict(
        layout="awq", block=(1, 32), config={"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}
    ),
    "gptq": dict(
        layout="gptq", block=(1, 32), config={"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": True}
    ),
}  # fmt: skip
"""By name: how weights of linear layers are stored, and what config.json says of it."""
_FP4 = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16, "symmetric": True}
_MXFP4 = {
    "num_bits": 4, "type": "float", "strategy": "group", "group_size": 32, "symmetric": True, "scale_dtype": "torch.uint8",
    "zp_dtype": "torch.uint8",
}  # fmt: skip
_FP8_CACHE = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True}
MORE_KINDS = {
    "fp8-channel-cache": KINDS["fp8-channel"]
    | {"config": KINDS["fp8-channel"]["config"] | {"kv_cache_scheme": _FP8_CACHE}},
    "nvfp4": dict(
        layout="nvfp4",
        block=(1, 16),
        config=_compressed("nvfp4-pack-quantized", _FP4, _FP4 | {"dynamic": "local"}),
    ),
    "nvfp4-modelopt": dict(
        layout="nvfp4-modelopt",
        block=(1, 16),
        config={"quant_method": "modelopt", "quant_algo": "NVFP4", "group_size": 16, "exclude_modules": ["lm_head"]},
    ),
    "mxfp4": dict(
        layout="mxfp4",
        block=(1, 32),
        config=_compressed("mxfp4-pack-quantized", _MXFP4),
    ),
    "mxfp4-activations": dict(
        layout="mxfp4",
        block=(1, 32),
        config=_compressed("mxfp4-pack-quantized", _MXFP4, _MXFP4 | {"dynamic": True}),
    ),
    "fp8-block-128": KINDS["fp8-block"]
    | {"block": (128, 128), "config": KINDS["fp8-block"]["config"] | {"weight_block_size": [128, 128]}},
}
"""A checkpoint that asks for a KV cache of its own; NVFP4, both ways of storing it; MXFP4;
blocks as published ones have, which tiny matrices on several devices cut."""


def save(
    path: str, kind: str, directory: Path, change: Callable[[Tensors], None] = lambda tensors: None
) -> tuple[str, str]:
    """(the checkpoint at `path` quantized, its twin). `change` may spoil the tensors before they are written."""
    how = {**KINDS, **MORE_KINDS}[kind]
    made = directory / f"{Path(path).name}-{kind}", directory / f"{Path(path).name}-{kind}-twin"
    quantized: Tensors = {}
    twin: Tensors = {}
    for name, tensor in load_file(Path(path) / "model.safetensors").items():
        if LINEAR.search(name):
            stored, meant = _quantize(name, tensor.float(), how)
            quantized |= {key: value.contiguous() for key, value in stored.items()}
            twin[name] = meant.bfloat16()
            assert torch.equal(twin[name].float(), meant), "the twin is exact"
        else:
            quantized[name] = twin[name] = tensor.bfloat16()
    change(quantized)
    config_of = how["config"]
    routers = [name.removesuffix(".weight") for name in twin if name.endswith(".mlp.gate.weight")]
    if routers and config_of["quant_method"] == "fp8":  # as published checkpoints say it
        config_of = {**config_of, "modules_to_not_convert": routers}
    for where, tensors, extra in zip(made, (quantized, twin), ({"quantization_config": config_of}, {}), strict=True):
        shutil.rmtree(where, ignore_errors=True)
        where.mkdir(parents=True)
        config = json.loads((Path(path) / "config.json").read_text())
        (where / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16", **extra}))
        save_file(tensors, where / "model.safetensors", metadata={"format": "pt"})
    return str(made[0]), str(made[1])
