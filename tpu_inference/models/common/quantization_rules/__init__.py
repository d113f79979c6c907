# SPDX-License-Identifier: Apache-2.0
"""Rules by which the weights of an unquantized checkpoint are rounded as they are loaded: a YAML list, of which the first that fits a layer counts.

Keys are those of qwix's rules, as far as they are served: `module_path`, a regular expression of the layer's whole name in the checkpoint;
`weight_qtype`, "int8", "int4" (not of experts) or "float8_e4m3fn", or null for layers that stay as they are; `act_qtype`, the same type or null, but
not "int4"; `tile_size`, columns of a row that share a scale, or null for all of them.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tpu_inference.errors import ConfigError
from tpu_inference.kernels.quantized_matmul import ACTIVATIONS
from tpu_inference.layers.common.quantization import GREATEST, LEAST_PART, Scheme

READY_MADE = Path(__file__).parent
_KEYS = ("module_path", "weight_qtype", "act_qtype", "tile_size")
_EXPERT = re.compile(r"\.experts\.\d+\.")


@dataclass(frozen=True)
class Rule:
    """What is done to the layers whose whole name `module_path` matches."""

    module_path: re.Pattern[str]
    scheme: Scheme | None


class Rules:
    """What a layer of a name becomes."""

    def __init__(self, rules: tuple[Rule, ...], where: str) -> None:
        self._rules, self._where = rules, where
        self._matched = False

    def __call__(self, layer: str) -> Scheme | None:
        """The scheme of the first rule that fits; None where none does. Raises ConfigError for rounded activations of experts, and int4 weights."""
        scheme = next((rule.scheme for rule in self._rules if rule.module_path.fullmatch(layer)), None)
        if scheme and scheme.dtype == "int4" and _EXPERT.search(layer):
            raise ConfigError(
                f"{self._where}: {layer} would have int4 weights, which experts are not served with: "
                "give experts a rule of their own, before this one, with weight_qtype: int8."
            )
        if scheme and scheme.activations and _EXPERT.search(layer):
            raise ConfigError(
                f"{self._where}: {layer} would have {scheme.activations} activations, and those of experts are not rounded: "
                "give experts a rule of their own, before this one and without act_qtype."
            )
        self._matched |= scheme is not None
        return scheme

    def refuse_if_without_effect(self) -> None:
        """Raises ConfigError where no layer that was asked about is quantized."""
        if not self._matched:
            raise ConfigError(f"{self._where}: no rule that quantizes fits the name of any layer of this model.")


def read_rules(name: str) -> Rules:
    """The rules of a ready-made file, by its name without .yaml, or of a file of the user's, by its path.

    Raises:
        ConfigError: there is no such file, or everything in it that is not served.
    """
    ready = READY_MADE / f"{name}.yaml"
    path = ready if re.fullmatch(r"\w+", name) and ready.exists() else Path(name)
    try:
        text = path.read_text()
    except OSError as error:
        known = ", ".join(sorted(file.stem for file in READY_MADE.glob("*.yaml")))
        raise ConfigError(
            f"additional_config quantization={name!r} is neither a file that can be read ({error.strerror}) nor one of {known}."
        ) from None
    return Rules(_parsed(text, str(path)), str(path))


def _parsed(text: str, where: str) -> tuple[Rule, ...]:
    import yaml

    try:
        found = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{where} is no YAML: {error}") from None
    if not isinstance(found, list) or not found or not all(isinstance(rule, dict) for rule in found):
        raise ConfigError(f"{where} must be a list of rules, each with {', '.join(_KEYS)}.")
    problems = [f"rule {i + 1}: {problem}" for i, rule in enumerate(found) for problem in _problems(rule)]
    if problems:
        raise ConfigError(f"{where} is not served: " + "; ".join(problems) + ".")
    return tuple(Rule(re.compile(rule["module_path"]), _scheme(rule)) for rule in found)


def _problems(rule: dict[Any, Any]) -> list[str]:
    weights, activations, tile = (rule.get(key) for key in ("weight_qtype", "act_qtype", "tile_size"))
    problems = [f"{key} is not known (known are {', '.join(_KEYS)})" for key in rule if key not in _KEYS]
    try:
        re.compile(rule.get("module_path") or "(")
    except (re.error, TypeError):
        problems.append(f"module_path={rule.get('module_path')!r} is no regular expression")
    if weights is not None and weights not in GREATEST:
        problems.append(f"weight_qtype={weights!r} is none of {', '.join(GREATEST)}")
    if activations not in ACTIVATIONS:
        rounded = ", ".join(name for name in ACTIVATIONS if name)
        problems.append(f"act_qtype={activations!r} is none of {rounded}, which activations are rounded to")
    elif activations and weights != activations:
        problems.append(f"act_qtype: {activations} needs weight_qtype: {activations}")
    if tile is not None and (type(tile) is not int or tile < LEAST_PART or tile % LEAST_PART):
        problems.append(f"tile_size={tile!r} is no multiple of {LEAST_PART}")
    elif tile and activations:
        problems.append("tile_size is of weights alone: remove act_qtype")
    return problems


def _scheme(rule: dict[str, Any]) -> Scheme | None:
    weights = rule.get("weight_qtype")
    return (
        None
        if weights is None
        else Scheme(weights, (1, rule.get("tile_size")), at_load=True, activations=rule.get("act_qtype"))
    )
