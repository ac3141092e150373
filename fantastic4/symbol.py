r"""The symbol of a convolution, F(ω) = Σ_t e^{iω·t} K[t], and its Gram matrix as a trigonometric polynomial.

A plain convolution multiplies the Fourier transform of its input by F(ω), so its norm is the largest
‖F(ω)‖. That of the smaller side's Gram matrix,

    G(ω) = F(ω) F(ω)ᴴ = Q_0 + Σ_{d>0} cos(d·ω) (Q_d + Q_dᵀ) + i sin(d·ω) (Q_d - Q_dᵀ),   Q_d = Σ_t K[t+d] K[t]ᵀ,

costs no matrix product a frequency once its coefficients are known: a few sums of matrices instead.
"""

from __future__ import annotations

import functools
import math
from functools import partial
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import DTypeLike

from fantastic4.linalg import HIGHEST, map_rows
from fantastic4.rounding import unit_roundoff

CHUNK_BYTES = 2**22  # of symbols in flight: larger arrays are slower to allocate than to fill
CHUNK_ENTRIES = 2**18  # of Gram matrices in flight, likewise


def at_once(total: int, one: int, limit: int) -> int:
    """How many of ``total`` things of size ``one`` fit into ``limit``: at least one."""
    return max(1, min(total, limit // one))


def phases(points: Array, sizes: tuple[int, ...], taps: tuple[int, ...], dtype: DTypeLike) -> tuple[Array, Array]:
    """Real and imaginary part of e^{iω·t}, ``(points, Π taps)``, at ω = 2π points / sizes.

    Looked up by f·t mod N, exact in integers, in tables rounded once from float64.
    """
    real = jnp.ones((len(points), 1), dtype)
    imag = jnp.zeros((len(points), 1), dtype)
    for axis, (n, k) in enumerate(zip(sizes, taps, strict=True)):
        angle = 2 * np.pi * np.arange(n) / n
        turn = points[:, axis, None] * np.arange(k) % n
        c, s = jnp.asarray(np.cos(angle), dtype)[turn], jnp.asarray(np.sin(angle), dtype)[turn]
        real, imag = (
            (real[:, :, None] * c[:, None] - imag[:, :, None] * s[:, None]).reshape(len(points), -1),
            (real[:, :, None] * s[:, None] + imag[:, :, None] * c[:, None]).reshape(len(points), -1),
        )
    return real, imag


def parts(kernels: Array, points: Array, sizes: tuple[int, ...]) -> tuple[Array, Array]:
    """Real and imaginary part of F at the frequencies ``points``, ``(points, batch, c_in, c_out)``.

    A product with the few rows of the Fourier matrix that are needed: for small kernels much cheaper
    than an FFT, and kernels larger than the grid fold over by themselves.
    """
    batch, *taps, c_in, c_out = kernels.shape
    flat = kernels.reshape(batch, -1, c_in, c_out)
    product = partial(jnp.einsum, "ft,btio->fbio", precision=HIGHEST)
    real, imag = phases(points, sizes, tuple(taps), kernels.dtype)
    return product(real, flat), product(imag, flat)


def symbols(kernels: Array, points: Array, sizes: tuple[int, ...]) -> Array:
    """F at the frequencies ``points``: ``(points, batch, c_in, c_out)``, complex."""
    return lax.complex(*parts(kernels, points, sizes))


def half_grid(sizes: tuple[int, ...]) -> np.ndarray:
    """One frequency of every pair f, -f of a grid, ``(count, rank)``: a real kernel has F(-ω) = conj F(ω)."""
    f = np.indices(sizes).reshape(len(sizes), -1).T
    opposite = np.ravel_multi_index((-f % np.array(sizes)).T, sizes)
    return f[np.arange(len(f)) <= opposite].astype(np.int32)


class Grid(NamedTuple):
    """The frequencies of a circular convolution, each class of equal spectra once.

    Attributes:
      sizes: frequencies per axis, N; frequency f stands for ω = 2πf/N.
      spacing: d an axis: the points are the d·f of all f.
      points: ``(classes, rank)``, one frequency a class.
      of: ``(Π sizes,)``, the class of every frequency.
    """

    sizes: tuple[int, ...]
    spacing: tuple[int, ...]
    points: np.ndarray
    of: np.ndarray


@functools.lru_cache(maxsize=64)
def grid(sizes: tuple[int, ...], dilation: tuple[int, ...]) -> Grid:
    """Frequencies d·f mod N, with f and -f in one class: a real kernel has F(-ω) = conj F(ω)."""
    n = np.array(sizes)
    f = np.indices(sizes).reshape(len(sizes), -1).T * np.array(dilation) % n
    key = np.minimum(np.ravel_multi_index(f.T, sizes), np.ravel_multi_index((-f % n).T, sizes))
    classes, of = np.unique(key, return_inverse=True)
    points = np.stack(np.unravel_index(classes, sizes), -1)
    # Of 32 bits with and without jax_enable_x64: what JAX makes of an array that is kept, it keeps too.
    return Grid(sizes, dilation, points.astype(np.int32), of.ravel().astype(np.int32))


class Gram(NamedTuple):
    """G(ω) as a trigonometric polynomial with real matrix coefficients; n is the smaller channel side.

    Attributes:
      even: ``(batch, lags, n, n)``: Q_0, then Q_d + Q_dᵀ.
      odd: ``(batch, lags, n, n)``: 0, then Q_d - Q_dᵀ.
    """

    even: Array
    odd: Array


@functools.lru_cache(maxsize=64)
def lags(taps: tuple[int, ...]) -> np.ndarray:
    """The lags d of a `Gram`, 0 first, one of each pair d, -d: ``(lags, rank)``."""
    sizes = tuple(2 * k - 1 for k in taps)
    f = half_grid(sizes)
    return np.where(f >= np.array(taps), f - np.array(sizes), f)


def gram(kernels: Array) -> Gram:
    """The coefficients of G, from its values on the smallest grid that determines them.

    Args:
      kernels: ``(batch, *spatial, c_in, c_out)``.

    Returns:
      `Gram`, of the kernels' dtype.
    """
    batch, *taps, c_in, c_out = kernels.shape
    if c_in > c_out:  # Fᵀ has the norm of F
        kernels, c_in, c_out = jnp.swapaxes(kernels, -1, -2), c_out, c_in
    sizes = tuple(2 * k - 1 for k in taps)
    points = half_grid(sizes)

    def values(point: Array) -> tuple[Array, Array]:
        real, imag = (part[0] for part in parts(kernels, point[None], sizes))
        # With F = R + iI, FFᴴ = A + iB, where A = RRᵀ + IIᵀ is symmetric and B = IRᵀ - RIᵀ antisymmetric:
        # so A + B = (R + I)Rᵀ + (I - R)Iᵀ, two products instead of three, holds both.
        left, right = jnp.concatenate([real + imag, imag - real], -1), jnp.concatenate([real, imag], -1)
        both = jnp.einsum("bio,bjo->bij", left, right, precision=HIGHEST)
        turned = jnp.swapaxes(both, -1, -2)
        return (both + turned) / 2, (both - turned) / 2

    one = 4 * batch * c_in * c_out * kernels.dtype.itemsize
    size = at_once(len(points), one, CHUNK_BYTES)
    real, imag = map_rows(values, jnp.asarray(points), size)
    cosines, sines = (t.T for t in turns(points, sizes, lags(tuple(taps))))
    both = np.where(np.arange(len(points)) > 0, 2.0, 1.0)  # f and -f; the sizes are odd, so only 0 is its own opposite
    weight = both[:, None] * both / math.prod(sizes)

    def invert(table: np.ndarray, at: Array) -> Array:
        # Not an einsum, whose product would be (b, i, j, d) in memory, 13 numbers apart for whoever reads a matrix.
        one_by_one = lax.dot_general(jnp.asarray(table, kernels.dtype), at, (((1,), (0,)), ((), ())), precision=HIGHEST)
        return jnp.swapaxes(one_by_one, 0, 1)

    return Gram(invert(weight * cosines, real), invert(weight * sines, imag))


def evaluate(coefficients: Gram, cosines: Array, sines: Array) -> Array:
    """G at the frequencies whose cos(d·ω) and sin(d·ω) these are: ``(points, batch, n, n)``, complex.

    Args:
      coefficients: from `gram`.
      cosines: ``(points, lags)``.
      sines: ``(points, lags)``.
    """
    at = partial(jnp.einsum, "fd,bdij->fbij", precision=HIGHEST)
    return lax.complex(at(cosines, coefficients.even), at(sines, coefficients.odd))


def places(taps: tuple[int, ...]) -> np.ndarray:
    """The position t of every tap, in the order of the kernel's memory: ``(Π taps, rank)``."""
    return np.indices(taps).reshape(len(taps), -1).T


def turns(points: np.ndarray, sizes: tuple[int, ...], at: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """cos(ω·t) and sin(ω·t) at grid frequencies for integer places or lags t, ``(points, len(at))`` in float64.

    The multiples are reduced in integers, so each is right to a unit or two in the last place.
    """
    whole = math.lcm(*sizes)
    steps = np.array([whole // n for n in sizes])
    angle = 2 * np.pi / whole * ((points * steps) @ at.T % whole)
    return np.cos(angle), np.sin(angle)


def phase_error(taps: tuple[int, ...]) -> float:
    """By how much e^{iω·t} of float64 angles may be off, for lags of these taps, reduced to a turn or not."""
    return (32 + 32 * sum(taps)) * unit_roundoff(np.float64)


def below(grams: Array, threshold: Array) -> Array:
    """Whether the Cholesky decomposition of ``threshold``·I - G succeeds: then λ(G) ≤ threshold, nearly.

    By how much a success can mislead is known (Higham 2002, Theorem 10.7): see `fantastic4.supremum`.

    Args:
      grams: ``(..., n, n)``, Hermitian; one triangle is read.
      threshold: scalar.

    Returns:
      Booleans ``(...)``.
    """
    n = grams.shape[-1]
    if n == 1:
        return grams[..., 0, 0].real <= threshold
    shifted = threshold * jnp.eye(n, dtype=grams.dtype) - grams
    # LAPACK wants columns first: of the conjugate, which has the same eigenvalues, that costs no transposition.
    factor = lax.linalg.cholesky(jnp.swapaxes(shifted, -1, -2), symmetrize_input=False)
    return jnp.all(jnp.isfinite(jnp.diagonal(factor.real, axis1=-2, axis2=-1)), axis=-1)
