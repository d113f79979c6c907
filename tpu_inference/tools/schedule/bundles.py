# SPDX-License-Identifier: Apache-2.0
"""Reads libtpu's text of an operation's final VLIW bundles: the scalar instructions of each, its loop depth, where branches lead.

Vector instructions are dropped: nothing but the bundle that they are in matters to the emulator.
"""

import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from tpu_inference.tools.schedule.arithmetic import WORD, Value, function_of, invert

_HEADER = re.compile(r"^ *(?:0x[0-9a-f]+|[0-9]+) +(?P<tag>[A-Z]{2})? *: *(?P<depth>(?:> ?)*)\{", re.M)
_COMMENT = re.compile(r"/\*(.*?)\*/", re.S)
_REGION = re.compile(r"Start(?:/End empty)? region (\d+)")
_DIVISION = re.compile(r"/\* k(\w*Rem|Div\w*|Quot\w*) \*/")
_INSTRUCTION = re.compile(r"(%[\w.]+) = ([\w.]+)(.*)$", re.S)
_PREDICATE = re.compile(r"\((!?%p\w*)(?:, *([^)]*))?\)(?:, *| *)(.*)$", re.S)
_HINT = re.compile(r"^\[(?:thread|resolvable):[^\]]*\] *")
_NUMBER = re.compile(r"\$?(-?(?:0x[0-9a-f]+|\d+))$")
_ADDRESS = re.compile(r"\[(#?\w+)(?: *\+ *([^\]]+))?\]")
_SMEM = re.compile(r"\[smem:\[(.*?)\]\]")
_PARAMETER = re.compile(
    r"inlined_call_operand\.(?P<space>[^\[]*?) *\[shape: (?P<shape>[^,{]*(?:\[[\d,]*\])?), index: (?P<index>\d+)"
)

Operand = Callable[[Any], Value]
"""What an operand is worth, asked of an emulator (`values`, `base_of`)."""
_NO_EFFECT = ("shalt",)
_ADDRESS_STEPS = ("int_to_ptr", "sshll", "smov")
"""Through which a parameter's address goes before a DMA uses it."""


def _no_value(*_: Any) -> Value:
    return None


@dataclass(frozen=True, slots=True)
class Instruction:
    """One scalar instruction; `kind` names the emulator's method."""

    kind: str
    predicate: Operand | None = None
    target: str = ""
    register: str = ""
    """The physical register of `target`."""
    otherwise: Operand | None = None
    """The target's value where the predicate is false; None: the register keeps its own."""
    function: Callable[..., Value] = _no_value
    operands: tuple[Operand, ...] = ()
    name: str = ""
    region: int = -1
    parameter: int = -1
    """Of the operation, that this instruction brings into SMEM, or is; -1 for none."""


def _operand(text: str) -> Operand:
    text = text.strip()
    if text.startswith("!"):
        return lambda emulator: invert(emulator.values.get(text[1:]))
    if text.startswith("%"):
        name = text.split()[0]
        return lambda emulator: emulator.values.get(name)
    if match := _ADDRESS.match(text):
        return _symbol(match[1], _operand(match[2]) if match[2] else None)
    if match := _NUMBER.match(text.split()[0] if text else ""):
        value = int(match[1], 0) & WORD
        return lambda _: value
    return _no_value


def _sum(left: Operand, right: Operand) -> Operand:
    def evaluate(emulator: Any) -> Value:
        a, b = left(emulator), right(emulator)
        return None if a is None or b is None else (a + b) & WORD

    return evaluate


def _symbol(name: str, offset: Operand | None) -> Operand:
    if offset is None:
        return lambda emulator: emulator.base_of(name)
    return _sum(lambda emulator: emulator.base_of(name), offset)


def _smem_address(inside: str) -> Operand:
    """Of "#allocation11 + %s5_s3" or "%s5_s3 + $0x1"."""
    first, _, offset = (part.strip() for part in inside.partition("+"))
    if first.startswith("%"):
        return _sum(_operand(first), _operand(offset)) if offset else _operand(first)
    return _symbol(first, _operand(offset) if offset else None)


