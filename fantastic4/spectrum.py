"""The exact singular values of a circular convolution, by its symbol at every frequency.

A circular convolution is block-diagonal in the Fourier basis: its singular values are those of the
matrices F(ω) = Σ_t e^{iω·t} K[t] over the frequencies ω of its grid (Sedghi, Gupta & Long 2019).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.sharding import Mesh

from fantastic4.border import check_circular, frequency_grid
from fantastic4.conv import ConvSpec, canonical, geometry
from fantastic4.devices import spread
from fantastic4.entry import entry, sizes
from fantastic4.entry import mesh as one_mesh
from fantastic4.linalg import HIGHEST, all_finite, krylov_top, map_rows, real_array, with_pairs
from fantastic4.rounding import power_of_two
from fantastic4.symbol import (
    CHUNK_BYTES,
    CHUNK_ENTRIES,
    Gram,
    Grid,
    at_once,
    below,
    evaluate,
    gram,
    lags,
    phases,
    symbols,
    turns,
)
from fantastic4.symbol import grid as frequencies_of

CIRCULAR = ConvSpec(padding="CIRCULAR")
_EXCLUDE_FROM = 24  # channels from which a Cholesky decomposition is much cheaper than singular values


def _values(symbols: Array) -> Array:
    """Singular values of the last two axes, descending."""
    if min(symbols.shape[-2:]) > 1:
        return jnp.linalg.svd(symbols, compute_uv=False)
    # One row or one column: the norm of a vector, with the gradient 0 at 0.
    squares = jnp.sum(symbols.real**2 + symbols.imag**2, axis=(-2, -1))
    positive = squares > 0
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, squares, 1)), 0)[..., None]


def _frequencies(kernel: Array, input_shape: tuple[int, ...], spec: ConvSpec) -> tuple[Grid, int]:
    """The frequencies of a circular layer, and how many singular values it has."""
    layer = geometry(kernel.shape, spec)
    shape = check_circular(input_shape, layer, spec)
    grid = frequency_grid(layer, spec, shape)
    outputs = tuple(n * s for n, s in zip(shape, layer.strides, strict=True)) if spec.transposed else grid.sizes
    return grid, min(math.prod(shape) * layer.c_in, math.prod(outputs) * layer.c_out)


class _Scaled(NamedTuple):
    """A circular layer, made ready for its symbol.

    Attributes:
      kernels: canonical, scaled by a power of two so that no intermediate value leaves the range of
        floats; zero where the kernel is not finite, for LAPACK may not return from an infinite entry.
      scale: to multiply singular values by; NaN for a kernel that is not finite.
    """

    kernels: Array
    scale: Array


@partial(jax.jit, static_argnames="input_shape")
def _scaled(kernel: Array, input_shape: tuple[int, ...], spec: ConvSpec) -> _Scaled:
    kernels = canonical(kernel, spec, input_shape).kernels
    finite = all_finite(lax.stop_gradient(kernels))
    kernels = jnp.where(finite, kernels, 0)
    scale, inverse = power_of_two(jnp.max(jnp.abs(lax.stop_gradient(kernels))))
    return _Scaled(kernels * inverse, jnp.where(finite, scale, jnp.nan))


def _map_chunks(kernels: Array, grid: Grid, mesh: Mesh | None = None) -> Array:
    """Singular values at every class, ``(classes, batch, values)``, in bounded memory, on all devices."""
    one = math.prod(kernels.shape[-2:]) * kernels.shape[0] * 2 * kernels.dtype.itemsize

    def share(kernels: Array, points: Array) -> Array:
        size = at_once(len(points), one, CHUNK_BYTES)
        return map_rows(lambda p: _values(symbols(kernels, p[None], grid.sizes))[0], points, size)

    if mesh is None:
        return share(kernels, jnp.asarray(grid.points))
    count = len(grid.points)
    rows = np.minimum(np.arange(-(-count // mesh.size) * mesh.size), count - 1)
    return spread(share, mesh, 1, 1)(kernels, jnp.asarray(grid.points[rows]))[:count]


class _Largest(NamedTuple):
    """The largest singular value, and where it is: indices into the grid's points and into the batch."""

    value: Array
    point: Array
    group: Array


