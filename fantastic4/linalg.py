"""Small linear algebra that every method shares: products, unit vectors, the derivative of a norm."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import DTypeLike

from fantastic4.devices import vary_as

HIGHEST = lax.Precision.HIGHEST
"""On a GPU or TPU the default for float32 is a product with 8 to 11 bits: no bound survives that."""

_UNKNOWN = (np.dtype(object), np.dtype(np.longdouble), np.dtype(np.clongdouble))  # dtypes of NumPy


def check_dtype(name: str, x: Any) -> None:
    """Refuse NumPy's arrays of a dtype that JAX does not know."""
    if isinstance(x, np.ndarray | np.generic) and (x.dtype in _UNKNOWN or not x.dtype.isnative):
        kind = x.dtype if x.dtype.isnative else x.dtype.str
        raise ValueError(f"{name} has dtype {kind}, which JAX does not know: cast it, .astype(np.float32)")


def real_array(x: Array | np.ndarray, name: str) -> Array:
    """``x`` as an array of float32 or wider; half precision is widened to float32, exactly.

    Raises:
      ValueError: ``x`` is no array, or is of an integer, boolean or complex dtype, or of fewer than 16 bits.
    """
    if not hasattr(x, "dtype") or not hasattr(x, "ndim"):
        raise ValueError(f"{name} must be one array, got {type(x).__name__}: jnp.asarray makes one")
    check_dtype(name, x)
    floating = jnp.issubdtype(x.dtype, jnp.floating)
    if not floating or jnp.finfo(x.dtype).bits < 16:
        wide = " of 16 bits or more" if floating else ""
        raise ValueError(
            f"{name} must have a real floating dtype{wide}, got {x.dtype}: cast it with .astype(jnp.float32)"
        )
    return widened(jnp.asarray(x))


def widened(x: Array) -> Array:
    """``x`` in float32 or wider, the numbers that its own type holds.

    Rounded to them once more: of a sum that is made in half precision in the same program XLA may keep more digits, and
    drop both conversions.
    """
    wide = jnp.promote_types(x.dtype, jnp.float32)
    if wide == x.dtype:
        return x
    info = jnp.finfo(x.dtype)
    return lax.reduce_precision(x, info.nexp, info.nmant).astype(wide)


def all_finite(x: Array) -> Array:
    """Whether no entry is NaN or infinite.

    Asked of every entry: on a CPU, a maximum over thousands of entries may drop a NaN.
    """
    return jnp.all(jnp.isfinite(x))


def unit(x: Array) -> tuple[Array, Array]:
    """Norm of ``x``, an array of any shape taken as a vector, and ``x`` over its norm; zeros give 0 and zeros.

    Scaled by the largest entry first, so that squares neither overflow nor vanish.
    """
    largest = jnp.max(jnp.abs(x), initial=0)
    scaled = x / jnp.where(largest > 0, largest, 1)
    norm = jnp.sqrt(jnp.sum(scaled * scaled))
    return norm * largest, scaled / jnp.where(norm > 0, norm, 1)


def each(function: Callable[..., Any], *batches: Any) -> Any:
    """``function`` of every member, stacked: ``vmap``, but for a batch of one, where it adds nothing and costs.

    Under ``vmap`` a loop copies what it carries, to hold back members that have stopped.
    """
    if len(batches[0]) > 1:
        return jax.vmap(function)(*batches)
    # Not x[0] and x[None], which take longer to trace.
    found = function(*jax.tree.map(lambda x: lax.squeeze(x, (0,)), batches))
    return jax.tree.map(lambda x: lax.reshape(x, (1, *x.shape)), found)


def after(x: Array, other: Array) -> Array:
    """``x``, but not before ``other`` has been computed.

    On a CPU a batch of LAPACK calls waits for threads of the pool that it runs in. Two batches beside each other in one
    program can wait like that for ever; a dependency keeps them apart. An integer that no compiler knows to be 0 makes
    one: an optimization barrier is gone when the program runs, and a float times 0 may be NaN.
    """
    bits = lax.bitcast_convert_type(other.ravel()[:1].astype(jnp.float32), jnp.uint32)
    return x + (lax.population_count(bits) >> 6)[0].astype(x.dtype)


