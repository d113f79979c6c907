# SPDX-License-Identifier: Apache-2.0
"""Serve the demo checkpoint in this process and stream one completion."""

import argparse
import asyncio
import time

from tpu_inference.demo import MODEL


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=MODEL, help="checkpoint directory (default: the demo model)")
    parser.add_argument("--prompt", default="Once upon a time", help="text to continue")
    parser.add_argument("--max-tokens", type=int, default=120)
    parser.add_argument("--temperature", type=float, default=0.0)
    return parser.parse_args()


async def stream(args: argparse.Namespace) -> None:
    """Print the completion as it comes, then how fast it came."""
    from vllm import SamplingParams
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.sampling_params import RequestOutputKind
    from vllm.v1.engine.async_llm import AsyncLLM

    engine = AsyncLLM.from_engine_args(AsyncEngineArgs(model=args.model, max_num_seqs=8, max_num_batched_tokens=512))
    params = SamplingParams(
        temperature=args.temperature, max_tokens=args.max_tokens, output_kind=RequestOutputKind.DELTA
    )
    try:
        print(f"\n{args.prompt}", end="", flush=True)
        start, first, count = time.monotonic(), None, 0
        async for output in engine.generate(args.prompt, params, request_id="demo"):
            first = first or time.monotonic()
            count += len(output.outputs[0].token_ids)
            print(output.outputs[0].text, end="", flush=True)
        end = time.monotonic()
        rate = (count - 1) / (end - first) if first and count > 1 else 0.0
        print(f"\n\n{count} tokens, the first after {first - start:.3f} s, then {rate:.0f} tokens/s")
    finally:
        engine.shutdown()
        # Some import in here keeps this frame, and the engine's `__del__` would find an interpreter that is half gone.
        del engine


if __name__ == "__main__":
    asyncio.run(stream(parse_args()))
