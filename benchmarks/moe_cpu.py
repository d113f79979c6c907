# SPDX-License-Identifier: Apache-2.0
"""A layer of 64 experts of which a token has two, beside a dense layer of the width of two experts, on JAX's CPU backend.

Run as `JAX_PLATFORMS=cpu python benchmarks/moe_cpu.py`. Milliseconds of a call, median; both in turns, so that other work on the machine slows
both.
"""

import argparse
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

from tpu_inference.layers.common.linear import matmul
from tpu_inference.layers.common.moe import ACTIVATIONS, ExpertWeights, experts
from tpu_inference.layers.common.sharding import make_mesh

EXPERTS, TOP_K = 64, 2


def seconds(functions, repeats):
    found = [[] for _ in functions]
    for function in functions:
        jax.block_until_ready(function())
    for _ in range(repeats):
        for function, times in zip(functions, found, strict=True):
            start = time.perf_counter()
            jax.block_until_ready(function())
            times.append(time.perf_counter() - start)
    return [statistics.median(times) for times in found]


def measure(tokens, hidden, width, dtype, repeats):
    """(dense, experts) in seconds."""
    mesh, rng = make_mesh(jax.devices(), 1), np.random.default_rng(0)

    def array(*shape):
        return jnp.asarray(rng.standard_normal(shape, np.float32) * 0.05, dtype)

    x, w13, w2 = array(tokens, hidden), array(EXPERTS, 2 * width, hidden), array(EXPERTS, hidden, width)
    gate_up, down = array(2 * TOP_K * width, hidden), array(hidden, TOP_K * width)
    ids = jnp.asarray(np.stack([rng.permutation(EXPERTS)[:TOP_K] for _ in range(tokens)]), jnp.int32)
    weights = jnp.full(ids.shape, 1 / TOP_K, jnp.float32)
    act = ACTIVATIONS["silu"]
    dense = jax.jit(lambda x, gate_up, down: matmul(act(matmul(x, gate_up, jnp.float32)), down, jnp.float32))
    sparse = jax.jit(
        lambda x, w13, w2: experts(
            x, weights, ids, ExpertWeights(w13, w2), activation="silu", mesh=mesh, sharding="whole", accumulate_dtype=jnp.float32,
        )
    )  # fmt: skip
    return seconds([lambda: dense(x, gate_up, down), lambda: sparse(x, w13, w2)], repeats)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 8, 32, 512, 2048])
    parser.add_argument("--layers", nargs="+", default=["256x128", "1024x512"], help="hidden x width of an expert")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--repeats", type=int, default=11)
    args = parser.parse_args()
    print(
        "| Hidden x width | dtype | Tokens | Dense, ms | 64 experts, ms | Ratio |\n| --- | --- | --- | --- | --- | --- |"
    )
    for layer in args.layers:
        hidden, width = map(int, layer.split("x"))
        for dtype in args.dtypes:
            for tokens in args.tokens:
                dense, sparse = measure(tokens, hidden, width, dtype, args.repeats)
                print(
                    f"| {layer} | {dtype} | {tokens} | {1e3 * dense:.2f} | {1e3 * sparse:.2f} | {sparse / dense:.1f} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
