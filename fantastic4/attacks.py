"""Adversarial examples: what a certified radius is held against."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from fantastic4 import classifier, entry
from fantastic4.classifier import Logits
from fantastic4.devices import vary_as


@functools.partial(jax.jit, static_argnames=("fn", "steps", "restarts"))
def _attack(fn: Logits, x: Array, labels: Array, epsilon: Array, key: Array, steps: int, restarts: int) -> Array:
    dims = tuple(range(1, x.ndim))

    def length(v: Array) -> Array:
        return jnp.sqrt(jnp.sum(v * v, axis=dims, keepdims=True))

    def into_ball(delta: Array) -> Array:
        size = length(delta)
        return delta * jnp.minimum(1, epsilon / jnp.where(size > 0, size, 1))

    def worst(delta: Array) -> Array:
        logits = fn(x + delta)
        others = jnp.where(jax.nn.one_hot(labels, logits.shape[1], dtype=bool), -jnp.inf, logits)
        return classifier.of_class(logits, labels) - jnp.max(others, axis=1)

    def restart(_: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        best, margin, key = carry
        key, mine = jax.random.split(key)
        start = jax.random.normal(mine, x.shape, x.dtype)
        delta = into_ball(start / length(start) * epsilon)

        def step(i: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            delta, best, margin = carry
            now, gradient = jax.value_and_grad(lambda d: (jnp.sum(worst(d)), worst(d)), has_aux=True)(delta)
            size = length(gradient)
            value = now[1]
            better = value < margin
            best = jnp.where(better.reshape(-1, *[1] * len(dims)), delta, best)
            rate = 2.5 * epsilon * (1 - i / steps)
            moved = delta - rate * gradient / jnp.where(size > 0, size, 1)
            return into_ball(moved), best, jnp.where(better, value, margin)

        delta, best, margin = lax.fori_loop(0, steps, step, vary_as((delta, best, margin), margin))
        value = worst(delta)
        better = value < margin
        best = jnp.where(better.reshape(-1, *[1] * len(dims)), delta, best)
        return best, jnp.where(better, value, margin), key

    zero = jnp.zeros_like(x)
    start = worst(zero)
    best, _, _ = lax.fori_loop(0, restarts, restart, (vary_as(zero, start), start, key))
    return x + best


def attack(
    fn: Logits, x: Array, labels: Array, epsilon: Any, *, key: Array, steps: int = 100, restarts: int = 20
) -> Array:
    """Projected gradient descent in the ℓ2 ball (Madry et al. 2018): the strongest adversarial examples that it finds.

    An attack proves that a prediction is not robust; that it finds nothing proves nothing.

    Args:
      fn: logits of a batch.
      x: the batch.
      labels: ``(batch,)``, integers from 0 on, whose margins are to be destroyed.
      epsilon: radius of the ball, a number, or one for each example.
      key: a ``jax.random.key``.
      steps: of each descent.
      restarts: descents from random points on the sphere.

    Returns:
      Examples of the shape of ``x``, within epsilon of it up to rounding.

    Raises:
      ValueError: shapes that do not fit, labels that are no classes, or a radius that is negative or no number.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from fantastic4 import robustness
      >>> net = lambda x: x @ jnp.array([[1.0, -1.0]])
      >>> found = robustness.attack(net, jnp.array([[1.0]]), jnp.array([0]), 1.5, key=jax.random.key(0), restarts=2)
      >>> print(jnp.argmax(net(found)))
      1
    """
    steps, restarts = entry.count(1)("steps", steps), entry.count(1)("restarts", restarts)
    entry.key(key)
    classes = jax.eval_shape(lambda x: classifier.logits(fn, x), x).shape[1]
    labels, epsilon = jnp.asarray(labels), jnp.asarray(epsilon, x.dtype)
    if labels.shape != (len(x),) or not jnp.issubdtype(labels.dtype, jnp.integer):
        raise ValueError(
            f"labels must be integers of the shape {(len(x),)}, one for each example, got {labels.dtype}{labels.shape}"
        )
    if epsilon.shape not in ((), (len(x),)):
        raise ValueError(f"epsilon must be a number or one for each of {len(x)} examples, got {epsilon.shape}")
    if not isinstance(labels, jax.core.Tracer) and not np.all((labels >= 0) & (labels < classes)):
        raise ValueError(f"labels must be classes from 0 to {classes - 1}, got {np.unique(labels)}")
    if not isinstance(epsilon, jax.core.Tracer) and not np.all((epsilon >= 0) & (epsilon < np.inf)):
        raise ValueError(f"epsilon must be a finite number that is not negative, got {epsilon}")
    sizes = jnp.broadcast_to(epsilon, (len(x),)).reshape(-1, *[1] * (x.ndim - 1))
    return _attack(classifier.precise(fn), x, labels, sizes, key, steps, restarts)
