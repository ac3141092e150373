"""Rules of comparisons and of what is chosen by them."""

from __future__ import annotations

import dataclasses
import functools
import math
from fractions import Fraction
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.extend import core

from fantastic4.expression import Expr, X, affine, const
from fantastic4.lipschitz.fixed import Fixed, Scaled
from fantastic4.lipschitz.graph import Label, Signal, unknown, whole
from fantastic4.lipschitz.moves import constants, moved
from fantastic4.lipschitz.nodes import Joint, Linear, settled
from fantastic4.lipschitz.numbers import above
from fantastic4.lipschitz.operands import Comparison, at_once, is_constant, is_known, uniform, wide
from fantastic4.lipschitz.scalars import JUMPS, NOT_A_NUMBER, aligned, always_a_number, scalar
from fantastic4.lipschitz.trace import Walk, out_shape, rule
from fantastic4.rounding import constant_up, product_up


@rule("lt", "gt", "le", "ge", "eq", "ne")
def _compare(walk: Walk, eqn: core.JaxprEqn, operands: list[Any]) -> Any:
    name = eqn.primitive.name
    a, b = aligned(operands, out_shape(eqn))
    signal = a if isinstance(a, Signal) else b
    if isinstance(a, Signal) and isinstance(b, Signal):
        if not a.same_entries(b):
            return walk.refuse(eqn, "compares two signals, and a choice by that may jump: use jnp.maximum, jnp.minimum")
        if a.expr == b.expr:  # x != x asks for NaN
            if not always_a_number(walk, a):
                return walk.refuse(eqn, NOT_A_NUMBER)
            return np.full(a.shape, name in ("le", "ge", "eq"))
        left, right = a.expr, b.expr
    else:
        number = uniform(b if isinstance(a, Signal) else a)
        if number is None or math.isnan(number):
            return walk.refuse(eqn, "compares with numbers that differ or are not known: a choice by that may jump")
        if math.isinf(number):  # on one side of all numbers
            if not always_a_number(walk, signal):
                return walk.refuse(eqn, NOT_A_NUMBER)
            above = (number > 0) == isinstance(a, Signal)
            return np.full(signal.shape, name == "ne" or name in (("lt", "le") if above else ("gt", "ge")))
        left, right = (a.expr, const(number)) if isinstance(a, Signal) else (const(number), b.expr)
    if name in ("eq", "ne"):
        return walk.refuse(eqn, "asks for equality, and a choice by that jumps")
    of = dataclasses.replace(signal, expr=X)
    less = Comparison("less", (left, right) if name in ("lt", "ge") else (right, left), of)
    return less if name in ("lt", "gt") else Comparison("not", (less,), of)


@rule("not", "and", "or")
def _logic(walk: Walk, eqn: core.JaxprEqn, operands: list[Any]) -> Any:
    name = eqn.primitive.name
    comparisons = [o for o in operands if isinstance(o, Comparison)]
    if len(comparisons) == len(operands) and all(c.of.same_entries(comparisons[0].of) for c in comparisons):
        return Comparison(name, tuple(comparisons), comparisons[0].of)
    return walk.refuse(eqn, "joins comparisons of different signals, and a choice by that may jump")


def _apart(by: Comparison) -> Comparison | None:
    """``abs(a) < b`` as ``a < b and -a < b``, and so on: comparisons of lines, where it was one of their sizes."""
    for place, side in enumerate(by.parts):
        if side.op in ("abs", "max", "min"):
            sides = (*side.args, Expr("neg", side.args)) if side.op == "abs" else side.args
            one, two = (
                dataclasses.replace(by, parts=(s, by.parts[1]) if not place else (by.parts[0], s)) for s in sides
            )
            # The larger of two is below where both are, and above where one is.
            return Comparison("and" if (side.op == "min") == bool(place) else "or", (one, two), by.of)
    return None


def _select(by: Comparison, yes: Expr, no: Expr) -> Expr:
    if by.kind == "less":
        apart = _apart(by)
        return Expr("select", (*by.parts, yes, no)) if apart is None else _select(apart, yes, no)
    if by.kind == "not":
        return _select(by.parts[0], no, yes)
    if by.kind == "and":
        return _select(by.parts[0], _select(by.parts[1], yes, no), no)
    return _select(by.parts[0], yes, _select(by.parts[1], yes, no))


@rule("convert_element_type")
def _convert(walk: Walk, eqn: core.JaxprEqn, operands: list[Any]) -> Any:
    (value,) = operands
    kind = eqn.params["new_dtype"]
    if jnp.issubdtype(kind, jnp.floating):
        if isinstance(value, Comparison):  # 0 and 1: x * (x > 0)
            return scalar(value.of, _select(value, const(1.0), const(0.0)), walk.label(eqn))
        return value
    return walk.refuse(eqn, JUMPS)


def _difference(by: Comparison) -> Expr | None:
    """What is compared with zero, of one scalar function below another; None where that is not known."""
    while by.kind == "not":
        by = by.parts[0]
    if by.kind != "less":
        return None
    left, right = by.parts
    if const(0.0) in by.parts:
        return right if left == const(0.0) else left
    return Expr("sub", by.parts) if affine(left) is not None and affine(right) is not None else None


