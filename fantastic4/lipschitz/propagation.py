"""How large signals are, whatever the input is: found back through the equations that made them.

So a product of two signals has a Lipschitz constant where both are bounded: of what is normalised, squashed, or a
matrix of such. It is looked for where a product asks: by what a signal's node says, and by a rule for each primitive,
each entry by the absolute values of what it is computed from.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend import core

from fantastic4 import dense
from fantastic4.expression import affine
from fantastic4.lipschitz.fixed import Confined, Scaled
from fantastic4.lipschitz.graph import Signal
from fantastic4.lipschitz.numbers import largest
from fantastic4.lipschitz.operands import at_once, evaluate, is_constant, is_known, taken, wide
from fantastic4.lipschitz.sizes import (
    Size,
    dot_product,
    largest_of,
    plus,
    product,
    reciprocals,
    scaled,
    sizes_of,
    times,
    top,
    up,
)
from fantastic4.lipschitz.trace import Walk
from fantastic4.rounding import constant_up, gamma, round_up


def size(walk: Walk, value: Any) -> Size | None:
    """What is known of a value of a walk; None where it is not known to be bounded."""
    waiting = [value]
    while waiting:
        last = waiting[-1]
        if not isinstance(last, Signal) or id(last) in walk.sizes:
            waiting.pop()
            continue
        made = walk.made.get(id(last))
        found = _by_node(last)
        if made is not None and (found is None or found.balls is None) and _has_rule(made.how):
            missing = [o for o in made.operands if isinstance(o, Signal) and id(o) not in walk.sizes]
            if missing:
                waiting += missing
                continue
            found = _smaller(found, _by_equation(walk, made.how, made.operands, made.place))
        walk.sizes[id(last)] = last, found
        waiting.pop()
    return _known(walk, value)


def _known(walk: Walk, value: Any) -> Size | None:
    if isinstance(value, Signal):
        return walk.sizes[id(value)][1]
    if not is_constant(value) or not _is_numbers(value):
        return None
    with at_once(value):
        return Size(sizes_of(wide(value)))


def _is_numbers(value: Any) -> bool:
    kind = jnp.result_type(value)
    return jnp.issubdtype(kind, np.number) or jnp.issubdtype(kind, np.bool_)


def _by_node(signal: Signal, depth: int = 0) -> Size | None:
    """What a signal's node says of it, and a few before that."""
    node, straight = signal.node, affine(signal.expr)
    most = largest(signal)
    ball = None
    if isinstance(node, Confined):
        balls = node.ball.reshape(node.shape)
        with at_once(0.0):
            radius = up(node.radius)
            ball = Size(jnp.full(node.shape, radius), balls, jnp.full(balls.max(initial=-1) + 1, radius))
    elif isinstance(node, Scaled) and depth < _DEEPEST:
        below = _by_node(node.inputs[0], depth + 1)
        if below is not None:
            with at_once(below.entries, node.by):
                ball = times(below, Size(jnp.broadcast_to(sizes_of(wide(node.by)), node.shape)))
    if ball is not None and straight is not None and not straight[1]:
        places = signal.places
        if not np.any(places < 0):
            with at_once(ball.entries):
                read = Size(ball.entries.reshape(-1), None if ball.balls is None else ball.balls.ravel(), ball.radii)
                return scaled(read.moved(lambda x: taken(x, places)), abs(straight[0]))
    if most == math.inf:
        return None
    with at_once(0.0):
        return Size(jnp.broadcast_to(up(most), signal.shape))


_DEEPEST = 8  # scales after one another; further back, equations tell


Rule = Callable[[core.JaxprEqn, list[Any], list[Size | None]], Any]
_RULES: dict[str, Rule] = {}
"""By the primitive: of the equation, its operands and what is known of them; a list of results, or one."""


def _rule(*names: str) -> Callable[[Rule], Rule]:
    def put(function: Rule) -> Rule:
        _RULES.update(dict.fromkeys(names, function))
        return function

    return put


def _has_rule(how: Any) -> bool:
    return callable(how) or how.primitive.name in _RULES


def _smaller(one: Size | None, other: Size | None) -> Size | None:
    """What both say, with the balls of the second."""
    if one is None or other is None:
        return other if one is None else one
    with at_once(one.entries, other.entries):
        return dataclasses.replace(other, entries=jnp.minimum(one.entries, other.entries))


