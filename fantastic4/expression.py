"""A function of one real number, written as operations: what an activation is in a traced network."""

from __future__ import annotations

import dataclasses
import functools
import math
from fractions import Fraction

UNARY = ("neg", "abs", "exp", "expm1", "log", "log1p", "tanh", "logistic", "erf", "erfc", "sqrt", "sin", "cos")
BINARY = ("add", "sub", "mul", "div", "max", "min")


@dataclasses.dataclass(frozen=True)
class Expr:
    """A function of one number x.

    Attributes:
      op: ``"x"``, ``"const"``, a name of `UNARY` or `BINARY`, ``"power"`` with a positive whole exponent, or
        ``"select"`` of (a, b, left, right): left where a < b, right elsewhere.
      args: what it is applied to.
      number: of ``"const"`` and ``"power"``.
    """

    op: str
    args: tuple[Expr, ...] = ()
    number: float = 0.0

    def __post_init__(self):
        count = {"x": 0, "const": 0, "power": 1, "select": 4} | dict.fromkeys(UNARY, 1) | dict.fromkeys(BINARY, 2)
        if self.op not in count or len(self.args) != count[self.op]:
            raise ValueError(f"no operation {self.op!r} of {len(self.args)} arguments")
        if self.op == "power" and not (self.number >= 1 and float(self.number).is_integer()):
            raise ValueError(f"the exponent of a power is a positive whole number, got {self.number!r}")
        if not math.isfinite(self.number):
            raise ValueError(f"a constant must be finite, got {self.number!r}")


X = Expr("x")


def size(expr: Expr) -> int:
    """Number of operations in an expression, with repetition."""
    return 1 + sum(map(size, expr.args))


def const(number: float) -> Expr:
    """A number."""
    return Expr("const", (), float(number))


def substitute(expr: Expr, part: Expr, by: Expr) -> Expr:
    """The expression with every occurrence of a part replaced."""
    if expr == part:
        return by
    if not expr.args:
        return expr
    return dataclasses.replace(expr, args=tuple(substitute(arg, part, by) for arg in expr.args))


def parts(expr: Expr) -> set[Expr]:
    """An expression and all that it is made of."""
    return {expr}.union(*map(parts, expr.args))


def layers(expr: Expr) -> list[tuple[Expr, Expr]]:
    """All ways to write f as g ∘ h with h of more than one operation: (g, h), the largest h first."""
    found = []
    for part in sorted(parts(expr) - {expr, X}, key=lambda part: (-size(part), repr(part))):
        outer = substitute(expr, part, const(0))
        if X in parts(part) and X not in parts(outer):
            found.append((substitute(expr, part, X), part))
    return found


def affine(expr: Expr) -> tuple[Fraction, Fraction] | None:
    """(a, b) of a x + b, exactly: floats may cancel; None for what is not of that form."""
    if expr.op == "x":
        return Fraction(1), Fraction(0)
    if expr.op == "const":
        return Fraction(0), Fraction(expr.number)
    args = [affine(arg) for arg in expr.args]
    if any(arg is None for arg in args):
        return None
    known = [arg for arg in args if arg is not None]
    if expr.op == "neg":
        return -known[0][0], -known[0][1]
    if expr.op in ("add", "sub"):
        s = 1 if expr.op == "add" else -1
        return known[0][0] + s * known[1][0], known[0][1] + s * known[1][1]
    if expr.op == "mul" and 0 in (known[0][0], known[1][0]):
        (a, b), (_, c) = known if known[1][0] == 0 else known[::-1]
        return a * c, b * c
    if expr.op == "div" and known[1][0] == 0 and known[1][1]:
        return known[0][0] / known[1][1], known[0][1] / known[1][1]
    return None


def multiple_of(expr: Expr, part: Expr) -> Fraction | None:
    """C, where an expression is c times a part of it, and that is there once."""
    outer = affine(substitute(expr, part, X))
    alone = X not in parts(substitute(expr, part, const(0.0)))
    return outer[0] if outer is not None and alone and not outer[1] else None


