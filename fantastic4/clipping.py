r"""Sedghi's projection: singular values of a circular layer clipped in the frequency domain.

F'(ω) = U min(S, c) Vᴴ at every frequency is the nearest layer of norm c, but its kernel has taps everywhere. Cropped
back to the taps that the kernel has, its norm is larger than c again (Sedghi, Gupta & Long 2019): so it is then
measured, and divided by what it has too much.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from fantastic4.border import check_circular, frequency_grid
from fantastic4.conv import ConvSpec, canonical, geometry
from fantastic4.dense import frobenius_bound
from fantastic4.devices import vary_as
from fantastic4.entry import entry, flag, positive, sizes
from fantastic4.linalg import HIGHEST, all_finite, real_array
from fantastic4.rounding import constant_up, gamma, power_of_two, round_up
from fantastic4.spectrum import CIRCULAR, singular_values
from fantastic4.symbol import Grid, phases, symbols


@entry(lapack=True, input_shape=sizes, maximum=positive, crop=flag)
def clip_singular_values(
    kernel: Array,
    input_shape: tuple[int, ...],
    maximum: Array | float,
    spec: ConvSpec = CIRCULAR,
    *,
    crop: bool = True,
) -> Array:
    """The kernel with the singular values of its circular layer clipped to ``maximum`` (Sedghi et al. 2019).

    With ``crop`` the result has the kernel's own taps, and is divided by what its norm at this input size exceeds
    ``maximum``, rounding included: **the promise holds**, ‖layer‖ ≤ maximum. It is for circular padding at this size;
    for a bound at every size project by `fantastic4.bound`. Without ``crop`` it has as many taps as the input
    and is the nearest layer itself, up to rounding. Singular values below ``maximum`` are changed by cropping alone;
    a kernel that has none above it comes back as it was, up to the safety of the last division.

    Costs one decomposition with vectors a frequency: for every hundredth step, not for every one.

    Args:
      kernel: ``(*spatial, c_in // groups, c_out)``.
      input_shape: spatial size of the input, static.
      maximum: c > 0, a scalar.
      spec: its padding must be ``"CIRCULAR"``, and its strides divide the input.
      crop: whether to keep the kernel's taps.

    Returns:
      ``kernel.shape``; without ``crop`` ``(*input_shape, c_in // groups, c_out)``, for the same spec. Of a kernel in
      half precision float32, in which the promise holds. A projection, not for differentiation: where singular
      values coincide its derivative is NaN.

    Raises:
      ValueError: what `singular_values` refuses; ``crop=False`` with dilation or a transposed convolution.

    Example:
      >>> import jax
      >>> import fantastic4 as f4
      >>> kernel = jax.random.normal(jax.random.key(0), (3, 3, 2, 2))
      >>> clipped = f4.clip_singular_values(kernel, (8, 8), 1.0)
      >>> clipped.shape, bool(f4.exact_norm(clipped, (8, 8)) <= 1.0)
      ((3, 3, 2, 2), True)
    """
    kernel = real_array(kernel, "kernel")
    maximum = jnp.asarray(maximum, kernel.dtype)
    layer = geometry(kernel.shape, spec)
    shape, taps = check_circular(input_shape, layer, spec), layer.taps
    if not crop:
        if spec.transposed or any(d != 1 for d in layer.dilation):
            raise ValueError("crop=False is for convolutions without dilation that are not transposed: use crop=True")
        # Every phase of the stride has taps in what comes out.
        behind = [(0, max(0, s - k)) for k, s in zip(taps, layer.strides, strict=True)]
        kernel = jnp.pad(kernel, [*behind, (0, 0), (0, 0)])
        layer = geometry(kernel.shape, spec)
    grid = frequency_grid(layer, spec, shape)
    to_canonical = lambda k: canonical(k, spec, shape).kernels  # noqa: E731
    kernels = to_canonical(kernel)
    finite = all_finite(kernels)
    scale, inverse = power_of_two(jnp.max(jnp.abs(kernels)))
    change = _change(jnp.where(finite, kernels, 0) * inverse, grid, maximum * inverse, crop=crop) * scale
    change = jnp.where(finite, change, jnp.nan)
    if not crop:
        return _whole(kernel, change, shape, spec, taps)
    # Every tap of the kernel is one entry of its canonical form: the transposed map takes it out again.
    (back,) = jax.linear_transpose(to_canonical, kernel)(change)
    clipped = kernel + back
    # What is smaller than the smallest normal float may vanish, before the bound is taken and after: sums of taps too.
    vanished = jnp.finfo(kernel.dtype).tiny * math.prod(kernel.shape)
    bound = _circular_bound(clipped, shape, spec) + vanished
    share = jnp.maximum(maximum - vanished, 0) / bound * (1 - 4 * jnp.finfo(kernel.dtype).eps)
    return clipped * jnp.minimum(1, share).astype(kernel.dtype)


def _circular_bound(kernel: Array, shape: tuple[int, ...], spec: ConvSpec) -> Array:
    """The norm and all that its rounding can lack, given a backward stable decomposition.

    By all singular values: `exact_norm` excludes frequencies by float32 tests whose worst case is larger than this.
    """
    kernels = canonical(kernel, spec, shape).kernels
    batch, *taps, c_in, c_out = kernels.shape
    every = jnp.sum(jnp.abs(kernels).reshape(batch, -1, c_in, c_out), axis=1)
    terms = 2 * math.prod(taps) + 6
    lost = jnp.max(jax.vmap(frobenius_bound)(every)) * constant_up(1.5 * gamma(terms, kernel.dtype), kernel.dtype)
    return round_up(singular_values(kernel, shape, spec)[0], 4 * max(c_in, c_out) + 160) + lost


def _change(kernels: Array, grid: Grid, maximum: Array, *, crop: bool) -> Array:
    """What clipping adds to canonical kernels ``(batch, *taps, c_in, c_out)``, or to as many taps as frequencies."""
    batch, *taps, c_in, c_out = kernels.shape
    out = tuple(taps) if crop else grid.sizes
    often = jnp.asarray(np.bincount(grid.of), kernels.dtype)
    points = jnp.asarray(grid.points)

    def at(point_and_weight: tuple[Array, Array]) -> Array:
        point, weight = point_and_weight
        left, values, right = jnp.linalg.svd(symbols(kernels, point[None], grid.sizes)[0], full_matrices=False)
        excess = jnp.maximum(values - maximum, 0)
        removed = -jnp.matmul(left * excess[..., None, :], right, precision=HIGHEST)
        real, imag = phases(point[None], grid.sizes, out, kernels.dtype)  # e^{iω·t}; its conjugate goes back
        back = real[0][:, None, None, None] * removed.real + imag[0][:, None, None, None] * removed.imag
        return weight * back

    def add(total: Array, item: tuple[Array, Array]) -> tuple[Array, None]:
        return total + at(item), None

    start = vary_as(jnp.zeros((math.prod(out), batch, c_in, c_out), kernels.dtype), kernels)
    total, _ = lax.scan(add, start, (points, often / len(grid.of)))
    total = jnp.moveaxis(total, 1, 0).reshape(batch, *out, c_in, c_out)
    if crop:
        # Taps that fold onto one another share what that one place has to change.
        for axis, (n, k, d) in enumerate(zip(grid.sizes, taps, grid.spacing, strict=True), start=1):
            period = n // math.gcd(n, d)
            alias = [sum(t % period == s % period for s in range(k)) for t in range(k)]
            total = total / jnp.asarray(alias, kernels.dtype).reshape(-1, *(1,) * (total.ndim - axis - 1))
    return total


def _whole(kernel: Array, change: Array, shape: tuple[int, ...], spec: ConvSpec, taps: tuple[int, ...]) -> Array:
    """The clipped layer with one tap for every input, centred as a kernel with so many taps was."""
    size = (*shape, *kernel.shape[-2:])
    folded = jnp.zeros(size, kernel.dtype)
    place = np.meshgrid(*(np.arange(k) % n for k, n in zip(kernel.shape[:-2], shape, strict=True)), indexing="ij")
    folded = folded.at[tuple(place)].add(kernel)
    (back,) = jax.linear_transpose(lambda k: canonical(k, spec, shape).kernels, folded)(change)
    shift = tuple((n - 1) // 2 - (k - 1) // 2 for n, k in zip(shape, taps, strict=True))
    return jnp.roll(folded + back, shift, tuple(range(len(shape))))