def _by_equation(walk: Walk, how: Any, operands: Sequence[Any], place: int) -> Size | None:
    sizes = [_known(walk, o) for o in operands]
    numbers = [s.entries for s in sizes if s is not None]
    with at_once(*numbers):
        if callable(how):
            return how(*sizes) if all(s is not None for s in sizes) else None
        found = _RULES[how.primitive.name](how, list(operands), sizes)
        return found[place] if isinstance(found, list) else found


@_rule("add", "add_any", "sub")
def _add(eqn: core.JaxprEqn, operands: list[Any], sizes: list[Size | None]) -> Any:
    a, b = sizes
    return None if a is None or b is None else plus(a, b)


@_rule("mul")
def _mul(eqn: core.JaxprEqn, operands: list[Any], sizes: list[Size | None]) -> Any:
    a, b = sizes
    if a is None or b is None:
        return None
    return times(a, b) if a.balls is not None else times(b, a)


@_rule("div")
def _div(eqn: core.JaxprEqn, operands: list[Any], sizes: list[Size | None]) -> Any:
    a, b = sizes
    if a is None or b is None or not is_constant(operands[1]):
        return None
    return times(a, Size(reciprocals(jnp.abs(wide(operands[1])))))


@_rule(
    *("neg", "abs", "reduce_precision", "convert_element_type", "copy", "stop_gradient", "real", "imag"),
    *("name", "sharding_constraint"),
)
def _alike(eqn: core.JaxprEqn, operands: list[Any], sizes: list[Size | None]) -> Any:
    return sizes[0]


@_rule("max", "min")
def _extreme(eqn: core.JaxprEqn, operands: list[Any], sizes: list[Size | None]) -> Any:
    a, b = sizes
    return (
        None if a is None or b is None else largest_of(*(Size(x) for x in jnp.broadcast_arrays(a.entries, b.entries)))
    )


@_rule("select_n")
def _select(eqn: core.JaxprEqn, operands: list[Any], sizes: list[Size | None]) -> Any:
    cases = [s for s in sizes[1:] if s is not None]
    return largest_of(*cases) if len(cases) == len(sizes) - 1 else None


@_rule("square", "integer_pow")
def _power(eqn: core.JaxprEqn, operands: list[Any], sizes: list[Size | None]) -> Any:
    y = eqn.params.get("y", 2)
    if sizes[0] is None or not 1 <= y <= 16:
        return None
    return Size(functools.reduce(product, [sizes[0].entries] * y))


@_rule("exp")
def _exp(eqn: core.JaxprEqn, operands: list[Any], sizes: list[Size | None]) -> Any:
    return None if sizes[0] is None else Size(round_up(jnp.exp(sizes[0].entries), 64))


@_rule("reshape", "squeeze", "expand_dims", "transpose", "rev", "slice", "broadcast_in_dim", "tile")
def _move(eqn: core.JaxprEqn, operands: list[Any], sizes: list[Size | None]) -> Any:
    return None if sizes[0] is None else sizes[0].moved(lambda x: evaluate(eqn, [x])[0])


@_rule("gather", "dynamic_slice")
def _read(eqn: core.JaxprEqn, operands: list[Any], sizes: list[Size | None]) -> Any:
    if sizes[0] is None or not all(map(is_known, operands[1:])) or eqn.params.get("fill_value") is not None:
        return None
    return Size(evaluate(eqn, [sizes[0].entries, *operands[1:]])[0])


@_rule("split", "unstack")
def _split(eqn: core.JaxprEqn, operands: list[Any], sizes: list[Size | None]) -> Any:
    if sizes[0] is None:
        return None
    part = lambda place, x: evaluate(eqn, [x])[place]  # noqa: E731
    return [sizes[0].moved(functools.partial(part, place)) for place in range(len(eqn.outvars))]


@_rule("concatenate", "stack", "pad")
def _join(eqn: core.JaxprEqn, operands: list[Any], sizes: list[Size | None]) -> Any:
    parts = [s.entries for s in sizes if s is not None]
    return Size(evaluate(eqn, parts)[0]) if len(parts) == len(sizes) else None