def _lines(expr: Expr) -> set[tuple[Fraction, Fraction]]:
    """The largest parts that are a x + b with a ≠ 0."""
    straight = affine(expr)
    if straight is not None:
        return {straight} if straight[0] else set()
    return set().union(*map(_lines, expr.args))


def _is_float(number: Fraction) -> bool:
    return Fraction(float(number)) == number if abs(number) < 2**1000 else False


def _of_line(expr: Expr, line: tuple[Fraction, Fraction]) -> Expr | None:
    """A function of x as one of a x + b; None where it has numbers then that are no floats."""
    straight = affine(expr)
    if straight is None:
        args = [_of_line(arg, line) for arg in expr.args]
        return None if None in args else dataclasses.replace(expr, args=tuple(arg for arg in args if arg is not None))
    if not straight[0]:
        return expr
    times = straight[0] / line[0]
    plus = straight[1] - times * line[1]
    if not (_is_float(times) and _is_float(plus)):
        return None
    scaled = X if times == 1 else Expr("mul", (const(float(times)), X))
    return scaled if not plus else Expr("add", (scaled, const(float(plus))))


@functools.lru_cache(maxsize=4096)
def in_units(expr: Expr) -> tuple[Expr, Fraction] | None:
    """(g, a) with f(x) = g(a x + b), exactly, where f is a function of such lines: 32 gelu(x/32) of x/32.

    Of several the flattest, if it is flatter than x itself; None where there is none.
    """
    lines = _lines(expr)
    for line in sorted(lines, key=lambda line: (abs(line[0]), line)):
        if line != (1, 0) and (len(lines) == 1 or abs(line[0]) < 1):
            found = _of_line(expr, line)
            if found is not None:
                return found, line[0]
    return None


def slopes(expr: Expr) -> frozenset[Fraction] | None:
    """All slopes of a function that is affine in pieces, and perhaps more; None for what is not of that form."""
    straight = affine(expr)
    if straight is not None:
        return frozenset((straight[0],))
    if expr.op in ("mul", "div"):
        # Of a function in pieces with a number.
        left, right = map(affine, expr.args)
        if expr.op == "mul" and left is not None and left[0] == 0:
            factor, inner = left[1], slopes(expr.args[1])
        elif right is not None and right[0] == 0 and (expr.op == "mul" or right[1]):
            factor, inner = right[1] if expr.op == "mul" else 1 / right[1], slopes(expr.args[0])
        else:
            return None
        return None if inner is None else frozenset(factor * k for k in inner)
    if expr.op not in ("neg", "add", "sub", "abs", "max", "min", "select"):
        return None
    parts = [slopes(arg) for arg in expr.args[2 if expr.op == "select" else 0 :]]
    if any(part is None for part in parts):
        return None
    known = [part for part in parts if part is not None]
    if expr.op in ("neg", "abs"):
        return known[0] | {-k for k in known[0]}
    if expr.op in ("add", "sub"):
        sign = 1 if expr.op == "add" else -1
        return frozenset(a + sign * b for a in known[0] for b in known[1])
    return known[0] | known[1]


def _compared(expr: Expr) -> tuple[tuple[Fraction, Fraction], tuple[Fraction, Fraction]] | None:
    """What an absolute value, a maximum or a selection compares, where that is two affine functions."""
    if expr.op not in ("abs", "max", "min", "select"):
        return None
    left, right = (affine(side) for side in (*expr.args, const(0))[:2])
    return None if left is None or right is None else (left, right)


def kinks(expr: Expr) -> set[float]:
    """Where an absolute value, a maximum or a selection of affine functions changes over."""
    found = set().union(*(kinks(arg) for arg in expr.args)) if expr.args else set()
    compared = _compared(expr)
    if compared is not None:
        left, right = compared
        if left[0] != right[0]:
            found.add(float((right[1] - left[1]) / (left[0] - right[0])))
    return found


@functools.lru_cache(maxsize=4096)
def has_known_kink(expr: Expr) -> bool:
    """Whether `kinks` knows where this operation itself changes over."""
    return _compared(expr) is not None


def selections(expr: Expr) -> list[Expr]:
    """Every ``"select"`` in it."""
    own = [expr] if expr.op == "select" else []
    return own + [s for arg in expr.args for s in selections(arg)]
