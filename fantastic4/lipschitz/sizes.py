"""How large the entries of a signal are at most, and how long rows of them, whatever the input is.

So a product of two signals has a Lipschitz constant where both are bounded: of what is normalised, squashed, or a
matrix of such. It is looked for where a product asks, back through the equations that made its factors: each entry by
the absolute values of what it is computed from; and entries that are known to lie in a ball, as those that have been
normalised together, by its radius too, which for a row of n is up to √n smaller than their largest values say.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.extend import core

from fantastic4 import dense
from fantastic4.expression import affine
from fantastic4.lipschitz.fixed import Confined, Scaled
from fantastic4.lipschitz.graph import Signal
from fantastic4.lipschitz.numbers import largest
from fantastic4.lipschitz.trace import Walk, at_once, evaluate, is_constant, is_known, wide
from fantastic4.rounding import constant_up, gamma, product_up, round_up, subnormal_norm


@dataclasses.dataclass(frozen=True)
class Size:
    """Upper bounds, for all inputs, of an array that depends on the input.

    Attributes:
      entries: of each entry's absolute value.
      balls: for each entry, in which ball it lies with others; None where nothing is known of several together.
      radii: of the balls: the root of the sum of squares of all entries in one is at most that.
    """

    entries: Array
    balls: np.ndarray | None = None
    radii: Array | None = None

    @property
    def most(self) -> Array:
        """Of all entries."""
        return top(self.entries)

    def length(self, axes: Sequence[int]) -> Array:
        """Of the root of the sum of squares over axes, which are gone."""
        by_entries = _root_sum_squares(self.entries, tuple(axes))
        if self.balls is None or self.radii is None:
            return by_entries
        count = math.prod(self.balls.shape[a] for a in axes)
        rows = np.moveaxis(self.balls, axes, range(-len(axes), 0)).reshape(*by_entries.shape, count)
        rows = np.sort(rows, axis=-1)
        first = np.diff(rows, axis=-1, prepend=-1) != 0
        return _by_balls(by_entries, self.radii, rows, first)

    def norm(self, rows: Sequence[int], columns: Sequence[int]) -> Array:
        """Of the ℓ2 norms of all matrices with these axes, which between them are those that no batch is along."""
        found = []
        for one, other in ((columns, rows), (rows, columns)):
            lengths = self.length(one)
            gone = sorted(one)
            left = tuple(a - sum(g < a for g in gone) for a in other)
            found.append(top(_root_sum_squares(lengths, left)))
        return jnp.minimum(*found)

    def moved(self, move: Callable[[Any], Any]) -> Size:
        """What moves entries does so to these: balls are kept where none is there twice."""
        entries = move(self.entries)
        if self.balls is None:
            return Size(entries)
        places = np.asarray(move(np.arange(self.balls.size, dtype=np.int32).reshape(self.balls.shape)))
        if places.size and (places.min() < 0 or np.bincount(places.ravel()).max() > 1):
            return Size(entries)
        return Size(entries, self.balls.ravel()[places], self.radii)


@functools.partial(jax.jit, static_argnames="axes")
def top(x: Array, axes: tuple[int, ...] | None = None) -> Array:
    """The largest of numbers that are not negative: on a CPU, a maximum over thousands may drop a NaN."""
    return jnp.where(jnp.any(jnp.isnan(x), axis=axes), jnp.nan, jnp.max(x, axis=axes, initial=0))


def _up(value: float | Fraction) -> Array:
    """A number in the widest type there is, rounded up: not 0, where it vanishes there."""
    dtype = jnp.result_type(float)
    try:
        number = float(value) * (1 + 1e-15)
    except OverflowError:
        number = math.inf
    return jnp.asarray(constant_up(max(number, float(jnp.finfo(dtype).tiny)) if value > 0 else 0.0, dtype))


# Compiled together: one by one, these operations would be a hundred programs.
@functools.partial(jax.jit, static_argnames="axes")
def _root_sum_squares(x: Array, axes: tuple[int, ...]) -> Array:
    """Of numbers that are not negative, rounded up."""
    count = math.prod(x.shape[a] for a in axes)
    return _root_of_squares(x, lambda squares: jnp.sum(squares, axis=axes), count)


def _root_of_squares(x: Array, add: Callable[[Array], Array], count: int) -> Array:
    """√ of sums of squares of numbers that are not negative, at most ``count`` in each, rounded up."""
    most = lax.stop_gradient(top(x))
    scale = jnp.where((most > 0) & (most < jnp.inf), most, 1)
    # Squares that vanish are below the smallest float each; the root of zero has no derivative.
    vanished = float(jnp.finfo(x.dtype).tiny) * count
    inside = round_up((add((x / scale) ** 2) + vanished) * (1 + gamma(count + 2, x.dtype)), 8)
    return jnp.where(most == 0, 0, product_up(round_up(jnp.sqrt(inside), 4), scale))


@jax.jit
def _by_balls(by_entries: Array, radii: Array, rows: Array, first: Array) -> Array:
    """Lengths of rows by the balls that their entries lie in, each counted once."""
    found = jnp.where(first, radii[rows], 0)
    return jnp.minimum(by_entries, _root_sum_squares(found, (found.ndim - 1,)))


@functools.partial(jax.jit, static_argnames="count")
def _of_balls(x: Array, balls: Array, count: int) -> Array:
    """Of the entries in each ball the root of the sum of squares, rounded up."""
    add = functools.partial(jax.ops.segment_sum, segment_ids=balls, num_segments=count)
    return _root_of_squares(x, add, x.size)


@functools.partial(jax.jit, static_argnames="count")
def _largest_of_balls(x: Array, balls: Array, count: int) -> Array:
    return jnp.maximum(jax.ops.segment_max(x, balls, count), 0)


@jax.jit
def _product(a: Array, b: Array) -> Array:
    return product_up(*jnp.broadcast_arrays(a, b))


@jax.jit
def _sum_of(a: Array, b: Array) -> Array:
    return round_up(a + b, 2)


@jax.jit
def _sizes_of(x: Array) -> Array:
    if jnp.iscomplexobj(x):  # |a + ib| ≤ |a| + |b|, which neither vanishes nor overflows
        return _sum_of(_sizes_of(x.real), _sizes_of(x.imag))
    return jnp.maximum(jnp.abs(x), subnormal_norm(x))


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
        return Size(_sizes_of(wide(value)))


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
            radius = _up(node.radius)
            ball = Size(jnp.full(node.shape, radius), balls, jnp.full(balls.max(initial=-1) + 1, radius))
    elif isinstance(node, Scaled) and depth < _DEEPEST:
        below = _by_node(node.inputs[0], depth + 1)
        if below is not None:
            with at_once(below.entries, node.by):
                ball = _times(below, Size(jnp.broadcast_to(_sizes_of(wide(node.by)), node.shape)))
    if ball is not None and straight is not None and not straight[1]:
        places = signal.places
        if not np.any(places < 0):
            with at_once(ball.entries):
                read = Size(ball.entries.reshape(-1), None if ball.balls is None else ball.balls.ravel(), ball.radii)
                return _scaled(read.moved(lambda x: x[places]), abs(straight[0]))
    if most == math.inf:
        return None
    with at_once(0.0):
        return Size(jnp.broadcast_to(_up(most), signal.shape))


_DEEPEST = 8  # scales after one another; further back, equations tell


def _scaled(of: Size, by: Fraction) -> Size:
    if by == 1:
        return of
    factor = _up(by)
    return Size(_product(of.entries, factor), of.balls, None if of.radii is None else _product(of.radii, factor))


def _times(a: Size, b: Size) -> Size:
    """Of products of entries; the balls are those of the first, by the largest in each."""
    entries = _product(a.entries, b.entries)
    if a.balls is None or a.radii is None or a.balls.shape != entries.shape:
        return Size(entries)
    by = jnp.broadcast_to(b.entries, entries.shape).ravel()
    return Size(entries, a.balls, _product(a.radii, _largest_of_balls(by, a.balls.ravel(), len(a.radii))))


def _plus(a: Size, b: Size) -> Size:
    """Of sums of entries."""
    entries = _sum_of(a.entries, b.entries)
    for one, other in ((a, b), (b, a)):
        if one.balls is None or one.radii is None or one.balls.shape != entries.shape:
            continue
        if other.balls is not None and other.radii is not None and np.array_equal(one.balls, other.balls):
            radii = other.radii
        else:
            spread = jnp.broadcast_to(other.entries, entries.shape).ravel()
            radii = _of_balls(spread, one.balls.ravel(), len(one.radii))
        return Size(entries, one.balls, _sum_of(one.radii, radii))
    return Size(entries)


def largest_of(*sizes: Size) -> Size:
    """Of entries of one of several arrays."""
    return Size(functools.reduce(jnp.maximum, [s.entries for s in sizes]))


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
    return None if a is None or b is None else _plus(a, b)


@_rule("mul")
def _mul(eqn: core.JaxprEqn, operands: list[Any], sizes: list[Size | None]) -> Any:
    a, b = sizes
    if a is None or b is None:
        return None
    return _times(a, b) if a.balls is not None else _times(b, a)


@_rule("div")
def _div(eqn: core.JaxprEqn, operands: list[Any], sizes: list[Size | None]) -> Any:
    a, b = sizes
    if a is None or b is None or not is_constant(operands[1]):
        return None
    return _times(a, Size(_reciprocals(jnp.abs(wide(operands[1])))))


@jax.jit
def _reciprocals(x: Array) -> Array:
    over = jnp.maximum(round_up(1 / x, 4), float(jnp.finfo(x.dtype).tiny))
    return jnp.where(x == jnp.inf, 0, over)


@_rule("neg", "abs", "reduce_precision", "convert_element_type", "copy", "stop_gradient", "real", "imag")
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
    return Size(functools.reduce(_product, [sizes[0].entries] * y))


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
    together = _product(sizes[0].length(axes), jnp.asarray(constant_up(math.sqrt(count), entries.dtype)))
    return Size(jnp.minimum(plain, together))


@functools.partial(jax.jit, static_argnames=("numbers", "count"))
def _dot_product(a: Array, b: Array, numbers: Any, count: int) -> Array:
    product = lax.dot_general(a, b, numbers, precision=lax.Precision.HIGHEST)
    # Products that vanish are below the smallest float each.
    vanished = float(jnp.finfo(product.dtype).tiny) * count
    return round_up(product * (1 + gamma(count + 2, product.dtype)) + vanished, 4)


@_rule("dot_general")
def _dot(eqn: core.JaxprEqn, operands: list[Any], sizes: list[Size | None]) -> Any:
    a, b = sizes
    if a is None or b is None:
        return None
    numbers = (contract, batch) = eqn.params["dimension_numbers"]
    count = math.prod(a.entries.shape[i] for i in contract[0])
    entries = _dot_product(a.entries, b.entries, numbers, count)
    free = [[i for i in range(s.entries.ndim) if i not in (*contract[k], *batch[k])] for k, s in enumerate((a, b))]
    lengths = []
    for k, s in enumerate((a, b)):
        left = [i for i in range(s.entries.ndim) if i not in contract[k]]
        lengths.append(jnp.transpose(s.length(contract[k]), [left.index(i) for i in (*batch[k], *free[k])]))
    shared, (n, m) = len(batch[0]), map(len, free)
    rows = lengths[0].reshape(*lengths[0].shape, *(1,) * m)
    columns = lengths[1].reshape(*lengths[1].shape[:shared], *(1,) * n, *lengths[1].shape[shared:])
    found = Size(jnp.minimum(entries, _product(rows, columns)))
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
            radii = _product(own, signal)
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
    product = lax.conv_general_dilated(
        a.entries, b.entries, p["window_strides"], p["padding"], p["lhs_dilation"], p["rhs_dilation"],
        p["dimension_numbers"], p["feature_group_count"], p["batch_group_count"], precision=lax.Precision.HIGHEST,
    )  # fmt: skip
    count, kind = b.entries.size // b.entries.shape[p["dimension_numbers"].rhs_spec[0]], product.dtype
    # Fast algorithms are off by more than a sum is, by a few roundings of the largest.
    slack = 64 * gamma(count + 2, kind) * jnp.max(product, initial=0)
    return Size(round_up(product + slack + float(jnp.finfo(kind).tiny) * count, 4))
