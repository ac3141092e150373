"""The exact singular values of a circular convolution, by its symbol at every frequency.

A circular convolution is block-diagonal in the Fourier basis: its singular values are those of the
matrices F(ω) = Σ_t e^{iω·t} K[t] over the frequencies ω of its grid (Sedghi, Gupta & Long 2019).
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

from fantastic4.conv import ConvSpec, canonical, check_input_shape, geometry
from fantastic4.entry import entry, sizes
from fantastic4.linalg import HIGHEST, all_finite, real_array, with_pairs
from fantastic4.rounding import power_of_two

CIRCULAR = ConvSpec(padding="CIRCULAR")
_CHUNK_BYTES = 2**26  # of symbols in flight


class _Grid(NamedTuple):
    """The frequencies of a circular convolution, each class of equal spectra once.

    Attributes:
      sizes: frequencies per axis, N; frequency f stands for ω = 2πf/N.
      points: ``(classes, rank)``, one frequency a class.
      of: ``(Π sizes,)``, the class of every frequency.
    """

    sizes: tuple[int, ...]
    points: np.ndarray
    of: np.ndarray


@functools.lru_cache(maxsize=64)
def _grid(sizes: tuple[int, ...], dilation: tuple[int, ...]) -> _Grid:
    """Frequencies d·f mod N, with f and -f in one class: a real kernel has F(-ω) = conj F(ω)."""
    n = np.array(sizes)
    f = np.indices(sizes).reshape(len(sizes), -1).T * np.array(dilation) % n
    key = np.minimum(np.ravel_multi_index(f.T, sizes), np.ravel_multi_index((-f % n).T, sizes))
    classes, of = np.unique(key, return_inverse=True)
    return _Grid(sizes, np.stack(np.unravel_index(classes, sizes), -1).astype(np.int32), of.ravel())


def _phases(points: Array, sizes: tuple[int, ...], taps: tuple[int, ...], dtype: DTypeLike) -> tuple[Array, Array]:
    """Real and imaginary part of e^{iω·t}, ``(points, Π taps)``.

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


def _symbols(kernels: Array, points: Array, sizes: tuple[int, ...]) -> Array:
    """F at the frequencies ``points``: ``(points, batch, c_in, c_out)``, complex.

    A product with the few rows of the Fourier matrix that are needed: for small kernels much cheaper
    than an FFT, and kernels larger than the grid fold over by themselves.
    """
    batch, *taps, c_in, c_out = kernels.shape
    flat = kernels.reshape(batch, -1, c_in, c_out)
    product = partial(jnp.einsum, "ft,btio->fbio", precision=HIGHEST)
    real, imag = _phases(points, sizes, tuple(taps), kernels.dtype)
    return lax.complex(product(real, flat), product(imag, flat))


def _values(symbols: Array) -> Array:
    """Singular values of the last two axes, descending."""
    if min(symbols.shape[-2:]) > 1:
        return jnp.linalg.svd(symbols, compute_uv=False)
    # One row or one column: the norm of a vector, with the gradient 0 at 0.
    squares = jnp.sum(symbols.real**2 + symbols.imag**2, axis=(-2, -1))
    positive = squares > 0
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, squares, 1)), 0)[..., None]


class _Circular(NamedTuple):
    """A circular layer, made ready for its symbol.

    Attributes:
      kernels: canonical, scaled by a power of two so that no intermediate value leaves the range of
        floats; zero where the kernel is not finite, for LAPACK may not return from an infinite entry.
      scale: to multiply singular values by; NaN for a kernel that is not finite.
      grid: the frequencies.
      total: how many singular values the layer has.
    """

    kernels: Array
    scale: Array
    grid: _Grid
    total: int


