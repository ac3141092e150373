"""Rules of operations that move, repeat and join entries."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.extend import core

from fantastic4.lipschitz.graph import Label, Signal, unknown, whole
from fantastic4.lipschitz.losses import picked
from fantastic4.lipschitz.nodes import Joint, settled
from fantastic4.lipschitz.numbers import largest
from fantastic4.lipschitz.operands import evaluate, is_constant, is_known, uniform
from fantastic4.lipschitz.trace import Walk, out_shape, rule


def moved(signal: Signal, places: np.ndarray) -> Signal:
    """A signal of the same node and function that reads other entries."""
    return picked(dataclasses.replace(signal, shape=places.shape, index=places))


def reshaped(signal: Signal, shape: Sequence[int]) -> Signal:
    """A signal of the same entries in the same order, in another shape."""
    index = None if signal.index is None else signal.index.reshape(shape)
    return dataclasses.replace(signal, shape=tuple(shape), index=index)


@rule("reshape", "squeeze", "expand_dims")
def _reshape(walk: Walk, eqn: core.JaxprEqn, operands: list[Any]) -> Signal:
    (signal,) = operands
    order = eqn.params["dimensions"]  # of a reshape, the axes by which it reads; of the others those of size 1
    if eqn.primitive.name == "reshape" and order is not None:
        signal = moved(signal, signal.places.transpose(order))
    return reshaped(signal, out_shape(eqn))


@rule("transpose")
def _transpose(walk: Walk, eqn: core.JaxprEqn, operands: list[Any]) -> Signal:
    return moved(operands[0], operands[0].places.transpose(eqn.params["permutation"]))


@rule("rev")
def _rev(walk: Walk, eqn: core.JaxprEqn, operands: list[Any]) -> Signal:
    return moved(operands[0], np.flip(operands[0].places, eqn.params["dimensions"]))


@rule("slice")
def _slice(walk: Walk, eqn: core.JaxprEqn, operands: list[Any]) -> Signal:
    p = eqn.params
    steps = p["strides"] or (1,) * len(p["start_indices"])
    cut = tuple(slice(a, b, s) for a, b, s in zip(p["start_indices"], p["limit_indices"], steps, strict=True))
    return moved(operands[0], operands[0].places[cut])


@rule("split")
def _split(walk: Walk, eqn: core.JaxprEqn, operands: list[Any]) -> list[Signal]:
    ends = np.cumsum(eqn.params["sizes"])[:-1]
    return [moved(operands[0], part) for part in np.split(operands[0].places, ends, eqn.params["axis"])]


@rule("broadcast_in_dim")
def _broadcast(walk: Walk, eqn: core.JaxprEqn, operands: list[Any]) -> Signal:
    signal, shape = operands[0], eqn.params["shape"]
    if math.prod(shape) == math.prod(signal.shape):
        return reshaped(signal, shape)
    spread = [1] * len(shape)
    for axis, place in enumerate(eqn.params["broadcast_dimensions"]):
        spread[place] = signal.shape[axis]
    return moved(signal, np.broadcast_to(signal.places.reshape(spread), shape))


@rule("pad")
def _pad(walk: Walk, eqn: core.JaxprEqn, operands: list[Any]) -> Any:
    signal, value = operands
    if not isinstance(signal, Signal) or not is_constant(value):
        return walk.refuse(eqn, "pads with a number that depends on the input: pad with a constant")
    signal = settled(signal)
    places = signal.places
    config = eqn.params["padding_config"]
    out = unknown(out_shape(eqn), alike=True)
    source, target = [], []
    for n, m, (low, _, inner) in zip(places.shape, out.shape, config, strict=True):
        at = low + np.arange(n) * (inner + 1)
        keep = (at >= 0) & (at < m)
        source.append(np.flatnonzero(keep))
        target.append(at[keep])
    out[np.ix_(*target)] = places[np.ix_(*source)]
    return moved(signal, out)


def constants(value: Any) -> np.ndarray:
    """Places of the entries of a constant."""
    return unknown(np.shape(value), alike=uniform(value) is not None)


def concatenate(operands: Sequence[Any], axis: int, label: Label) -> Signal:
    """Signals and constants, one after the other."""
    if not all(isinstance(o, Signal) for o in operands):
        operands = [settled(o) if isinstance(o, Signal) else o for o in operands]
    signals = [o for o in operands if isinstance(o, Signal)]
    first = signals[0]
    if all(s.node is first.node and s.expr == first.expr for s in signals):
        read = [o.places if isinstance(o, Signal) else constants(o) for o in operands]
        return moved(first, np.concatenate(read, axis))
    shape = list(first.shape)
    shape[axis] = sum(o.shape[axis] if isinstance(o, Signal) else np.shape(o)[axis] for o in operands)
    places = np.arange(math.prod(shape)).reshape(shape)
    cuts = np.cumsum([np.shape(o)[axis] if not isinstance(o, Signal) else o.shape[axis] for o in operands])[:-1]
    pieces = zip(operands, np.split(places, cuts, axis), strict=True)
    where = tuple(part for operand, part in pieces if isinstance(operand, Signal))
    most = max(map(largest, signals)) if len(signals) == len(operands) else math.inf
    return whole(Joint(label, tuple(shape), tuple(signals), where=where, most=most))


@rule("concatenate")
def _concatenation(walk: Walk, eqn: core.JaxprEqn, operands: list[Any]) -> Signal:
    return concatenate(operands, eqn.params["dimension"], walk.label(eqn))


@rule("stack")
def _stacked(walk: Walk, eqn: core.JaxprEqn, operands: list[Any]) -> Signal:
    axis = eqn.params["axis"]
    apart = [
        moved(o, np.expand_dims(o.places, axis))
        if isinstance(o, Signal)
        else (np if is_known(o) else jnp).expand_dims(o, axis)
        for o in operands
    ]
    return concatenate(apart, axis, walk.label(eqn))


@rule("unstack")
def _unstacked(walk: Walk, eqn: core.JaxprEqn, operands: list[Any]) -> list[Signal]:
    (signal,) = operands
    axis = eqn.params["axis"]
    return [moved(signal, np.take(signal.places, i, axis)) for i in range(signal.shape[axis])]


@rule("tile")
def _tile(walk: Walk, eqn: core.JaxprEqn, operands: list[Any]) -> Signal:
    return moved(operands[0], np.tile(operands[0].places, eqn.params["reps"]))


@rule("gather", "dynamic_slice")
def _gather(walk: Walk, eqn: core.JaxprEqn, operands: list[Any]) -> Any:
    signal, *where = operands
    if not isinstance(signal, Signal) or not all(map(is_known, where)):
        return walk.refuse(eqn, "looks entries up at places that are not known while tracing: use fixed ones")
    params = {k: -1 if k == "fill_value" else v for k, v in eqn.params.items()}
    # Of positions, not of the places: those of constants may be any numbers.
    positions = np.arange(signal.places.size, dtype=np.int32).reshape(signal.shape)
    found = np.asarray(evaluate(eqn.replace(params=params), [positions, *where])[0])
    filled = found == -1
    if np.any(filled):
        filler = eqn.params["fill_value"]
        if filler is None or not np.isfinite(filler):  # None is NaN
            walk.entered.strange()
        signal = settled(signal)
    places = signal.places.ravel()[np.where(filled, 0, found)]
    return moved(signal, np.where(filled, unknown(found.shape, alike=True), places))


@rule("dynamic_update_slice")
def _update(walk: Walk, eqn: core.JaxprEqn, operands: list[Any]) -> Any:
    into, new, *where = operands
    if not all(map(is_known, where)):
        return walk.refuse(eqn, "writes entries to places that are not known while tracing: use fixed ones")
    shape = out_shape(eqn)
    starts = [int(np.clip(int(w), 0, n - m)) for w, n, m in zip(where, shape, np.shape(new), strict=True)]
    inside = tuple(slice(s, s + m) for s, m in zip(starts, np.shape(new), strict=True))
    old, fresh = unknown(shape, alike=False), unknown(shape, alike=False)
    parts = []
    if isinstance(into, Signal):
        kept = into.places.copy()
        kept[inside] = old[inside]
        parts.append(moved(settled(into), kept))
    if isinstance(new, Signal):
        fresh[inside] = new.places
        parts.append(moved(settled(new), fresh))
    return parts[0] if len(parts) == 1 else whole(Joint(walk.label(eqn), tuple(shape), tuple(parts)))


@rule("reduce_precision")
def _reduce_precision(walk: Walk, eqn: core.JaxprEqn, operands: list[Any]) -> list[Any]:
    if eqn.params["exponent_bits"] < 8:  # numbers of moderate size are infinite
        walk.entered.strange()
    return operands


@rule(
    *("copy", "copy_p", "stop_gradient", "optimization_barrier", "sharding_constraint", "mesh_cast"),
    *("name", "device_put"),
)
def _same(walk: Walk, eqn: core.JaxprEqn, operands: list[Any]) -> list[Any]:
    return operands
