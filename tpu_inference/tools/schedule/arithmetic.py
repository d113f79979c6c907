# SPDX-License-Identifier: Apache-2.0
"""What the scalar unit computes, as a table: instruction -> function of its operands. None is a value that is not known."""

from collections.abc import Callable, Mapping
from typing import Any

Value = Any
"""An int, a bool, the results of a division that are not popped yet, or None."""
WORD = 0xFFFFFFFF


def signed(x: int) -> int:
    """A 32-bit word as two's complement."""
    return (x ^ 0x80000000) - 0x80000000


def invert(x: Value) -> Value:
    return None if x is None else not x


def _both(a: Value, b: Value) -> Value:
    if (a is not None and not a) or (b is not None and not b):
        return False
    return None if a is None or b is None else True


def _either(a: Value, b: Value) -> Value:
    return invert(_both(invert(a), invert(b)))


def _known(function: Callable) -> Callable:
    """Not known where an operand is not."""
    return lambda *operands: None if None in operands else function(*operands)


def _zero_wins(function: Callable) -> Callable:
    """0 where one operand is 0, whatever the other is."""

    def evaluate(a: Value, b: Value) -> Value:
        if a is None or b is None:
            return 0 if 0 in (a, b) else None
        return function(a, b)

    return evaluate


def _divide(a: int, b: int, kind: int) -> Value:
    """Quotient (0), remainder (1), or both to be popped one after the other (2)."""
    if b == 0:
        return None
    return [a // b, a % b] if kind == 2 else a % b if kind else a // b


def _select(condition: Value, yes: Value, no: Value) -> Value:
    return None if condition is None else (yes if condition else no)


_COMPARISONS: dict[str, Callable] = {
    "eq": lambda a, b: a == b,
    "ne": lambda a, b: a != b,
    "lt": lambda a, b: a < b,
    "le": lambda a, b: a <= b,
    "gt": lambda a, b: a > b,
    "ge": lambda a, b: a >= b,
}


def _compare_signed(compare: Callable) -> Callable:
    return _known(lambda a, b: compare(signed(a), signed(b)))


FUNCTIONS: Mapping[str, Callable] = {
    "sadd": _known(lambda a, b: (a + b) & WORD),
    "ssub": _known(lambda a, b: (a - b) & WORD),
    "smul": _zero_wins(lambda a, b: (a * b) & WORD),
    "smulhi": _known(lambda a, b: (a * b) >> 32),
    "sand": _zero_wins(lambda a, b: a & b),
    "sor": _known(lambda a, b: a | b),
    "sxor": _known(lambda a, b: a ^ b),
    "sshll": _known(lambda a, b: (a << (b & 31)) & WORD),
    "sshrl": _known(lambda a, b: a >> (b & 31)),
    "sshra": _known(lambda a, b: (signed(a) >> (b & 31)) & WORD),
    "sc": _known(lambda a, b: a + b > WORD),
    "scalar_lea": _known(lambda a, b: (a + b) & WORD),
    "scalar_select": _select,
    "sdivrem": _known(_divide),
    "smin.s32": _known(lambda a, b: min(a, b, key=signed)),
    "smax.s32": _known(lambda a, b: max(a, b, key=signed)),
    "smin": _known(min),
    "smax": _known(max),
    "smov": lambda a: a,
    "pmov": lambda a: a,
    "int_to_ptr": lambda a: a,
    "ptr_to_int": lambda a: a,
    "pand": _both,
    "por": _either,
    "pnand": lambda a, b: invert(_both(a, b)),
    "pnor": lambda a, b: invert(_either(a, b)),
    "pneg": invert,
    "pxor": _known(lambda a, b: a != b),
    **{f"scmp.{name}.s32": _compare_signed(compare) for name, compare in _COMPARISONS.items()},
    **{f"scmp.{name}.u32": _known(compare) for name, compare in _COMPARISONS.items()},
}


def function_of(instruction: str) -> Callable | None:
    """For "scmp.lt.s32.totalorder", say: the longest part of the name that the table has."""
    parts = instruction.split(".")
    names = (".".join(parts[:n]) for n in (3, 2, 1))
    return next((FUNCTIONS[name] for name in names if name in FUNCTIONS), None)
