r"""Certified ℓ2 radii of a classifier's predictions; `attack` is what to hold them against.

A prediction y at x₀ is certified with radius r when no x with ‖x - x₀‖₂ < r has another class whose logit is as large:
every margin f = z_y - z_t stays positive, against **every** other class t, and a tie is never certified.

* From Lipschitz bounds L_yt of the margins (`fantastic4.lipschitz.margins`): r = min_t f_t(x₀) / L_yt.
* From curvature (`fantastic4.lipschitz.margin_curvatures`): with ∇²f ≥ -m and 0 ≤ η < 1/m, the function
  φ(x) = ½‖x - x₀‖² + η f(x) is (1 - ηm)-strongly convex, so wherever f ≤ 0 and for any x̂

      ½ ‖x - x₀‖² ≥ φ(x) ≥ d(η, x̂) = φ(x̂) - ‖∇φ(x̂)‖² / (2 (1 - ηm)),

  and r = √(2 d). Any η and x̂ will do: the search for good ones need not converge for the radius to be sound
  (a one-shot form of the dual of Singla & Feizi 2020).

Sound for the function in real arithmetic where its values and gradients are right to 64 roundings of the logits and of
their gradients: so much is taken from each radius. Products are computed in full precision. Functions that cancel
inside (inputs of 1e6 and a bias that takes it away) or compute in half precision are off by more: take float64 there.
Radii by curvature take the gradients of `jax.grad`: **a ``stop_gradient`` or a ``custom_vjp`` that makes them something
else than the derivative makes these radii wrong**. So do kinks that cancel: relu(x) - relu(-x) is x, but its gradient
at 0 in JAX is 0.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from fantastic4 import classifier
from fantastic4.attacks import attack as attack
from fantastic4.classifier import Logits
from fantastic4.entry import count, not_negative
from fantastic4.linalg import unit, widened
from fantastic4.rounding import constant_up, round_up

_BATCH = 1000  # examples whose gradients are computed together
_CHUNK = 512  # pairs of an example and a class that are searched together


def _pairs_of(matrix: Array, classes: int, name: str, dtype: Any) -> Array:
    """One number for each pair of classes, none below the smallest normal float, where XLA takes numbers for 0."""
    try:
        matrix = jnp.asarray(matrix)
    except TypeError:
        raise ValueError(
            f"{name} must be numbers, as fantastic4.lipschitz.margins and margin_curvatures return them, got "
            f"{type(matrix).__name__}; of a lipschitz.Bound its value"
        ) from None
    if matrix.shape not in ((), (classes, classes)):
        raise ValueError(f"{name} must be a number or ({classes}, {classes}), one entry for each z_i - z_j")
    numbers = jnp.maximum(not_negative(name, matrix).astype(dtype), jnp.finfo(dtype).tiny)
    return jnp.broadcast_to(numbers, (classes, classes))


def _slack(*dtypes: Any) -> float:
    return 64 * max(float(jnp.finfo(dtype).eps) for dtype in dtypes)


def _finite(x: Array) -> Array:
    """What has overflowed as the largest float: a radius is no larger for it."""
    return jnp.minimum(x, jnp.finfo(x.dtype).max)


def lipschitz_radii(fn: Logits, x: Array, margins: Array) -> Array:
    """Certified radii of the predicted classes from Lipschitz bounds of the margins.

    Args:
      fn: logits ``(batch, classes)`` of a batch.
      x: the batch.
      margins: ``(classes, classes)`` from `fantastic4.lipschitz.margins`; or a scalar L, the bound of the whole
        network: each margin's is then at most √2 L.

    Returns:
      ``(batch,)``, 0 where nothing is certified: a tie, or a NaN.

    Raises:
      ValueError: shapes that do not fit.

    Example:
      >>> import jax.numpy as jnp
      >>> from fantastic4 import lipschitz, robustness
      >>> net = lambda x: x @ jnp.array([[1.0, -1.0]])
      >>> limits = lipschitz.margins(net, jnp.ones((1, 1)))
      >>> print(robustness.lipschitz_radii(net, jnp.array([[3.0], [0.0]]), limits).round(2))
      [3. 0.]
    """
    logits = classifier.logits(classifier.precise(fn), x)
    limits = _pairs_of(margins, logits.shape[1], "margins", jnp.promote_types(logits.dtype, jnp.float32))
    if jnp.ndim(margins) == 0:
        limits = round_up(limits * constant_up(math.sqrt(2), limits.dtype), 2)
    predicted = jnp.argmax(logits, axis=1)
    own = classifier.of_class(logits, predicted)[:, None]
    slack = _slack(x.dtype, logits.dtype)
    lost = slack * (jnp.abs(own) + jnp.abs(logits))
    gap = jnp.maximum(own - logits - lost, 0)
    other = jnp.arange(logits.shape[1]) != predicted[:, None]
    radii = jnp.where(gap > 0, _finite(gap / limits[predicted]) * (1 - slack), 0)
    nearest = jnp.min(jnp.where(other, radii, jnp.inf), axis=1)
    # Asked of every class: on a CPU, a minimum over thousands may drop a NaN.
    sound = jnp.all(jnp.isfinite(logits), axis=1) & ~jnp.any(jnp.isnan(radii), axis=1)
    return jnp.where(sound, nearest, 0)


class _Pair(NamedTuple):
    """An example with the classes of a margin, its curvatures, the size of the logits' gradients, and the slack."""

    x: Array
    own: Array
    other: Array
    below: Array
    above: Array
    steep: Array
    slack: Array


