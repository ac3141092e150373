"""The norm of a layer between two floats that cannot lie: at every input size, or at one."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import numbers
from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh

from fantastic4 import border, jacobian
from fantastic4.conv import ConvSpec, canonical, check_input_shape, geometry
from fantastic4.entry import count, sizes
from fantastic4.entry import mesh as one_mesh
from fantastic4.linalg import krylov_top, real_array
from fantastic4.now import now
from fantastic4.promotion import usual_promotion
from fantastic4.rounding import gamma
from fantastic4.supremum import Enclosure, OutputWave

_DENSE_SIDE = 768  # up to this smaller side the layer's matrix is decomposed
_DENSE_ENTRIES = 2**22
_FREQUENCIES = 4096  # up to this many each is tested; beyond, the infinite grid is as good
_KRYLOV, _RESTARTS = 8, 12
_UP, _DOWN = 1 + 1e-14, 1 - 1e-14


class Interval(NamedTuple):
    """Two Python floats with the norm between them.

    Attributes:
      lower: never above the norm.
      upper: never below it.
      reached: whether upper ≤ (1 + rtol) · lower.
    """

    lower: float
    upper: float
    reached: bool


@usual_promotion
def norm_interval(
    kernel: Array | np.ndarray,
    spec: ConvSpec = ConvSpec(),  # noqa: B008 (frozen)
    rtol: float = 1e-3,
    *,
    input_shape: tuple[int, ...] | None = None,
    max_tests: int = 50_000,
    mesh: Mesh | None = None,
) -> Interval:
    r"""Enclose a layer's norm, rounding included.

    **Without** ``input_shape``: the supremum of the layer's norm over all input sizes. With zero padding
    that is σ∞ of the canonical kernels, found to ``rtol`` by branch and bound over frequencies
    (`fantastic4.supremum` has the theorem). Reflect and edge padding multiply the upper end by
    √2 or √(1+p) an axis, and a circular layer whose strides need not divide the input has the un-strided kernel's:
    there the ends stay apart, and ``reached`` says so.

    **With** ``input_shape``: the norm of that very operator. Small ones (a matrix with a side of at most 768) are
    found to ``rtol``, and circular ones whose strides divide the input and that have at most 4,096 frequencies. For
    others the lower end comes from Lanczos iterations on the operator, the upper end is the smallest of what its
    circular stand-ins allow (`fantastic4.border.covers`): for zero padding the norm at a slightly larger period.

    All arithmetic is float64, whatever the kernel's dtype; the kernel is taken as it is held. A host function
    around compiled pieces, since the work depends on the values: it cannot be traced. A 3×3×64×64 kernel takes
    tens of milliseconds on two cores, 512 channels of a trained network a second, once compiled for the shape; large
    random kernels, which are nearly as large at many frequencies, far longer. With ``threadpoolctl`` installed (it
    comes with ``fantastic4[cli]``) twice as fast, and ten times where other programs take the processors.

    Args:
      kernel: ``(*spatial, c_in // groups, c_out)``, concrete.
      spec: the layer's `ConvSpec`.
      rtol: wanted upper / lower - 1, positive.
      input_shape: spatial size of the input.
      max_tests: frequencies to test, apart from the coarsest grid; past that, the ends reached so far, the upper one
        raised until it holds.
      mesh: of devices, to give each a share of the frequencies that are tested together.

    Returns:
      `Interval`. 0 and 0 for a zero kernel, NaN and NaN where an entry is NaN or infinite.

    Raises:
      ValueError: a traced kernel, ``rtol`` that is not positive or below what float64 can certify (about 1e-10
        to 1e-6, growing with the channels; the message has the number), or a spec or size that does not fit.

    Example:
      >>> import jax
      >>> import fantastic4 as f4
      >>> kernel = jax.random.normal(jax.random.key(0), (3, 3, 4, 8))
      >>> interval = f4.norm_interval(kernel, rtol=1e-3)
      >>> interval.reached, interval.lower <= interval.upper <= 1.001 * interval.lower
      (True, True)
    """
    if isinstance(kernel, jax.core.Tracer):
        raise ValueError("norm_interval is a host function and cannot be traced: inside jit use fantastic4.bound")
    with _float64():
        real_array(kernel, "kernel")
    layer = geometry(kernel.shape, spec)
    if not isinstance(rtol, numbers.Real) or not 0 < rtol < math.inf:
        raise ValueError(f"rtol must be a positive number, got {rtol!r}")
    wanted, rtol = rtol, float(min(rtol, 1.0))
    max_tests = count(1)("max_tests", max_tests)
    mesh = one_mesh("mesh", mesh)
    shape = None if input_shape is None else check_input_shape(sizes("input_shape", input_shape), layer)
    values = np.asarray(kernel).astype(np.float64)
    if not np.isfinite(values).all():
        return Interval(math.nan, math.nan, False)
    if shape is not None and _vanish(values):
        values = np.where(_that_meet(values, spec, shape), values, 0.0)
    largest = float(np.abs(values).max())
    if largest == 0:
        return Interval(0.0, 0.0, True)
    exponent = math.frexp(largest)[1]
    scaled = np.ldexp(values, -exponent)
    with _float64():
        if shape is None:
            lower, upper = _every_size(scaled, spec, rtol, max_tests, mesh)
        else:
            lower, upper = _one_size(scaled, spec, shape, rtol, max_tests, mesh)
    lower, upper = _scaled(lower, exponent, 0.0), _scaled(upper, exponent, math.inf)
    return Interval(lower, upper, bool(upper <= (1 + wanted) * lower * _UP))


def _vanish(values: np.ndarray) -> bool:
    """Whether some entries are nothing beside the largest, even in float64."""
    sizes = np.abs(values[values != 0])
    return bool(sizes.size) and math.frexp(sizes.max())[1] - math.frexp(sizes.min())[1] > 1000


def _that_meet(values: np.ndarray, spec: ConvSpec, shape: tuple[int, ...]) -> np.ndarray:
    """Which entries meet the input: beside those that do not, all that count may be too small to be kept."""
    with _float64():
        x = jnp.ones((*shape, geometry(values.shape, spec).c_in))
        times = jax.grad(lambda kernel: jnp.sum(jacobian.forward(kernel, x, spec)))(jnp.zeros(values.shape))
    return np.asarray(times) > 0


def _scaled(value: float, exponent: int, outward: float) -> float:
    """Value · 2^exponent, rounded ``outward`` where it leaves the normal floats."""
    with np.errstate(over="ignore", under="ignore"):
        result = float(np.ldexp(value, exponent))
    if math.isinf(result):
        return math.nextafter(result, outward)
    return result if result == 0.0 == value or abs(result) > 1e-300 else math.nextafter(result, outward)


@contextlib.contextmanager
def _float64() -> Iterator[None]:
    """Float64 within, on a device that computes it as IEEE 754 says: a TPU does not. Now, whatever is being traced."""
    device = jax.devices("cpu")[0] if jax.default_backend() == "tpu" else None
    with jax.enable_x64(True), jax.default_device(device), now():
        yield


def _every_size(
    kernel: np.ndarray, spec: ConvSpec, rtol: float, max_tests: int, mesh: Mesh | None
) -> tuple[float, float]:
    kernels, factor = canonical(jnp.asarray(kernel), spec)
    above = Enclosure(kernels, mesh).everywhere(rtol, max_tests)
    below = above
    if not spec.transposed:
        # Large inputs have an interior that no border touches.
        plain = canonical(jnp.asarray(kernel), dataclasses.replace(spec, padding="VALID")).kernels
        if plain.shape != kernels.shape:
            below = Enclosure(plain, mesh).everywhere(rtol, max_tests)
    return below.lower, above.upper * factor * (_UP if factor != 1 else 1)


def _one_size(
    kernel: np.ndarray, spec: ConvSpec, shape: tuple[int, ...], rtol: float, max_tests: int, mesh: Mesh | None
) -> tuple[float, float]:
    layer = geometry(kernel.shape, spec)
    x = jax.ShapeDtypeStruct((*shape, layer.c_in), np.float64)
    outputs = math.prod(jax.eval_shape(lambda x: jacobian.forward(jnp.asarray(kernel), x, spec), x).shape)
    inputs = math.prod(x.shape)
    if outputs == 0:
        return 0.0, 0.0
    if min(inputs, outputs) <= _DENSE_SIDE and inputs * outputs <= _DENSE_ENTRIES:
        return _dense(kernel, spec, shape)
    best: tuple[float, Enclosure] | None = None
    for cover in border.covers(kernel.shape, spec, shape):
        enclosure = Enclosure(canonical(jnp.asarray(kernel), cover.spec, cover.input_shape).kernels, mesh)
        # Half of it is for the lower end, whose vector is a float32 one.
        part = rtol if cover.is_layer else max(rtol / 2, 1e-5)
        circular = geometry(kernel.shape, cover.spec)
        frequencies = math.prod(cover.input_shape) // (1 if spec.transposed else math.prod(circular.strides))
        few = frequencies <= _FREQUENCIES
        if few:
            grid = border.frequency_grid(circular, cover.spec, cover.input_shape)
            found = enclosure.on_grid(grid.sizes, grid.points, part)
        else:
            found = enclosure.everywhere(part, max_tests)
        if few and cover.is_layer:
            return found.lower, found.upper
        upper = found.upper * cover.factor * (_UP if cover.factor != 1 else 1)
        if best is None or upper < best[0]:
            best = upper, enclosure
    assert best is not None
    return _from_below(kernel, spec, shape, best[1].output_wave()), best[0]


def _dense(kernel: np.ndarray, spec: ConvSpec, shape: tuple[int, ...]) -> tuple[float, float]:
    """By the layer's matrix A: λ(AAᵀ) ≤ t where the Cholesky decomposition of t I - AAᵀ succeeds."""
    matrix, sizes = (np.asarray(jacobian.materialise(jnp.asarray(k), shape, spec)) for k in (kernel, np.abs(kernel)))
    largest = float(np.abs(sizes).max())  # the kernel's largest taps need not be among those that meet the input
    if largest == 0:
        return 0.0, 0.0
    exponent = math.frexp(largest)[1]
    lower, upper = _matrix_norm(
        np.ldexp(matrix, -exponent), np.ldexp(sizes, -exponent), math.prod(kernel.shape[:-1]) * spec.groups
    )
    return _scaled(lower, exponent, 0.0), _scaled(upper, exponent, math.inf)


def _matrix_norm(matrix: np.ndarray, sizes: np.ndarray, terms: int) -> tuple[float, float]:
    """Of a matrix whose entries are sums of so many terms, of absolute values that add up to ``sizes``."""
    if matrix.shape[0] > matrix.shape[1]:
        matrix = matrix.T
    n, m = matrix.shape
    # An entry is a sum of taps and zeros; a product of two rows one of m products.
    entries = gamma(terms + 8, np.float64) * float(np.linalg.norm(sizes)) * _UP
    frobenius = float(np.linalg.norm(matrix)) * (1 + 1e-9) + entries
    slack = (gamma(m + 4, np.float64) * frobenius + 2.1 * entries) * frobenius
    gram = matrix @ matrix.T
    values, vectors = np.linalg.eigh(gram)
    top = vectors[:, -1]
    below: float = float(top @ gram @ top) / float(top @ top) - slack - 4 * gamma(2 * n + 8, np.float64) * frobenius**2
    cholesky = 3 * gamma(2 * n + 8, np.float64) * n
    margin = 1e-13
    while margin < 1:
        above = float(values[-1]) * (1 + margin)
        try:
            np.linalg.cholesky(above * np.eye(n) - gram)
        except np.linalg.LinAlgError:
            margin *= 4
            continue
        return math.sqrt(max(below, 0.0)) * _DOWN, math.sqrt(above * (1 + cholesky) + slack) * _UP
    return 0.0, float(np.linalg.norm(matrix)) * (1 + 1e-9) + entries


@partial(jax.jit, static_argnames=("steps",))
def _krylov(kernel: Array, x: Array, spec: ConvSpec, steps: int) -> Array:
    """The best vector for ‖J x‖ in the Krylov space of JᵀJ that starts at ``x``, unit length."""

    def apply(flat: Array) -> Array:
        y = jacobian.forward(kernel, flat.reshape(x.shape), spec)
        return jacobian.adjoint(kernel, y, x.shape[:-1], spec).ravel()

    return krylov_top(apply, x.ravel(), steps).reshape(x.shape)


@jax.jit
def _stretch(kernel: Array, x: Array, spec: ConvSpec) -> Array:
    """‖J x‖ / ‖x‖ in the precision of its arguments."""
    y = jacobian.forward(kernel, x, spec)
    return jnp.sqrt(jnp.sum(y * y) / jnp.sum(x * x))


def _from_below(kernel: np.ndarray, spec: ConvSpec, shape: tuple[int, ...], wave: OutputWave) -> float:
    """‖J x‖ / ‖x‖, rounded down, for a vector made by Krylov iterations in float32, evaluated in float64.

    They start from the plane wave that attains the norm of the circular stand-in, under a sine window: nearly
    the top singular vector of a zero-padded layer.
    """
    layer = geometry(kernel.shape, spec)
    single = jnp.asarray(kernel, jnp.float32)
    x = jax.ShapeDtypeStruct((*shape, layer.c_in), jnp.float32)
    y = jax.eval_shape(lambda x: jacobian.forward(single, x, spec), x)
    ends = x.shape if spec.transposed else y.shape
    start = np.zeros(ends)
    places = np.stack(np.meshgrid(*map(np.arange, ends[:-1]), indexing="ij"), -1)
    window = np.prod(np.sin(np.pi * (places + 0.5) / np.array(ends[:-1])), axis=-1)
    spacing = np.array(border.tap_spacing(layer))  # a tap further is so many outputs further
    signal = (window * np.exp(1j * (places @ (wave.angles / spacing))))[..., None] * wave.vector
    first = wave.group * len(wave.vector)
    start[..., first : first + len(wave.vector)] = signal.real
    noise = np.random.default_rng(0).standard_normal(ends)  # reaches what the wave may be orthogonal to
    vector = jnp.asarray(start + 0.02 * np.linalg.norm(start) / np.linalg.norm(noise) * noise, jnp.float32)
    if not spec.transposed:
        vector = jacobian.adjoint(single, vector, shape, spec)
    reached = 0.0
    for _ in range(_RESTARTS):
        vector = _krylov(single, vector, spec, _KRYLOV)
        before, reached = reached, float(_stretch(single, vector, spec))
        if reached <= before * (1 + 1e-5):
            break
    value = float(_stretch(jnp.asarray(kernel), vector.astype(np.float64), spec))
    # |J| |x| bounds what the sums of products can lose; ‖|J|‖ ≤ copies · Σ_t ‖K[t]‖_F.
    copies = max(cover.factor for cover in border.covers(kernel.shape, spec, shape))
    every_tap = np.sqrt(np.sum(kernel.reshape(-1, *kernel.shape[-2:]) ** 2, axis=(1, 2))).sum()
    lost = gamma(kernel.size + 64, np.float64) * copies * every_tap
    norms = gamma(max(math.prod(x.shape), math.prod(y.shape)) + 64, np.float64)
    return max(0.0, value * (1 - norms) - 2 * lost) * _DOWN