def _circular(kernel: Array, input_shape: tuple[int, ...], spec: ConvSpec) -> _Circular:
    """The canonical kernels and the frequencies of a circular layer."""
    kernel = real_array(kernel, "kernel")
    layer = geometry(kernel.shape, spec)
    shape = check_input_shape(input_shape, layer)
    if spec.padding != "CIRCULAR":
        raise ValueError(
            f"the spectrum is exact for CIRCULAR padding, got {spec.padding!r}, whose norm may be larger: "
            "ask for dataclasses.replace(spec, padding='CIRCULAR'), or bound this layer with fantastic4.four_bounds"
        )
    if not spec.transposed and any(n % s for n, s in zip(shape, layer.strides, strict=True)):
        nearest = tuple(max(1, round(n / s)) * s for n, s in zip(shape, layer.strides, strict=True))
        raise ValueError(
            f"strides {layer.strides} must divide input_shape {shape}, or the rows wrap onto other phases "
            f"and no symbol exists: the nearest size is {nearest}"
        )
    frequencies = shape if spec.transposed else tuple(n // s for n, s in zip(shape, layer.strides, strict=True))
    spacing = tuple(d // math.gcd(s, d) for s, d in zip(layer.strides, layer.dilation, strict=True))
    outputs = tuple(n * s for n, s in zip(shape, layer.strides, strict=True)) if spec.transposed else frequencies
    count = min(math.prod(shape) * layer.c_in, math.prod(outputs) * layer.c_out)
    kernels = canonical(kernel, spec, shape).kernels
    finite = all_finite(lax.stop_gradient(kernels))
    kernels = jnp.where(finite, kernels, 0)
    scale, inverse = power_of_two(jnp.max(jnp.abs(lax.stop_gradient(kernels))))
    return _Circular(kernels * inverse, jnp.where(finite, scale, jnp.nan), _grid(frequencies, spacing), count)


def _map_chunks(kernels: Array, grid: _Grid) -> Array:
    """Singular values at every class, ``(classes, batch, values)``, in bounded memory."""
    one = math.prod(kernels.shape[-2:]) * kernels.shape[0] * 2 * kernels.dtype.itemsize
    size = max(1, min(len(grid.points), _CHUNK_BYTES // one))
    return lax.map(
        lambda p: _values(_symbols(kernels, p[None], grid.sizes))[0], jnp.asarray(grid.points), batch_size=size
    )


@entry(input_shape=sizes)
def singular_values(kernel: Array, input_shape: tuple[int, ...], spec: ConvSpec = CIRCULAR) -> Array:
    """Every singular value of a circular convolution, with multiplicity.

    Those of F(ω) at each frequency of the grid (Sedghi, Gupta & Long 2019), right to a few units of
    rounding of the largest. ω and -ω are computed once. Strides take the polyphase kernel on the
    coarser grid, groups a symbol each, kernels larger than the input fold over. They are not those of
    a zero-padded layer, whose norm may be larger.

    Differentiable; where singular values coincide, by one of the subgradients. On a CPU that is busy with
    other work, set OPENBLAS_NUM_THREADS=1 before JAX is imported: its LAPACK waits for all cores at once.

    Args:
      kernel: ``(*spatial, c_in // groups, c_out)``.
      input_shape: spatial size of the input (of a transposed convolution too), static.
      spec: its padding must be ``"CIRCULAR"``, and its strides divide the input.

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
    layer = _circular(kernel, input_shape, spec)
    values = _map_chunks(layer.kernels, layer.grid)[layer.grid.of].ravel()
    # Inputs that no tap reaches, and phases that have none, add zeros.
    return jnp.pad(-jnp.sort(-values), (0, layer.total - values.size)) * layer.scale


@entry(input_shape=sizes)
def exact_norm(kernel: Array, input_shape: tuple[int, ...], spec: ConvSpec = CIRCULAR) -> Array:
    """The largest of `singular_values`, without sorting or keeping the others.

    Its derivative is that of the top pair at its frequency, held constant: one small decomposition, in
    both modes, where differentiating the spectrum takes one a frequency.

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
    kernels, scale, grid, _ = _circular(kernel, input_shape, spec)
    constant = lax.stop_gradient(kernels)
    batch, *taps, c_in, c_out = kernels.shape
    largest = _map_chunks(constant, grid)[..., 0]
    point, group = jnp.divmod(jnp.argmax(largest), batch)
    frequency = jnp.asarray(grid.points)[point][None]
    left, values, right = jnp.linalg.svd(_symbols(constant, frequency, grid.sizes)[0, group], full_matrices=False)
    real, imag = _phases(frequency, grid.sizes, tuple(taps), kernels.dtype)
    # Re(uᴴ dF v) for dF = Σ_t e_t dK_t, as two real pairs.
    inputs = lax.complex(real, imag)[0, :, None] * left[:, 0].conj()
    outputs = right[0].conj()
    inputs = jnp.stack([inputs.real, -inputs.imag], 1)
    outputs = jnp.broadcast_to(jnp.stack([outputs.real, outputs.imag]), (len(inputs), 2, c_out))
    chosen = (jnp.arange(batch) == group).astype(kernels.dtype)[:, None, None, None]
    value = jnp.stack([values[0], jnp.zeros_like(values[0])])
    spread = jnp.broadcast_to(outputs, (batch, *outputs.shape))
    return jnp.sum(with_pairs(value, kernels.reshape(batch, -1, c_in, c_out), inputs * chosen, spread)) * scale
