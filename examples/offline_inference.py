# SPDX-License-Identifier: Apache-2.0
"""Complete some prompts with vLLM's `LLM`, without a server.

    python examples/offline_inference.py                      # by the JAX class of the demo's architecture
    python examples/offline_inference.py --model-impl vllm    # by vLLM's PyTorch class of it, lowered by torchax
    python examples/offline_inference.py --model meta-llama/Llama-3.1-8B-Instruct --tensor-parallel-size 4 --max-model-len 4096

Takes every flag of `vllm serve` that concerns the engine; the model is the demo checkpoint unless `--model` names another.
"""

from vllm import LLM, EngineArgs, SamplingParams
from vllm.utils.argparse_utils import FlexibleArgumentParser

from tpu_inference.demo import MODEL

PROMPTS = ["Once upon a time", "The fox lives in", "On Monday morning"]


def parse_args():
    parser = FlexibleArgumentParser(description="Complete some prompts with vLLM's LLM class.")
    EngineArgs.add_cli_args(parser)
    parser.set_defaults(model=MODEL, max_num_seqs=8, max_num_batched_tokens=512)
    sampling = parser.add_argument_group("sampling")
    sampling.add_argument("--prompt", action="append", help="a text to continue; may be given several times")
    sampling.add_argument("--max-tokens", type=int, default=48)
    sampling.add_argument("--temperature", type=float, default=0.0)
    sampling.add_argument("--top-p", type=float, default=1.0)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    params = SamplingParams(max_tokens=args.max_tokens, temperature=args.temperature, top_p=args.top_p)
    llm = LLM.from_engine_args(EngineArgs.from_cli_args(args))
    for output in llm.generate(args.prompt or PROMPTS, params):
        print(f"\n{output.prompt!r}\n  -> {output.outputs[0].text!r}")


# The engine runs in a process of its own, which imports this file: it must not start another.
if __name__ == "__main__":
    main()
