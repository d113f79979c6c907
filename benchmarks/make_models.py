# SPDX-License-Identifier: Apache-2.0
"""Llama checkpoints with random bf16 weights, untied, saved by transformers: `python benchmarks/make_models.py DIR 3m 125m`.

The tokenizer is the demo model's: its ids all lie in the vocabulary, so `vllm bench` works on them.
"""

import argparse
import shutil
from pathlib import Path
from typing import Any

from tpu_inference.demo import MODEL

SIZES: dict[str, dict[str, Any]] = {
    "3m": dict(
        vocab_size=10240, hidden_size=128, intermediate_size=384, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2,
    ),
    "125m": dict(
        vocab_size=25600, hidden_size=768, intermediate_size=2048, num_hidden_layers=12, num_attention_heads=12,
        num_key_value_heads=12,
    ),
    "0.5b": dict(
        vocab_size=32000, hidden_size=1024, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=16,
        num_key_value_heads=4,
    ),
}  # fmt: skip
"""Name -> shape. What transformers' LlamaConfig leaves out is a default."""
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")


def make(directory: Path, size: str) -> Path:
    """The checkpoint DIRECTORY/SIZE, made unless it is there."""
    path = directory / size
    if (path / "config.json").exists():
        return path
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        **SIZES[size], max_position_embeddings=4096, tie_word_embeddings=False, bos_token_id=0, eos_token_id=1
    )
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(path)
    for name in TOKENIZER_FILES:
        shutil.copy(Path(MODEL) / name, path / name)
    print(f"{path}: {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters")
    return path


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path)
    parser.add_argument("sizes", nargs="*", choices=list(SIZES), default=["3m", "125m"])
    args = parser.parse_args()
    for name in args.sizes:
        make(args.directory, name)
