# SPDX-License-Identifier: Apache-2.0
"""Which shapes are compiled: a step runs in the smallest bucket that holds it."""

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

from tpu_inference.errors import TpuInferenceError

# Powers of four on the CPU backend: a compile there costs seconds and small shapes are bound by reading the weights, so a padded row
# is nearly free. Powers of two from 16 on TPU: a padded row costs its share of the MXU, and warm-up is cached between starts.
CPU_FIRST_TOKENS, CPU_GROWTH = 1, 4
TPU_FIRST_TOKENS, TPU_GROWTH = 16, 2
ROW_GROWTH = 4
"""Of request rows, on either: a padded row costs its logits only, and each row count has sampling programs of its own."""
PREFILL_ROWS = 8
"""Request rows of the buckets for steps of few requests with many tokens, so that they do not pay for logits of `max_num_seqs` rows."""
SHORT_PROMPT = 64
"""Tokens of the bucket that a server's first request, or its first few dozen decoding ones, will want."""


@dataclass(frozen=True, order=True)
class Bucket:
    """A compiled shape: `tokens` of `rows` requests."""

    tokens: int
    rows: int

    def __str__(self) -> str:
        return f"{self.tokens}x{self.rows}"


def geometric(first: int, growth: int, last: int) -> tuple[int, ...]:
    """first, first*growth, ... below `last`, then `last` itself."""
    sizes = []
    size = first
    while size < last:
        sizes.append(size)
        size *= growth
    return (*sizes, last)


@dataclass(frozen=True)
class BucketPlan:
    """All buckets of a server, for batches of up to `max_tokens` tokens of up to `max_rows` requests."""

    token_sizes: tuple[int, ...]
    row_steps: tuple[int, ...]
    """Row counts to choose from, besides PREFILL_ROWS; the last is the largest batch."""

    @classmethod
    def build(
        cls, max_tokens: int, max_rows: int, *, on_tpu: bool, token_sizes: Sequence[int] | None = None
    ) -> "BucketPlan":
        """The default plan for the backend, or the user's `token_sizes`, which must be increasing and end at `max_tokens`."""
        max_rows = min(max_rows, max_tokens)
        first, growth = (TPU_FIRST_TOKENS, TPU_GROWTH) if on_tpu else (CPU_FIRST_TOKENS, CPU_GROWTH)
        if token_sizes is None:
            token_sizes = geometric(min(first, max_tokens), growth, max_tokens)
        sizes = tuple(token_sizes)
        if not sizes or list(sizes) != sorted(set(sizes)) or sizes[0] < 1 or sizes[-1] != max_tokens:
            raise TpuInferenceError(
                f"token_buckets={list(sizes)} must be increasing, positive, and end at "
                f"max_num_batched_tokens={max_tokens}, so that every batch fits and none overruns the budget."
            )
        return cls(sizes, geometric(min(first, max_rows), ROW_GROWTH, max_rows))

    @property
    def max_rows(self) -> int:
        """Requests of the largest batch."""
        return self.row_steps[-1]

    def rows_of(self, tokens: int) -> tuple[int, ...]:
        """Row counts compiled for a token size, increasing."""
        most = min(tokens, self.max_rows)
        most = next(rows for rows in self.row_steps if rows >= most)
        return (PREFILL_ROWS, most) if tokens > PREFILL_ROWS and most > PREFILL_ROWS else (most,)

    @cached_property
    def buckets(self) -> tuple[Bucket, ...]:
        """Every (tokens, rows) shape of the forward program, increasing."""
        return tuple(Bucket(t, r) for t in self.token_sizes for r in self.rows_of(t))

    @property
    def row_sizes(self) -> tuple[int, ...]:
        """Every row count of the sampler's programs."""
        return tuple(sorted({bucket.rows for bucket in self.buckets}))

    @property
    def first_needed(self) -> tuple[Bucket, ...]:
        """Enough to serve any batch, and the commonest ones well: the largest, the smallest, and those of a short prompt."""
        short = self.token_sizes[min(bisect_left(self.token_sizes, SHORT_PROMPT), len(self.token_sizes) - 1)]
        return tuple(b for b in self.buckets if b in (self.buckets[-1], self.buckets[0]) or b.tokens == short)

    def pick(self, num_tokens: int, num_rows: int, is_ready: Callable[[Bucket], bool] = lambda _: True) -> Bucket:
        """The smallest bucket for a batch that `is_ready`; ValueError for a batch over the budget."""
        for bucket in self.buckets:
            if bucket.tokens >= num_tokens and bucket.rows >= num_rows and is_ready(bucket):
                return bucket
        raise ValueError(
            f"a batch of {num_tokens} tokens of {num_rows} requests is over the budget of "
            f"{self.token_sizes[-1]} tokens of {self.max_rows} requests"
        )