def _by_all(kernels: Array, grid: Grid) -> _Largest:
    """By the singular values everywhere: best for small matrices."""
    values = _map_chunks(kernels, grid)[..., 0]
    return _Largest(jnp.max(values), *jnp.divmod(jnp.argmax(values), len(kernels)))


def _by_exclusion(kernels: Array, coefficients: Gram, grid: Grid) -> _Largest:
    """By excluding nearly all: ‖F‖ ≤ best where the Cholesky decomposition of best² I - FFᴴ succeeds.

    That is a tenth of a singular value decomposition, of which a handful remain. A point is excluded
    only if 2e-6 below the best one (in float32), more than the rounding of FFᴴ.
    """
    batch, *taps, c_in, c_out = kernels.shape
    n = min(c_in, c_out)
    cosines, sines = (jnp.asarray(t, kernels.dtype) for t in turns(grid.points, grid.sizes, lags(tuple(taps))))
    margin = 1 - 80 * float(jnp.finfo(kernels.dtype).eps) / 2

    def value(point: Array, group: Array) -> Array:
        one = lax.dynamic_index_in_dim(kernels, group)
        return _values(symbols(one, jnp.asarray(grid.points)[point][None], grid.sizes))[0, 0, 0]

    def excluded(best: Array, tables: tuple[Array, Array]) -> Array:
        return below(evaluate(coefficients, *tables), best * best * margin)

    def climb(tables: tuple[Array, Array], steps: int) -> Array:
        """A value that ‖F‖ has at least, ``(points, batch)``."""
        grams = evaluate(coefficients, *tables)
        apply = partial(jnp.einsum, "pbij,pbj->pbi", grams, precision=HIGHEST)
        start = jnp.broadcast_to(jnp.cos(jnp.arange(n) ** 2.0), grams.shape[:-1]).astype(grams.dtype)
        x = krylov_top(apply, start, steps)
        return jnp.sqrt(jnp.maximum(jnp.sum((x.conj() * apply(x)).real, axis=-1), 0))

    at = lambda point: (cosines[point][None], sines[point][None])  # noqa: E731

    # A high value from some of the points, by which nearly all are excluded.
    some = np.unique(np.linspace(0, len(grid.points) - 1, 8).astype(int))
    rows = partial(jax.tree.map, lambda t: t[None])
    size = at_once(len(grid.points), batch * n * n, CHUNK_ENTRIES)
    rough = map_rows(lambda tables: climb(rows(tables), 8)[0], (cosines[some], sines[some]), size)
    point, group = jnp.divmod(jnp.argmax(rough), batch)
    point = jnp.asarray(some)[point]
    guess = _Largest(climb(at(point), min(n, 48))[0, group], point, group)
    left = ~map_rows(lambda tables: excluded(guess.value, rows(tables))[0], (cosines, sines), size)

    def visit(improve: Callable[[Array, Array], Array]) -> Callable[[Any], Any]:
        """Exclude the next point that is left, or see how high it is."""

        def body(state: tuple[Array, Array, _Largest]) -> tuple[Array, Array, _Largest]:
            waiting, kept, best = state
            point, group = jnp.divmod(jnp.argmax(waiting), batch)
            out = excluded(best.value, at(point))[0, group]
            found = lax.cond(out, lambda: jnp.zeros_like(best.value), lambda: improve(point, group))
            better = found > best.value
            best = jax.tree.map(lambda new, old: jnp.where(better, new, old), _Largest(found, point, group), best)
            return waiting.at[point, group].set(False), kept.at[point, group].set(~out), best

        return body

    waiting = lambda state: jnp.any(state[0])  # noqa: E731
    others = left.at[guess.point, guess.group].set(False)
    _, left, high = lax.while_loop(waiting, visit(lambda p, g: climb(at(p), min(n, 48))[0, g]), (others, left, guess))
    # Lanczos from below and a Cholesky decomposition just above: as near as singular values are, where both agree.
    agreed = below(evaluate(coefficients, *at(high.point)), high.value**2 / margin)[0, high.group]
    exact = high._replace(value=lax.cond(agreed, lambda: high.value, lambda: value(high.point, high.group)))
    left = left.at[high.point, high.group].set(False)
    return lax.while_loop(waiting, visit(value), (left, left, exact))[2]


