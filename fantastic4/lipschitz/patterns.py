"""Operations that arrive in pieces, recognised by what the pieces compute, never by a name."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
from jax import Array

from fantastic4.expression import Expr, X
from fantastic4.lipschitz.fixed import LogSoftmax, LogSumExp, Reduced, Softmax
from fantastic4.lipschitz.graph import Label, Node, Signal, whole
from fantastic4.lipschitz.nodes import Sum


def spread_of(small: Signal, shape: tuple[int, ...], axes: Sequence[int]) -> bool:
    """Whether a signal is all of a reduced node, spread back over the axes that were reduced."""
    kept = [1 if a in axes else n for a, n in enumerate(shape)]
    wanted = np.broadcast_to(np.arange(int(np.prod(kept))).reshape(kept), shape)
    return small.shape == shape and np.array_equal(small.places, wanted)


def _level(signal: Signal, axes: Sequence[int]) -> bool:
    """Whether a signal is the same along axes."""
    places = signal.places
    return bool(np.all(places == np.take(places, [0], axis=axes[0]))) if len(axes) == 1 else all(
        _level(signal, (a,)) for a in axes
    )  # fmt: skip


def _without_level(signal: Signal, axes: Sequence[int]) -> tuple[Signal, tuple[Signal, ...]]:
    """X for x - c with c the same along axes, and c: softmax and its kin do not see it."""
    node = signal.node
    if (
        signal.plain
        and signal.shape == node.shape
        and isinstance(node, Sum)
        and node.sign < 0
        and _level(node.inputs[1], axes)
    ):
        return node.inputs[0], (node.inputs[1],)
    return signal, ()


def summed(node: Node) -> tuple[Signal, tuple[int, ...]] | None:
    """What a node is the sum of, and over which axes."""
    if not isinstance(node, Reduced) or node.label.operation != "reduce_sum" or not node.axes:
        return None
    return node.inputs[0], node.axes


def _sum_of_exponentials(signal: Signal, exponent: Signal) -> tuple[int, ...] | None:
    """The axes, where a signal's node is the sum of exp(exponent) over axes."""
    found = summed(signal.node)
    if found is None or found[0].expr != Expr("exp", (exponent.expr,)) or not found[0].same_entries(exponent):
        return None
    return found[1]


def softmax(top: Signal, bottom: Signal, label: Label) -> Signal | None:
    r"""``exp(z) / Σ exp(z)``: its Jacobian diag(p) - p pᵀ has a norm of at most ½.

    Its second derivative in three directions is Σ p (u - ū) (v - v̄) (w - w̄), with means under p: largest, as it is
    symmetric, where all three are one unit vector (Banach), whose entries lie within √2. A third central moment on an
    interval of length r is at most r³ / (6√3): of mean 0 and at most M, the mean of (M - y) (y + σ²/M)² ≥ 0 says that
    it is at most σ² (M - σ²/M), with σ² ≤ (r - M) M. So ‖D‖ ≤ √(2/27), which two entries reach.
    """
    if top.expr.op != "exp" or bottom.expr != X:
        return None
    exponent = dataclasses.replace(top, expr=top.expr.args[0])
    axes = _sum_of_exponentials(bottom, exponent)
    if axes is None or not spread_of(bottom, top.shape, axes):
        return None
    source, level = _without_level(exponent, axes)
    name = dataclasses.replace(label, operation="softmax")
    bend = (2 / 27) ** 0.5 * (1 + 1e-15)
    found = Softmax(
        name, top.shape, (source,), 0.5, bend=bend, unmoved=level, most=1.0, least=0.0, axes=tuple(axes), radius=1.0
    )
    return whole(found)


def softmax_product(a: Signal, b: Signal, label: Label) -> Signal | None:
    """``exp(z) · (1 / Σ exp(z))``."""
    over = Expr("div", (Expr("const", (), 1.0), X))
    for top, bottom in ((a, b), (b, a)):
        if bottom.expr == over:
            return softmax(top, dataclasses.replace(bottom, expr=X), label)
    return None


