# SPDX-License-Identifier: Apache-2.0
"""Perplexity of quantized models against bfloat16: `python benchmarks/quantization.py --work-dir DIRECTORY`.

The demo model over text that it was not trained on: documents of its grammar from another seed, in sequences of 256 tokens, by the log
probabilities of prompt tokens that the engine gives. Kinds "at load" are rounded by the flag named. The others are checkpoints written here from
the same weights by rounding to the nearest value, 4-bit scales being the best of 24 by squared error; embeddings and the head stay bfloat16, as in
published checkpoints. A matrix of 192 columns is harder to round than one of thousands, and the method of a published 4-bit checkpoint (GPTQ, AWQ)
is better than rounding.
"""

import argparse
import importlib.util
import json
import math
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import common
import torch

from tpu_inference.layers.common.mxfp4 import VALUES

SEED = 2026
LENGTH = 256
BARS = {"int8": 0.02, "fp8": 0.02, "4-bit": 0.06}
GROUP = 32
FP8 = torch.float8_e4m3fn
E2M1 = torch.from_numpy(VALUES[:8])
"""What three bits of a four-bit float mean."""
Tensors = dict[str, torch.Tensor]


def int8_channel(base: str, weight: torch.Tensor) -> Tensors:
    """compressed-tensors, int-quantized."""
    scales = weight.abs().amax(1, keepdim=True) / 127
    return {base + "weight": (weight / scales).round().to(torch.int8), base + "weight_scale": scales}


