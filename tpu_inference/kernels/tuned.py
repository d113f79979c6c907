# SPDX-License-Identifier: Apache-2.0
"""Block sizes that a search found better than an op's heuristic; `python -m tpu_inference.tools.tune` writes them."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from importlib import resources
from typing import Any


@cache
def table(op: str, chip: str) -> Mapping[str, Mapping[str, Any]]:
    """Shape key -> part of the op -> entry, from `kernels/<op>/tuned/<chip>.json`; empty where there is none."""
    path = resources.files("tpu_inference.kernels") / op / "tuned" / f"{chip}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def lookup(op: str, chip: str | None, key: str, part: str) -> Mapping[str, Any] | None:
    """Fields of the part's config for a shape; None where the heuristic is to be asked."""
    entry = table(op, chip).get(key, {}).get(part) if chip else None
    return entry and entry["config"]


def with_tuned(config: Any, op: str, chip: str | None, key: str, parts: Sequence[str]) -> Any:
    """The config of an op of several kernels, with the fields that the table has of each: `parts` are names of fields, of a config each."""
    found = {part: lookup(op, chip, key, part) for part in parts}
    return replace(config, **{part: replace(getattr(config, part), **new) for part, new in found.items() if new})
