"""Products of two signals that are both bounded: entry by entry, of matrices, and the means that attention takes."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.extend import core

from fantastic4.expression import Expr, X, affine, const
from fantastic4.lipschitz.fixed import Softmax
from fantastic4.lipschitz.graph import Label, Node, Signal, multiplicity, whole
from fantastic4.lipschitz.numbers import Numbers, above, largest
from fantastic4.lipschitz.operands import at_once
from fantastic4.lipschitz.propagation import size
from fantastic4.lipschitz.sizes import top
from fantastic4.lipschitz.trace import Walk, out_shape


@dataclasses.dataclass(eq=False)
class Product(Node):
    """A product of two signals, entry by entry or of matrices.

    Attributes:
      sizes: what their entries are at most, in absolute value; of matrices their ℓ2 norms.
    """

    sizes: tuple[float | Array, float | Array] = (math.inf, math.inf)

    def _apart(self, a: Array, b: Array, how: Numbers) -> list[Array]:
        of_a, of_b = (_narrow(s, how) for s in self.sizes)
        return [how.times(of_b, a), how.times(of_a, b)]

    def lipschitz(self, given: Sequence[Array], how: Numbers) -> Array:
        """‖a b - a' b'‖ ≤ |b| ‖a - a'‖ + |a'| ‖b - b'‖."""
        return how.sum(self._apart(given[0], given[1], how))

    def curvature(self, given: Sequence[tuple[Array, Array]], how: Numbers) -> Array:
        """The derivative is b Da + a Db: by that of each, and twice by how far one moves while the other does."""
        (a, bent_a), (b, bent_b) = given[:2]
        return how.sum([*self._apart(bent_a, bent_b, how), how.times(2.0, a, b)])


@dataclasses.dataclass(eq=False)
class Entrywise(Product):
    """Of entries."""


@dataclasses.dataclass(eq=False)
class Matrices(Product):
    """Of matrices, which its result is in the shape (batch, rows, columns), each of any number of axes.

    Attributes:
      batch: how many axes that is.
      rows: likewise.
      lengths: of the vectors whose dot products it is, those that are rows and those that are columns, at most.
    """

    batch: int = 0
    rows: int = 0
    lengths: tuple[float | Array, float | Array] = (math.inf, math.inf)


@dataclasses.dataclass(eq=False)
class Between(Node):
    r"""``(1 - z) a + z b`` with z between 0 and 1, as in a GRU; its inputs are z, a, b.

    Attributes:
      apart: what \|a - b\| is at most.
    """

    apart: float = math.inf

    def lipschitz(self, given: Sequence[Array], how: Numbers) -> Array:
        """Along da and db no further than the larger of two entries, along dz by a - b."""
        z, a, b = given
        return self._first(z, a, b, how)

    def _first(self, z: Array, a: Array, b: Array, how: Numbers) -> Array:
        return how.times(_UP, how.sum([how.times(self.apart, z), how.root_sum_squares([a, b])]))

    def curvature(self, given: Sequence[tuple[Array, Array]], how: Numbers) -> Array:
        """By the derivatives of each, and twice by how far a - b moves while z does."""
        (z, bent_z), (a, bent_a), (b, bent_b) = given
        return how.sum([self._first(bent_z, bent_a, bent_b, how), how.times(2.0 * _UP, z, how.sum([a, b]))])


@dataclasses.dataclass(eq=False)
class Means(Matrices):
    r"""Means of vectors v by the weights p = softmax(s): its inputs are p and v, in either order, s; and q, k.

    Along ds a mean moves by Σ p_k (v_k - v̄) ds_k. In a direction in which the v lie within ±R that is at most
    ‖ds‖ √(Σ p_k² (y_k - ȳ)²), largest for y = ±R: with the weight P on one side, 8 P² (1 - P)² R² ≤ R²/2. Where
    s_k = c qᵀk_k, along dq it moves by the covariance of v and k, of at most R max‖k‖, and along dk as by the ds
    ‖c Q dKᵀ‖. Where some of the s are constants, as a mask makes them, the sums have fewer terms, and no larger bounds;
    where one dot product is several of the s of a softmax, it stands for their sum, with the mean of their v. Where
    the probabilities of one softmax go into several means, these are one, of longer vectors with zeros for the others:
    of the same R. So they may go into means anyhow, if each goes into one and all in one are of one softmax.

    Attributes:
      first: whether p is the first input.
      radius: R, the length of the longest v.
      by: \|c\|, where s is dot products.
      scores: the norm of Q, and the length of the longest k.
    """

    first: bool = True
    radius: float | Array = math.inf
    by: float = math.inf
    scores: tuple[float | Array, float | Array] = (math.inf, math.inf)

    def lipschitz(self, given: Sequence[Array], how: Numbers) -> Array:
        """By s, by what that is made of, or as any product: the smallest."""
        weights, moving = (self.sizes[0], given[1]) if self.first else (self.sizes[1], given[0])
        by_vectors = how.times(_narrow(weights, how), moving)
        mean = how.times(_narrow(self.radius, how), _ROOT_HALF)
        found = [super().lipschitz(given, how), how.sum([by_vectors, how.times(mean, given[2])])]
        if len(given) > 3:
            norm, longest = (_narrow(x, how) for x in self.scores)
            by_query = how.times(_narrow(self.radius, how), longest, self.by, given[3])
            found.append(how.sum([by_vectors, by_query, how.times(mean, norm, self.by, given[4])]))
        return functools.reduce(jnp.minimum, found)