def _margin(fn: Logits, pair: _Pair) -> Callable[[Array], tuple[Array, Array]]:
    """A margin of one example, and what floats may have made it too large by."""

    def f(x: Array) -> tuple[Array, Array]:
        z = fn(x[None])[0]
        return z[pair.own] - z[pair.other], jnp.abs(z[pair.own]) + jnp.abs(z[pair.other])

    return f


def _dual(value: Array, size: Array, gradient: Array, x: Array, eta: Array, pair: _Pair) -> Array:
    """2 d(η, x), with the rounding of its terms taken off."""
    moved = (x - pair.x).ravel()
    slope = moved + eta * gradient.ravel()
    half, squares = jnp.sum(moved * moved), jnp.sum(slope * slope)
    convex = 1 - eta * pair.below
    fell, slack = squares / convex, pair.slack
    steep = eta * jnp.maximum(pair.steep, jnp.sqrt(jnp.sum(gradient * gradient)))
    noise = half + steep * steep
    lost = half + 2 * eta * size + fell + (2 * jnp.sqrt(squares * noise) + slack * noise) / convex
    vanished = (4 * x.size / convex + 2 * eta) * jnp.finfo(x.dtype).tiny  # squares and logits below the smallest float
    return jnp.where(convex > 0, half + 2 * eta * value - fell - slack * lost - vanished, -jnp.inf)


