# SPDX-License-Identifier: Apache-2.0
"""Host memory while a checkpoint of 3 GB is loaded, by the JAX class and by vLLM's PyTorch class.

    python benchmarks/load_memory.py --work-dir /tmp/load_memory [--shards 1 4]

WORK_DIR keeps the checkpoint. On the CPU backend the "device" memory is the host's, so the bound is: what the process holds before, the weights, and
1.5 GiB. Counted is anonymous memory (RssAnon); pages of the mapped checkpoint, which the kernel may drop, are shown beside it.
"""

import argparse
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import common

SIDES = ("flax_nnx", "vllm")
BOUND_GIB = 1.5
SHAPE = dict(
    vocab_size=64000, hidden_size=2048, intermediate_size=5632, num_hidden_layers=28, num_attention_heads=16,
    num_key_value_heads=4, max_position_embeddings=2048, tie_word_embeddings=False, bos_token_id=0, eos_token_id=1,
)  # fmt: skip


def make(directory: Path) -> Path:
    """A Llama of 1.5 billion random bf16 parameters, in files of 1 GB, unless it is there."""
    if not (directory / "config.json").exists():
        import torch
        from transformers import LlamaConfig, LlamaForCausalLM

        torch.set_default_dtype(torch.bfloat16)
        LlamaForCausalLM(LlamaConfig(**SHAPE)).save_pretrained(directory, max_shard_size="1GB")
    return directory


def resident(kind: str) -> float:
    """GiB of this process: "RssAnon" or "RssFile"."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition(f"{kind}:")[2].split()[0]) / 2**20


def load(model: str, side: str, shards: int) -> dict[str, float]:
    """Loads in this process, and says what it took."""
    os.environ.update(MODEL_IMPL_TYPE=side, JAX_PLATFORMS="cpu", HF_HUB_OFFLINE="1")
    import jax
    from vllm import EngineArgs

    from tpu_inference.layers.common.sharding import make_mesh
    from tpu_inference.models.common.vllm_loader import load_model

    jax.config.update("jax_num_cpu_devices", shards)
    config = EngineArgs(
        model=model, dtype="bfloat16", skip_tokenizer_init=True, tensor_parallel_size=shards
    ).create_engine_config()
    mesh, peaks, done = make_mesh(jax.devices("cpu"), shards), {"RssAnon": 0.0, "RssFile": 0.0}, threading.Event()
    before = {kind: resident(kind) for kind in peaks}

    def watch() -> None:
        while not done.wait(0.01):
            peaks.update({kind: max(peak, resident(kind)) for kind, peak in peaks.items()})

    watcher = threading.Thread(target=watch)
    watcher.start()
    began = time.monotonic()
    functions = load_model(config, mesh)
    jax.block_until_ready(functions.params)
    seconds = time.monotonic() - began
    done.set()
    watcher.join()
    weights = sum(array.nbytes for array in jax.tree.leaves(functions.params)) / 2**30
    return {
        "weights": weights,
        "before": before["RssAnon"],
        "peak": peaks["RssAnon"],
        "beyond": peaks["RssAnon"] - before["RssAnon"] - weights,
        "mapped": peaks["RssFile"] - before["RssFile"],
        "seconds": seconds,
    }


def render(results: dict[str, dict[str, float]]) -> str:
    """The report."""
    columns = ("weights", "before", "peak", "beyond", "mapped", "seconds")
    rows = [[name, *(r[c] for c in columns), common.met(r["beyond"], BOUND_GIB)] for name, r in results.items()]
    head = ["", *(f"{c}, GiB" if c != "seconds" else c for c in columns), f"beyond <= {BOUND_GIB} GiB"]
    return "\n\n".join(
        ["# Host memory while loading", common.machine_line(), __doc__.split("\n\n")[2], common.table(head, rows)]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work-dir", type=Path, required=True)
    parser.add_argument("--shards", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--load", nargs=2, metavar=("SIDE", "SHARDS"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.load:
        side, shards = args.load
        print("RESULT", json.dumps(load(str(args.work_dir / "model"), side, int(shards))))
        return
    model = make(args.work_dir / "model")
    results = {}
    for shards in args.shards:
        for side in SIDES:
            command = [sys.executable, __file__, "--work-dir", str(model.parent), "--load", side, str(shards)]
            out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            results[f"{side}, {shards} device(s)"] = json.loads(out.partition("RESULT ")[2])
            print(side, shards, results[f"{side}, {shards} device(s)"], flush=True)
    common.write("load_memory.md", render(results))


if __name__ == "__main__":
    main()