UNBOUNDED = (
    "multiplies two signals that both depend on the input, not both known to be bounded: no Lipschitz constant on the "
    "whole space. Attention and gates have one behind a normalisation, as in pre-norm transformers"
)
_UP = 1 + 1e-8
_ROOT_HALF = math.sqrt(0.5) * (1 + 1e-15)


def _narrow(number: float | Array, how: Numbers) -> Array:
    return how.up(number) if isinstance(number, float) else how.narrow(number)


def _most(walk: Walk, signal: Signal) -> float | Array | None:
    """What entries are at most; None where that is not known."""
    known = largest(signal)
    if known < math.inf:
        return known
    found = size(walk, signal)
    return None if found is None else found.most


def of_entries(walk: Walk, a: Signal, b: Signal, operands: Sequence[Signal], label: Label) -> Signal | None:
    """A product of bounded functions, as tanh(u) · sigmoid(v), and of what is a layer of such.

    ``a`` and ``b`` are the operands, spread to one shape.
    """
    one, two = (_most(walk, operand) for operand in operands)
    if one is None or two is None:
        return None
    both = isinstance(one, float) and isinstance(two, float)
    most = math.nextafter(float(one) * float(two), math.inf) if both else math.inf
    return whole(Entrywise(label, a.shape, (a, b), sizes=(one, two), most=most))


def of_matrices(walk: Walk, eqn: core.JaxprEqn, operands: Sequence[Signal]) -> Any:
    """A product of two signals that are both bounded, as QKᵀ and softmax(QKᵀ) V of what is normalised."""
    contract, batch = eqn.params["dimension_numbers"]
    found = [size(walk, signal) for signal in operands]
    sizes = [s for s in found if s is not None]
    if len(sizes) < 2:
        return walk.refuse(eqn, UNBOUNDED)
    free = [
        [a for a in range(len(s.shape)) if a not in (*c, *b)] for s, c, b in zip(operands, contract, batch, strict=True)
    ]
    with at_once(*(s.entries for s in sizes)):
        norms = [s.norm(c, f) for s, c, f in zip(sizes, contract, free, strict=True)]
        longest = [top(s.length(c)) for s, c in zip(sizes, contract, strict=True)]
    node = Matrices(
        walk.label(eqn), out_shape(eqn), tuple(operands), sizes=(norms[0], norms[1]), batch=len(batch[0]),
        rows=len(free[0]), lengths=(longest[0], longest[1]),
    )  # fmt: skip
    for own in (0, 1):
        if _are_weights(operands[own], contract[own]):
            with at_once(*(s.entries for s in sizes)):
                radius = top(sizes[1 - own].length(free[1 - own]))
            return whole(_means(node, own, radius))
    return whole(node)


def _are_weights(signal: Signal, contracted: Sequence[int]) -> bool:
    """Whether what is summed over are probabilities of one softmax each, used once."""
    node, places = signal.node, signal.places
    if not isinstance(node, Softmax) or signal.expr != X or np.any(places < 0) or multiplicity(places) > 1:
        return False
    rows = np.moveaxis(node.ball[places], contracted, range(-len(contracted), 0))
    rows = rows.reshape(-1, math.prod(rows.shape[-len(contracted) :]))
    return bool(rows.size and np.all(rows == rows[:, :1]))


def _means(node: Matrices, own: int, radius: Array) -> Means:
    weights = node.inputs[own].node
    (scores,) = weights.inputs
    fields = {f.name: getattr(node, f.name) for f in dataclasses.fields(node) if f.init}
    fields |= {"first": own == 0, "radius": radius, "inputs": (*node.inputs, scores)}
    straight, of = affine(scores.expr), scores.node
    if isinstance(weights, Softmax) and isinstance(of, Matrices) and straight is not None:
        query = _query(weights.ball.reshape(scores.shape), scores, of)
        if query is not None:
            fields["by"] = above(straight[0])
            fields["scores"] = of.sizes[query], of.lengths[1 - query]
            fields["inputs"] += of.inputs[query], of.inputs[1 - query]
    return Means(**fields)


def _query(ball: np.ndarray, scores: Signal, of: Matrices) -> int | None:
    """Which factor's vectors are each in the dot products of one softmax alone; None where that is true of neither."""
    places, balls = scores.places.ravel(), ball.ravel()
    read = places >= 0
    shape = [math.prod(part) for part in np.split(np.array(of.shape), [of.batch, of.batch + of.rows])]
    batch, row, column = np.unravel_index(places[read], shape)
    for query, vector in enumerate((batch * shape[1] + row, batch * shape[2] + column)):
        pairs = np.unique(np.stack([balls[read], vector]), axis=1)
        if len(np.unique(pairs[1])) == pairs.shape[1]:
            return query
    return None


def between(one: Signal, two: Signal, label: Label) -> Signal | None:
    """``(1 - z) a + z b`` of two products, where z lies between 0 and 1: both z and 1 - z are at most 1."""
    if not all(isinstance(s.node, Entrywise) and s.plain and s.shape == s.node.shape for s in (one, two)):
        return None
    for z, a in (one.node.inputs, one.node.inputs[::-1]):
        for rest, b in (two.node.inputs, two.node.inputs[::-1]):
            if not z.same_entries(rest) or not _add_to_one(z.expr, rest.expr):
                continue
            if max(largest(z), largest(rest)) > 1 + 1e-9:
                continue
            sizes = [largest(a), largest(b)]
            if max(sizes) < math.inf:
                apart = math.nextafter(sum(sizes), math.inf)
                return whole(Between(label, one.shape, (z, a, b), apart=apart, most=max(sizes) * _UP))
    return None


def _add_to_one(a: Expr, b: Expr) -> bool:
    return a == Expr("sub", (const(1.0), b)) or b == Expr("sub", (const(1.0), a))
