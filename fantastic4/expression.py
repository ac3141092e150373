"""A function of one real number, written as operations: what an activation is in a traced network."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from fractions import Fraction

Line = tuple[Fraction, Fraction]
"""(a, b) of a x + b."""

UNARY = (
    *("neg", "abs", "exp", "expm1", "log", "log1p", "tanh", "logistic", "erf", "erfc", "sqrt", "sin", "cos"),
    *("atan", "asinh"),
)
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


@functools.lru_cache(maxsize=4096)
def single_waves(expr: Expr) -> Expr:
    """The same with products of two waves of one argument as one wave: what is added to them may cancel far out."""
    if not expr.args:
        return expr
    args = tuple(map(single_waves, expr.args))
    square = expr.op == "power" and expr.number == 2
    factors = (*args, *args) if square else args
    if (
        (square or expr.op == "mul")
        and {f.op for f in factors} <= {"sin", "cos"}
        and factors[0].args == factors[1].args
    ):
        twice, half = Expr("mul", (const(2.0), *factors[0].args)), const(0.5)
        if factors[0].op != factors[1].op:
            return Expr("mul", (half, Expr("sin", (twice,))))
        sign = "sub" if factors[0].op == "sin" else "add"
        return Expr(sign, (half, Expr("mul", (half, Expr("cos", (twice,))))))
    return dataclasses.replace(expr, args=args)


def affine(expr: Expr) -> Line | None:
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


def _lines(expr: Expr) -> set[Line]:
    """The largest parts that are a x + b with a ≠ 0."""
    straight = affine(expr)
    if straight is not None:
        return {straight} if straight[0] else set()
    return set().union(*map(_lines, expr.args))


def _is_float(number: Fraction) -> bool:
    return Fraction(float(number)) == number if abs(number) < 2**1000 else False


def _of_line(expr: Expr, line: Line) -> Expr | None:
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


_PIECES = 32  # lines of a function in pieces, each of which is compared with each


def _in_pieces(expr: Expr, keep: Callable[[Line], Line], most: int) -> frozenset[Line] | None:
    """The lines that a function is made of, and perhaps more; None for what is not of that form, or has too many.

    Args:
      expr: the function.
      keep: what is kept of a line.
      most: how many different ones.
    """
    straight = affine(expr)
    if straight is not None:
        return frozenset((keep(straight),))
    if expr.op in ("mul", "div"):
        # Of a function in pieces with a number.
        left, right = map(affine, expr.args)
        if expr.op == "mul" and left is not None and left[0] == 0:
            factor, inner = left[1], expr.args[1]
        elif right is not None and right[0] == 0 and (expr.op == "mul" or right[1]):
            factor, inner = right[1] if expr.op == "mul" else 1 / right[1], expr.args[0]
        else:
            return None
        lines = _in_pieces(inner, keep, most)
        return None if lines is None else frozenset((factor * a, factor * b) for a, b in lines)
    if expr.op not in ("neg", "add", "sub", "abs", "max", "min", "select"):
        return None
    parts = [_in_pieces(arg, keep, most) for arg in expr.args[2 if expr.op == "select" else 0 :]]
    if any(part is None for part in parts):
        return None
    known = [part for part in parts if part is not None]
    if expr.op in ("neg", "abs"):
        opposite = frozenset((-a, -b) for a, b in known[0])
        found = opposite if expr.op == "neg" else known[0] | opposite
    elif expr.op in ("add", "sub"):
        sign = 1 if expr.op == "add" else -1
        found = frozenset((a + sign * c, b + sign * d) for a, b in known[0] for c, d in known[1])
    else:
        found = known[0] | known[1]
    return found if len(found) <= most else None


def slopes(expr: Expr) -> frozenset[Fraction] | None:
    """All slopes of a function that is affine in pieces, and perhaps more; None for what is not of that form."""
    lines = _in_pieces(expr, lambda line: (line[0], Fraction(0)), 256)
    return None if lines is None else frozenset(a for a, _ in lines)


@functools.lru_cache(maxsize=4096)
def _changes(expr: Expr) -> frozenset[Fraction] | None:
    """Where an absolute value, a maximum or a selection itself changes over, and perhaps more places.

    Known where what it compares is affine in pieces, as min(|x|, 1) of Huber's loss does; None elsewhere.
    """
    if expr.op not in ("abs", "max", "min", "select"):
        return None
    left, right = (_in_pieces(side, lambda line: line, _PIECES) for side in (*expr.args, const(0))[:2])
    if left is None or right is None:
        return None
    return frozenset((d - b) / (a - c) for a, b in left for c, d in right if a != c)


def kinks(expr: Expr) -> set[float]:
    """Where an absolute value, a maximum or a selection of functions affine in pieces may change over."""
    found = set().union(*(kinks(arg) for arg in expr.args)) if expr.args else set()
    return found | {float(place) for place in _changes(expr) or ()}


def has_known_kink(expr: Expr) -> bool:
    """Whether `kinks` knows where this operation itself changes over."""
    return _changes(expr) is not None


def selections(expr: Expr) -> list[Expr]:
    """Every ``"select"`` in it."""
    own = [expr] if expr.op == "select" else []
    return own + [s for arg in expr.args for s in selections(arg)]
