"""The fantastic four: bounds of a convolution's norm, sound ones and warm-started estimates of them."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from fantastic4 import gram, ladder, power, unfolding
from fantastic4.conv import ConvSpec, canonical, phased, polyphase_taps
from fantastic4.devices import vary_as
from fantastic4.entry import choice, count, entry, optional, same_kind
from fantastic4.linalg import with_pairs
from fantastic4.power import PowerState
from fantastic4.rounding import constant_up, round_up

METHODS = ("four", "weighted", "hybrid", "grid", "gram", "gram_conv")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class FourBounds:
    """√(taps) · ‖unfolding‖ for each of the 2^D unfoldings of a kernel; four in 2-D.

    From `four_bounds` each number is an upper bound of the convolution's norm; from `step` each is an
    estimate of that bound, which may lie below it.

    Attributes:
      values: ``(2^D,)``: R, S, T, U in 2-D; T, U in 1-D; in 3-D as `names` tells.
      smallest: scalar, their minimum, whose derivative costs one outer product instead of 2^D.
    """

    values: Array
    smallest: Array

    @property
    def names(self) -> tuple[str, ...]:
        """The names of `values`; of a mixed unfolding in 3-D, the axes that go with the outputs."""
        return unfolding.names(self.values.shape[-1].bit_length() - 1)

    def min(self) -> Array:
        """The smallest of them, the bound to use. Its gradient is that of the smallest alone."""
        return self.smallest

    def argmin(self) -> Array:
        """Index of the smallest in `values`, an int32 scalar."""
        return jnp.argmin(self.values, axis=-1)

    def __getitem__(self, name: str) -> Array:
        """The bound with this name: ``four["T"]``."""
        if name not in self.names:
            raise ValueError(f"no unfolding {name!r}: this kernel has {', '.join(self.names)}")
        return self.values[..., self.names.index(name)]

    @property
    def r(self) -> Array:
        """R: kernel rows with the outputs, kernel columns with the inputs. 2-D only."""
        return self["R"]

    @property
    def s(self) -> Array:
        """S: kernel columns with the outputs, kernel rows with the inputs. 2-D only."""
        return self["S"]

    @property
    def t(self) -> Array:
        """T: all taps with the inputs: √(taps) times Miyato's heuristic."""
        return self["T"]

    @property
    def u(self) -> Array:
        """U: all taps with the outputs."""
        return self["U"]


def _four(kernels: Array, pairs: unfolding.Pairs, taps: tuple[int, ...], factor: float, *, sound: bool) -> FourBounds:
    """Scale, maximise over the groups, spread to 2^D values, and attach the derivatives.

    ``taps`` and ``factor`` are those of the canonical kernel.
    """
    scale = constant_up(math.sqrt(math.prod(taps)) * factor, kernels.dtype)
    top = unfolding.over_groups(lax.stop_gradient(pairs))
    at_taps = kernels.reshape(len(kernels), -1, *kernels.shape[-2:])
    each, smallest = with_pairs(top.values, at_taps, top.inputs, top.outputs), unfolding.smallest(kernels, top)

    def finish(x: Array) -> Array:
        return round_up(x * scale, 2) if sound else x * scale

    which = np.array(unfolding.distinct(taps)[1])
    return FourBounds(finish(each)[which], finish(smallest))


