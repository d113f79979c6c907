# SPDX-License-Identifier: Apache-2.0
"""Answers as text, as JSON, and ranked."""

from collections.abc import Sequence
from typing import Any

from tpu_inference.plan.answer import Answer, StepEstimate
from tpu_inference.plan.steps import KINDS

ABOUT_HBM = "HBM is what libtpu's compiler lets a program have; weights are taken to be all that is allocated beside the KV cache and temporaries."
ABOUT_TIMES = (
    "Times are estimates by the compiler's schedule, not measurements: nothing was calibrated on hardware, so compare, and do not quote as speeds.",
    "A range is from DMAs of 300 cycles, the published HBM bandwidth and ICI wholly behind other work, to 1000 cycles, 83 % and ICI after it.",
    "Left out: the host (scheduling, dispatch, HTTP), contention between DMAs and for VMEM banks, HBM pages, gaps between programs, and how "
    "busy the matrix unit is: work bound by it is 12-21 % slower on v5e and v6e, up to twice on tpu7x.",
)

GIB = 2**30


def assumptions(answers: Sequence[Answer]) -> tuple[str, ...]:
    """What the figures shown rest on, and leave out."""
    return (ABOUT_HBM, *(ABOUT_TIMES if any(each.steps for each in answers) else ()))


def cost_per_million(answer: Answer, prices: dict[str, float]) -> tuple[float, float] | None:
    """(least, most) dollars for a million tokens decoded at the best batch; None without a price or times."""
    price, best = prices.get(answer.slice.chip.name), answer.best_decode
    if price is None or best is None:
        return None
    per_second = price * answer.slice.num_chips / 3600
    slow, fast = best.tokens_per_s
    return per_second / fast * 1e6, per_second / slow * 1e6


def ranked(answers: Sequence[Answer]) -> list[Answer]:
    """Those that fit first, then by tokens a second, by the low end."""
    return sorted(
        answers,
        key=lambda a: (a.memory.fits, a.best_decode.tokens_per_s[0] if a.best_decode else 0.0, a.memory.margin),
        reverse=True,
    )


def _step_json(step: StepEstimate) -> dict[str, Any]:
    cost = step.cost
    return {
        "step": cost.load.name,
        "decoding_requests": cost.load.decodes,
        "prompt_tokens": cost.load.prompt,
        "context": cost.load.context,
        "bucket": cost.bucket,
        "schedule_us_by_kind": {kind: round(us, 1) for kind, us in cost.kinds.items()},
        "schedule_us": [round(cost.fast, 1), round(cost.slow, 1)],
        "sampling_us": round(step.sampling, 1),
        "sampling_is_lower_bound": step.sampling_is_floor,
        "ici_bytes": cost.ici.bytes,
        "ici_collectives": cost.ici.count,
        "ici_us": [round(cost.ici.fast, 1), round(cost.ici.slow, 1)],
        "step_us": [round(step.fast, 1), round(step.slow, 1)],
        "tokens_per_s": [round(rate) for rate in step.tokens_per_s],
        "not_followed": cost.unknown,
    }


def as_json(answer: Answer, prices: dict[str, float]) -> dict[str, Any]:
    """One slice, as JSON has it."""
    memory, settings, cost = answer.memory, answer.settings, cost_per_million(answer, prices)
    return {
        "model": answer.model,
        "slice": str(answer.slice),
        "chips": answer.slice.num_chips,
        "hosts": answer.slice.num_hosts,
        "devices": answer.slice.num_devices,
        **vars(settings),
        "fits": memory.fits,
        "why_not": memory.why_not or None,
        "margin_bytes": memory.margin,
        "hbm_bytes_per_device": {
            "limit": memory.device.limit,
            "weights": memory.device.weights,
            "kv_cache": memory.kv_cache,
            "temporaries": memory.device.temporaries,
            "free": memory.free,
            "sampling": answer.sampling,
        },
        "devices_per_chip": answer.slice.chip.devices,
        "kv_blocks": memory.num_blocks,
        "kv_tokens": memory.tokens,
        "requests_held": {str(length): count for length, count in memory.requests.items()},
        "programs": memory.num_programs,
        "compiled": [
            {"program": c.name, "seconds": round(c.seconds, 1), "needs_bytes": c.needs} for c in answer.compiled
        ],
        "steps": [_step_json(step) for step in answer.steps],
        "samplers_us": {c.name: [round(c.fast, 1), round(c.slow, 1)] for c in answer.samplers},
        "usd_per_million_tokens": [round(x, 4) for x in cost] if cost else None,
        "notes": list(memory.notes),
        "assumptions": list(assumptions([answer])),
    }