def _ratio(expr: Expr, base: Expr) -> Fraction | None:
    """By what number a scalar function is another one; None where it is not known to be a multiple of it."""
    if expr == base:
        return Fraction(1)
    line, of = affine(expr), affine(base)
    if line is not None and of is not None:
        return line[0] / of[0] if of[0] and line[0] * of[1] == line[1] * of[0] else None
    if expr.op == "neg":
        below = _ratio(expr.args[0], base)
        return None if below is None else -below
    if expr.op == "mul":
        for factor, rest in (expr.args, expr.args[::-1]):
            below = _ratio(rest, base) if factor.op == "const" else None
            if below is not None:
                return Fraction(factor.number) * below
    return None


def _slope_through_zero(case: Any, of: Signal) -> Array | None:
    """The largest slope, where every entry of a case is a number, perhaps its own, times that entry of the signal."""
    if not isinstance(case, Signal):
        return jnp.zeros(()) if uniform(case) == 0 else None
    by: Array | float = 1.0
    if isinstance(case.node, Scaled) and case.plain and case.shape == case.node.shape:
        by, (case,) = case.node.factor, case.node.inputs
    ratio = _ratio(case.expr, of.expr) if case.same_entries(of) else None
    if ratio is None:
        return None
    by = wide(by)
    with at_once(by):
        return product_up(by, jnp.asarray(constant_up(above(ratio), by.dtype)))


def _unfolded(case: Any) -> Any:
    """Entries times constants, though a kernel has taken the constants in."""
    node = case.node if isinstance(case, Signal) else None
    if isinstance(node, Linear) and node.unfolded is not None and case.plain and case.shape == node.shape:
        return node.unfolded()
    return case


def _two_lines(by: Comparison, cases: list[Any], label: Label) -> Signal | None:
    """``where(x > 0, x, slopes * x)`` with a slope for each channel, or one that is not known."""
    base = _difference(by)
    if base is None:
        return None
    of = dataclasses.replace(by.of, expr=base)
    cases = [case if isinstance(case, Signal) and case.same_entries(of) else _unfolded(case) for case in cases]
    slopes = [_slope_through_zero(case, of) for case in cases]
    found = [slope for slope in slopes if slope is not None]
    if len(found) < len(slopes):
        return None
    # Not the larger of both sides: every entry is on a side of its own.
    with at_once(*found):
        return whole(Fixed(label, of.shape, (of,), functools.reduce(jnp.maximum, found)))


NOT_OF_ONE = "chooses by the input between what is not a function of the same entries: it may jump"


@rule("select_n")
def _choose(walk: Walk, eqn: core.JaxprEqn, operands: list[Any]) -> Any:
    by, *cases = operands
    label, shape = walk.label(eqn), out_shape(eqn)
    if isinstance(by, Comparison):
        exprs = []
        for case in cases:
            number = uniform(case)
            if isinstance(case, Signal) and case.same_entries(by.of):
                exprs.append(case.expr)
            elif number is not None and math.isfinite(number):
                exprs.append(const(number))
            else:
                return _two_lines(by, cases, label) or walk.refuse(eqn, NOT_OF_ONE)
        one, _ = aligned([by.of, by.of], shape)  # one comparison may choose for all
        return scalar(one, _select(by, exprs[1], exprs[0]), label)
    if not is_constant(by):
        return walk.refuse(eqn, "chooses by the input: it may jump")
    number = uniform(by)
    if number is not None:
        return cases[int(number)]
    if any(isinstance(c, Comparison) for c in cases):
        return walk.refuse(eqn, "chooses between comparisons, and a choice by that may jump")
    signals = [c for c in cases if isinstance(c, Signal)]
    if is_known(by):
        # Which entry comes from where is known: entries move.
        chosen = np.broadcast_to(np.asarray(by).astype(int), shape)
        if len({(id(s.node), s.expr) for s in signals}) == 1:
            signals = [settled(s) for s in signals] if len(signals) < len(cases) else signals
            read = iter(signals)
            places = [next(read).places if isinstance(c, Signal) else constants(c) for c in cases]
            stacked = np.stack([np.broadcast_to(p, shape) for p in places])  # np.choose takes 32 at most, or 64
            found = np.take_along_axis(stacked, chosen[None], 0)[0]
            return moved(dataclasses.replace(signals[0], shape=shape), found)
        other = unknown(shape, alike=True)
        taken = [(k, settled(c)) for k, c in enumerate(cases) if isinstance(c, Signal)]
        signals = [moved(s, np.where(chosen == k, s.places, other)) for k, s in taken]
    return whole(Joint(label, shape, tuple(signals)))


@rule("sign")
def _sign(walk: Walk, eqn: core.JaxprEqn, operands: list[Any]) -> Signal:
    """-1, 0 or 1: sign(x) log1p(|x|) may go on where it jumps."""
    (signal,) = operands
    e, zero = signal.expr, const(0.0)
    not_below = Expr("select", (zero, e, const(1.0), zero))
    return scalar(signal, Expr("select", (e, zero, const(-1.0), not_below)), walk.label(eqn))


@rule("round", "floor", "ceil", "argmax", "argmin", "nextafter", "population_count")
def _jump(walk: Walk, eqn: core.JaxprEqn, operands: list[Any]) -> Any:
    return walk.refuse(eqn, "jumps: no Lipschitz constant. Leave it out of what is bounded")
