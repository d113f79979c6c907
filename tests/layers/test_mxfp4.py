# SPDX-License-Identifier: Apache-2.0
"""MXFP4 against transformers' reading of it, and rows of float8 against both."""

import numpy as np
import torch

from tpu_inference.layers.common.mxfp4 import Mxfp4RowsSource, dequantize

EXPERTS, ROWS, GROUPS = 2, 5, 4


def stored():
    rng = np.random.default_rng(0)
    blocks = rng.integers(0, 256, (EXPERTS, ROWS, GROUPS, 16), dtype=np.uint8)
    return blocks, rng.integers(110, 140, (EXPERTS, ROWS, GROUPS), dtype=np.uint8)


def test_as_transformers_reads_it():
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    blocks, scales = stored()
    # [E, in, out], which is the other way round.
    expected = convert_moe_packed_tensors(torch.tensor(blocks), torch.tensor(scales), dtype=torch.float32)
    for expert in range(EXPERTS):
        np.testing.assert_array_equal(dequantize(blocks[expert], scales[expert]), expected[expert].T.numpy())


def test_rows_of_float8_are_the_same_numbers():
    blocks, scales = stored()
    scales = 120 + scales % 15  # no more than 14 powers of two apart
    source = Mxfp4RowsSource.of_experts("w", EXPERTS, ROWS, GROUPS * 32)
    tensors = {"w_blocks": blocks, "w_scales": scales}
    assert {s.name: s.shape for s in (source, source.row_scales)} == {n: t.shape for n, t in tensors.items()}
    for expert in range(EXPERTS):

        def read(name, index, expert=expert):
            return tensors[name][(expert, *index)]

        every = dequantize(blocks[expert], scales[expert])
        for box in ((slice(0, ROWS), slice(0, GROUPS * 32)), (slice(1, 4), slice(40, 90))):
            values = source.read(read, "w_blocks", box)
            factors = source.row_scales.read(read, "w_scales", (box[0], slice(0, 1)))
            assert values.dtype == "float8_e4m3fn" and factors.shape == (len(values), 1)
            np.testing.assert_array_equal(values.astype(np.float32) * factors, every[box])


def test_what_a_row_of_float8_leaves_out():
    """Of a group whose scale is further below the greatest of its row than e4m3 reaches."""
    blocks, scales = np.tile(np.arange(16, dtype=np.uint8) * 17, (1, 2, 1)), np.array([[140, 118]], np.uint8)
    tensors = {"w_blocks": blocks, "w_scales": scales}
    source = Mxfp4RowsSource.of_experts("w", 1, 1, 64)
    values = source.read(lambda name, index: tensors[name][index], "w_blocks", (slice(0, 1), slice(0, 64)))
    factors = source.row_scales.read(lambda name, index: tensors[name][index], "w_scales", (slice(0, 1), slice(0, 1)))
    meant, found = dequantize(blocks, scales)[0], (values.astype(np.float32) * factors)[0]
    np.testing.assert_array_equal(found[:32], meant[:32])
    assert 0 < np.abs(found[32:] - meant[32:]).max() < np.abs(meant).max() * 2**-14
