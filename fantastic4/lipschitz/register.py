"""Rules of users, for primitives that the table does not know."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
from jax.extend import core

from fantastic4.lipschitz.fixed import Fixed
from fantastic4.lipschitz.graph import Signal, whole
from fantastic4.lipschitz.operands import Comparison
from fantastic4.lipschitz.trace import USER_RULES, Walk, shape_and_dtype


def register_rule(primitive: Any, rule: Callable[..., Any]) -> None:
    """Tell `bound` the Lipschitz constant of a primitive, in place of the built-in rule if there is one.

    Args:
      primitive: a ``jax.extend.core.Primitive``, or its name.
      rule: a function ``rule(*operands, **params)`` of the equation's operands and parameters. An operand that depends
        on the input is a ``jax.ShapeDtypeStruct``, a constant is its array. It returns one number, or scalar array: the
        Lipschitz constant of all outputs together in all such operands together, on the whole space, so also that they
        are numbers everywhere; or None where there is none.

    Raises:
      ValueError: something that is no primitive.

    Example:
      >>> import jax.numpy as jnp
      >>> from fantastic4 import lipschitz
      >>> lipschitz.register_rule("atan", lambda x: 1.0)
      >>> print(float(lipschitz.bound(jnp.arctan, jnp.ones(3)).value))
      1.0
    """
    name = primitive if isinstance(primitive, str) else getattr(primitive, "name", None)
    if not isinstance(name, str):
        raise ValueError(f"a primitive is a jax.extend.core.Primitive or its name, got {type(primitive).__name__}")

    def apply(walk: Walk, eqn: core.JaxprEqn, operands: list[Any]) -> list[Any]:
        if any(isinstance(o, Comparison) for o in operands):
            return walk.refuse(eqn, "makes something else of a comparison, and a choice by that may jump")
        given = [
            jax.ShapeDtypeStruct(*shape_and_dtype(v)) if isinstance(o, Signal) else o
            for o, v in zip(operands, eqn.invars, strict=True)
        ]
        factor = rule(*given, **eqn.params)
        if factor is None:
            return walk.refuse(eqn, "has no Lipschitz constant, by the rule that is registered for it")
        signals = tuple(o for o in operands if isinstance(o, Signal))
        label = walk.label(eqn)
        shapes = [shape_and_dtype(variable)[0] for variable in eqn.outvars]
        node = whole(
            Fixed(label, (sum(map(math.prod, shapes)),), signals, float(factor) if isinstance(factor, int) else factor)
        )
        results, start = [], 0
        for shape in shapes:
            places = node.places[start : start + math.prod(shape)].reshape(shape)
            start += math.prod(shape)
            results.append(Signal(node.node, shape, places, node.expr, label))
        return results

    USER_RULES[name] = apply
