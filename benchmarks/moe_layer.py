# SPDX-License-Identifier: Apache-2.0
"""A whole layer of experts on a TPU (router, routing, sorting, both products, activation, weighted sum), from the compiler's schedule.

Run as `python benchmarks/moe_layer.py [--chip v6e] [--tokens 64 1024]`; docs/measuring_a_kernel.md says what the figures are.
"""

import argparse
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from tpu_inference.tools import schedule
from tpu_inference.tools.kernel_report.cases import device_of, lower
from tpu_inference.tools.kernel_report.measure import Figure, roofs_of
from tpu_inference.tools.kernel_report.render import unknown


@dataclass(frozen=True)
class Layer:
    """Qwen3-30B-A3B's."""

    tokens: int
    hidden: int = 2048
    width: int = 768
    experts: int = 128
    top_k: int = 8
    dtype: str = "bfloat16"
    donated: tuple[int, ...] = ()

    @property
    def products(self) -> tuple[Any, Any]:
        from tpu_inference.kernels.grouped_matmul.shapes import GroupedShape

        of = dict(tokens=self.tokens, top_k=self.top_k, experts=self.experts, local=self.experts)
        return (
            GroupedShape("", out=2 * self.width, columns=self.hidden, **of),
            GroupedShape("", out=self.hidden, columns=self.width, **of),
        )

    @property
    def useful_bytes(self) -> int:
        """The router's weight, those of experts that have tokens, and what goes in and out, once."""
        with_tokens = int((self.products[0].group_sizes > 0).sum())
        numbers = self.hidden * (self.experts + 3 * self.width * with_tokens + 2 * self.tokens)
        return 2 * numbers

    @property
    def useful_flops(self) -> int:
        return 2 * self.tokens * self.hidden * (self.experts + 3 * self.width * self.top_k)

    def arguments(self, device: Any) -> tuple[Any, ...]:
        import jax

        del device
        shapes = (
            (self.tokens, self.hidden), (self.experts, self.hidden),
            (self.experts, 2 * self.width, self.hidden), (self.experts, self.hidden, self.width),
        )  # fmt: skip
        return tuple(jax.ShapeDtypeStruct(shape, self.dtype) for shape in shapes)

    def function(self, device: Any, config: Any = None) -> Callable:
        import jax.numpy as jnp

        from tpu_inference.layers.common.linear import matmul
        from tpu_inference.layers.common.moe import ExpertWeights, Routing, experts, route
        from tpu_inference.layers.common.sharding import make_mesh

        mesh = make_mesh([device], 1)

        def layer(x: Any, router: Any, w13: Any, w2: Any) -> Any:
            weights, ids = route(matmul(x, router, jnp.float32), Routing(self.top_k, True))
            return experts(
                x, weights, ids, ExpertWeights(w13, w2),
                activation="silu", mesh=mesh, sharding="whole", accumulate_dtype=x.dtype,
            )  # fmt: skip

        return layer

    def workload(self, device: Any) -> Mapping[str, Any]:
        return self.products[0].workload(device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--chip", default="v6e")
    parser.add_argument("--tokens", type=int, nargs="+", default=[64, 1024])
    parser.add_argument("--ops", action="store_true", help="print what every operation takes")
    args = parser.parse_args()
    schedule.prepare()
    device = device_of(args.chip)
    for tokens in args.tokens:
        layer = Layer(tokens)
        with schedule.workload(layer.workload(device)):
            _, recorded = schedule.record(lambda layer=layer: lower(layer, device).compile())
        for latency in schedule.LATENCIES:
            timing = recorded.time(args.chip, latency, 1.0)
            figure = Figure.of(timing, latency, 1.0, roofs_of(layer, args.chip, 1.0))
            print(
                f"{tokens} tokens on {args.chip}, DMA latency {latency}: kernels {figure.kernels} µs, other ops {figure.wrappers} µs, "
                f"total {figure.total} µs, {100 * figure.roofline:.1f} % of roofline; moved {timing.moved_bytes / 1e6:.0f} MB, "
                f"useful {layer.useful_bytes / 1e6:.0f} MB; unknown: {unknown(vars(timing.unknown))}"
            )
        if args.ops:
            for op in sorted(timing.ops, key=lambda op: -op.microseconds)[:30]:
                print(f"    {op.name} {op.kind} x{op.trips}: {op.microseconds:.1f} µs")


if __name__ == "__main__":
    main()