def _split(text: str) -> list[str]:
    """At commas outside of brackets."""
    parts, depth, start = [], 0, 0
    for i, char in enumerate(text):
        depth += (char in "[(") - (char in ")]")
        if char == "," and depth == 0:
            parts.append(text[start:i])
            start = i + 1
    return [*parts, text[start:]] if text[start:].strip() else parts


def _operands(text: str) -> tuple[Operand, ...]:
    return tuple(_operand(part) for part in _split(text))


class _Decoder:
    """Decodes instructions one by one, and remembers what addresses the parameters have."""

    def __init__(self) -> None:
        self.parameters: dict[str, int] = {}
        self.in_hbm: set[str] = set()
        """Addresses in HBM."""
        self.not_decoded: Counter[str] = Counter()

    def decode(self, text: str) -> Instruction | None:
        """None for what has no effect on the scalar program."""
        match = _INSTRUCTION.match(text)
        if match is None:
            return None
        target, name, rest = match[1], match[2], _HINT.sub("", match[3].strip())
        predicate = otherwise = None
        if guard := _PREDICATE.match(rest):
            predicate = _operand(guard[1])
            otherwise = _operand(guard[2]) if guard[2] else None
            rest = guard[3].strip()
        base = name.split(".")[0]
        if base in _NO_EFFECT:
            return None
        decode = _DECODERS.get(base, _Decoder._computation)
        return decode(self, name, rest, dict(predicate=predicate, target=target, otherwise=otherwise,
                                             register=target.split("_")[-1]))  # fmt: skip

    def _branch(self, name: str, rest: str, fields: dict) -> Instruction:
        match = re.search(r"\$region(\d+)", rest)
        return Instruction("branch", fields["predicate"], region=int(match[1]) if match else -1)

    def _phi(self, name: str, rest: str, fields: dict) -> Instruction:
        return Instruction("phi", **fields)

    def _dma(self, name: str, rest: str, fields: dict) -> Instruction:
        kind = "wait" if name.startswith("dma.done") else "copy"
        parts = _split(rest)
        parameter = self.parameters.get(parts[0].split()[0], -1) if name.endswith("to_smem") else -1
        way = name.removeprefix("dma.")
        if way == "general":  # which memories these are, their addresses say
            way = "_to_".join("hbm" if parts[i].strip() in self.in_hbm else "local" for i in (0, 2))
        return Instruction(
            kind, fields["predicate"], name=way, operands=tuple(map(_operand, parts)), parameter=parameter
        )

    def _sync(self, name: str, rest: str, fields: dict) -> Instruction | None:
        adds = name.startswith("vsyncadd") and "remote" not in name
        return Instruction("signal", fields["predicate"], operands=_operands(rest)) if adds else None

    def _delay(self, name: str, rest: str, fields: dict) -> Instruction:
        return Instruction("delay", operands=(_operand(rest or "1"),))

    def _store(self, name: str, rest: str, fields: dict) -> Instruction | None:
        match = re.match(_SMEM.pattern + r" *(.*)$", rest)
        if match is None:
            return None
        predicate, value = fields["predicate"], match[2]
        if guard := re.match(r"\((!?%p\w*)[^)]*\),? *(.*)$", value):
            predicate, value = _operand(guard[1]), guard[2]
        return Instruction("store", predicate, operands=(_smem_address(match[1]), _operand(value)))

    def _load(self, name: str, rest: str, fields: dict) -> Instruction | None:
        match = _SMEM.match(rest)
        if match is None:
            return self._unknown(fields)
        return Instruction("load", operands=(_smem_address(match[1]),), **fields)

    def _division(self, name: str, rest: str, fields: dict) -> Instruction:
        return Instruction("compute", function=function_of(name) or _no_value, operands=_operands(rest), **fields)

    def _pop(self, name: str, rest: str, fields: dict) -> Instruction | None:
        if name == "spop.drf":
            return Instruction("pop", operands=(_operand(rest),), **fields)
        return self._computation(name, rest, fields)

    def _parameter(self, name: str, rest: str, fields: dict) -> Instruction | None:
        if match := _PARAMETER.match(name + rest):
            index = int(match["index"])
            self.parameters[fields["target"]] = index
            if match["space"] == "hbm":
                self.in_hbm.add(fields["target"])
            if "no memory space" in match["space"]:  # the value itself
                return Instruction("parameter", parameter=index, **fields)
        return self._unknown(fields)

    def _computation(self, name: str, rest: str, fields: dict) -> Instruction | None:
        """Any other instruction: of interest where it writes a scalar register or a predicate."""
        if not re.match(r"%[sp]\d", fields["target"]):
            return None
        if name.endswith(".hbm"):
            self.in_hbm.add(fields["target"])
        function = function_of(name)
        if function is None:
            if not name.startswith("scmp"):  # of floats: not followed, like all floats
                self.not_decoded[name] += 1
            return self._unknown(fields)
        parts = _split(rest)
        if name.split(".")[0] in _ADDRESS_STEPS and (source := parts[0].split()[0]) in self.parameters:
            self.parameters[fields["target"]] = self.parameters[source]
        return Instruction("compute", function=function, operands=tuple(map(_operand, parts)), **fields)

    def _unknown(self, fields: dict) -> Instruction | None:
        if not re.match(r"%[sp]\d", fields["target"]):
            return None
        return Instruction("compute", **fields)