def fp8_block(base: str, weight: torch.Tensor) -> Tensors:
    """A scale for blocks of 64 x 64."""
    rows, columns = weight.shape
    blocks = weight.reshape(rows // 64, 64, columns // 64, 64)
    scales = blocks.abs().amax((1, 3)) / 448
    values = (blocks / scales[:, None, :, None]).reshape(rows, columns)
    return {base + "weight": values.to(FP8), base + "weight_scale_inv": scales}


def _best_of_scales(
    groups: torch.Tensor, full: torch.Tensor, rounded: Callable[[torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    """Of parts of `full`, for each group the scale whose rounded values are the nearest."""
    best, least = full, torch.full(full.shape, math.inf)
    for part in torch.linspace(0.6, 1.06, 24):
        scales = full * part
        error = (rounded(scales) - groups).square().sum(-1, keepdim=True)
        best, least = torch.where(error < least, scales, best), torch.minimum(error, least)
    return best


def _words(fields: torch.Tensor) -> torch.Tensor:
    """int32, eight neighbours along the last dimension in one."""
    words = (fields.to(torch.int64).reshape(*fields.shape[:-1], -1, 8) << torch.arange(0, 32, 4)).sum(-1)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def int4_group(base: str, weight: torch.Tensor) -> Tensors:
    """compressed-tensors, pack-quantized, symmetric."""
    groups = weight.reshape(weight.shape[0], -1, GROUP)
    values = lambda scales: (groups / scales).round().clamp(-8, 7)  # noqa: E731
    scales = _best_of_scales(groups, groups.abs().amax(-1, keepdim=True) / 7.5, lambda s: values(s) * s)
    return {
        base + "weight_packed": _words((values(scales) + 8).reshape(weight.shape)),
        base + "weight_scale": scales[..., 0],
        base + "weight_shape": torch.tensor(weight.shape),
    }


def awq(base: str, weight: torch.Tensor) -> Tensors:
    """The format of AWQ, with zero points; not its scaling of activations."""
    groups = weight.reshape(weight.shape[0], -1, GROUP)
    low, high = groups.amin(-1, keepdim=True).clamp(max=0), groups.amax(-1, keepdim=True).clamp(min=0)
    zeros = lambda scales: (-low / scales).round().clamp(0, 15)  # noqa: E731
    values = lambda scales: (groups / scales + zeros(scales)).round().clamp(0, 15)  # noqa: E731
    scales = _best_of_scales(groups, (high - low) / 15, lambda s: (values(s) - zeros(s)) * s).half().float()
    order = torch.tensor([0, 2, 4, 6, 1, 3, 5, 7])

    def packed(fields: torch.Tensor) -> torch.Tensor:
        return _words(fields.T.reshape(fields.shape[1], -1, 8)[..., order].reshape(fields.shape[1], -1))

    return {
        base + "qweight": packed(values(scales).reshape(weight.shape)),
        base + "qzeros": packed(zeros(scales)[..., 0]),
        base + "scales": scales[..., 0].T.half(),
    }


def _e2m1(groups: torch.Tensor, scales: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(codes of four bits, what they mean), the nearest values."""
    codes = ((groups / scales).abs()[..., None] - E2M1).abs().argmin(-1)
    return codes + 8 * (groups < 0), E2M1[codes] * scales * groups.sign()


def _pairs(codes: torch.Tensor) -> torch.Tensor:
    """uint8, two neighbours in a byte."""
    return (codes[..., ::2] | codes[..., 1::2] << 4).to(torch.uint8)


def mxfp4(base: str, weight: torch.Tensor) -> Tensors:
    """compressed-tensors, mxfp4-pack-quantized: scales are powers of two."""
    groups = weight.reshape(weight.shape[0], -1, GROUP)
    power = lambda scales: scales.log2().round().exp2()  # noqa: E731
    full = groups.abs().amax(-1, keepdim=True) / 6
    scales = power(_best_of_scales(groups, full, lambda s: _e2m1(groups, power(s))[1]))
    codes, _ = _e2m1(groups, scales)
    return {
        base + "weight_packed": _pairs(codes.reshape(weight.shape)),
        base + "weight_scale": (scales[..., 0].log2() + 127).to(torch.uint8),
    }


def nvfp4(base: str, weight: torch.Tensor) -> Tensors:
    """compressed-tensors, nvfp4-pack-quantized: float8 scales of 16 weights, times one of the matrix."""
    groups = weight.reshape(weight.shape[0], -1, 16)
    full = groups.abs().amax(-1, keepdim=True) / 6
    whole = full.max() / 448
    stored = lambda scales: (scales / whole).clamp(max=448).to(FP8)  # noqa: E731
    scales = stored(_best_of_scales(groups, full, lambda s: _e2m1(groups, stored(s).float() * whole)[1]))
    codes, _ = _e2m1(groups, scales.float() * whole)
    return {
        base + "weight_packed": _pairs(codes.reshape(weight.shape)),
        base + "weight_scale": scales[..., 0],
        base + "weight_global_scale": (1 / whole)[None],
        base + "input_global_scale": torch.ones(1),
    }


def compressed(layout: str, weights: dict[str, Any], activations: dict[str, Any] | None = None) -> dict[str, Any]:
    """What config.json says of compressed-tensors."""
    group = {"targets": ["Linear"], "weights": {"symmetric": True, **weights}, "input_activations": activations}
    return {
        "quant_method": "compressed-tensors",
        "format": layout,
        "ignore": ["lm_head"],
        "config_groups": {"group_0": group},
    }


INT8 = {"num_bits": 8, "type": "int", "strategy": "channel"}
TOKENS = {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True, "symmetric": True}
FP4 = {"num_bits": 4, "type": "float"}
INT4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": GROUP}
CHECKPOINTS: dict[str, tuple[Callable[[str, torch.Tensor], Tensors], dict[str, Any]]] = {
    "int8 weights and activations (W8A8)": (int8_channel, compressed("int-quantized", INT8, TOKENS)),
    "fp8, blocks of 64": (
        fp8_block,
        {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [64, 64]},
    ),
    f"4-bit, groups of {GROUP} (W4A16)": (int4_group, compressed("pack-quantized", INT4)),
    f"4-bit, groups of {GROUP}, zero points (AWQ)": (
        awq,
        {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True},
    ),
    f"4-bit floats, groups of {GROUP} (MXFP4)": (
        mxfp4,
        compressed(
            "mxfp4-pack-quantized", {**FP4, "strategy": "group", "group_size": GROUP, "scale_dtype": "torch.uint8"}
        ),
    ),
    "4-bit floats, groups of 16 (NVFP4)": (
        nvfp4,
        compressed("nvfp4-pack-quantized", {**FP4, "strategy": "tensor_group", "group_size": 16}),
    ),
}
AT_LOAD: dict[str, dict[str, Any]] = {
    "bfloat16": {},
    "int8 weights, at load (`int8_per_channel_static`)": dict(
        quantization="online", quantization_config={"linear": "int8_per_channel_static"}
    ),
    "fp8, at load (`fp8_per_channel`)": dict(quantization="fp8_per_channel"),
    "int8 weights and activations, at load (rules `int8_weights_activations`)": dict(
        additional_config={"quantization": "int8_weights_activations"}
    ),
    "fp8 weights and activations, at load (rules `fp8_weights_activations`)": dict(
        additional_config={"quantization": "fp8_weights_activations"}
    ),
    "4-bit, groups of 64, at load (rules `int4_weights`)": dict(additional_config={"quantization": "int4_weights"}),
    "bfloat16, KV cache in fp8 (`--kv-cache-dtype fp8`), scales of 1": dict(kv_cache_dtype="fp8"),
}


def save(model: Path, kind: str, directory: Path) -> str:
    """The checkpoint `model` in that kind."""
    from safetensors.torch import load_file, save_file

    quantize, config = CHECKPOINTS[kind]
    shutil.rmtree(directory, ignore_errors=True)
    shutil.copytree(model, directory)
    tensors: Tensors = {}
    for name, tensor in load_file(model / "model.safetensors").items():
        linear = name.endswith("_proj.weight")
        tensors |= quantize(name.removesuffix("weight"), tensor.float()) if linear else {name: tensor}
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    old = json.loads((model / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**old, "quantization_config": config}))
    return str(directory)


def held_out(model: Path, count: int) -> list[list[int]]:
    """Token ids [count][LENGTH] of fresh documents end to end."""
    from transformers import AutoTokenizer

    script = Path(__file__).parent.parent / "scripts" / "train_demo_model.py"
    spec = importlib.util.spec_from_file_location("train_demo_model", script)
    train = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(train)
    stream = train.token_stream(AutoTokenizer.from_pretrained(model), random.Random(SEED), count * LENGTH)
    return stream.reshape(count, LENGTH).tolist()


def perplexity(path: str, prompts: list[list[int]], **options: Any) -> float:
    """exp of the mean negative log probability of every token but the first of each prompt."""
    from vllm import LLM, SamplingParams

    llm = LLM(
        path, dtype="bfloat16", max_model_len=LENGTH + 1, max_num_seqs=1, max_num_batched_tokens=LENGTH, num_gpu_blocks_override=64,
        enable_prefix_caching=False, **options,
    )  # fmt: skip
    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
    outputs = llm.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False)
    llm.llm_engine.engine_core.shutdown()
    found = [
        entry[token].logprob
        for out in outputs
        for token, entry in zip(out.prompt_token_ids[1:], out.prompt_logprobs[1:], strict=True)
    ]
    return math.exp(-sum(found) / len(found))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work-dir", type=Path, required=True)
    parser.add_argument("--sequences", type=int, default=64, help="of 256 tokens")
    parser.add_argument("--implementations", nargs="+", default=["auto", "vllm"], help="values of --model-impl")
    args = parser.parse_args()
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    from tpu_inference.demo import MODEL

    prompts = held_out(Path(MODEL), args.sequences)
    kinds = [(kind, str(MODEL), flags) for kind, flags in AT_LOAD.items()]
    kinds += [(kind, save(Path(MODEL), kind, args.work_dir / str(i)), {}) for i, kind in enumerate(CHECKPOINTS)]
    rows, plain = [], {}
    for kind, path, flags in kinds:
        row: list[Any] = [kind]
        for implementation in args.implementations:
            found = perplexity(path, prompts, model_impl=implementation, **flags)
            more = found / plain.setdefault(implementation, found) - 1
            row += [f"{found:.4f}", f"{100 * more:+.2f} %"]
            print(kind, implementation, found, more, flush=True)
        bar = next((bar for name, bar in BARS.items() if kind.startswith(name) or f"cache in {name}" in kind), None)
        row.append(
            ""
            if bar is None
            else f"{100 * bar:.0f} %, {'met' if float(row[2].split()[0]) <= 100 * bar else '**not met**'}"
        )
        rows.append(row)
    names = {"auto": "JAX class", "vllm": "PyTorch class"}
    header = ["Weights of linear layers"]
    for implementation in args.implementations:
        header += [f"perplexity, {names.get(implementation, implementation)}", "against bfloat16"]
    text = common.table([*header, "bar"], rows)
    about = f"{args.sequences} sequences of {LENGTH} tokens.\n\n" + __doc__.split("\n\n", 1)[1].strip()
    common.write("quantization.md", "\n\n".join(("# Perplexity of quantized models", about, text)))


if __name__ == "__main__":
    main()
