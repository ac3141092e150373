"""The ladder from cheap to tight: every bound between the fantastic four and the interval.

Each sound function here takes canonical kernels and returns an upper bound of σ∞, rounding included. `init` and
`step` are their warm-started estimates for a train step.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from fantastic4 import frequency, gram, msgpack, power, unfolding
from fantastic4.conv import ConvSpec, Phased, geometry, phased, polyphase, polyphase_taps
from fantastic4.devices import vary_as
from fantastic4.entry import choice, count, entry, optional, same_kind
from fantastic4.linalg import pairs_gradient
from fantastic4.rounding import constant_up, power_of_two, round_up, subnormal_norm
from fantastic4.symbol import half_grid

POWERS = (0.0, 0.5, 0.75)
"""Exponents of the tap weights of the sound weighted bound; 0 is the four bounds."""
TRAINING_POWERS = (0.0, 0.5)
TRAINING_METHODS = ("four", "weighted", "grid")


def _smallest(kernels: Array, pairs: unfolding.Pairs, factors: Array) -> Array:
    """The smallest over the unfoldings of factor · value, the largest over the batch, differentiable."""
    pairs, factors = lax.stop_gradient((pairs, factors))
    scaled = pairs._replace(values=pairs.values * factors, inputs=pairs.inputs * factors[:, None, :, None])
    return unfolding.smallest(kernels, unfolding.over_groups(scaled))


def weighted(kernels: Array) -> Array:
    r"""Min over weights and unfoldings of ‖1/a‖ ‖1/b‖ ‖unfolding scaled by a, b‖: at most the four bounds.

    See `fantastic4.unfolding.weights`. The weights are constants in the gradient, which they may be: any are sound.
    """
    constant = lax.stop_gradient(kernels)
    # Weights of a row and of a column may be large, both.
    scale, inverse = power_of_two(jnp.max(jnp.abs(constant), initial=0))
    scaling = unfolding.weights(unfolding.tap_squares(constant * inverse), POWERS)
    pairs = unfolding.certified_pairs(constant * inverse, scaling)
    pairs = pairs._replace(values=pairs.values * scale)
    # A factor is a product of two norms of a few numbers, each from squares and reciprocals.
    factors = round_up(scaling.factor, 2 * math.prod(kernels.shape[1:-2]) + 24)
    # Scaling a tap may flush its subnormals before anyone can find them.
    flushed = subnormal_norm(constant) * constant_up(math.sqrt(math.prod(kernels.shape[1:-2])), kernels.dtype)
    return round_up(_smallest(kernels, pairs, factors) + flushed, 4)


def hybrid(kernels: Array, points: int | None) -> Array:
    """The smallest over the axes of: this axis on a grid of ``points`` (2k + 2), the others unfolded."""
    spatial = kernels.shape[1:-2]
    alike: dict[tuple[int, ...], list[Array]] = {}
    for axis in [a for a, k in enumerate(spatial) if k > 1] or [0]:
        turned = jnp.moveaxis(kernels, 1 + axis, 1)
        alike.setdefault(turned.shape, []).append(turned)
    values = []
    for shape, same in alike.items():  # the axes of a square kernel share one program
        stacked, size = jnp.stack(same), points or 2 * shape[1] + 2
        tops = lax.map(lambda k, n=size: frequency.certified_top(k, (0,), n), lax.stop_gradient(stacked))
        values.append(jax.vmap(frequency.differentiable)(stacked, tops))
    return jnp.min(jnp.concatenate(values))


def grid(kernels: Array, points: int | None) -> Array:
    """Max ‖F‖ on a grid of ``points`` an axis (3k by default) times the Ehlich-Zeller factor."""
    sizes = _grid_sizes(kernels.shape[1:-2], points)
    top = frequency.certified_top(lax.stop_gradient(kernels), tuple(range(len(sizes))), sizes)
    return frequency.differentiable(kernels, top)


def _grid_sizes(spatial: tuple[int, ...], points: int | None) -> tuple[int, ...]:
    return tuple(1 if k == 1 else points or 3 * k for k in spatial)


def matrix_gram(kernels: Array, iterations: int) -> Array:
    """√taps · the smallest Schatten norm of order 2^(iterations + 1) of the unfoldings."""
    spatial = kernels.shape[1:-2]
    matrices = [unfolding.unfold(kernels, axes) for axes in unfolding.distinct(spatial)[0]]
    schatten = jax.vmap(jax.vmap(lambda m: gram.schatten_bound(m, iterations)))
    each = []
    for _, stacked in unfolding.stacks(matrices):
        norms = schatten(stacked)
        # Asked of every group: on a CPU, a maximum over thousands may drop a NaN.
        poisoned = jnp.any(jnp.isnan(norms), axis=1)
        each.append(jnp.where(poisoned, jnp.nan, jnp.max(norms, axis=1)))
    scale = constant_up(math.sqrt(math.prod(spatial)), kernels.dtype)
    return round_up(jnp.min(jnp.concatenate(each)) * scale, 2)


@msgpack.state
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LadderState:
    """What the next `step` starts from.

    Attributes:
      inner: the vectors of the method.
      method: its name, static.
      points: grid points an axis, static; None where there is no grid.
    """

    inner: Any
    method: str = dataclasses.field(metadata={"static": True})
    points: int | None = dataclasses.field(metadata={"static": True})


def _prepare(kernel: Array, spec: ConvSpec, scale: Array | None, method: str) -> tuple[Phased, Array | None]:
    """`phased`, with the scale of the outputs beside the kernels or, where it must be, in them."""
    if scale is None:
        return phased(kernel, spec), None
    c_out = geometry(kernel.shape, spec).c_out
    if scale.shape != (c_out,):
        raise ValueError(f"scale must be ({c_out},), one number for each output of the layer, got {scale.shape}")
    if method != "four" or spec.transposed:
        return phased(kernel * (scale[:, None] if spec.transpose_kernel else scale), spec), None
    plain = phased(kernel, spec)
    return plain, scale.astype(plain.kernels.dtype).reshape(len(plain.kernels), -1)


def _weights(kernels: Array, phases: tuple[int, ...]) -> unfolding.Weights:
    """`fantastic4.unfolding.weights` for a train step, at the taps of the kernels as they are stored."""
    spatial = kernels.shape[1:-2]
    squares = polyphase(unfolding.tap_squares(kernels)[..., None, None], phases)
    scaling = unfolding.weights(jnp.sum(squares, axis=(-2, -1)), TRAINING_POWERS)
    place = np.indices(spatial).reshape(len(spatial), -1) // np.array(phases)[:, None]
    at_taps = scaling.taps[:, np.ravel_multi_index(tuple(place), polyphase_taps(spatial, phases))]
    return scaling._replace(taps=at_taps)


@entry(method=choice(*TRAINING_METHODS), points=optional(count(1)), warmup=count(0))
def init(
    kernel: Array,
    spec: ConvSpec = ConvSpec(),  # noqa: B008 (frozen)
    *,
    key: Array,
    method: str = "grid",
    points: int | None = None,
    warmup: int = 20,
    scale: Array | None = None,
) -> LadderState:
    """A start for `step`: random vectors, brought near the top ones by ``warmup`` iterations.

    Args:
      kernel: ``(*spatial, c_in // groups, c_out)``.
      spec: the layer's `ConvSpec`.
      key: a ``jax.random.key``.
      method: ``"four"``, ``"weighted"`` or ``"grid"``.
      points: of ``"grid"``: points an axis, at least the kernel size; 3k without.
      warmup: iterations to run.
      scale: see `step`.

    Returns:
      `LadderState`.

    Raises:
      ValueError: an unknown method, a grid that is too coarse, ``points`` for a method without a grid, a ``scale`` that
        is not one number for each output.
    """
    msgpack.register()  # also if this is traced: once is enough
    (kernels, phases, _), scale = _prepare(lax.stop_gradient(kernel), spec, lax.stop_gradient(scale), method)
    if points is not None and method != "grid":
        raise ValueError(f"points belong to method 'grid', not to {method!r}")
    inner: Any
    if method == "grid":
        taps = polyphase_taps(kernels.shape[1:-2], phases)
        sizes = _grid_sizes(taps, points)
        frequency.grid_factor(taps, sizes)
        inner = frequency.start(key, kernels, len(half_grid(sizes)))
    else:
        inner = power.start(key, kernels, phases, len(TRAINING_POWERS) if method == "weighted" else 1)
    iterate, inner = _iterate(kernels, phases, method, points, scale), vary_as(inner, kernels)
    return LadderState(lax.fori_loop(0, warmup, lambda _, s: iterate(s)[1], inner), method, points)


def _iterate(
    kernels: Array, phases: tuple[int, ...], method: str, points: int | None, scale: Array | None
) -> Callable[[Any], tuple[Any, Any]]:
    """One power iteration of a method on constant kernels: its singular values with vectors, and the new state."""
    if method == "grid":
        sizes = _grid_sizes(polyphase_taps(kernels.shape[1:-2], phases), points)
        return lambda s: frequency.power_step(kernels, s, half_grid(sizes), sizes, phases)
    if method == "four":
        return lambda s: power.step(kernels, s, phases, scale=scale)
    taps = _weights(kernels, phases).taps
    return lambda s: power.step(kernels, s, phases, weights=taps)


@functools.partial(jax.jit, static_argnames=("phases", "method", "points", "iterations"))
def _advance(
    kernels: Array,
    inner: Any,
    scale: Array | None,
    *,
    phases: tuple[int, ...],
    method: str,
    points: int | None,
    iterations: int,
) -> tuple[Any, Any]:
    """Some power iterations. A program of its own: of constants, so a derivative passes by it without a look inside."""
    iterate = _iterate(kernels, phases, method, points, scale)
    if iterations > 1:
        inner = vary_as(inner, kernels)
        inner = lax.fori_loop(0, iterations - 1, lambda _, s: iterate(s)[1], inner)
    return iterate(inner)


def _fitting(state: LadderState, kernels: Array, phases: tuple[int, ...], shape: tuple[int, ...]) -> Any:
    """The vectors of a state, constant and of the dtype of its kernels, to which they must belong."""
    wanted: tuple[int, ...]
    if state.method == "grid":
        sizes = _grid_sizes(polyphase_taps(kernels.shape[1:-2], phases), state.points)
        wanted = frequency.state_shape(kernels, len(half_grid(sizes)))
    else:
        wanted = power.state_shape(kernels, phases, len(TRAINING_POWERS) if state.method == "weighted" else 1)[0]
    if state.inner.vectors.shape != wanted:
        raise ValueError(
            f"this state belongs to another kernel than {shape} with this spec: "
            "make one with ladder.init(kernel, spec, key=…)"
        )
    return jax.tree.map(lambda x: lax.stop_gradient(x).astype(kernels.dtype), state.inner)


@entry(iterations=count(1))
def step(
    kernel: Array,
    state: LadderState,
    spec: ConvSpec = ConvSpec(),  # noqa: B008 (frozen)
    *,
    iterations: int = 1,
    scale: Array | None = None,
) -> tuple[Array, LadderState]:
    """An estimate of a bound for a train step, by the method that the state was made for.

    **An estimate**: power iteration comes to each singular value from below. Measured costs and gaps of the
    methods stand in docs/methods.md; the sound counterparts are ``fantastic4.bound(kernel, spec, method=…)``.
    Kernels beyond 1e±18 have weights of 1.

    Args:
      kernel: ``(*spatial, c_in // groups, c_out)``.
      state: from `init` or the step before.
      spec: the layer's `ConvSpec`.
      iterations: at least 1.
      scale: ``(c_out,)``, by which each output of the layer is multiplied, as batch normalisation does it. With
        ``"four"`` it costs next to nothing: the kernel with it is never written down, nor is that kernel's gradient.

    Returns:
      A scalar, whose gradient, by ``kernel`` and by ``scale``, is that of the one singular value that it is, with
      constant vectors; and the new state.

    Raises:
      ValueError: a state that belongs to another kernel, a ``scale`` that is not one number for each output.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from fantastic4 import ladder
      >>> kernel = jnp.ones((3, 3, 1, 1))
      >>> state = ladder.init(kernel, key=jax.random.key(0), method="grid", points=8)
      >>> value, state = ladder.step(kernel, state)
      >>> print(round(float(value), 2))  # 9 · 1.17, the factor of an 8-point grid
      10.54
    """
    same_kind("state", state, LadderState, "ladder.init(kernel, spec, key=…)")
    (kernels, phases, factor), scale = _prepare(kernel, spec, scale, state.method)
    taps = polyphase_taps(kernels.shape[1:-2], phases)
    inner, constant = _fitting(state, kernels, phases, kernel.shape), lax.stop_gradient(kernels)
    how: dict[str, Any] = {"method": state.method, "points": state.points, "iterations": iterations}
    found, inner = _advance(constant, inner, lax.stop_gradient(scale), phases=phases, **how)
    if state.method == "grid":
        value = frequency.differentiable(kernels, found) * frequency.grid_factor(taps, _grid_sizes(taps, state.points))
    elif state.method == "weighted":
        value = _smallest(kernels, found, _weights(constant, phases).factor)
    else:
        factor *= math.sqrt(math.prod(taps))
        value = unfolding.smallest(kernels, unfolding.over_groups(found), scale)
    return value if factor == 1 else value * factor, LadderState(inner, state.method, state.points)


def step_with_gradient(
    kernel: Array, state: LadderState, spec: ConvSpec, *, iterations: int = 1
) -> tuple[Array, LadderState, Array]:
    """`step` with the gradient by the kernel: that of ``jax.value_and_grad``, in a fraction of the time to trace."""
    if state.method != "four":
        advance = functools.partial(step, state=state, spec=spec, iterations=iterations)
        (value, after), gradient = jax.value_and_grad(advance, has_aux=True)(kernel)
        return value, after, gradient
    kernels, phases, factor = phased(kernel, spec)
    inner = _fitting(state, kernels, phases, kernel.shape)
    how: dict[str, Any] = {"method": "four", "points": None, "iterations": iterations}
    found, inner = _advance(kernels, inner, None, phases=phases, **how)
    value, inputs, outputs, _ = unfolding.pick_smallest(unfolding.over_groups(found))
    factor *= math.sqrt(math.prod(polyphase_taps(kernels.shape[1:-2], phases)))
    if factor != 1:
        value, inputs = value * factor, inputs * factor
    gradients = pairs_gradient(inputs, outputs).reshape(kernels.shape)
    (gradient,) = jax.linear_transpose(lambda kernel: phased(kernel, spec).kernels, kernel)(gradients)
    return value, LadderState(inner, state.method, state.points), gradient