_DECODERS: Mapping[str, Callable[..., Instruction | None]] = {
    "sbr": _Decoder._branch,
    "sphi": _Decoder._phi,
    "pphi": _Decoder._phi,
    "dma": _Decoder._dma,
    **dict.fromkeys(("vsyncadd", "vsyncset", "vsyncpa", "vsyncmov"), _Decoder._sync),
    **dict.fromkeys(("vdelay", "sdelay", "delay", "snop", "vnop"), _Decoder._delay),
    "vwait": lambda *_: None,
    "sst": _Decoder._store,
    "sld": _Decoder._load,
    "sdivrem": _Decoder._division,
    "spop": _Decoder._pop,
    "inlined_call_operand": _Decoder._parameter,
    "reloc": lambda decoder, name, rest, fields: decoder._unknown(fields),
}


@dataclass(frozen=True)
class Program:
    """An operation's schedule."""

    bundles: tuple[tuple[Instruction, ...], ...]
    depth: tuple[int, ...]
    """Loops around each bundle."""
    tags: tuple[str, ...]
    """"LB" where a loop's body begins, or other marks of libtpu's, or ""."""
    regions: Mapping[int, int]
    """Region -> its first bundle."""
    not_decoded: Counter[str] = field(default_factory=Counter)
    """Instructions that write scalars and are not understood; what they write is not known."""

    @classmethod
    def parse(cls, text: str) -> "Program":
        decoder, headers = _Decoder(), list(_HEADER.finditer(text))
        bundles: list[tuple[Instruction, ...]] = []
        depth: list[int] = []
        regions: dict[int, int] = {}
        for i, header in enumerate(headers):
            body = text[header.end() : headers[i + 1].start() if i + 1 < len(headers) else len(text)]
            level = header["depth"].count(">")
            if level == 0 and depth and body.lstrip().startswith("}"):
                level = depth[-1]  # empty bundles carry no loop marker
            depth.append(level)
            for comment in _COMMENT.findall(body):
                for region in _REGION.findall(comment):
                    regions.setdefault(int(region), i)
            bundles.append(_decode_bundle(decoder, body))
        tags = tuple(header["tag"] or "" for header in headers)
        return cls(tuple(bundles), tuple(depth), tags, regions, decoder.not_decoded)

    def slots_after(self, branch: int, most: int) -> int:
        """Bundles that run after the branch in a bundle before it takes effect: `most`, or up to where the next block begins."""
        following = bisect_right(self._starts, branch)
        return min(most, self._starts[following] - branch - 1) if following < len(self._starts) else most

    @cached_property
    def _starts(self) -> list[int]:
        return sorted(self.regions.values())


def _decode_bundle(decoder: _Decoder, body: str) -> tuple[Instruction, ...]:
    # Which result of a division is meant is said in a comment only.
    body = _DIVISION.sub(lambda match: "," + {"Rem": "1", "DivAndRem": "2"}.get(match[1], "0"), body)
    body = _COMMENT.sub("", body).strip().removesuffix("}")
    decoded = (decoder.decode(text.strip()) for text in body.split(";;") if text.strip())
    # A phi reads a register that another instruction of its bundle may write.
    return tuple(sorted((x for x in decoded if x is not None), key=lambda x: x.kind != "phi"))