_gram = jax.jit(gram)


@partial(jax.jit, static_argnames=("sizes", "spacing"))
def _search(kernels: Array, coefficients: Gram | None, sizes: tuple[int, ...], spacing: tuple[int, ...]) -> _Largest:
    """The largest singular value on a grid; without the Gram matrix's coefficients by all of them."""
    at = frequencies_of(sizes, spacing)
    return _by_all(kernels, at) if coefficients is None else _by_exclusion(kernels, coefficients, at)


@partial(jax.jit, static_argnames="sizes")
def _differentiable(kernels: Array, found: _Largest, frequency: Array, sizes: tuple[int, ...]) -> Array:
    """The value found, with the derivative of the top pair of its symbol, held constant."""
    constant = lax.stop_gradient(kernels)
    batch, *taps, c_in, c_out = kernels.shape
    # Only the derivative needs vectors: without one this decomposition is dead code.
    left, _, right = jnp.linalg.svd(symbols(constant, frequency, sizes)[0, found.group], full_matrices=False)
    real, imag = phases(frequency, sizes, tuple(taps), kernels.dtype)
    # Re(uᴴ dF v) for dF = Σ_t e_t dK_t, as two real pairs.
    inputs = lax.complex(real, imag)[0, :, None] * left[:, 0].conj()
    outputs = right[0].conj()
    inputs = jnp.stack([inputs.real, -inputs.imag], 1)
    outputs = jnp.broadcast_to(jnp.stack([outputs.real, outputs.imag]), (len(inputs), 2, c_out))
    chosen = (jnp.arange(batch) == found.group).astype(kernels.dtype)[:, None, None, None]
    value = jnp.stack([found.value, jnp.zeros_like(found.value)])
    spread = jnp.broadcast_to(outputs, (batch, *outputs.shape))
    return jnp.sum(with_pairs(value, kernels.reshape(batch, -1, c_in, c_out), inputs * chosen, spread))


@entry(lapack=True, input_shape=sizes, mesh=one_mesh)
def singular_values(
    kernel: Array, input_shape: tuple[int, ...], spec: ConvSpec = CIRCULAR, *, mesh: Mesh | None = None
) -> Array:
    """Every singular value of a circular convolution, with multiplicity.

    Those of F(ω) at each frequency of the grid (Sedghi, Gupta & Long 2019), right to a few units of
    rounding of the largest. ω and -ω are computed once. Strides take the polyphase kernel on the
    coarser grid, groups a symbol each, kernels larger than the input fold over. They are not those of
    a zero-padded layer, whose norm may be larger.

    Differentiable; where singular values coincide, by one of the subgradients. On a CPU that is busy with
    other work, set OPENBLAS_NUM_THREADS=1 before JAX is imported: its LAPACK waits for all cores at once.
    For several layers in one jitted function on a CPU use ``lax.map``, or a function each: jaxlib's LAPACK
    calls share one pool of threads, and two that run beside each other may wait for one another for ever.

    Args:
      kernel: ``(*spatial, c_in // groups, c_out)``.
      input_shape: spatial size of the input (of a transposed convolution too), static.
      spec: its padding must be ``"CIRCULAR"``, and its strides divide the input.
      mesh: of devices, to give each a share of the frequencies; without, where the kernel is.

    Returns:
      ``(count,)``, descending; count is the smaller side of the layer's matrix.

    Raises:
      ValueError: another padding, strides that do not divide the input, or a spec that does not fit.

    Example:
      >>> import jax.numpy as jnp
      >>> import fantastic4 as f4
      >>> identity = jnp.zeros((3, 3, 1, 1)).at[1, 1].set(2.0)
      >>> print(f4.singular_values(identity, (2, 2)))
      [2. 2. 2. 2.]
    """
    kernel = real_array(kernel, "kernel")
    grid, total = _frequencies(kernel, input_shape, spec)
    kernels, scale = _scaled(kernel, input_shape, spec)
    values = _map_chunks(kernels, grid, mesh)[grid.of].ravel()
    # Inputs that no tap reaches, and phases that have none, add zeros.
    return jnp.pad(-jnp.sort(-values), (0, total - values.size)) * scale


