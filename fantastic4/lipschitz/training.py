"""Lipschitz estimates for a train step: the walk of `bound` with warm-started power iterations for the norms."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from fantastic4 import ladder
from fantastic4.conv import ConvSpec
from fantastic4.entry import choice, count, same_kind
from fantastic4.linalg import each
from fantastic4.lipschitz.graph import reachable
from fantastic4.lipschitz.numbers import HasNorm, Numbers
from fantastic4.lipschitz.order import first_order
from fantastic4.lipschitz.traced import Traced, trace
from fantastic4.promotion import usual_promotion


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LipschitzState:
    """What the next `step` starts from: a pytree.

    Attributes:
      inner: a state for every kernel, in the order in which the function uses them.
    """

    inner: tuple[ladder.LadderState, ...]


class _Estimates(Numbers):
    """Norms by a function of (place, kernels, spec, scales), which may keep states.

    Batch norm's scale stays beside the kernel: their product is as large as the kernel, and so is its gradient.
    """

    def __init__(self, dtype: Any, estimate: Callable[[int, Array, ConvSpec, Array | None], Array]):
        super().__init__(dtype)
        self._estimate = estimate

    def compute(self, node: HasNorm) -> Array:
        """An estimate of a norm."""
        kernel, scale = node.factors or (node.kernel, None)
        kernels = kernel[:, None] if node.spec is None else kernel[None]
        return self._estimate(len(self._norms), kernels, node.spec or ConvSpec(), scale)


def _total(traced: Traced, how: Numbers) -> Array:
    _, totals = first_order(reachable(traced.outputs), traced.outputs, how)
    return how.root_sum_squares(totals) if totals else jnp.zeros((), traced.dtype)


@usual_promotion
def init(fn: Callable[..., Any], x: Any, *, key: Array, method: str = "four", warmup: int = 20) -> LipschitzState:
    """A start for `step`.

    Args:
      fn: as for `fantastic4.lipschitz.bound`.
      x: likewise.
      key: a ``jax.random.key``.
      method: of `fantastic4.ladder.init`: ``"four"``, ``"weighted"``, ``"grid"``.
      warmup: power iterations to run.

    Returns:
      `LipschitzState`.

    Raises:
      ValueError: what `fantastic4.lipschitz.bound` raises, or an unknown method.
    """
    method, warmup = choice(*ladder.TRAINING_METHODS)("method", method), count(0)("warmup", warmup)
    traced = trace(fn, x)
    states: list[Any] = []

    def start(place: int, kernels: Array, spec: ConvSpec, scale: Array | None) -> Array:
        make = functools.partial(ladder.init, spec=spec, key=key, method=method, warmup=warmup, scale=scale)
        states.append(each(make, kernels))
        return jnp.ones(())

    _total(traced, _Estimates(traced.dtype, start))
    return LipschitzState(tuple(states))


@usual_promotion
def step(fn: Callable[..., Any], x: Any, state: LipschitzState) -> tuple[Array, LipschitzState]:
    """An estimate of `fantastic4.lipschitz.bound` for a train step, and the new state.

    **An estimate**: the norms come from one warm-started power iteration each, from below. The walk, the folding of
    batch norm and all else is that of `fantastic4.lipschitz.bound`, which has the sound number.

    Args:
      fn: as for `fantastic4.lipschitz.bound`; the same function that the state was made for, with any params.
      x: likewise.
      state: from `init` or the step before.

    Returns:
      A scalar, whose gradient reaches the params with the singular vectors held constant; its logarithm is the better
      penalty for deep networks. And the new `LipschitzState`.

    Raises:
      ValueError: what `fantastic4.lipschitz.bound` raises, or a state of another function.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from fantastic4 import lipschitz
      >>> def penalty(w, state):
      ...     return lipschitz.step(lambda x: jnp.tanh(x @ w), jnp.ones((1, 2)), state)
      >>> w = jnp.diag(jnp.array([3.0, 2.0]))
      >>> state = lipschitz.init(lambda x: jnp.tanh(x @ w), jnp.ones((1, 2)), key=jax.random.key(0))
      >>> (value, state), gradient = jax.value_and_grad(penalty, has_aux=True)(w, state)
      >>> print(round(float(value), 3), round(float(gradient[0, 0]), 3))
      3.0 1.0
    """
    same_kind("state", state, LipschitzState, "lipschitz.init(fn, x, key=…)")
    traced = trace(fn, x)
    new: list[Any] = []

    def advance(place: int, kernels: Array, spec: ConvSpec, scale: Array | None) -> Array:
        if place >= len(state.inner):
            raise ValueError("this state belongs to another function: make one with lipschitz.init(fn, x, key=…)")
        values, after = each(lambda k, s: ladder.step(k, s, spec, scale=scale), kernels, state.inner[place])
        new.append(after)
        return jnp.max(values)

    value = _total(traced, _Estimates(traced.dtype, advance))
    if len(new) != len(state.inner):
        raise ValueError("this state belongs to another function: make one with lipschitz.init(fn, x, key=…)")
    return value, LipschitzState(tuple(new))
