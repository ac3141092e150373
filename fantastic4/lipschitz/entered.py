"""Which constants make numbers of numbers, and not infinities or NaN.

A mask like ``jnp.isfinite(h)`` is constant where h is a number at every input: where its functions are, and its
constants. Those that are known while tracing are looked at; of the others, as under ``jit``, the result asks.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array


def _keeps_numbers(name: str, place: int, constant: Any, xp: Any) -> Any:
    """Whether an operation makes numbers of numbers with these constants as its operand at a place."""
    if name == "div" and place == 1:
        size = abs(constant)  # what is smaller than the smallest normal float may count as 0
        return xp.all(size >= (jnp.finfo(size.dtype).tiny if jnp.issubdtype(size.dtype, jnp.floating) else 1))
    # A limit may be infinite on the side where it limits nothing.
    if name == "max" or (name == "clamp" and place == 0):
        return xp.all(constant < np.inf)
    if name == "min" or (name == "clamp" and place == 2):
        return xp.all(constant > -np.inf)
    return xp.all(xp.isfinite(constant))


class Entered:
    """The constants that have met a signal in a walk.

    Attributes:
      asked: whether each of those that are relied on keeps numbers, as scalars that are not known while tracing.
    """

    def __init__(self) -> None:
        self.asked: list[Array] = []
        self._strange = False
        self._unknown: dict[Any, tuple[str, int, Any]] = {}

    def meet(self, name: str, operands: Sequence[Any]) -> None:
        """Keep in mind the constants among an operation's operands, each with its place."""
        for place, constant in enumerate(operands):
            kind = (
                jnp.result_type(constant)
                if isinstance(constant, np.generic | np.ndarray | Array | float | complex)
                else None
            )
            if kind is None or not (jnp.issubdtype(kind, jnp.inexact) or (name == "div" and place == 1)):
                continue
            if isinstance(constant, jax.core.Tracer) or not getattr(constant, "is_fully_addressable", True):
                self._unknown.setdefault((id(constant), name, place), (name, place, constant))
            elif not _keeps_numbers(name, place, np.asarray(constant), np):
                self.strange()

    def strange(self) -> None:
        """Keep in mind that something has come in that is no number."""
        self._strange = True

    def rely(self) -> bool:
        """Whether all that have come in keep numbers, as far as that is known; of the others it is asked."""
        if not self._strange:
            self.asked += [_keeps_numbers(*met, jnp) for met in self._unknown.values()]
            self._unknown.clear()
        return not self._strange


def where_all(asked: Sequence[Array], value: Array) -> Array:
    """A value, or NaN where the answer to one question is no."""
    if not asked:
        return value
    return jnp.where(functools.reduce(jnp.logical_and, asked), value, jnp.nan)
