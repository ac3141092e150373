"""Rules of arithmetic and of functions of one number."""

from __future__ import annotations

import dataclasses
import math
from fractions import Fraction
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.extend import core

from fantastic4.expression import UNARY, Expr, X, affine, const
from fantastic4.lipschitz import forms, losses, means, norms, patterns, products
from fantastic4.lipschitz.fixed import Fixed, Scaled
from fantastic4.lipschitz.graph import Label, Signal, UnboundedError, reachable, whole
from fantastic4.lipschitz.moves import moved, reshaped
from fantastic4.lipschitz.nodes import Joint, Linear, Sum
from fantastic4.lipschitz.numbers import largest
from fantastic4.lipschitz.operands import at_once, is_constant, uniform, wide
from fantastic4.lipschitz.pooling import Pool
from fantastic4.lipschitz.sparse import Sparse
from fantastic4.lipschitz.trace import Walk, out_shape, rule, shape_and_dtype
from fantastic4.rounding import subnormal_norm
from fantastic4.values import is_total


def scalar(signal: Signal, expr: Expr, label: Label) -> Signal:
    """A signal under another scalar function."""
    return dataclasses.replace(signal, expr=forms.known(expr), label=label)


@rule(*UNARY)
def _unary(walk: Walk, eqn: core.JaxprEqn, operands: list[Any]) -> Signal:
    (signal,) = operands
    label = walk.label(eqn)
    if eqn.primitive.name == "sqrt":
        return _root(signal, label)
    return scalar(signal, Expr(eqn.primitive.name, (signal.expr,)), label)


def _root(signal: Signal, label: Label) -> Signal:
    return norms.norm(signal, label) or scalar(signal, Expr("sqrt", (signal.expr,)), label)


@rule("square", "integer_pow", "rsqrt", "exp2")
def _power(walk: Walk, eqn: core.JaxprEqn, operands: list[Any]) -> Any:
    (signal,) = operands
    e, label = signal.expr, walk.label(eqn)
    if eqn.primitive.name == "exp2":
        return scalar(signal, Expr("exp", (Expr("mul", (const(math.log(2)), e)),)), label)
    if eqn.primitive.name == "rsqrt":
        root = _root(signal, label)
        return scalar(root, Expr("div", (const(1.0), root.expr)), label)
    return _to_the(signal, 2 if eqn.primitive.name == "square" else eqn.params["y"], label)


_LARGEST_POWER = 100


def _to_the(signal: Signal, y: int, label: Label) -> Any:
    if y == 0:
        return np.ones(signal.shape, np.float32)
    if abs(y) > _LARGEST_POWER:
        raise UnboundedError(f"{label} has an exponent of {y}: up to {_LARGEST_POWER} is known")
    power = signal.expr if abs(y) == 1 else Expr("power", (signal.expr,), float(abs(y)))
    return scalar(signal, power if y > 0 else Expr("div", (const(1.0), power)), label)


@rule("pow")
def _pow(walk: Walk, eqn: core.JaxprEqn, operands: list[Any]) -> Any:
    base, exponent = aligned(operands, out_shape(eqn))
    number = None if isinstance(exponent, Signal) else uniform(exponent)
    if number is None or not math.isfinite(number) or not isinstance(base, Signal):
        return walk.refuse(eqn, "is known for exponents that are constants: write exp(y log(x))")
    label = walk.label(eqn)
    if number.is_integer():
        return _to_the(base, int(number), label)
    if (2 * number).is_integer():
        return _to_the(_root(base, label), int(2 * number), label)
    logarithm = Expr("log", (base.expr,))  # where the base is not positive, neither is a number with a slope
    return scalar(base, Expr("exp", (Expr("mul", (const(number), logarithm)),)), label)


JUMPS = "makes whole numbers or truth values of a signal, which jump"
NOT_A_NUMBER = "hides where its argument is not a number, which is not known to be nowhere: it may jump there"


