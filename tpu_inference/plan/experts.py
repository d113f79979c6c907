# SPDX-License-Identifier: Apache-2.0
"""What the kernel of experts is given in a step. Only the device knows where tokens go: here they choose at random."""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from tpu_inference.kernels.grouped_matmul.pallas import NAME
from tpu_inference.kernels.grouped_matmul.shapes import random_group_sizes
from tpu_inference.kernels.grouped_matmul.units import Units, units
from tpu_inference.tools.schedule.hlo import Module, Operation, base_name


def expert_scalars(module: Module, tokens: int, top_k: int, num_experts: int) -> dict[str, Mapping[int, Any]]:
    """Values of the scalar-prefetch arguments of each call of the kernel, by operation, as the first of the devices would have them.

    Args:
        tokens: of the program, those that pad a step among them: they go to experts as the others do.
        num_experts: of a layer, on all devices; 0 where the model has none.
    """
    calls = (x for x in module.operations.values() if x.kind == "kernel" and base_name(x.name) == NAME)
    found: dict[str, Mapping[int, Any]] = {}
    for call in calls if num_experts else ():
        local, num_blocks, block_rows = _blocking(module, call)
        sizes = random_group_sizes(tokens, top_k, num_experts, local)
        found[call.name] = dict(enumerate(units(sizes, num_blocks, block_rows, np)))
    return found


def _blocking(module: Module, call: Operation) -> tuple[int, int, int]:
    """(experts of the device, blocks of rows, rows of a block), from the shapes of what a call is given."""
    lengths = [int(re.findall(r"\d+", module.operations[x].type.partition("[")[2])[0]) for x in call.operands]
    arguments = Units(*lengths[: len(Units._fields)])
    local = arguments.item_groups
    num_blocks = arguments.groups - local + 1  # as in `num_units`
    return local, num_blocks, lengths[len(Units._fields)] // num_blocks
