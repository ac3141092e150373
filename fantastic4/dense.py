"""Norms of plain matrices: a bound from above, a power step from below, the exact value.

A dense kernel is ``(n_in, n_out)``, as Flax keeps it; its norm is its largest singular value,
the factor by which ``x @ kernel`` can stretch ``x``.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import DTypeLike

from fantastic4.devices import vary_as
from fantastic4.entry import count, entry, same_kind
from fantastic4.linalg import HIGHEST, all_finite, generic, real_array, unit, with_pairs
from fantastic4.rounding import constant_up, gamma, power_of_two, round_up, subnormal_norm

_SQUARINGS = 20  # at most; rank^(2^-21) is 1.000004 for rank 10,000
_GAP = 2.0**-13  # squaring stops once the value is known to this accuracy


class Certified(NamedTuple):
    """An upper bound of a matrix norm, and the singular pair that attains it.

    Attributes:
      bound: scalar, never below the norm.
      left: ``(rows,)``, unit vector u.
      right: ``(columns,)``, unit vector v, with M v ≈ bound · u.
    """

    bound: Array
    left: Array
    right: Array


def _blocks(length: int) -> tuple[int, int]:
    """Block length and number of blocks for a sum of ``length`` products."""
    block = length if length <= 64 else 8 * math.ceil(math.sqrt(length) / 8)
    return block, -(-length // block)


def _gram(a: Array) -> Array:
    """AᵀA of ``(length, n)``, summed block by block so that its error grows with 2√length, not length."""
    length, n = a.shape
    block, blocks = _blocks(length)
    if blocks == 1:
        return jnp.matmul(a.T, a, precision=HIGHEST)
    padded = jnp.pad(a, ((0, blocks * block - length), (0, 0))).reshape(blocks, block, n)

    def add(total, part):
        return total + jnp.matmul(part.T, part, precision=HIGHEST), None

    return lax.scan(add, vary_as(jnp.zeros((n, n), a.dtype), padded), padded)[0]


def _gram_slack(length: int, dtype: DTypeLike) -> np.ndarray:
    """S with ‖`_gram`(A) - AᵀA‖₂ ≤ s · trace(`_gram`(A)).

    Entry by entry the error is at most γ|A|ᵀ|A|, whose norm is at most γ‖A‖_F². Two percent more pay for
    the rounding of the trace and for products that vanish below the smallest float.
    """
    return constant_up(1.02 * gamma(sum(_blocks(length)) + 1, dtype), dtype)


def _sum_squares(a: Array) -> Array:
    """Σ a², never below: row by row, and the barrier keeps the compiler from making it one long sum."""
    rows = lax.optimization_barrier(jnp.sum(a * a, axis=1))
    return jnp.sum(rows) * constant_up(1 + gamma(sum(a.shape) + 4, a.dtype), a.dtype)


@functools.partial(jax.jit, inline=True)
def frobenius_bound(matrix: Array) -> Array:
    """Upper bound of the Frobenius norm of a matrix, rounding included; NaN if an entry is NaN or infinite."""
    scale, inverse = power_of_two(jnp.max(jnp.abs(matrix), initial=0))
    root = round_up(jnp.sqrt(_sum_squares(matrix * inverse)), 4)
    value = round_up(root * scale, 2) + subnormal_norm(matrix)
    return jnp.where(all_finite(matrix), value, jnp.nan)


class _Powers(NamedTuple):
    """Loop state: A_t = (AᵀA)^(2^t) up to exact scalings, whose history undoes them at the end."""

    power: Array  # (n, n), trace in [1, 2)
    scales: Array  # (_SQUARINGS + 1,), the powers of two divided out
    traces: Array  # (_SQUARINGS + 1,), tr(A_{t-1}ᵀ A_{t-1}), before scaling
    steps: Array
    gap: Array


def certified_norm(matrix: Array, squarings: int | None = None) -> Certified:
    r"""Upper bound of ‖M‖₂ by Gram iteration, rounding included, without convergence.

    With G_0 = AᵀA and G_{t+1} = G_tᵀG_t, ‖A‖₂ ≤ ‖G_T‖_F^(2^-(T+1)), which falls to ‖A‖₂ as T
    grows (Delattre et al. 2023). Rounding is carried along, not estimated: a computed Gram matrix
    differs from the exact one by at most γ‖G_t‖_F² in norm, so from the last step backwards

        b_T = ‖G_T‖_F,     b_{t-1} = √(b_t + γ ‖G_{t-1}‖_F²),

    each rounded up, and ‖A‖₂ ≤ b. The squares are scaled by powers of two, which is exact.
    The iteration stops when the bound is known to be within 2^-13 of the norm, or after 20 squarings. What
    rounding adds is about u √(rows + columns) ‖A‖_F²/‖A‖², relative, which is most where all singular
    values are equal: measured in all (benchmarks.norms), 1.0002 for Gaussian 128×1152, 1.0014 for 512×4608;
    orthogonal, 1.0008 for 300×300, 1.0016 for 512×512, 1.011 for 2048×2048.

    Args:
      matrix: ``(rows, columns)``, float32 or float64.
      squarings: T, instead of as many as are needed: the bound is then the Schatten norm of order 2^(T+2).

    Returns:
      `Certified`: bound, left, right. NaN if an entry is NaN or infinite. Subnormal entries, which a
      compiler may flush to zero, add the smallest normal float times √size: sound, but loose for
      matrices that small.
    """
    rows, columns = matrix.shape
    if matrix.size == 0:
        empty = jnp.zeros((), matrix.dtype)
        return Certified(empty, jnp.zeros(rows, matrix.dtype), jnp.zeros(columns, matrix.dtype))
    size = sizing(matrix)
    tall = (matrix if rows >= columns else matrix.T) * size.inverse  # the Gram matrix is of the short side
    found = certified_tall(tall, squarings)
    found = found._replace(bound=size.restore(found.bound))
    return found if rows >= columns else Certified(found.bound, found.right, found.left)


class Sizing(NamedTuple):
    """What an array must be multiplied by before it is squared, and what undoes it.

    Attributes:
      scale: a power of two near the largest entry.
      inverse: one over it.
      lost: norm of what a compiler may flush to zero.
      finite: whether no entry is NaN or infinite.
      zero: whether all are zero, or flushed.
    """

    scale: Array
    inverse: Array
    lost: Array
    finite: Array
    zero: Array

    def restore(self, bound: Array) -> Array:
        """The bound of the array, from that of the scaled one; NaN if an entry is NaN or infinite."""
        value = jnp.where(self.zero, self.lost, round_up(bound * self.scale, 2) + self.lost)
        return jnp.where(self.finite, value, jnp.nan)


def sizing(array: Array) -> Sizing:
    """Scale of an array of any shape, the same for all its unfoldings."""
    largest = jnp.max(jnp.abs(array))
    return Sizing(*power_of_two(largest), subnormal_norm(array), all_finite(array), ~(largest > 0))


def certified_tall(tall: Array, squarings: int | None = None) -> Certified:
    """`certified_norm` of a matrix with no fewer rows than columns whose entries are at most 2 in size.

    NaN or anything for other matrices: `Sizing` knows which those are.
    """
    dtype, n = tall.dtype, tall.shape[1]
    gram = _gram(tall)

    def record(state: _Powers, gram: Array) -> _Powers:
        trace = jnp.trace(gram)
        scale, inverse = power_of_two(trace)
        power = gram * inverse
        # λ₁ lies between ‖A‖_F²/tr A and ‖A‖_F: both ends of the value that the roots will shrink.
        spread = jnp.log(trace * inverse) - jnp.log(_sum_squares(power)) / 2
        return _Powers(
            power,
            state.scales.at[state.steps].set(scale),
            state.traces.at[state.steps].set(trace),
            state.steps + 1,
            spread * jnp.exp2(-state.steps.astype(dtype) - 1),
        )

    most = _SQUARINGS if squarings is None else squarings
    history = jnp.zeros(most + 1, dtype)
    start = record(_Powers(gram, history, history, jnp.asarray(0), jnp.zeros((), dtype)), gram)
    end = lax.while_loop(
        lambda state: (state.steps <= most) & ((state.gap > _GAP) | (squarings is not None)),
        lambda state: record(state, _gram(state.power)),
        start,
    )

    def unwind(step: Array, bound: Array) -> Array:
        t = end.steps - 1 - step
        slack = jnp.where(t == 0, _gram_slack(tall.shape[0], dtype), _gram_slack(n, dtype))
        return round_up(jnp.sqrt(bound * end.scales[t] + slack * end.traces[t]), 8)

    bound = round_up(jnp.sqrt(_sum_squares(end.power)), 8)
    bound = lax.fori_loop(0, end.steps, unwind, bound)

    def climb(_: int, vector: Array) -> Array:
        image = jnp.matmul(end.power, vector, precision=HIGHEST)
        return image / jnp.maximum(jnp.max(jnp.abs(image)), jnp.finfo(dtype).tiny)

    # A power this high is nearly a projection onto the top singular space, and its largest column nearly
    # lies in it. Eight more products raise the power ninefold, at the cost of vectors.
    column = end.power[:, jnp.argmax(jnp.diagonal(end.power))]
    _, short = unit(lax.fori_loop(0, 8, climb, column))
    _, long = unit(jnp.matmul(tall, short, precision=HIGHEST))
    return Certified(bound, long, short)


def _dense_kernel(kernel: Array) -> Array:
    kernel = real_array(kernel, "a dense kernel")
    if kernel.ndim != 2:
        raise ValueError(
            f"a dense kernel has shape (n_in, n_out), got {kernel.shape}: "
            "for a convolution use fantastic4.four_bounds, for a stack of kernels jax.vmap"
        )
    return kernel


def _differentiable(value: Array, kernel: Array, n_in: Array, n_out: Array) -> Array:
    value, n_in, n_out = lax.stop_gradient((value, n_in, n_out))
    return with_pairs(value, kernel[None, None], n_in[None, None], n_out[None, None])


@entry()
def bound(kernel: Array) -> Array:
    """Upper bound of ‖kernel‖₂, never below it, rounding included, and hardly above it.

    See `certified_norm` for the formula, the proof and the gap: 1.001 at most for sides up to 300.
    Differentiable in both modes: the gradient is u vᵀ of the top singular pair, held constant in second
    derivatives.

    Args:
      kernel: ``(n_in, n_out)``; float16 and bfloat16 are computed in float32.

    Returns:
      Scalar, float32 or float64. 0 for a zero kernel; NaN if an entry is NaN or infinite.

    Raises:
      ValueError: wrong rank or dtype.

    Example:
      >>> import jax.numpy as jnp
      >>> from fantastic4 import dense
      >>> 5.0 <= float(dense.bound(jnp.array([[3.0, 4.0]]))) < 5.001
      True
    """
    kernel = _dense_kernel(kernel)
    value, n_in, n_out = certified_norm(lax.stop_gradient(kernel))
    return _differentiable(value, kernel, n_in, n_out)


@entry()
def exact_norm(kernel: Array) -> Array:
    """‖kernel‖₂ by a singular value decomposition, right to a few units in the last place.

    It may lie on either side of the truth by its rounding; use `bound` for a number that may not.

    Args:
      kernel: ``(n_in, n_out)``.

    Returns:
      Scalar, differentiable.

    Raises:
      ValueError: wrong rank or dtype.

    Example:
      >>> import jax.numpy as jnp
      >>> from fantastic4 import dense
      >>> print(round(float(dense.exact_norm(jnp.diag(jnp.array([1.0, -7.0])))), 4))
      7.0
    """
    kernel = _dense_kernel(kernel)
    if kernel.size == 0:
        return jnp.zeros((), kernel.dtype)
    finite = all_finite(kernel)  # LAPACK may not return from an infinite entry
    values = jnp.linalg.svd(jnp.where(finite, kernel, 0), compute_uv=False)
    return jnp.where(finite, values[0], jnp.nan)


class PowerState(NamedTuple):
    """What the next power step starts from.

    Attributes:
      vector: ``(n_out,)``, the latest left singular vector, unit length.
    """

    vector: Array


@entry(warmup=count(0))
def init(kernel: Array, *, key: Array, warmup: int = 20) -> PowerState:
    """A random start for `step`, brought near the top singular vector by ``warmup`` iterations.

    Args:
      kernel: ``(n_in, n_out)``.
      key: a ``jax.random.key``.
      warmup: iterations to run.

    Returns:
      `PowerState`.
    """
    kernel = _dense_kernel(kernel)
    _, vector = unit(generic(key, (kernel.shape[1],), kernel.dtype))
    return step(kernel, PowerState(vector), iterations=warmup)[1] if warmup else PowerState(vector)


@entry(iterations=count(1))
def step(kernel: Array, state: PowerState, *, iterations: int = 1) -> tuple[Array, PowerState]:
    """Estimate of ‖kernel‖₂ from below by warm-started power iteration (Golub & Van Loan 1996).

    An estimate, not a bound: it never exceeds the norm by more than rounding, and reaches it only
    in the limit. Two products with the kernel an iteration; the gradient is one outer product.

    Args:
      kernel: ``(n_in, n_out)``.
      state: from `init` or the step before.
      iterations: at least 1.

    Returns:
      The estimate, a scalar, and the new state. A zero kernel leaves the state as it was.

    Raises:
      ValueError: ``iterations`` < 1, or a state that belongs to another kernel.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from fantastic4 import dense
      >>> kernel = jnp.array([[3.0, 0.0], [0.0, 4.0]])
      >>> estimate, state = dense.step(kernel, dense.init(kernel, key=jax.random.key(0)))
      >>> print(round(float(estimate), 3))
      4.0
    """
    kernel = _dense_kernel(kernel)
    same_kind("state", state, PowerState, "dense.init(kernel, key=…)")
    if state.vector.shape != kernel.shape[1:]:
        raise ValueError(
            f"this state has a vector of shape {state.vector.shape}, the kernel {kernel.shape} "
            f"needs {kernel.shape[1:]}: make one with dense.init(kernel, key=…)"
        )
    constant = lax.stop_gradient(kernel)

    def iterate(_, carry):
        n_out, _, _ = carry
        _, n_in = unit(jnp.matmul(constant, n_out, precision=HIGHEST))
        value, new = unit(jnp.matmul(n_in, constant, precision=HIGHEST))
        return jnp.where(value > 0, new, n_out), n_in, value

    vector = lax.stop_gradient(state.vector)
    carry = iterate(0, (vector, None, None))
    n_out, n_in, value = lax.fori_loop(1, iterations, iterate, carry) if iterations > 1 else carry
    return _differentiable(value, kernel, n_in, n_out), PowerState(n_out)
