"""Rules of functions that are called, repeated and chosen."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend import core

from fantastic4.expression import X
from fantastic4.lipschitz.graph import Label, Signal, whole
from fantastic4.lipschitz.moves import concatenate, moved
from fantastic4.lipschitz.nodes import Either
from fantastic4.lipschitz.operands import Comparison, Refused, at_once, is_constant, is_known, taken
from fantastic4.lipschitz.sizes import Size, largest_of
from fantastic4.lipschitz.trace import Walk, rule, shape_and_dtype

_LONGEST = 100_000  # iterations of a while loop


@rule("jit", "closed_call", "core_call", "checkpoint", "remat2", "custom_jvp_call", "custom_vjp_call")
def _call(walk: Walk, eqn: core.JaxprEqn, operands: list[Any]) -> list[Any]:
    inner = next(eqn.params[key] for key in ("jaxpr", "call_jaxpr", "fun_jaxpr") if key in eqn.params)
    with walk.inside(eqn):
        closed = isinstance(inner, core.ClosedJaxpr)
        results = walk.closed(inner, operands) if closed else walk.jaxpr(inner, [], operands)
    named = [_named(result, operands, str(eqn.params.get("name", ""))) for result in results]
    for old, new in zip(results, named, strict=True):
        walk.remember(new, _alike, [old])
    return named


def _alike(size: Any) -> Any:
    return size


def _named(result: Any, operands: Sequence[Any], name: str) -> Any:
    """A scalar function is shown by the name of the function that the user called; nothing is concluded from it."""
    if not name or name.startswith("_") or name == "<lambda>" or not isinstance(result, Signal) or result.expr == X:
        return result
    if any(isinstance(o, Signal) and o.node is result.node and o.expr == X for o in operands):
        return dataclasses.replace(result, label=dataclasses.replace(result.label, operation=name))
    return result


@rule("scan")
def _scan(walk: Walk, eqn: core.JaxprEqn, operands: list[Any]) -> list[Any]:
    p = eqn.params
    body = p["jaxpr"]
    # Counted by their shapes, as the names of these counts change between versions of JAX.
    carried = _as_inside(eqn.outvars, body.jaxpr.outvars)
    constants = _as_inside(eqn.invars, body.jaxpr.invars) - carried
    fixed, carry = operands[:constants], operands[constants : constants + carried]
    sequences = operands[constants + carried :]
    order = range(p["length"])[:: -1 if p["reverse"] else 1]
    stacked: dict[int, list[Any]] = {}
    for i in order:
        with walk.inside(eqn):
            results = walk.closed(body, [*fixed, *carry, *(_entry(walk, s, i) for s in sequences)])
        carry = results[:carried]
        stacked[i] = results[carried:]
    ys = []
    for j, variable in enumerate(eqn.outvars[carried:]):
        members = [stacked[i][j] for i in range(p["length"])]
        if not members:
            ys.append(jnp.zeros(*shape_and_dtype(variable)))
        else:
            ys.append(_stack(walk, members, walk.label(eqn)))
    return [*carry, *ys]


def _as_inside(outside: Sequence[Any], inside: Sequence[Any]) -> int:
    """How many variables have the shape outside of a body that they have inside; sequences have an axis more."""
    return sum(shape_and_dtype(o)[0] == shape_and_dtype(i)[0] for o, i in zip(outside, inside, strict=True))


def _entry(walk: Walk, value: Any, i: int) -> Any:
    """``value[i]``."""
    if isinstance(value, Refused):
        return value
    if isinstance(value, Comparison):
        return _COMPARED
    if isinstance(value, Signal):
        found = moved(value, value.places[i])
        walk.remember(found, lambda size: size.moved(lambda x: x[i]), [value])
        return found
    with at_once(value):  # a place that is known is one under jit too
        return taken(value, i)


_COMPARED = Refused("a loop or a branch carries a comparison, and a choice by that may jump")


def _refused(members: Sequence[Any]) -> Refused | None:
    """The first of several results that nothing may depend on."""
    found = [_COMPARED if isinstance(m, Comparison) else m for m in members]
    return next((m for m in found if isinstance(m, Refused)), None)


def _stack(walk: Walk, members: Sequence[Any], label: Label) -> Any:
    refused = _refused(members)
    if refused is not None:
        return refused
    if all(map(is_constant, members)):
        with at_once(*members):
            return jnp.stack(members)
    walk.entered.meet("stack", members)
    rows = [moved(m, m.places[None]) if isinstance(m, Signal) else jnp.asarray(m)[None] for m in members]
    found = concatenate(rows, 0, label)
    walk.remember(found, lambda *sizes: Size(jnp.stack([s.entries for s in sizes])), members)
    return found


@rule("cond")
def _cond(walk: Walk, eqn: core.JaxprEqn, operands: list[Any]) -> list[Any]:
    which, *arguments = operands
    branches = eqn.params["branches"]
    if not is_constant(which):
        if isinstance(which, Refused):
            return walk.refuse(eqn, "chooses a branch by the input, so it may jump: " + which.reason)
        return walk.refuse(eqn, "chooses a branch by the input, so it may jump: jnp.where of elementwise functions is "
                                "looked into")  # fmt: skip
    with walk.inside(eqn):
        if is_known(which):
            return walk.closed(branches[int(np.clip(which, 0, len(branches) - 1))], arguments)
        every = [walk.closed(branch, arguments) for branch in branches]
    results: list[Any] = []
    for members in zip(*every, strict=True):
        refused = _refused(members)
        signals = tuple(m for m in members if isinstance(m, Signal))
        if refused is not None:
            results.append(refused)
        elif signals:
            walk.entered.meet("cond", members)
            results.append(whole(Either(walk.label(eqn), signals[0].shape, signals)))
            walk.remember(results[-1], largest_of, members)
        else:
            results.append(lax.select_n(jnp.clip(which, 0, len(branches) - 1), *members))
    return results


@rule("while")
def _while(walk: Walk, eqn: core.JaxprEqn, operands: list[Any]) -> list[Any]:
    p = eqn.params
    condition, body = p["cond_nconsts"], p["body_nconsts"]
    conditions, bodies, carry = (
        operands[:condition],
        operands[condition : condition + body],
        operands[condition + body :],
    )
    for _ in range(_LONGEST):
        with walk.inside(eqn):
            go = walk.closed(p["cond_jaxpr"], [*conditions, *carry])[0]
            if not is_known(go):
                return walk.refuse(eqn, "runs a number of times that is not known while tracing: use a fixed number")
            if not bool(go):
                return carry
            carry = walk.closed(p["body_jaxpr"], [*bodies, *carry])
    return walk.refuse(eqn, f"runs more than {_LONGEST} times")