@entry()
def four_bounds(kernel: Array, spec: ConvSpec = ConvSpec()) -> FourBounds:  # noqa: B008 (frozen)
    r"""The four bounds of a convolution's norm, each never below it, rounding included.

    For every input size, ‖layer‖₂ ≤ factor · √(hw) · min(‖R‖, ‖S‖, ‖T‖, ‖U‖) (Singla & Feizi 2021,
    Theorem 1), with the kernel and the factor of `fantastic4.conv.canonical`, and each ‖·‖ bounded
    from above by `fantastic4.dense.certified_norm`, which says by how much it may exceed them. With groups each is
    the largest over the groups. For unit stride and zero padding, at most √(hw) times the norm on large inputs.

    Differentiable in both modes: the gradient is √(hw) · u vᵀ of the top singular pair, folded back to
    the kernel's shape; that of the minimum is the smallest one's. The pair is held constant, so second
    derivatives are zero.

    Args:
      kernel: ``(*spatial, c_in // groups, c_out)``, 1 to 3 spatial axes, taken as JAX holds it;
        float16 and bfloat16 are computed in float32.
      spec: the layer's `ConvSpec`.

    Returns:
      `FourBounds`. 0 for a zero kernel; NaN where an entry is NaN or infinite.

    Raises:
      ValueError: wrong rank or dtype, or a spec that does not fit the kernel.

    Example:
      >>> import jax.numpy as jnp
      >>> import fantastic4 as f4
      >>> four = f4.four_bounds(jnp.ones((3, 3, 1, 1)))  # equal taps: the bounds are exact
      >>> 9.0 <= float(four.min()) < 9.01
      True
    """
    kernels, factor = canonical(kernel, spec)
    pairs = unfolding.certified_pairs(lax.stop_gradient(kernels))
    return _four(kernels, pairs, kernels.shape[1:-2], factor, sound=True)


@entry(method=choice(*METHODS), points=optional(count(1)), iterations=optional(count(1)))
def bound(
    kernel: Array,
    spec: ConvSpec = ConvSpec(),  # noqa: B008 (frozen)
    *,
    method: str = "four",
    points: int | None = None,
    iterations: int | None = None,
) -> Array:
    """Upper bound of a convolution's norm, never below it, for every input size, rounding included.

    A ladder from cheap to tight; docs/methods.md has the table of costs and gaps.

    * ``"four"``: the smallest of `four_bounds`; at most √(taps) above the norm.
    * ``"weighted"``: the same with weighted taps, the best of three weights; up to rounding never above ``"four"``.
    * ``"hybrid"``: one axis on a grid of ``points`` (2k + 2), the others unfolded; the best axis.
    * ``"grid"``: all axes on a grid of ``points`` (3k) an axis; at most Π 1/cos(π(k-1)/2N) above, whatever the kernel.
    * ``"gram"``: the four by ``iterations`` (5) Gram iterations: Schatten norms, whose gradient reaches all large
      singular values.
    * ``"gram_conv"``: ``iterations`` (3) convolutional Gram iterations.

    Args:
      kernel: ``(*spatial, c_in // groups, c_out)``.
      spec: the layer's `ConvSpec`.
      method: one of these.
      points: of ``"grid"`` and ``"hybrid"``: points on an axis, at least the (polyphase) kernel size.
      iterations: of ``"gram"`` and ``"gram_conv"``, at least 1.

    Returns:
      Scalar, differentiable in both modes; its vectors are held constant in second derivatives, which are zero but for
      ``"gram_conv"``. ``"weighted"`` holds its weights constant too: its derivative is that of the bound with these
      weights, not of the best ones. 0 for a zero kernel, NaN where an entry is NaN or infinite.

    Raises:
      ValueError: an unknown method, a grid too coarse, an option of another method, or what `four_bounds` refuses.

    Example:
      >>> import jax.numpy as jnp
      >>> import fantastic4 as f4
      >>> 2.0 <= float(f4.bound(2 * jnp.ones((1, 1, 1, 1)))) < 2.01
      True
      >>> one_tap = jnp.zeros((3, 3, 1, 1)).at[0, 1].set(1.0)
      >>> [round(float(f4.bound(one_tap, method=m)), 2) for m in ("four", "weighted", "grid")]
      [3.0, 1.0, 1.13]
    """
    if points is not None and method not in ("grid", "hybrid"):
        raise ValueError(f"points belong to the methods 'grid' and 'hybrid', not to {method!r}")
    if iterations is not None and method not in ("gram", "gram_conv"):
        raise ValueError(f"iterations belong to the methods 'gram' and 'gram_conv', not to {method!r}")
    if method == "four":
        return four_bounds(kernel, spec).min()
    kernels, factor = canonical(kernel, spec)
    value = {
        "weighted": ladder.weighted,
        "hybrid": lambda k: ladder.hybrid(k, points),
        "grid": lambda k: ladder.grid(k, points),
        "gram": lambda k: ladder.matrix_gram(k, iterations or 5),
        "gram_conv": lambda k: gram.convolutional_bound(k, iterations or 3),
    }[method](kernels)
    return round_up(value * constant_up(factor, kernels.dtype), 2) if factor != 1 else value


