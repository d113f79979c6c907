# SPDX-License-Identifier: Apache-2.0
"""Throughput of 32 requests that ask for everything against 32 plain ones: `python benchmarks/sampling.py`.

The demo model, 32 requests of 16 tokens in and 128 out, all at once. Plain ones are greedy, or draw at temperature 1; the others are a mixture of
penalties, seeds, logprobs, biases, allowed tokens, bad words, `min_tokens` and, in the last row, grammars too. Kinds take turns; a ratio is the
median over rounds of two neighbours in time, so that load which comes and goes on the machine touches both. "Engine" counts the time in vLLM's
engine core, scheduler and runner: its front end, which makes Python objects and text of each logprob, is a process of its own in a server and shares
this one here ("all").

The second table is the sampler alone, 32 rows at temperature 1: the one that can do everything beside one that can do nothing else, the quickest of
the calls. Greedy batches run a program that knows of no parameter. The demo model's step is 32 tokens at the throughput above.
"""

import argparse
import os
import random
import time
from statistics import median
from typing import Any

import common

BAR, SWITCHES_BAR = 0.85, 0.02
VOCABULARIES = (32_768, 131_072)
REQUESTS, PROMPT, TOKENS = 32, 16, 128


def mixed(i: int) -> dict[str, Any]:
    """What the i-th of the mixed requests asks for."""
    kinds: list[dict[str, Any]] = [
        dict(temperature=1.0, seed=i, presence_penalty=0.5, frequency_penalty=0.3),
        dict(temperature=0.8, seed=i, top_p=0.9, repetition_penalty=1.2),
        dict(temperature=0.0, logprobs=5, repetition_penalty=1.1),
        dict(temperature=1.0, seed=i, logprobs=0, logit_bias={300: 2.0, 301: -5.0}),
        dict(temperature=0.7, top_k=40, allowed_token_ids=list(range(100, 1200))),
        dict(temperature=1.0, min_p=0.05, bad_words=["fox", "there was", "a long time ago"]),
        dict(temperature=0.0, min_tokens=64, stop_token_ids=[17, 19]),
        dict(temperature=1.0, seed=i, logprob_token_ids=[5, 6, 7]),
    ]
    return kinds[i % len(kinds)]


def structured(i: int) -> dict[str, Any]:
    """The same, every fourth request under a grammar of its own."""
    from vllm.sampling_params import StructuredOutputsParams

    if i % 4:
        return mixed(i)
    return dict(temperature=1.0, seed=i, structured_outputs=StructuredOutputsParams(regex=f"[a-z{i % 10} ]*"))


KINDS = {
    "greedy": lambda i: dict(temperature=0.0),
    "temperature 1": lambda i: dict(temperature=1.0),
    "mixed": mixed,
    "mixed, with grammars": structured,
}