def _search(fn: Logits, steps: int, inner: int, pair: _Pair) -> Array:
    """The largest certificate met while η is halved towards the place where the margin vanishes.

    At the minimum x of φ the margin falls as η grows: from a positive one η goes up, from a negative one down.
    """
    f = jax.value_and_grad(_margin(fn, pair), has_aux=True)
    (gap, _), slope = f(pair.x)
    squares = jnp.sum(slope * slope)
    scale = jnp.where(squares > 0, gap / jnp.where(squares > 0, squares, 1), 1)  # η where a linear margin vanishes

    def outer(_: Array, carry: tuple[Array, Array, Array, Array]) -> tuple[Array, Array, Array, Array]:
        low, high, x, best = carry
        # Doubled at first: the largest η may be far off, or infinite.
        eta = jnp.minimum((low + high) / 2, jnp.maximum(2 * low, scale))

        def descend(_: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
            x, best = carry
            (value, size), gradient = f(x)
            best = jnp.maximum(best, _dual(value, size, gradient, x, eta, pair))
            step = 1 / (1 + eta * pair.above)
            return x - step * (x - pair.x + eta * gradient), best

        x, best = lax.fori_loop(0, inner, descend, (x, best))
        (value, size), gradient = f(x)
        best = jnp.maximum(best, _dual(value, size, gradient, x, eta, pair))
        positive = value > 0
        return jnp.where(positive, eta, low), jnp.where(positive, high, eta), x, best

    start = jnp.zeros((), pair.x.dtype)
    high = jnp.where(pair.below > 0, (1 - 1e-4) / jnp.where(pair.below > 0, pair.below, 1), jnp.inf)
    *_, best = lax.fori_loop(0, steps, outer, (start, high, pair.x, start))
    return jnp.sqrt(jnp.maximum(best, 0)) * (1 - pair.slack)


@functools.partial(jax.jit, static_argnames=("fn", "steps", "inner"))
def _searches(fn: Logits, pairs: _Pair, steps: int, inner: int) -> Array:
    return jax.vmap(functools.partial(_search, fn, steps, inner))(pairs)


@functools.partial(jax.jit, static_argnames=("fn",))
def _taylor(fn: Logits, x: Array, below: Array) -> tuple[Array, Array, Array]:
    """Radii from the margin, its gradient and its curvature at x₀, for every other class; logits; gradients' sizes.

    F(x₀ + δ) ≥ f - ‖∇f‖ r - ½ m r² for ‖δ‖ ≤ r.
    """
    logits, back = jax.vjp(fn, x)
    predicted, classes = jnp.argmax(logits, axis=1), logits.shape[1]

    def gradient(of: Array) -> Array:
        """Of one logit, of every example: ``(batch, size)``."""
        return back(jax.nn.one_hot(of, classes, dtype=logits.dtype))[0].reshape(len(x), -1)

    own_gradient = gradient(predicted)
    lengths = jax.vmap(lambda vector: unit(vector)[0])

    def against(other: Array) -> tuple[Array, Array]:
        other_gradient = gradient(jnp.full(len(x), other))
        return lengths(own_gradient - other_gradient), lengths(other_gradient)

    slopes, sizes = lax.map(against, jnp.arange(classes))
    slack = _slack(x.dtype, logits.dtype)
    vanished = own_gradient.shape[1] * float(jnp.finfo(x.dtype).tiny) / slack  # entries below the smallest float
    sizes = sizes.T + lengths(own_gradient)[:, None] + vanished
    slopes = slopes.T * (1 + slack) + slack * sizes
    own = classifier.of_class(logits, predicted)[:, None]
    gap = own - logits - slack * (jnp.abs(own) + jnp.abs(logits))
    gap = jnp.where(gap > jnp.finfo(x.dtype).tiny ** 0.4, gap, 0)  # squares of smaller ones vanish
    m = below[predicted]
    # The root in the form that does not cancel, of squares that do not vanish.
    bottom = slopes + jnp.hypot(slopes, jnp.sqrt(2 * m) * jnp.sqrt(gap))
    radii = jnp.where(gap > 0, _finite(2 * gap / bottom) * (1 - slack), 0)
    return jnp.where(jnp.arange(classes) == predicted[:, None], jnp.inf, radii), logits, sizes


def curvature_radii(
    fn: Logits,
    x: Array,
    curvatures: Array,
    *,
    enough: float | None = None,
    steps: int = 12,
    inner: int = 3,
    progress: Callable[[int, int], Any] | None = None,
) -> np.ndarray:
    """Certified radii of the predicted classes from curvature bounds of the margins: on the host, in jitted pieces.

    First for every other class from the value, gradient and curvature at the example; then the dual of this module's
    page for those classes that keep the radius down, most urgent first, until none does.

    Args:
      fn: logits ``(batch, classes)`` of a batch, which treats examples one by one; compiled anew in every call. Its
        gradients in JAX must be its derivatives: no ``stop_gradient`` or ``custom_vjp`` that changes them, and no kinks
        that cancel, as in ``relu(x) - relu(-x)``.
      x: the batch; of half precision it is taken in float32.
      curvatures: ``(classes, classes)`` m_ij from `fantastic4.lipschitz.margin_curvatures`, or one number for all.
      enough: stop for an example once its radius exceeds this; without, every radius is made as large as can be.
      steps: halvings of η.
      inner: gradient steps for each.
      progress: called with (pairs done, pairs to do).

    Returns:
      ``(batch,)``, 0 where nothing is certified.

    Raises:
      ValueError: shapes that do not fit, or arrays that are traced.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from fantastic4 import lipschitz, robustness
      >>> net = lambda x: jnp.concatenate([jax.nn.softplus(x), jax.nn.softplus(-x)], axis=1)
      >>> curvatures = lipschitz.margin_curvatures(net, jnp.ones((1, 1)))
      >>> radius = robustness.curvature_radii(net, jnp.array([[2.0]]), curvatures)[0]
      >>> 1.95 < radius <= 2.0
      np.True_
    """
    steps, inner = count(1)("steps", steps), count(1)("inner", inner)
    if any(isinstance(given, jax.core.Tracer) for given in (x, curvatures)):
        raise ValueError("curvature_radii works on numbers, not inside jit, vmap or grad: call it outside")
    x, fn = jnp.asarray(x), classifier.precise(fn)
    classes = jax.eval_shape(lambda x: classifier.logits(fn, x), x).shape[1]
    x = widened(x)
    if not len(x):
        return np.zeros(0)
    below = _pairs_of(curvatures, classes, "curvatures", x.dtype)
    pieces = [_taylor(fn, x[start : start + _BATCH], below) for start in range(0, len(x), _BATCH)]
    radii, logits, steep = (np.concatenate([np.asarray(p[i], np.float64) for p in pieces]) for i in range(3))
    predicted = np.argmax(logits, axis=1)
    slack = _slack(x.dtype, pieces[0][1].dtype)
    searched = ~np.isfinite(radii) | (radii <= 0)
    done = 0
    while True:
        least = radii.min(axis=1)
        worst = np.argmin(radii, axis=1)
        open_ = ~searched[np.arange(len(x)), worst]
        if enough is not None:
            open_ &= least <= enough
        examples = np.flatnonzero(open_)
        if not len(examples):
            break
        total = done + len(examples)
        for start in range(0, len(examples), _CHUNK):
            rows = examples[start : start + _CHUNK]
            # Few shapes to compile: a piece is filled up to a power of two with its first.
            size = 1 << (len(rows) - 1).bit_length()
            filled = np.concatenate([rows, np.repeat(rows[:1], size - len(rows))])
            own, other = jnp.asarray(predicted[filled]), jnp.asarray(worst[filled])
            sizes = jnp.asarray(steep[filled, worst[filled]], x.dtype)
            pairs = _Pair(
                x[filled], own, other, below[own, other], below[other, own], sizes, jnp.full_like(sizes, slack)
            )
            found = np.asarray(_searches(fn, pairs, steps, inner), np.float64)[: len(rows)]
            radii[rows, worst[rows]] = np.fmax(radii[rows, worst[rows]], found)
            searched[rows, worst[rows]] = True
            if progress is not None:
                progress(done + start + len(rows), total)
        done = total
    certified = radii.min(axis=1)
    return np.where(np.all(np.isfinite(logits), axis=1) & ~np.isnan(certified), certified, 0.0)


def certified_accuracy(fn: Logits, x: Array, labels: Array, radii: Array | np.ndarray, epsilon: float) -> float:
    """The share of examples that are right and certified beyond a distance.

    Args:
      fn: logits of a batch.
      x: the batch.
      labels: ``(batch,)``, integers from 0 on.
      radii: of the predictions, from this module.
      epsilon: the distance, at least 0; a radius must exceed it.

    Raises:
      ValueError: labels or radii of another shape, labels that are no integers, or a negative epsilon.

    Example:
      >>> import jax.numpy as jnp
      >>> from fantastic4 import robustness
      >>> net = lambda x: x @ jnp.array([[1.0, -1.0]])
      >>> x = jnp.array([[3.0], [1.0]])
      >>> robustness.certified_accuracy(net, x, jnp.array([0, 0]), jnp.array([3.0, 1.0]), 2.0)
      0.5
    """
    predicted, labels, radii = jnp.argmax(classifier.logits(fn, x), axis=1), jnp.asarray(labels), jnp.asarray(radii)
    for name, given in (("labels", labels), ("radii", radii)):
        if given.shape != predicted.shape:
            raise ValueError(f"{name} must have the shape {predicted.shape}, one for each example, got {given.shape}")
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise ValueError(f"labels must be integers, the classes, got {labels.dtype}")
    return float(jnp.mean((predicted == labels) & (radii > not_negative("epsilon", epsilon))))