def _table(rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """Columns of a width; the first `left` flush left."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    cells = (
        [
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        for row in rows
    )
    return "\n".join("  " + "  ".join(row).rstrip() for row in cells)


def _range(low: float, high: float, digits: int = 0) -> str:
    return f"{low:,.{digits}f}-{high:,.{digits}f}"


def _us(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 else f"{value:.1f}"


def _memory_text(answer: Answer) -> str:
    memory = answer.memory
    if not memory.fits:
        return f"Does not fit. {memory.why_not}"
    device = memory.device
    rows = [
        ("weights", device.weights, ""),
        ("KV cache", memory.kv_cache, f"{memory.num_blocks} blocks of {memory.block_size} tokens"),
        ("temporaries", device.temporaries, "of the largest program, and the sampler's tables"),
        (
            "free",
            memory.free,
            f"kept back by gpu_memory_utilization={device.share}; sampling takes up to {answer.sampling / GIB:.2f} of it",
        ),
    ]
    lines = [
        f"  {name:<11}  {size / GIB:>7.2f} GiB  {100 * size / device.limit:>5.1f} %  {note}".rstrip()
        for name, size, note in rows
    ]
    held = ", ".join(f"{count:,} of {length:,} tokens" for length, count in memory.requests.items())
    return "\n".join(
        [
            f"Fits, with {memory.margin / GIB:.2f} GiB on each device beyond one request of {answer.settings.max_model_len:,} tokens.",
            "",
            f"HBM of a device, {device.limit / GIB:.2f} GiB for programs"
            + (" (two devices a chip)" if answer.slice.chip.devices == 2 else ""),
            *lines,
            f"Requests that the cache holds at once: {held}; a step runs up to {answer.settings.max_num_seqs}.",
        ]
    )


def _step_name(step: StepEstimate) -> str:
    load = step.cost.load
    names = {
        "decode": f"decode {load.decodes}",
        "prefill": f"prefill {load.prompt}",
        "mixed": f"{load.prompt} + {load.decodes} decodes",
    }
    return names[load.name]


def _steps_text(answer: Answer) -> str:
    if not answer.steps:
        return ""
    header = ("step", "context", *KINDS, "sampling", "schedule", "ICI", "step", "tokens/s")
    rows: list[tuple[str, ...]] = [header]
    for step in answer.steps:
        cost = step.cost
        kinds = [_us(cost.kinds[kind]) for kind in KINDS]
        sampling = ("≥" if step.sampling_is_floor else "") + _us(step.sampling)
        bound = "≥" if cost.unknown else ""
        slow, fast = step.tokens_per_s
        rows.append(
            (_step_name(step), f"{cost.load.context:,}", *kinds, sampling, bound + _range(cost.fast, cost.slow),
             _range(cost.ici.fast, cost.ici.slow), bound + _range(step.fast, step.slow), _range(slow, fast))
        )  # fmt: skip
    text = (
        "A step, in microseconds (kinds at the fast end), with greedy sampling; tokens of all requests together\n"
        + _table(rows)
    )
    for sampler in answer.samplers:
        if "greedy" not in sampler.name:
            least = "at least " if sampler.floor else ""
            took = f"{least}{_range(sampler.fast, sampler.slow)}"
            text += f"\n  With temperature, top-k, top-p or min-p instead, {sampler.name} takes {took}."
    return text


def as_text(answer: Answer, prices: dict[str, float]) -> str:
    """One slice, for people."""
    s, compiled = answer.settings, answer.compiled
    parts = [
        f"{answer.model} on {answer.slice}: {s.dtype}, tensor parallel {s.tensor_parallel}, max_model_len {s.max_model_len:,}, "
        f"max_num_seqs {s.max_num_seqs}, max_num_batched_tokens {s.max_num_batched_tokens}, block_size {s.block_size}",
        _memory_text(answer),
        _steps_text(answer),
    ]
    if cost := cost_per_million(answer, prices):
        parts.append(f"Decoding, a million tokens: ${_range(*cost, digits=3)} at the best batch above.")
    if compiled:
        listed = ", ".join(f"{c.name} {c.seconds:.0f} s" for c in compiled)
        of = f" of {answer.memory.num_programs}" if answer.memory.num_programs else ""
        parts.append(f"Compiled here, {len(compiled)}{of} programs: {listed}.")
    parts += [note for note in answer.memory.notes]
    return "\n\n".join(part for part in parts if part)


def comparison(answers: Sequence[Answer], prices: dict[str, float]) -> str:
    """The slices in order of merit, a line each."""
    rows = [
        (
            "slice",
            "chips",
            "TP",
            "fits",
            "spare GiB",
            "requests held",
            "best decode",
            "tokens/s",
            "tokens/s a chip",
            "$/M tokens",
        )
    ]
    for answer in answers:
        best, cost, memory = answer.best_decode, cost_per_million(answer, prices), answer.memory
        longest = list(memory.requests.items())[-1:]
        held = f"{longest[0][1]:,} x {longest[0][0]:,}" if longest else "-"
        speed = per_chip = decode = "-"
        if memory.fits and best:
            slow, fast = best.tokens_per_s
            speed, per_chip = _range(slow, fast), _range(slow / answer.slice.num_chips, fast / answer.slice.num_chips)
            decode = f"{best.cost.load.decodes} at {best.cost.load.context:,}"
        rows.append(
            (str(answer.slice), str(answer.slice.num_chips), str(answer.settings.tensor_parallel), "yes" if memory.fits else "no",
             f"{memory.margin / GIB:.2f}", held, decode, speed, per_chip, _range(*cost, digits=3) if cost and memory.fits else "-")
        )  # fmt: skip
    return _table(rows)
