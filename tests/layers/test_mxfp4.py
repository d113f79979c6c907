# SPDX-License-Identifier: Apache-2.0
"""MXFP4 against transformers' reading of it, and parts of a tensor against the whole."""

import numpy as np
import torch

from tpu_inference.layers.common.mxfp4 import Mxfp4Source, dequantize

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


def test_a_part_of_it_reads_its_groups_alone():
    blocks, scales = stored()
    source, asked = Mxfp4Source.of_experts("w", EXPERTS, ROWS, GROUPS * 32), []
    assert {s.name: s.shape for s in (source, *source.beside)} == {
        "w_blocks": blocks.shape,
        "w_scales": scales.shape,
    }

    def read(name, index):
        asked.append(index)
        return {"w_blocks": blocks, "w_scales": scales}[name][(1, *index)]

    found = source.read(read, source.name, (slice(1, 4), slice(40, 90)))
    np.testing.assert_array_equal(found, dequantize(blocks[1], scales[1])[1:4, 40:90])
    assert asked == [(slice(1, 4), slice(1, 3))] * 2