def map_rows(function: Callable[..., Any], rows: Any, size: int) -> Any:
    """``function`` of each row, stacked, at most ``size`` rows at once: ``lax.map``, in chunks that are all alike.

    With a ``batch_size`` that does not divide their number, ``lax.map`` computes the last rows beside its loop. On a
    CPU two batches of LAPACK calls then wait for one another, see `after`. Here the last row is repeated instead.
    """
    count = len(jax.tree.leaves(rows)[0])
    chunks = -(-count // size)
    size = -(-count // chunks)
    missing = chunks * size - count

    def chunked(x: Array) -> Array:
        x = jnp.concatenate([x, jnp.broadcast_to(x[-1:], (missing, *x.shape[1:]))]) if missing else jnp.asarray(x)
        return x.reshape(chunks, size, *x.shape[1:])

    found = lax.map(jax.vmap(function), jax.tree.map(chunked, rows))
    return jax.tree.map(lambda x: x.reshape(chunks * size, *x.shape[2:])[:count], found)


def generic(key: Array, shape: tuple[int, ...], dtype: DTypeLike) -> Array:
    """Numbers in [-1, 1) without pattern, from a ``jax.random.key``: to start a power iteration from.

    The bits of the key and an index, mixed as MurmurHash3 ends. ``jax.random`` would take 0.7 s to compile for each
    shape, and be no better for this.
    """

    def mix(x: Array) -> Array:
        x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
        x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
        return x ^ (x >> 16)

    # A sum over the axes, not a reshaped range: sharded arrays make their own parts of it.
    bits = jnp.zeros(shape, jnp.uint32)
    for axis in range(len(shape)):
        stride = math.prod(shape[axis + 1 :]) % 2**32
        bits = bits + lax.broadcasted_iota(jnp.uint32, shape, axis) * jnp.uint32(stride)
    words = jax.random.key_data(key).astype(jnp.uint32).ravel()
    for i in range(len(words)):
        bits = mix(bits * jnp.uint32(0x9E3779B9) + words[i] + jnp.uint32(0x7F4A7C15))
    return (mix(bits) >> 8).astype(dtype) * 2.0**-23 - 1


def _top_vector(matrices: Array) -> Array:
    """A top eigenvector of small positive semidefinite matrices ``(..., k, k)``, up to its length.

    By squaring: after 2²⁰ products eigenvalues 1e-5 below the largest are gone. Products alone, for a call of LAPACK
    in the midst of a program costs more than they do: its threads and XLA's wait for one another.
    """

    def square(_: Array, x: Array) -> Array:
        largest = jnp.max(jnp.abs(x), axis=(-2, -1), keepdims=True)
        x = x / jnp.where(largest > 0, largest, 1)
        return jnp.einsum("...kl,...lm->...km", x, x, precision=HIGHEST)

    projector = lax.fori_loop(0, 20, square, matrices)
    column = jnp.argmax(jnp.real(jnp.diagonal(projector, axis1=-2, axis2=-1)), axis=-1)
    return jnp.take_along_axis(projector, column[..., None, None], axis=-1)[..., 0]


def krylov_top(apply: Callable[[Array], Array], start: Array, steps: int) -> Array:
    """The unit vector with the largest Rayleigh quotient in the Krylov space of a positive semidefinite map.

    Lanczos with full orthogonalisation. Its quotient approaches the largest eigenvalue from below, with the
    square of ``steps`` where power iteration has the first power.

    Args:
      apply: the map, on ``(..., n)``, Hermitian and positive semidefinite in the last axis.
      start: ``(..., n)``, real or complex; zeros stay zeros.
      steps: dimension of the space.

    Returns:
      ``(..., n)``.
    """

    def size(x: Array) -> Array:
        return jnp.sqrt(jnp.sum(jnp.real(x) ** 2 + jnp.imag(x) ** 2, axis=-1, keepdims=True))

    def normalise(x: Array) -> Array:
        norm = size(x)
        return x / jnp.where(norm > 0, norm, 1)

    def extend(j: Array, carry: tuple[Array, Array, Array, Array]) -> tuple[Array, Array, Array, Array]:
        basis, images, x, largest = carry  # (..., steps, n)
        image = apply(x)
        largest = jnp.maximum(largest, size(image))
        basis, images = basis.at[..., j, :].set(x), images.at[..., j, :].set(image)
        for _ in range(2):  # twice is enough (Kahan, Parlett)
            overlap = jnp.einsum("...kn,...n->...k", basis.conj(), image, precision=HIGHEST)
            image -= jnp.einsum("...k,...kn->...n", overlap, basis, precision=HIGHEST)
        # Once the space is exhausted only rounding is left, and that is not orthogonal to anything.
        image = jnp.where(size(image) > 32 * jnp.finfo(start.dtype).eps * largest, image, 0)
        return basis, images, normalise(image), largest

    empty = jnp.zeros((*start.shape[:-1], steps, start.shape[-1]), start.dtype)
    carry = vary_as((empty, empty, normalise(start), jnp.zeros_like(size(start))), jax.eval_shape(apply, start))
    basis, images, _, _ = lax.fori_loop(0, steps, extend, carry)
    projected = jnp.einsum("...kn,...ln->...kl", basis.conj(), images, precision=HIGHEST)
    ritz = _top_vector((projected + jnp.swapaxes(projected, -1, -2).conj()) / 2)
    return normalise(jnp.einsum("...k,...kn->...n", ritz, basis, precision=HIGHEST))


@jax.custom_jvp
def with_pairs(value: Array, kernel: Array, inputs: Array, outputs: Array) -> Array:
    """``value``, with the derivative of a singular value whose vectors are held constant.

    For M(K) linear in K and a singular pair (x, y) of M(K): dσ = yᵀ M(dK) x. Here M is any
    re-arrangement of the taps, so that dσ = Σ_bt x_btᵀ dK_bt y_bt: in reverse mode one outer
    product per tap, in forward mode one product with the kernel.

    Args:
      value: computed singular values, shape ``()`` or ``(m,)``.
      kernel: ``(batch, taps, c_in, c_out)``, the array by which to differentiate.
      inputs: right singular vectors as each tap meets them, ``(batch, taps, [m,] c_in)``.
      outputs: left singular vectors likewise, ``(batch, taps, [m,] c_out)``.

    Returns:
      ``value``. Its second derivative by ``kernel`` is zero: the vectors do not move.
    """
    del kernel, inputs, outputs
    return value


@with_pairs.defjvp
def _with_pairs_jvp(primals, tangents):
    value, kernel, inputs, outputs = primals
    del kernel
    inputs, outputs = lax.stop_gradient((inputs, outputs))
    # Products, not broadcast ones and a sum: what reverse mode keeps is then the vectors alone.
    if value.ndim:
        product = jnp.einsum("btio,btmo->btmi", tangents[1], outputs, precision=HIGHEST)
        return value, jnp.sum(product * inputs, axis=(0, 1, 3))
    each_tap = ((0, 1), (0, 1))  # an einsum would take longer to trace
    product = lax.dot_general(tangents[1], outputs, (((3,), (2,)), each_tap), precision=HIGHEST)
    return value, jnp.sum(product * inputs)


def pairs_gradient(inputs: Array, outputs: Array) -> Array:
    """The gradient of one value of `with_pairs` by the kernel: an outer product a tap."""
    return lax.dot_general(inputs, outputs, (((), ()), ((0, 1), (0, 1))), precision=HIGHEST)