@_rule("reduce_max", "reduce_min")
def _reduce_extreme(eqn: core.JaxprEqn, operands: list[Any], sizes: list[Size | None]) -> Any:
    return None if sizes[0] is None else Size(top(sizes[0].entries, tuple(eqn.params["axes"])))


@_rule("reduce_sum")
def _sum(eqn: core.JaxprEqn, operands: list[Any], sizes: list[Size | None]) -> Any:
    if sizes[0] is None:
        return None
    axes, entries = eqn.params["axes"], sizes[0].entries
    count = math.prod(entries.shape[a] for a in axes)
    plain = round_up(jnp.sum(entries, axis=axes) * (1 + gamma(count, entries.dtype)), 4)
    together = product(sizes[0].length(axes), jnp.asarray(constant_up(math.sqrt(count), entries.dtype)))
    return Size(jnp.minimum(plain, together))


@_rule("dot_general")
def _dot(eqn: core.JaxprEqn, operands: list[Any], sizes: list[Size | None]) -> Any:
    a, b = sizes
    if a is None or b is None:
        return None
    numbers = (contract, batch) = eqn.params["dimension_numbers"]
    count = math.prod(a.entries.shape[i] for i in contract[0])
    entries = dot_product(a.entries, b.entries, numbers, count)
    free = [[i for i in range(s.entries.ndim) if i not in (*contract[k], *batch[k])] for k, s in enumerate((a, b))]
    lengths = []
    for k, s in enumerate((a, b)):
        left = [i for i in range(s.entries.ndim) if i not in contract[k]]
        lengths.append(jnp.transpose(s.length(contract[k]), [left.index(i) for i in (*batch[k], *free[k])]))
    shared, (n, m) = len(batch[0]), map(len, free)
    rows = lengths[0].reshape(*lengths[0].shape, *(1,) * m)
    columns = lengths[1].reshape(*lengths[1].shape[:shared], *(1,) * n, *lengths[1].shape[shared:])
    found = Size(jnp.minimum(entries, product(rows, columns)))
    for k, at in ((1, shared + n), (0, shared)):  # the first of the constant's axes in the result
        if free[k] and is_constant(operands[k]) and not jnp.iscomplexobj(operands[k]):
            *others, last = free[k]
            kernel = jnp.transpose(wide(operands[k]), (*batch[k], *others, *contract[k], last))
            lead = kernel.shape[: shared + len(others)]
            if not kernel.size:
                return found
            norms = jax.vmap(dense.bound)(kernel.reshape(math.prod(lead), count, -1)).reshape(lead)
            own = norms.reshape(*lead[:shared], *(1,) * (len(free[1 - k]) if k else 0), *lead[shared:])
            signal = lengths[1 - k]
            if k:
                signal = signal.reshape(*signal.shape, *(1,) * len(others))
            else:
                own = own.reshape(*own.shape, *(1,) * len(free[1]))
                signal = signal.reshape(*signal.shape[:shared], *(1,) * len(others), *signal.shape[shared:])
            radii = product(own, signal)
            balls = np.arange(radii.size).reshape(radii.shape)
            balls = np.broadcast_to(np.expand_dims(balls, at + len(others)), found.entries.shape)
            return Size(found.entries, balls, radii.reshape(-1))
    return found


@_rule("conv_general_dilated")
def _conv(eqn: core.JaxprEqn, operands: list[Any], sizes: list[Size | None]) -> Any:
    a, b = sizes
    if a is None or b is None or not is_constant(operands[1]):
        return None
    p = eqn.params
    found = lax.conv_general_dilated(
        a.entries, b.entries, p["window_strides"], p["padding"], p["lhs_dilation"], p["rhs_dilation"],
        p["dimension_numbers"], p["feature_group_count"], p["batch_group_count"], precision=lax.Precision.HIGHEST,
    )  # fmt: skip
    count, kind = b.entries.size // b.entries.shape[p["dimension_numbers"].rhs_spec[0]], found.dtype
    # Fast algorithms are off by more than a sum is, by a few roundings of the largest.
    slack = 64 * gamma(count + 2, kind) * jnp.max(found, initial=0)
    return Size(round_up(found + slack + float(jnp.finfo(kind).tiny) * count, 4))