def cost_of_switches(vocab: int, calls: int = 400) -> tuple[float, float]:
    """Least microseconds of a batch at temperature 1: in the sampler that can do everything, and in one that can do nothing else."""
    import jax
    import jax.numpy as jnp

    from tpu_inference.layers.common.sampling import draw, sample
    from tpu_inference.layers.common.sampling_processors import RowParameters, TokenTables

    def of_rows(value: Any, dtype: Any) -> jax.Array:
        return jnp.full(REQUESTS, value, dtype)

    zeros, ones = of_rows(0, jnp.float32), of_rows(1, jnp.float32)
    index = jnp.arange(REQUESTS, dtype=jnp.int32)
    rows = RowParameters(
        slots=index, temperature=ones, top_p=ones, min_p=zeros, top_k=of_rows(vocab, jnp.int32), seed=index.astype(jnp.uint32), step=index,
        presence_penalty=zeros, frequency_penalty=zeros, repetition_penalty=ones, flags=of_rows(0, jnp.int32), forced_ids=of_rows(-1, jnp.int32),
    )  # fmt: skip
    tables = TokenTables(jnp.zeros((REQUESTS, vocab), jnp.int32), jnp.zeros((REQUESTS, vocab)))
    logits = jax.random.normal(jax.random.key(0), (REQUESTS, vocab))

    @jax.jit
    def only_draws(logits: jax.Array, rows: RowParameters) -> jax.Array:
        return draw(logits / rows.temperature[:, None], rows.seed, rows.step)

    everything = jax.jit(lambda logits, tables, rows: sample(logits, tables, rows)[0])
    functions = (lambda: everything(logits, tables, rows)), (lambda: only_draws(logits, rows))
    times: tuple[list[float], list[float]] = [], []
    for _ in range(calls):
        for function, found in zip(functions, times, strict=True):
            start = time.perf_counter()
            function().block_until_ready()
            found.append(1e6 * (time.perf_counter() - start))
    return min(times[0]), min(times[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    rounds = parser.parse_args().rounds
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    from vllm import LLM, SamplingParams

    from tpu_inference.demo import MODEL

    llm = LLM(
        MODEL, max_model_len=256, max_num_seqs=REQUESTS, max_num_batched_tokens=512, num_gpu_blocks_override=1024, enable_prefix_caching=False,
        additional_config={"background_compile": False},
    )  # fmt: skip

    core = llm.llm_engine.engine_core
    inside, get_output = [0.0], core.get_output

    def timed() -> Any:
        start = time.perf_counter()
        try:
            return get_output()
        finally:
            inside[0] += time.perf_counter() - start

    core.get_output = timed

    def rates(kind: str) -> tuple[float, float]:
        """Tokens a second of the engine, and of all."""
        prompts = [{"prompt_token_ids": [random.randrange(300, 1200) for _ in range(PROMPT)]} for _ in range(REQUESTS)]
        params = [SamplingParams(max_tokens=TOKENS, ignore_eos=True, **KINDS[kind](i)) for i in range(REQUESTS)]
        inside[0], start = 0.0, time.perf_counter()
        outputs = llm.generate(prompts, params, use_tqdm=False)
        count = sum(len(out.outputs[0].token_ids) for out in outputs)
        return count / inside[0], count / (time.perf_counter() - start)

    for kind in KINDS:  # once, to be rid of what happens only then
        rates(kind)
    found = [{kind: rates(kind) for kind in KINDS} for _ in range(rounds)]

    def ratio(kind: str, plain: str, part: int) -> float:
        return median(each[kind][part] / each[plain][part] for each in found)

    rows = []
    for kind in KINDS:
        of_drawn = ratio(kind, "temperature 1", 0)
        met = common.met(of_drawn, BAR, at_least=True) if kind == "mixed" else ""
        engine, everything = (median(each[kind][part] for each in found) for part in (0, 1))
        rows.append(
            (kind, engine, ratio(kind, "greedy", 0), of_drawn, met, everything, ratio(kind, "temperature 1", 1))
        )
    header = (
        "32 requests",
        "engine, tokens/s",
        "of greedy",
        "of temperature 1",
        f"bar {BAR} met",
        "all, tokens/s",
        "of temperature 1",
    )
    text = common.table(header, rows)
    step = 1e6 * REQUESTS / next(row[1] for row in rows if row[0] == "temperature 1")
    switches = []
    for vocab in (llm.model_config.get_vocab_size(), *VOCABULARIES):
        everything, alone = cost_of_switches(vocab)
        of_step = (everything - alone) / step if not switches else None
        met = "" if of_step is None else common.met(of_step, SWITCHES_BAR, at_least=False)
        switches.append((vocab, everything, alone, "" if of_step is None else f"{100 * of_step:.1f} %", met))
    names = (
        "vocabulary",
        "can do everything, us",
        "only draws, us",
        "more, of the demo model's step",
        f"bar {SWITCHES_BAR:.0%} met",
    )
    text += "\n\n" + common.table(names, switches)
    print(text)
    title = "# What sampling parameters cost"
    common.write("sampling.md", "\n\n".join((title, common.machine_line(), __doc__.split("\n\n", 1)[1].strip(), text)))


if __name__ == "__main__":
    main()