@entry(compiled=False, lapack=True, input_shape=sizes)
def exact_norm(kernel: Array, input_shape: tuple[int, ...], spec: ConvSpec = CIRCULAR) -> Array:
    """The largest of `singular_values`, without sorting or keeping the others.

    Its derivative is that of the top pair at its frequency, held constant: one small decomposition, in
    both modes, where differentiating the spectrum takes one a frequency. For several layers in one jitted
    function on a CPU see `singular_values`.

    Args:
      kernel: ``(*spatial, c_in // groups, c_out)``.
      input_shape: spatial size of the input, static.
      spec: its padding must be ``"CIRCULAR"``, and its strides divide the input.

    Returns:
      Scalar. 0 for a zero kernel.

    Raises:
      ValueError: what `singular_values` refuses.

    Example:
      >>> import jax.numpy as jnp
      >>> import fantastic4 as f4
      >>> print(round(float(f4.exact_norm(jnp.ones((3, 3, 1, 1)), (8, 8))), 4))
      9.0
    """
    kernel = real_array(kernel, "kernel")
    grid, _ = _frequencies(kernel, input_shape, spec)
    kernels, scale = _scaled(kernel, input_shape, spec)
    constant = lax.stop_gradient(kernels)
    few = min(kernels.shape[-2:]) < _EXCLUDE_FROM or len(grid.points) < 4
    # Programs of their own, outside another jit: the memory of one that holds them all is new at every call.
    found = _search(constant, None if few else _gram(constant), grid.sizes, grid.spacing)
    frequency = jnp.asarray(grid.points)[found.point][None]
    return _differentiable(kernels, found, frequency, grid.sizes) * scale


class SymbolVectors(NamedTuple):
    """F(ω) = left · diag(values) · rightᴴ at one frequency of every pair ω, -ω.

    Attributes:
      frequencies: ``(count, rank)``, f with ω = 2πf/N.
      left: ``(count, groups, c_in, r)``, complex; phases of a strided layer count as input channels.
      values: ``(count, groups, r)``, descending.
      right: ``(count, groups, c_out, r)``.
    """

    frequencies: Array
    left: Array
    values: Array
    right: Array


@entry(lapack=True, input_shape=sizes)
def singular_vectors(kernel: Array, input_shape: tuple[int, ...], spec: ConvSpec = CIRCULAR) -> SymbolVectors:
    """The singular value decompositions of a circular layer's symbol, half of the grid.

    For unit stride and dilation, the input x[j] = e^{iω·j} conj(left) is mapped to value · e^{iω·j} conj(right), up to
    the shift by which the layer is centred; its real and imaginary part are real singular vectors.

    Args:
      kernel: ``(*spatial, c_in // groups, c_out)``.
      input_shape: spatial size of the input, static.
      spec: its padding must be ``"CIRCULAR"``, and its strides divide the input.

    Returns:
      `SymbolVectors`; of a transposed layer, those of the convolution that it transposes.

    Raises:
      ValueError: what `singular_values` refuses.
    """
    kernel = real_array(kernel, "kernel")
    grid, _ = _frequencies(kernel, input_shape, spec)
    kernels, scale = _scaled(kernel, input_shape, spec)
    points = jnp.asarray(grid.points)
    left, values, right = jnp.linalg.svd(symbols(kernels, points, grid.sizes), full_matrices=False)
    return SymbolVectors(points, left, values * scale, jnp.swapaxes(right, -1, -2).conj())
