# SPDX-License-Identifier: Apache-2.0
"""Bitmasks over the vocabulary, a row a request: what a grammar allows, and the bad words that the text so far would complete."""

from collections.abc import Iterable

import numpy as np
from vllm.v1.core.sched.output import GrammarOutput

from tpu_inference.runner.input_batch import InputBatch

ALL = -1
"""A word of a bitmask that allows every token."""


def grammar_rows(grammar: GrammarOutput, batch: InputBatch, rows: int, words: int) -> np.ndarray:
    """The scheduler's bitmask in the batch's own order: int32 [rows, words], a copy, since vLLM reuses the memory behind it.

    Its rows come in the order of `structured_output_request_ids`; rows of other requests, and padding, allow everything. What is beyond
    the grammar's vocabulary is not allowed.
    """
    bitmask = grammar.grammar_bitmask
    width = min(words, bitmask.shape[1])
    out = np.full((rows, words), ALL, np.int32)
    row_of = {req_id: row for row, req_id in enumerate(batch.req_ids)}
    for i, req_id in enumerate(grammar.structured_output_request_ids):
        row = row_of[req_id]
        out[row, :width] = bitmask[i, :width]
        out[row, width:] = 0
    return out


def completed_words(outputs: list[int], words: Iterable[list[int]]) -> list[int]:
    """Last tokens of the `words` (of several tokens) that they would complete after `outputs`."""
    return [word[-1] for word in words if len(word) > 1 and outputs[-(len(word) - 1) :] == word[:-1]]


def bad_word_rows(banned: dict[int, list[int]], rows: int, words: int, vocab_size: int) -> np.ndarray | None:
    """A bitmask without the tokens that are `banned` in each row: int32 [rows, words], or None where nothing is."""
    if not any(banned.values()):
        return None
    out = np.full((rows, words), ALL, np.int32)
    bits = out.view(np.uint32)
    for row, tokens in banned.items():
        for token in tokens:
            if 0 <= token < vocab_size:
                bits[row, token >> 5] &= ~np.uint32(1 << (token & 31))
    return out
