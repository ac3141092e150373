"""Rules of writing and adding entries into known places."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax import lax
from jax.extend import core
from jax.lax import GatherScatterMode

from fantastic4.lipschitz.graph import Signal, unknown, whole
from fantastic4.lipschitz.moves import moved
from fantastic4.lipschitz.nodes import Joint, Sum, settled
from fantastic4.lipschitz.operands import is_known
from fantastic4.lipschitz.scalars import shifted
from fantastic4.lipschitz.sparse import added_up
from fantastic4.lipschitz.trace import Walk, out_shape, rule, shape_and_dtype
from fantastic4.now import now

_DIGITS = 4096  # a place is two numbers below 2²⁴, which float32 holds


def _targets(eqn: core.JaxprEqn, where: Any) -> np.ndarray:
    """For each of the entries that are written, in which place of the result it comes; -1 for those that are dropped.

    Where they come from is what the transpose of adding them up reads.
    """
    sizes = [math.prod(shape_and_dtype(v)[0]) for v in eqn.invars]
    if 0 in sizes:
        return np.full(shape_and_dtype(eqn.invars[2])[0], -1)
    into, _, new = (jax.ShapeDtypeStruct(shape_and_dtype(v)[0], np.float32) for v in eqn.invars)
    names = "dimension_numbers", "indices_are_sorted", "unique_indices", "mode"
    p = {name: eqn.params[name] for name in names}
    if p["mode"] == GatherScatterMode.PROMISE_IN_BOUNDS:
        p["mode"] = GatherScatterMode.FILL_OR_DROP
    with now():
        add = lambda x: lax.scatter_add(np.zeros(into.shape, np.float32), where, x, **p)  # noqa: E731
        transpose = jax.linear_transpose(add, new)
        place = 1 + np.arange(np.prod(into.shape, dtype=int)).reshape(into.shape)
        high, low = (
            np.asarray(transpose(digits.astype(np.float32))[0]) for digits in (place // _DIGITS, place % _DIGITS)
        )
    return high.astype(np.int64) * _DIGITS + low.astype(np.int64) - 1


def _placed(function: Callable[..., Any]) -> Callable[[Walk, core.JaxprEqn, list[Any]], Any]:
    """A rule of what is written into, what is written, and `_targets`; of none that are not known."""

    @functools.wraps(function)
    def with_places(walk: Walk, eqn: core.JaxprEqn, operands: list[Any]) -> Any:
        into, where, new = operands
        if not is_known(where):
            return walk.refuse(eqn, "writes entries to places that are not known while tracing: use fixed ones")
        targets = _targets(eqn, where)
        if eqn.params["mode"] == GatherScatterMode.PROMISE_IN_BOUNDS and np.any(targets < 0):
            return walk.refuse(
                eqn, "writes out of bounds, and it was promised not to: use places inside, or another mode"
            )
        return function(walk, eqn, into, new, targets)

    return with_places


@rule("scatter")
@_placed
def _write(walk: Walk, eqn: core.JaxprEqn, into: Any, new: Any, targets: np.ndarray) -> Any:
    if eqn.params["update_jaxpr"] is not None:
        return walk.refuse(eqn, "applies a function in some places: apply it everywhere and choose with jnp.where")
    targets, shape = targets.ravel(), out_shape(eqn)
    written = targets >= 0
    if targets.size and np.bincount(targets[written], minlength=1).max() > 1:
        return walk.refuse(
            eqn, "writes several entries to one place, of which any may win: add them, or write each once"
        )
    parts = []
    if isinstance(into, Signal):
        kept = into.places.copy().ravel()
        kept[targets[written]] = unknown(targets.shape, alike=False)[written]
        parts.append(moved(settled(into), kept.reshape(shape)))
    if isinstance(new, Signal):
        fresh = unknown(shape, alike=False).ravel()
        fresh[targets[written]] = new.places.ravel()[written]
        parts.append(moved(settled(new), fresh.reshape(shape)))
    return parts[0] if len(parts) == 1 else whole(Joint(walk.label(eqn), shape, tuple(parts)))


@rule("scatter-add", "scatter-sub")
@_placed
def _add_into(walk: Walk, eqn: core.JaxprEqn, into: Any, new: Any, targets: np.ndarray) -> Any:
    label, shape = walk.label(eqn), out_shape(eqn)
    if not isinstance(new, Signal):
        return shifted(into, label)
    total = whole(added_up(label, shape, new, targets))
    if not isinstance(into, Signal):
        return total
    sign = -1 if eqn.primitive.name == "scatter-sub" else 1
    return whole(Sum(dataclasses.replace(label, operation="add"), shape, (into, total), sign=sign))


@rule("scatter-max", "scatter-min")
@_placed
def _largest_into(walk: Walk, eqn: core.JaxprEqn, into: Any, new: Any, targets: np.ndarray) -> Any:
    # Each entry is asked for in one place, and the largest moves by no more than what moves most.
    signals = tuple(o for o in (into, new) if isinstance(o, Signal))
    return whole(Joint(walk.label(eqn), out_shape(eqn), signals, linear=False))