@rule("is_finite")
def _is_finite(walk: Walk, eqn: core.JaxprEqn, operands: list[Any]) -> Any:
    (signal,) = operands
    if not always_a_number(walk, signal):
        return walk.refuse(eqn, NOT_A_NUMBER)
    return np.ones(signal.shape, bool)


def always_a_number(walk: Walk, signal: Signal) -> bool:
    """Whether every entry is a number at every input: so are the scalar functions in all that it depends on.

    And so are all constants that have come in: of those that are not known while tracing that is asked later.
    """
    read = [signal, *(s for node in reachable([signal], unmoved=True) for s in (*node.inputs, *node.unmoved))]
    return all(map(is_total, {s.expr for s in read})) and walk.entered.rely()


def _of_one(op: str, a: Signal, b: Signal, label: Label) -> Signal | None:
    """An operation on two signals as a scalar function of one, where they read the same entries."""
    return scalar(a, Expr(op, (a.expr, b.expr)), label) if a.same_entries(b) else None


def aligned(operands: list[Any], shape: tuple[int, ...]) -> tuple[Any, Any]:
    """Signals spread to the shape of the result."""

    def spread(value: Any) -> Any:
        if not isinstance(value, Signal) or value.shape == shape:
            return value
        if math.prod(value.shape) == math.prod(shape):
            return reshaped(value, shape)
        return moved(value, np.broadcast_to(value.places, shape))

    a, b = operands
    return spread(a), spread(b)


def _plain_linear(signal: Signal) -> tuple[Linear, Fraction] | None:
    """The linear node that a signal is all of, and by what number it is multiplied, whatever is added."""
    straight = affine(signal.expr)
    node = signal.node
    if not isinstance(node, Linear) or signal.index is not None or signal.shape != node.shape or straight is None:
        return None
    return node, straight[0]


def shifted(signal: Signal, label: Label) -> Signal:
    """A signal plus constants that differ from entry to entry."""
    found = _plain_linear(signal)
    if found is not None and abs(found[1]) == 1:
        return whole((found[0] if found[1] == 1 else found[0].negated()).shifted(label))
    name = dataclasses.replace(label, operation="shift")
    return whole(Fixed(name, signal.shape, (signal,), linear=True, apply=lambda x: x))


def _times(signal: Signal, by: Any, label: Label) -> Signal:
    """A signal times constants that differ from entry to entry, or are not known."""
    by, node = wide(by), signal.node
    if isinstance(node, Sparse | Pool) and signal.is_shifted:
        with at_once(by):  # squeezed, as Flax does with a batch that it has added
            inside = by if signal.shape == node.shape else jnp.broadcast_to(by, signal.shape).reshape(node.shape)
        matrix = node.scaled(inside, label)
        if matrix is not None:
            return reshaped(whole(matrix), signal.shape)
    found = _plain_linear(signal)
    # A number that is no float of the constants' type stays apart.
    if found is not None and by.ndim == len(signal.shape) and 1e-30 < abs(found[1]) < 1e30:
        scaled = found[0].scaled(by * float(found[1]), label)
        if scaled is not None:
            scaled.unfolded = lambda: _scaled(signal, by, label)
            return whole(scaled)
    return _scaled(signal, by, label)


def _scaled(signal: Signal, by: Array, label: Label) -> Signal:
    name = dataclasses.replace(label, operation="scale")
    return whole(Scaled(name, signal.shape, (signal,), _largest(by), linear=True, by=by))


@jax.jit
def _largest(by: Array) -> Array:
    largest = jnp.maximum(jnp.max(jnp.abs(by), initial=0), subnormal_norm(by))  # which compilers may take for 0
    return jnp.where(jnp.any(jnp.isnan(by)), jnp.nan, largest)


def _no_number(signal: Signal, label: Label) -> Signal:
    return whole(Fixed(label, signal.shape, (signal,), math.nan))


def _less_log_softmax(a: Signal, b: Signal, label: Label) -> Signal | None:
    """``log Σ exp(z) - z``."""
    found = patterns.log_softmax(b, a, label)
    return None if found is None else scalar(found, Expr("neg", (found.expr,)), label)