@entry(warmup=count(0))
def init(kernel: Array, spec: ConvSpec = ConvSpec(), *, key: Array, warmup: int = 20) -> PowerState:  # noqa: B008
    """A start for `step`: random vectors, brought near the top ones by ``warmup`` iterations.

    Args:
      kernel: ``(*spatial, c_in // groups, c_out)``.
      spec: the layer's `ConvSpec`.
      key: a ``jax.random.key``.
      warmup: iterations to run; 0 leaves the vectors random.

    Returns:
      `PowerState`.

    Raises:
      ValueError: what `four_bounds` refuses, or a negative ``warmup``.
    """
    kernels, phases, _ = phased(lax.stop_gradient(kernel), spec)
    iterate = lambda _, state: power.step(kernels, state, phases)[1]  # noqa: E731
    return lax.fori_loop(0, warmup, iterate, power.start(key, kernels, phases))


@entry(iterations=count(1))
def step(
    kernel: Array,
    state: PowerState,
    spec: ConvSpec = ConvSpec(),  # noqa: B008 (frozen)
    *,
    iterations: int = 1,
) -> tuple[FourBounds, PowerState]:
    r"""Estimates of the four bounds for a train step, by warm-started power iteration.

    **Estimates**: power iteration comes to each ‖M‖ from below, so these may be smaller than the
    bounds, and than the norm; `four_bounds` is the sound one. Warm-started, they follow slowly moving
    weights to within a percent or so, but not to a singular vector that is exactly orthogonal to theirs, as of a
    diagonal kernel whose largest entry becomes another.

    All unfoldings together cost two passes over the kernel an iteration, and the derivative of
    `FourBounds.min` one outer product more, in forward and in reverse mode. The vectors are held
    constant: first derivatives are those of σ at the pair reached, uᵀ M(dK) v; second derivatives by
    the kernel are zero, not those of ‖M‖.

    Args:
      kernel: ``(*spatial, c_in // groups, c_out)``.
      state: from `init` or the step before.
      spec: the layer's `ConvSpec`.
      iterations: at least 1.

    Returns:
      `FourBounds` and the new state. No gradient flows into or out of the state. A zero kernel gives
      0 and leaves the vectors as they were. From one step to the next the kernel may change its scale
      by a factor of 1e18 either way; past that, make a new state. Float32 holds it for kernels with norms from
      1e-35 to 1e35.

    Raises:
      ValueError: ``iterations`` < 1, a state that belongs to another kernel, or what `four_bounds` refuses.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import fantastic4 as f4
      >>> kernel = jnp.ones((3, 3, 1, 1))
      >>> state = f4.init(kernel, key=jax.random.key(0))
      >>> def penalty(kernel, state):
      ...     four, state = f4.step(kernel, state)
      ...     return four.min(), state
      >>> (value, state), gradient = jax.value_and_grad(penalty, has_aux=True)(kernel, state)
      >>> print(round(float(value), 3), gradient.shape)
      9.0 (3, 3, 1, 1)
    """
    same_kind("state", state, PowerState, "fantastic4.init(kernel, spec, key=…)")
    kernels, phases, factor = phased(kernel, spec)
    wanted = power.state_shape(kernels, phases)
    if (state.vectors.shape, state.scales.shape) != wanted:
        raise ValueError(
            f"this state has vectors of shape {state.vectors.shape}, the kernel {kernel.shape} with this spec "
            f"needs {wanted[0]}: make one with fantastic4.init(kernel, spec, key=…)"
        )
    constant = lax.stop_gradient(kernels)
    state = jax.tree.map(lambda x: lax.stop_gradient(x).astype(kernels.dtype), state)
    iterate = lambda _, state: power.step(constant, state, phases)[1]  # noqa: E731
    if iterations > 1:
        state = vary_as(state, constant)
        state = lax.fori_loop(0, iterations - 1, iterate, state)
    pairs, state = power.step(constant, state, phases)
    taps = polyphase_taps(kernels.shape[1:-2], phases)
    return _four(kernels, pairs, taps, factor, sound=False), state