def log_softmax(a: Signal, b: Signal, label: Label) -> Signal | None:
    """``z - log Σ exp(z)``: its Jacobian I - 1pᵀ is a projection, of the norm √n ‖p‖ ≤ √n.

    Each entry bends as `logsumexp` does.
    """
    if isinstance(b.node, LogSumExp) and b.expr == X:
        axes = b.node.axes if a.expr == b.node.inputs[0].expr and a.same_entries(b.node.inputs[0]) else None
    else:
        axes = _sum_of_exponentials(b, a) if b.expr in _LOGS else None
    if axes is None or not spread_of(b, a.shape, axes):
        return None
    count = int(np.prod([a.shape[x] for x in axes]))
    source, level = _without_level(a, axes)
    name = dataclasses.replace(label, operation="log_softmax")
    root = count**0.5 * (1 + 1e-15)
    return whole(
        LogSoftmax(name, a.shape, (source,), root, bend=root / 2, axes=axes, unmoved=(*level, *b.node.unmoved))
    )


_LOGS = (Expr("log", (X,)), Expr("log", (Expr("abs", (X,)),)))


def logsumexp(a: Signal, b: Signal, label: Label) -> Signal | None:
    """``log Σ exp(x - c) + c``: its gradient is a vector of probabilities p, of length at most 1.

    Its Hessian is the covariance under p, of at most (largest - smallest)² / 4 ≤ ½ for unit vectors.
    """
    for outer, level in ((a, b), (b, a)):
        if outer.expr not in _LOGS or not isinstance(outer.node, Reduced) or outer.index is not None:
            continue
        (inner,) = outer.node.inputs
        exponent = dataclasses.replace(inner, expr=X)
        axes = _sum_of_exponentials(outer, exponent)
        node = exponent.node
        if axes is None or not exponent.plain or exponent.shape != node.shape:
            continue
        if not isinstance(node, Sum) or node.sign > 0 or outer.shape != level.shape:
            continue
        source, taken = node.inputs
        kept = [1 if i in axes else n for i, n in enumerate(source.shape)]
        if int(np.prod(kept)) != level.places.size:
            continue
        small = level.places.reshape(kept)
        same = taken.node is level.node and taken.expr == level.expr
        if same and np.array_equal(taken.places, np.broadcast_to(small, source.shape)):
            name = dataclasses.replace(label, operation="logsumexp")
            return whole(LogSumExp(name, outer.shape, (source,), bend=0.5, axes=axes, unmoved=(taken,)))
    return None


def padded(
    signal: Signal, axes: Sequence[int], taps: Sequence[int], p: dict[str, Any]
) -> tuple[Signal, str, Callable[[Array], Array]] | None:
    """What a signal was before Flax padded it around the border for this convolution, and how.

    Flax's "CIRCULAR" and "REFLECT" pad by (k - 1) d in all, half of it (rounded down) in front.
    """
    if signal.index is None or any(pad != (0, 0) for pad in p["padding"]):
        return None
    source = whole(signal.node)
    before = [(0, 0)] * len(signal.shape)
    shape = list(signal.shape)
    for axis, k, d in zip(axes, taps, p["rhs_dilation"], strict=True):
        total = (k - 1) * d
        before[axis] = (total // 2, total - total // 2)
        shape[axis] -= total
    if any(n < 1 for n in shape) or int(np.prod(shape)) != int(np.prod(signal.node.shape)):
        return None
    places = np.arange(int(np.prod(shape))).reshape(shape)
    ways: tuple[tuple[str, Literal["wrap", "reflect", "edge"]], ...]
    ways = (("CIRCULAR", "wrap"), ("REFLECT", "reflect"), ("EDGE", "edge"))
    for name, mode in ways:
        if np.array_equal(np.pad(places, before, mode=mode), signal.index):
            before_it = dataclasses.replace(source, shape=tuple(shape), expr=signal.expr, label=signal.label)
            return before_it, name, functools.partial(jnp.pad, pad_width=before, mode=mode)
    return None