@rule("add", "add_any", "sub")
def _add(walk: Walk, eqn: core.JaxprEqn, operands: list[Any]) -> Any:
    op = "sub" if eqn.primitive.name == "sub" else "add"
    a, b = aligned(operands, out_shape(eqn))
    label = walk.label(eqn)
    if isinstance(a, Signal) and isinstance(b, Signal):
        known = [patterns.logsumexp, products.between]
        if op == "sub":
            a, b = losses.same_differences(a, b)
            known = [patterns.log_softmax, _less_log_softmax, losses.cross_entropy, means.centred, means.variance]
        found = _of_one(op, a, b, label) or next(filter(None, (pattern(a, b, label) for pattern in known)), None)
        if found is not None:
            return found
        most = math.nextafter(largest(a) + largest(b), math.inf)
        return whole(Sum(label, a.shape, (a, b), sign=-1 if op == "sub" else 1, most=most))
    signal, other = (a, b) if isinstance(a, Signal) else (b, a)
    number = uniform(other)
    if number is not None and math.isnan(number):
        return _no_number(signal, label)
    if number is not None and math.isfinite(number):
        left, right = (signal.expr, const(number)) if isinstance(a, Signal) else (const(number), signal.expr)
        return scalar(signal, Expr(op, (left, right)), label)
    if op == "sub" and isinstance(b, Signal):
        signal = scalar(signal, Expr("neg", (signal.expr,)), label)
    return shifted(signal, label)


def _normalised(a: Signal, b: Signal, label: Label) -> Signal | None:
    """U · (1 / g) for a norm g, or u · (constants / g), as Flax computes it."""
    for top, bottom in ((a, b), (b, a)):
        scale = bottom.node
        if isinstance(scale, Scaled) and bottom.expr == X and not np.any(bottom.places < 0):
            below = moved(scale.inputs[0], scale.inputs[0].places.ravel()[bottom.places])
            found = norms.normalised_product(top, below, label)
            if found is not None:
                if bottom.index is None and bottom.shape == scale.shape:
                    return _times(found, scale.by, label)
                with at_once(scale.by):
                    return _times(found, jnp.broadcast_to(scale.by, scale.shape).ravel()[bottom.places], label)
    return norms.normalised_product(a, b, label)


def _scaled_quotient(a: Signal, b: Signal, label: Label) -> Signal | None:
    """U · constants / g for a norm g of u, as if the constants came last."""
    node = a.node
    if isinstance(node, Linear) and node.unfolded is not None and a.plain and a.shape == node.shape:
        a = node.unfolded()
        node = a.node
    if not isinstance(node, Scaled) or not a.plain or a.shape != node.shape:
        return None
    found = norms.normalised(node.inputs[0], b, label)
    return None if found is None else _times(found, node.by, label)


@rule("mul")
def _mul(walk: Walk, eqn: core.JaxprEqn, operands: list[Any]) -> Any:
    a, b = aligned(operands, out_shape(eqn))
    label = walk.label(eqn)
    if isinstance(a, Signal) and isinstance(b, Signal):
        return (
            _of_one("mul", a, b, label)
            or patterns.softmax_product(a, b, label)
            or _normalised(a, b, label)
            or products.of_entries(walk, a, b, operands, label)
            or walk.refuse(
                eqn,
                products.UNBOUNDED + "; x / sqrt(sum(x²) + c) is known. Else bound both factors, as by jnp.clip or "
                "jnp.tanh, or register a rule",
            )
        )
    signal, other = (a, b) if isinstance(a, Signal) else (b, a)
    number = uniform(other)
    if number is not None and math.isfinite(number):
        return scalar(signal, Expr("mul", (const(number), signal.expr)), label)
    return _times(signal, other, label)


