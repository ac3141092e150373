"""Rules of pooling, reductions and sorting."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.extend import core

from fantastic4.lipschitz.fixed import Fixed, Reduced
from fantastic4.lipschitz.graph import whole
from fantastic4.lipschitz.losses import weighed
from fantastic4.lipschitz.moves import moved, reshaped
from fantastic4.lipschitz.numbers import largest
from fantastic4.lipschitz.operands import Refused, evaluate
from fantastic4.lipschitz.pooling import Pool, window_pairs
from fantastic4.lipschitz.sparse import norm_above
from fantastic4.lipschitz.trace import Walk, out_shape, rule
from fantastic4.lipschitz.wrapped import wrapped


@rule("reduce_window_sum")
def _window_sum(walk: Walk, eqn: core.JaxprEqn, operands: list[Any]) -> Any:
    (signal,) = operands
    axes = tuple(pairs for pairs, _ in window_pairs(eqn.params, signal.shape))
    factor = math.prod(norm_above(*pairs, np.ones(len(pairs[0]))) for pairs in axes) * (1 + 1e-14 * len(axes))
    add = lambda x: evaluate(eqn, [x])[0]  # noqa: E731
    return whole(Pool(walk.label(eqn), out_shape(eqn), (signal,), factor, linear=True, apply=add, axes=axes))


@rule("reduce_window_max", "reduce_window_min")
def _window_max(walk: Walk, eqn: core.JaxprEqn, operands: list[Any]) -> Any:
    (signal,) = operands
    axes = window_pairs(eqn.params, signal.shape)
    if any(len(np.unique(windows)) < count for (windows, _), count in axes):  # of no entry, the largest is -∞
        walk.entered.strange()
    held = math.prod(int(np.bincount(entries, minlength=1).max()) for (_, entries), _ in axes)
    return whole(Fixed(walk.label(eqn), out_shape(eqn), (signal,), math.sqrt(held)))


@rule("reduce_sum")
def _reduce_sum(walk: Walk, eqn: core.JaxprEqn, operands: list[Any]) -> Any:
    (signal,), axes = operands, tuple(eqn.params["axes"])
    shape = out_shape(eqn)
    loss = weighed(signal, axes, walk.label(eqn))
    if loss is not None:
        signal, axes = loss
    if not axes:
        return reshaped(signal, shape)
    around = wrapped(signal, axes[0], walk.label(eqn)) if len(axes) == 1 else None
    if around is not None:
        return around
    count = math.prod(signal.shape[a] for a in axes)
    add = lambda x: jnp.sum(x, axis=axes)  # noqa: E731
    return whole(Reduced(walk.label(eqn), shape, (signal,), math.sqrt(count), linear=True, apply=add, axes=axes))


@rule("reduce_max", "reduce_min")
def _reduce_max(walk: Walk, eqn: core.JaxprEqn, operands: list[Any]) -> Any:
    (signal,), axes = operands, tuple(eqn.params["axes"])
    op, shape = eqn.primitive.name, out_shape(eqn)
    count = math.prod(signal.shape[a] for a in axes)
    if count == 0:
        return jnp.full(shape, -jnp.inf if op == "reduce_max" else jnp.inf)
    if count < 2:
        return reshaped(signal, shape)
    # Sorting stretches nothing, and the largest and the smallest are two entries of what is sorted.
    key = (id(signal.node), signal.expr, None if signal.index is None else signal.index.tobytes(), signal.shape, axes)
    if key not in walk.joined:
        label = dataclasses.replace(walk.label(eqn), operation="largest and smallest")
        walk.joined[key] = whole(Fixed(label, (2, *shape), (signal,), most=largest(signal)))
    both = walk.joined[key]
    return dataclasses.replace(moved(both, both.places[0 if op == "reduce_max" else 1]), label=walk.label(eqn))


@rule("top_k")
def _top_k(walk: Walk, eqn: core.JaxprEqn, operands: list[Any]) -> Any:
    (signal,) = operands
    # Some of what is sorted.
    found = whole(Fixed(walk.label(eqn), out_shape(eqn), (signal,), most=largest(signal)))
    return [found, Refused(f"{walk.label(eqn)} tells the places of the largest, which jump: take their values alone")]


@rule("sort")
def _sort(walk: Walk, eqn: core.JaxprEqn, operands: list[Any]) -> Any:
    if len(operands) != 1:
        return walk.refuse(eqn, "sorts one array by another, which jumps")
    return whole(Fixed(walk.label(eqn), operands[0].shape, (operands[0],), most=largest(operands[0])))


@rule("cummax", "cummin")
def _cummax(walk: Walk, eqn: core.JaxprEqn, operands: list[Any]) -> Any:
    (signal,) = operands
    return whole(Fixed(walk.label(eqn), signal.shape, (signal,), math.sqrt(signal.shape[eqn.params["axis"]])))


@rule("cumsum")
def _cumsum(walk: Walk, eqn: core.JaxprEqn, operands: list[Any]) -> Any:
    (signal,) = operands
    n = signal.shape[eqn.params["axis"]]
    # The matrix of ones below the diagonal has the norm 1 / (2 sin(π / (4n + 2))).
    factor = 1 / (2 * math.sin(math.pi / (4 * n + 2)))
    return whole(Fixed(walk.label(eqn), signal.shape, (signal,), factor, linear=True))
