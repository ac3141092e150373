"""What the operands of an equation are: signals, truth values, refused results, and constants, computed as JAX does."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.extend import core

from fantastic4.devices import vary_over, varying_axes
from fantastic4.linalg import widened
from fantastic4.lipschitz.graph import Signal
from fantastic4.now import now


@dataclasses.dataclass(frozen=True)
class Refused:
    """A result for which there is no rule. It is an error only for what depends on it."""

    reason: str


@dataclasses.dataclass(frozen=True)
class Comparison:
    """A truth value for every entry: whether one scalar function of it is below another, and what is made of those.

    Attributes:
      kind: ``"less"`` of two expressions of one signal's entries, ``"not"``, ``"and"`` or ``"or"`` of comparisons.
      parts: these.
      of: the signal, with the identity as its scalar function.
    """

    kind: str
    parts: tuple[Any, ...]
    of: Signal


def is_constant(value: Any) -> bool:
    """Whether it does not depend on the input."""
    return not isinstance(value, Signal | Comparison | Refused)


def is_known(value: Any) -> bool:
    """Whether it is a constant whose numbers are known while tracing."""
    return is_constant(value) and not isinstance(value, jax.core.Tracer)


def uniform(value: Any) -> float | None:
    """The number that all entries of a known constant are, NaN where they are none; None for all others."""
    if not is_known(value) or jnp.iscomplexobj(value):
        return None
    entries = np.asarray(value).ravel()
    if entries.size == 0 or not (np.all(entries == entries[0]) or np.all(entries != entries)):
        return None
    return float(entries[0])


def evaluate(eqn: core.JaxprEqn, operands: Sequence[Any]) -> list[Any]:
    """Results of an equation of constants, as JAX computes them: now, where they are known, under ``jit`` too.

    What a mutable array holds is known when it is read.
    """
    with contextlib.nullcontext() if eqn.effects else at_once(*operands):
        move = _BY_NUMPY.get(eqn.primitive.name)
        if move is not None and _is_on_host(operands[0]):
            return [jnp.asarray(move(np.asarray(operands[0]), eqn.params))]
        return _bind(eqn, operands)


# What only moves numbers that are in the host's memory needs no program, of which there would be one for every shape.
_BY_NUMPY: dict[str, Callable[[np.ndarray, dict[str, Any]], np.ndarray]] = {
    "reshape": lambda x, p: x.transpose(p["dimensions"]).reshape(p["new_sizes"]),
    "squeeze": lambda x, p: np.squeeze(x, p["dimensions"]),
    "transpose": lambda x, p: x.transpose(p["permutation"]),
    "broadcast_in_dim": lambda x, p: np.broadcast_to(
        np.expand_dims(x, [a for a in range(len(p["shape"])) if a not in p["broadcast_dimensions"]]), p["shape"]
    ),
}


def _is_on_host(value: Any) -> bool:
    """Whether it is numbers in the host's memory that JAX may put anywhere."""
    if not is_known(value) or not jnp.issubdtype(jnp.result_type(value), np.number) or jax.default_backend() != "cpu":
        return False
    return not isinstance(value, Array) or not value.committed


def rearranged(x: Array, order: Sequence[int], shape: Sequence[int]) -> Array:
    """A constant with its axes in another order, in another shape."""
    if _is_on_host(x):
        return jnp.asarray(np.asarray(x).transpose(order).reshape(shape))
    return jnp.transpose(x, order).reshape(shape)


def taken(x: Any, places: np.ndarray | int) -> Any:
    """``x[places]``, by the first axis."""
    if isinstance(x, np.ndarray) or not _is_on_host(x):
        return x[places]
    return jnp.asarray(np.asarray(x)[places])


def wide(x: Any) -> Array:
    """Constants in the widest type there is: what is done with them is rounded."""
    with at_once(x):
        x = jnp.asarray(x)
        if jnp.issubdtype(x.dtype, jnp.floating):
            x = widened(x)
        return x.astype(jnp.promote_types(x.dtype, jnp.result_type(float)))


def at_once(*operands: Any) -> contextlib.AbstractContextManager[None]:
    """Where these are known, what is computed of them is known too, under ``jit`` as elsewhere."""
    return now() if all(map(is_known, operands)) else contextlib.nullcontext()


def _bind(eqn: core.JaxprEqn, operands: Sequence[Any]) -> list[Any]:
    if not all(map(is_known, operands)):  # those that do not vary over the devices must say so beside those that do
        operands = [vary_over(x, varying_axes(atom.aval)) for x, atom in zip(operands, eqn.invars, strict=True)]
    found = eqn.primitive.bind(*operands, **eqn.primitive.get_bind_params(eqn.params))
    return list(found) if eqn.primitive.multiple_results else [found]