@rule("div")
def _div(walk: Walk, eqn: core.JaxprEqn, operands: list[Any]) -> Any:
    a, b = aligned(operands, out_shape(eqn))
    label = walk.label(eqn)
    if isinstance(a, Signal) and isinstance(b, Signal):
        return (
            _of_one("div", a, b, label)
            or patterns.softmax(a, b, label)
            or norms.normalised(a, b, label)
            or _scaled_quotient(a, b, label)
            or walk.refuse(
                eqn,
                "divides by what depends on the input: no Lipschitz constant that is known. Normalisation has one as "
                "x / sqrt(sum(x²) + c), x / (norm(x) + c), x / maximum(norm(x), c) with a constant c > 0 that is known "
                "while tracing",
            )
        )
    if isinstance(b, Signal):
        number = uniform(a)
        if number is None or not math.isfinite(number):
            return walk.refuse(eqn, "divides by what depends on the input: register a rule")
        return scalar(b, Expr("div", (const(number), b.expr)), label)
    number = uniform(b)
    if number is not None and math.isinf(number):
        if not always_a_number(walk, a):
            return walk.refuse(eqn, NOT_A_NUMBER)
        return jnp.zeros(*shape_and_dtype(eqn.outvars[0]))
    if number is not None and math.isnan(number):
        return _no_number(a, label)
    if number:
        return scalar(a, Expr("div", (a.expr, const(number))), label)
    if number == 0:
        return walk.refuse(eqn, "divides by zero")
    b = wide(b)
    with at_once(b):
        by = _over(b)
    return _times(a, by, label)


@jax.jit
def _over(b: Array) -> Array:
    """1 / b, which is 0 for infinity alone."""
    over, tiny = 1 / b, jnp.asarray(jnp.finfo(b.dtype).tiny, b.dtype)
    vanished = (jnp.abs(over) < tiny) & jnp.isfinite(b)
    return jnp.where(vanished, jnp.copysign(tiny, b), over)


@rule("max", "min")
def _extreme(walk: Walk, eqn: core.JaxprEqn, operands: list[Any]) -> Any:
    op = eqn.primitive.name
    a, b = aligned(operands, out_shape(eqn))
    label = walk.label(eqn)
    if isinstance(a, Signal) and isinstance(b, Signal):
        if a.same_entries(b):
            return scalar(a, Expr(op, (a.expr, b.expr)), label)
        # |max - max'|² + |min - min'|² ≤ |a - a'|² + |b - b'|²: both are halves of one node.
        key = frozenset((id(s.node), s.expr, s.shape, None if s.index is None else s.index.tobytes()) for s in (a, b))
        if key not in walk.joined:
            pair = Joint(dataclasses.replace(label, operation="max and min"), (2, *a.shape), (a, b), linear=False)
            walk.joined[key] = whole(pair)
        pair_signal = walk.joined[key]
        return dataclasses.replace(moved(pair_signal, pair_signal.places[0 if op == "max" else 1]), label=label)
    signal, other = (a, b) if isinstance(a, Signal) else (b, a)
    number = uniform(other)
    if number is not None and math.isinf(number):
        if (number < 0) == (op == "max"):
            return signal
        if not always_a_number(walk, signal):
            return walk.refuse(eqn, NOT_A_NUMBER)
        return jnp.broadcast_to(other, signal.shape)
    if number is not None and math.isfinite(number):
        return scalar(signal, Expr(op, (signal.expr, const(number))), label)
    if number is not None:
        return _no_number(signal, label)
    return whole(Fixed(label, signal.shape, (signal,)))


@rule("clamp")
def _clamp(walk: Walk, eqn: core.JaxprEqn, operands: list[Any]) -> Any:
    low, signal, high = operands
    if not isinstance(signal, Signal) or not is_constant(low) or not is_constant(high):
        return walk.refuse(eqn, "clamps between numbers that depend on the input")
    label = walk.label(eqn)
    least, most = uniform(low), uniform(high)
    if any(end is not None and math.isnan(end) for end in (least, most)):
        return _no_number(signal, label)
    if least is None or most is None or not math.isfinite(least) or not math.isfinite(most):
        return whole(Fixed(label, signal.shape, (signal,)))
    expr = Expr("max", (signal.expr, const(least)))
    return scalar(signal, Expr("min", (expr, const(most))), label)
