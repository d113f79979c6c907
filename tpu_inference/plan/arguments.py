# SPDX-License-Identifier: Apache-2.0
"""What the planner is asked, parsed and checked."""

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from tpu_inference.errors import ConfigError
from tpu_inference.plan.slices import TpuSlice, find_chip, find_slice, parse_slice
from tpu_inference.tpu_info import CHIPS

ENGINE_OPTIONS = (
    "max_model_len",
    "max_num_seqs",
    "max_num_batched_tokens",
    "dtype",
    "kv_cache_dtype",
    "quantization",
    "quantization_config",
    "gpu_memory_utilization",
    "block_size",
    "additional_config",
    "enable_expert_parallel",
)
"""Handed to vLLM as they are, under the same names; what is not given keeps the server's default for the chip."""
NO_EXPORT = (
    "--export-cache is not offered. Programs that are compiled without a TPU can be serialized, but whether a TPU finds and loads them cannot be "
    "shown without one: JAX's cache key holds the fingerprint of the live devices, libtpu's version and its flags. Let the first start on the "
    "slice fill VLLM_XLA_CACHE_PATH instead, and copy that directory to the next ones."
)


@dataclass(frozen=True)
class Question:
    """A model, the slices to look at, and how it would be served."""

    model: str
    slices: tuple[TpuSlice, ...]
    """One, or several to compare."""
    tensor_parallel: int | None
    """None: as many devices of each slice as the model's heads divide among."""
    engine: dict[str, Any]
    """Of ENGINE_OPTIONS, those given."""
    prices: dict[str, float]
    """Dollars a chip-hour, by chip."""
    batches: tuple[int, ...]
    """Requests of the decode steps that are timed, beside the largest."""
    contexts: tuple[int, ...]
    """Lengths that requests are counted at and decode steps timed at, beside the longest."""
    times: bool = True
    full_prefill: bool = False
    """Time prompts in the largest program, rather than in one of 256 tokens."""
    json: bool = False
    plot: str | None = None


class _Parser(argparse.ArgumentParser):
    """Raises instead of exiting: every refusal leaves by one door."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}. See python -m tpu_inference.plan --help.")


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise ValueError
    return value


def _share(text: str) -> float:
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not above 0 and up to 1")
    return value


def _object(text: str) -> dict[str, Any]:
    value = json.loads(text)
    if not isinstance(value, dict):
        raise ValueError
    return value


_object.__name__ = "JSON object"
_positive.__name__ = "whole number from 1"


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="python -m tpu_inference.plan",
        description="Whether a model fits a TPU slice, how many requests it holds and what a step costs, without a TPU.",
    )
    add = parser.add_argument
    add("--model", required=True, help="directory with a config.json, or a name on the Hugging Face hub")
    add("--chip", help=f"one of {', '.join(CHIPS)}")
    add("--topology", help="grid of chips, as in 2x4 (default: the smallest with enough devices)")
    add(
        "--tensor-parallel-size",
        "-tp",
        type=_positive,
        help="devices to use (default: all that the heads divide among)",
    )
    add("--max-model-len", type=_positive, help="longest request in tokens (default: the model's)")
    add("--max-num-seqs", type=_positive, help="most requests in a step (default: the server's)")
    add("--max-num-batched-tokens", type=_positive, help="most tokens in a step (default: the server's for the chip)")
    add("--dtype", help="of weights and activations: bfloat16 or float32 (default: the checkpoint's)")
    add("--kv-cache-dtype", help="of the KV cache (default: that of the model)")
    add("--quantization", "-q", help="of weights rounded at load (default: the checkpoint's)")
    add("--quantization-config", type=_object, help='the server\'s, as in \'{"linear": "int8_per_channel_static"}\'')
    add(
        "--gpu-memory-utilization", type=_share, help="share of the HBM that the engine may use (default: the server's)"
    )
    add("--block-size", type=_positive, help="tokens a block of the KV cache holds (default: the platform's)")
    add(
        "--enable-expert-parallel",
        action="store_const",
        const=True,
        help="give each device whole experts, instead of a part of every one",
    )
    add("--additional-config", type=_object, help="our own settings, as in '{\"token_buckets\": [16, 1024]}'")
    add(
        "--batch",
        nargs="+",
        type=_positive,
        default=[64],
        metavar="N",
        help="decode batches to time (default: 64, and the largest)",
    )
    add(
        "--context",
        nargs="+",
        type=_positive,
        default=[1024, 2048],
        metavar="N",
        help="lengths to count requests and time decoding at (default: 1024, 2048 and the longest)",
    )
    add(
        "--full-prefill",
        action="store_true",
        help="time prompts at max_num_batched_tokens, which takes longer, not at 256",
    )
    add("--no-times", action="store_true", help="memory only: no step times, which take most of the planner's own time")
    add("--json", action="store_true", help="print one JSON object")
    add("--plot", metavar="FILE", help="draw the HBM and the step times into FILE (png, svg or pdf; needs matplotlib)")
    add("--compare", nargs="+", metavar="CHIP:TOPOLOGY", help="rank several slices")
    add("--price", nargs="+", default=[], metavar="CHIP=USD", help="dollars a chip-hour, for a cost per million tokens")
    add("--export-cache", metavar="DIR", help="refused; says why")
    return parser


def _price(text: str) -> tuple[str, float]:
    name, _, amount = text.partition("=")
    try:
        value = float(amount)
    except ValueError:
        value = math.nan
    if not (value > 0 and math.isfinite(value)):
        raise ConfigError(f"--price {text!r} is not valid: write CHIP=DOLLARS a chip-hour, as in v6e=2.7.")
    return find_chip(name).name, value


def _slices(args: argparse.Namespace) -> tuple[TpuSlice, ...]:
    if args.compare:
        if args.chip or args.topology:
            raise ConfigError("--compare names its slices itself: leave out --chip and --topology.")
        return tuple({str(where): where for where in map(parse_slice, args.compare)}.values())
    if not args.chip:
        raise ConfigError(f"Say which slice: --chip ({', '.join(CHIPS)}) and --topology, or --compare v6e:2x4 v5e:2x4.")
    return (find_slice(args.chip, args.topology, args.tensor_parallel_size),)


def _check_plot(path: str | None) -> None:
    """Before minutes of compiling, not after."""
    if path is None:
        return
    from tpu_inference.plan.plot import check

    check(path)


def parse(argv: Sequence[str] | None = None) -> Question:
    """The command line as a question; ConfigError says what is wrong with it."""
    args = _parser().parse_args(argv)
    if args.export_cache:
        raise ConfigError(NO_EXPORT)
    slices = _slices(args)
    if args.no_times and (args.full_prefill or args.price):
        raise ConfigError("--full-prefill and --price need step times: leave out --no-times.")
    prices = dict(_price(text) for text in args.price)
    if unused := sorted(set(prices) - {s.chip.name for s in slices}):
        raise ConfigError(f"--price names {', '.join(unused)}, which no slice asked about is made of.")
    _check_plot(args.plot)
    return Question(
        model=args.model,
        slices=slices,
        tensor_parallel=args.tensor_parallel_size,
        engine={name: value for name in ENGINE_OPTIONS if (value := getattr(args, name)) is not None},
        prices=prices,
        batches=tuple(args.batch),
        contexts=tuple(args.context),
        times=not args.no_times,
        full_prefill=args.full_prefill,
        json=args.json,
        plot=args.plot,
    )
