#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Check vLLM's PyTorch classes on this engine against transformers, one tiny checkpoint an architecture, and write docs/supported_models.md.

    python scripts/model_table.py --run [--only ARCHITECTURE ...]   check, keep the results, write the page
    python scripts/model_table.py [--check]                         write the page from the results kept; or see whether it is up to date

Columns: loads; largest error of float32 logits of a prompt; 32 greedy tokens equal; the same with two devices; compiles ahead of time for v6e with
attention in its Pallas kernels (bfloat16).
"""

import argparse
import json
import os
import sys
import tempfile
import traceback
from datetime import date
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS, PAGE = ROOT / "docs" / "supported_models.json", ROOT / "docs" / "supported_models.md"
MAX_ERROR = 2e-2
"""Of log-probabilities: weights are scaled until rounding shows."""
COUNT = 32
PROMPT = [5, 9, 77, 30, 200, 150, 33, 44, 8, 91, 61, 12, 7, 250, 19, 20, 100, 101, 102, 55] * 2
INTRODUCTION = """
Architectures with a JAX class of ours are in the [list of models](index.md). All others run by vLLM's own PyTorch class, lowered by torchax
(see [PyTorch models](pytorch_models.md)). This is what was checked, each with a tiny checkpoint of random float32 weights against
transformers: the largest error of log-probabilities of a prompt of 40 tokens; 32 greedy tokens (layers scanned where they repeat); the same on
two devices (layers looped over); and whether the step compiles for v6e, with attention in its Pallas kernels. A column that is not right says so.
""".strip()
REST = """
State-space and linear-attention layers (Mamba, Jamba, Falcon-H1, …) are refused by the name of what they need: their state is not served yet.
ChatGLM, EXAONE, InternLM2 and 3, MiniCPM, Orion and Solar have no class in transformers: their checkpoints are another architecture's that
computes the same, rewritten. Others whose code comes with the checkpoint are not in the table. MPT, Baichuan, InternLM (1), QWen (1),
Persimmon and others named in older lists are no longer in vLLM 0.32.0.
""".strip()
VERSIONS = ("vllm", "transformers", "torch", "torchax", "jax", "libtpu")


def prepare() -> None:
    """Before JAX and vLLM are imported."""
    os.environ.update(
        JAX_PLATFORMS="cpu", JAX_NUM_CPU_DEVICES="2", VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_LOGGING_LEVEL="ERROR",
        HF_HUB_OFFLINE="1", TRANSFORMERS_VERBOSITY="error", TPU_SKIP_MDS_QUERY="1", ALLOW_MULTIPLE_LIBTPU_LOAD="1",
    )  # fmt: skip
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]


def by_transformers(path: str) -> tuple[Any, list[int]]:
    """(log-probabilities of the prompt, the greedy tokens after it)."""
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager").float().eval()
    with torch.no_grad():
        ids = torch.tensor([PROMPT])
        logprobs = torch.log_softmax(model(ids).logits[0], -1).numpy()
        out = model.generate(ids, max_new_tokens=COUNT, min_new_tokens=COUNT, do_sample=False, eos_token_id=None)
    return logprobs, out[0, len(PROMPT) :].tolist()


def compiles_for_v6e(path: str) -> bool:
    """Whether the whole step compiles, with the kernels in it. Raises what the compiler raises."""
    import jax
    import jax.numpy as jnp
    from jax.experimental import topologies

    from helpers.pytorch_models import vllm_config
    from tpu_inference.layers.common.attention_metadata import AttentionMetadata
    from tpu_inference.layers.common.sharding import make_mesh
    from tpu_inference.models.vllm.vllm_model_wrapper import abstract_vllm_model
    from tpu_inference.runner.kv_cache_manager import abstract_kv_cache, uniform_layout

    mesh = make_mesh(topologies.get_topology_desc(platform="tpu", topology_name="v6e:2x2").devices, 1)
    functions = abstract_vllm_model(vllm_config(path, dtype="bfloat16"), mesh)
    kv_cache = abstract_kv_cache(functions, uniform_layout(functions, 64), 16, functions.kv_dtype, mesh)
    int32 = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.int32)  # noqa: E731
    meta = AttentionMetadata(int32(16), int32(9), int32(8), int32(1, 8, 16))
    step = jax.jit(functions.forward, donate_argnums=1).lower(functions.params, kv_cache, int32(16), meta)
    return "tpu_custom_call" in step.compile().as_text()


def check(architecture: str, directory: Path) -> dict[str, Any]:
    """The row of one architecture; "cause" is why a column is empty."""
    import numpy as np
    import torch

    from helpers import architectures
    from helpers.pytorch_models import greedy_of, mesh, vllm_config
    from tpu_inference.models.vllm.vllm_model_wrapper import load_vllm_model

    row: dict[str, Any] = {}
    entry = architectures.ARCHITECTURES.get(architecture)
    if entry and entry.differs:
        row["cause"] = entry.differs
    try:
        path = architectures.save(architecture, directory)
        logprobs, tokens = by_transformers(architectures.for_transformers(path))
        for column, shards, scanned in (("tokens", 1, True), ("tensor parallel", 2, False)):
            functions = load_vllm_model(vllm_config(path, scan_layers=scanned), mesh(shards), dummy=False)
            row["loads"] = True
            logits, found = greedy_of(functions, PROMPT, COUNT)
            if shards == 1:
                row["scanned"] = functions.flat_kv
                error = np.abs(torch.log_softmax(torch.from_numpy(logits.copy()), -1).numpy() - logprobs).max()
                row["error"] = float(f"{error:.2g}")
            row[column] = found == tokens
        row["v6e"] = compiles_for_v6e(path)
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        said = " ".join(str(error).split())[:300] or type(error).__name__
        row["cause"] = f"{said} ({Path(last.filename).name}:{last.lineno})"
    return row


def passes(row: dict[str, Any]) -> bool:
    """Whether every column holds."""
    error = row.get("error", float("inf"))
    return error <= MAX_ERROR and all(row.get(column) for column in ("loads", "tokens", "tensor parallel", "v6e"))


def render(results: dict[str, Any]) -> str:
    """The page."""
    from tpu_inference.models.common.refused import REFUSED

    rows = results["rows"]
    mark = lambda value: "yes" if value else "**no**" if value is False else "-"  # noqa: E731
    lines = [
        "# Supported models",
        "",
        "<!-- Written by scripts/model_table.py: do not edit. -->",
        "",
        INTRODUCTION,
        "",
        f"{sum(map(passes, rows.values()))} of {len(rows)} architectures pass every column. Checked on {results['date']} with "
        + ", ".join(f"{name} {version}" for name, version in results["versions"].items())
        + ". Check again: `python scripts/model_table.py --run`.",
        "",
        "| Architecture | logits, max error | tokens equal | two devices | compiles for v6e | layers | |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, row in sorted(rows.items()):
        how = {True: "scanned", False: "looped", None: "-"}[row.get("scanned")]
        cells = (row.get("error", "-"), mark(row.get("tokens")), mark(row.get("tensor parallel")), mark(row.get("v6e")))
        cause = row.get("cause", "").replace("|", "/")
        lines.append(f"| `{name}` | {' | '.join(map(str, cells))} | {how} | {cause} |")
    lines += ["", "## Refused", "", "Before anything is loaded, with the reason:", ""]
    lines += [f"- `{name}`: {reason}" for name, reason in sorted(REFUSED.items())]
    lines += [
        "",
        REST,
        "",
    ]
    return "\n".join(lines)


def run(only: list[str]) -> dict[str, Any]:
    """Check, keeping results as they come."""
    from helpers.architectures import NAMES

    results = json.loads(RESULTS.read_text()) if RESULTS.exists() and only else {"rows": {}}
    with tempfile.TemporaryDirectory() as directory:
        results["rows"] = {name: row for name, row in results["rows"].items() if name in NAMES}
        for name in only or NAMES:
            row = results["rows"][name] = check(name, Path(directory))
            print("pass" if passes(row) else "FAIL", name, row, flush=True)
            results["date"] = date.today().isoformat()
            results["versions"] = {package: metadata.version(package) for package in VERSIONS}
            RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    return results


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", action="store_true", help="check the architectures first")
    parser.add_argument("--only", nargs="+", default=[], help="architectures to check; the results of others are kept")
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 where the page is out of date")
    args = parser.parse_args()
    prepare()
    page = render(run(args.only) if args.run else json.loads(RESULTS.read_text()))
    if args.check:
        if PAGE.read_text() != page:
            print("docs/supported_models.md is out of date: run python scripts/model_table.py")
            return 1
        return 0
    PAGE.write_text(page)
    return 0


if __name__ == "__main__":
    sys.exit(main())
