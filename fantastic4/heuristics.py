"""The systems that the paper compares with, under their authors' names. Their numbers are estimates.

| function | whose | what its number is |
|---|---|---|
| `estimate_miyato`, `miyato_normalise` | Miyato et al. 2018 | ‖T‖: below the norm, by up to √taps |
| `yoshida_penalty` | Yoshida & Miyato 2017 | ½ ‖T‖², by power iteration |
| `estimate_ryu` | Ryu et al. 2019 | the norm of that very operator, from below |
| `gouk_project` | Gouk et al. 2018 | the kernel over max(1, that / λ) |
| `estimate_sedghi` | Sedghi et al. 2019, batched as in the paper | the circular norm, from below |
| `estimate_tnn` | Grishina et al. 2024 | √taps times a tensor norm that lies above σ∞, found from below |
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from fantastic4 import dense, frequency, jacobian
from fantastic4.border import check_circular, frequency_grid
from fantastic4.conv import ConvSpec, canonical, check_input_shape, geometry
from fantastic4.devices import vary_as
from fantastic4.entry import count, entry, positive, same_kind, sizes
from fantastic4.linalg import HIGHEST, generic, real_array, unit
from fantastic4.spectrum import CIRCULAR
from fantastic4.symbol import Grid


def _matrix(kernel: Array) -> Array:
    kernel = real_array(kernel, "kernel")
    geometry(kernel.shape, ConvSpec())
    return kernel.reshape(-1, kernel.shape[-1])


@entry()
def estimate_miyato(kernel: Array) -> Array:
    """‖T‖, the norm of the kernel reshaped to ``(taps · c_in, c_out)`` (Miyato et al. 2018), exactly.

    **Not a bound**: never above the norm of a convolution on inputs of at least the kernel size (zero
    or circular padding, unit stride, one group), and up to √taps below it. Flax's ``SpectralNorm`` divides by it.

    Args:
      kernel: ``(*spatial, c_in, c_out)``.

    Returns:
      Scalar, differentiable.

    Example:
      >>> import jax.numpy as jnp
      >>> from fantastic4 import estimate_miyato
      >>> print(round(float(estimate_miyato(jnp.ones((3, 3, 1, 1)))), 3))  # the norm is 9
      3.0
    """
    return dense.exact_norm(_matrix(kernel))


@entry(warmup=count(0))
def miyato_init(kernel: Array, *, key: Array, warmup: int = 20) -> dense.PowerState:
    """A start for `miyato_normalise` and `yoshida_penalty`."""
    return dense.init(_matrix(kernel), key=key, warmup=warmup)


@entry(iterations=count(1))
def miyato_normalise(kernel: Array, state: dense.PowerState, *, iterations: int = 1) -> tuple[Array, dense.PowerState]:
    """Kernel / ‖T‖ by one warm-started power iteration (Miyato et al. 2018); a copy, with the gradient of the quotient.

    The result's convolution may still stretch by up to √taps, and by what the iteration lacks.

    Args:
      kernel: ``(*spatial, c_in, c_out)``.
      state: from `miyato_init` or the call before.
      iterations: at least 1.

    Returns:
      The kernel, of its own dtype, unchanged if it is zero, and the new state.
    """
    norm, state = dense.step(_matrix(kernel), state, iterations=iterations)
    return (kernel / jnp.where(norm > 0, norm, 1)).astype(kernel.dtype), state


@entry(iterations=count(1))
def yoshida_penalty(kernel: Array, state: dense.PowerState, *, iterations: int = 1) -> tuple[Array, dense.PowerState]:
    """½ ‖T‖² by warm-started power iteration: the spectral norm regulariser of Yoshida & Miyato 2017, times λ.

    Args:
      kernel: ``(*spatial, c_in, c_out)``.
      state: from `miyato_init` or the call before.
      iterations: at least 1.

    Returns:
      The penalty, an estimate from below, and the new state.
    """
    norm, state = dense.step(_matrix(kernel), state, iterations=iterations)
    return norm * norm / 2, state


class RyuState(NamedTuple):
    """What the next `ryu_step` starts from.

    Attributes:
      vector: ``(*input_shape, c_in)``, unit length.
    """

    vector: Array


@entry(input_shape=sizes, warmup=count(0))
def ryu_init(
    kernel: Array,
    input_shape: tuple[int, ...],
    spec: ConvSpec = ConvSpec(),  # noqa: B008 (frozen)
    *,
    key: Array,
    warmup: int = 20,
) -> RyuState:
    """A random input for `ryu_step`, improved by ``warmup`` iterations.

    Args:
      kernel: ``(*spatial, c_in // groups, c_out)``.
      input_shape: spatial size of the input.
      spec: the layer's `ConvSpec`.
      key: a ``jax.random.key``.
      warmup: iterations to run.
    """
    kernel = real_array(kernel, "kernel")
    layer = geometry(kernel.shape, spec)
    shape = (*check_input_shape(input_shape, layer), layer.c_in)
    vector = unit(generic(key, shape, kernel.dtype))[1]
    return ryu_step(kernel, RyuState(vector), spec, iterations=warmup)[1] if warmup else RyuState(vector)


@entry(iterations=count(1))
def ryu_step(
    kernel: Array,
    state: RyuState,
    spec: ConvSpec = ConvSpec(),  # noqa: B008 (frozen)
    *,
    iterations: int = 1,
) -> tuple[Array, RyuState]:
    """Power iteration with the convolution and its adjoint (Ryu et al. 2019), warm-started.

    **An estimate from below** of the norm of that very operator: its padding, stride and input size.

    Args:
      kernel: ``(*spatial, c_in // groups, c_out)``.
      state: from `ryu_init` or the step before.
      spec: the layer's `ConvSpec`.
      iterations: at least 1; two convolutions each.

    Returns:
      The estimate, whose gradient is that of ⟨y, J x⟩ with constant vectors, and the new state.

    Raises:
      ValueError: a state of another layer.
    """
    same_kind("state", state, RyuState, "ryu_init(kernel, input_shape, spec, key=…)")
    kernel = real_array(kernel, "kernel")
    constant = lax.stop_gradient(kernel)
    shape = state.vector.shape
    vector = lax.stop_gradient(state.vector).astype(kernel.dtype)

    def stretch(x: Array) -> tuple[Array, Array]:
        y = jacobian.forward(constant, x, spec)
        norm, direction = unit(y.ravel())
        return norm, direction.reshape(y.shape)

    def iterate(_: Array | int, x: Array) -> Array:
        _, y = stretch(x)
        back = jacobian.adjoint(constant, y, shape[:-1], spec)
        norm, new = unit(back.ravel())
        return jnp.where(norm > 0, new.reshape(shape), x)

    vector = lax.fori_loop(0, iterations, iterate, vary_as(vector, kernel))
    _, y = stretch(vector)
    return jnp.vdot(y, jacobian.forward(kernel, vector, spec), precision=HIGHEST), RyuState(vector)


@entry(input_shape=sizes, iterations=count(1))
def estimate_ryu(
    kernel: Array,
    input_shape: tuple[int, ...],
    spec: ConvSpec = ConvSpec(),  # noqa: B008 (frozen)
    *,
    key: Array,
    iterations: int = 50,
) -> Array:
    """The norm of a layer at one input size by power iteration from a random start (Ryu et al. 2019).

    **An estimate from below**: 50 iterations are known to end 0.4 to 0.7 % short on trained kernels, more where
    the top singular values lie close. Any padding, stride, dilation, groups, size. See `ryu_step` for warm starts.

    Args:
      kernel: ``(*spatial, c_in // groups, c_out)``.
      input_shape: spatial size of the input.
      spec: the layer's `ConvSpec`.
      key: a ``jax.random.key``.
      iterations: at least 1.

    Returns:
      Scalar, differentiable.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from fantastic4 import estimate_ryu
      >>> print(round(float(estimate_ryu(jnp.ones((3, 3, 1, 1)), (8, 8), key=jax.random.key(0))), 3))
      8.291
    """
    state = ryu_init(kernel, input_shape, spec, key=key, warmup=0)
    return ryu_step(kernel, state, spec, iterations=iterations)[0]


@entry(maximum=positive, iterations=count(1))
def gouk_project(
    kernel: Array,
    maximum: Array | float,
    state: RyuState,
    spec: ConvSpec = ConvSpec(),  # noqa: B008 (frozen)
    *,
    iterations: int = 1,
) -> tuple[Array, RyuState]:
    """Kernel / max(1, σ/λ), σ by power iteration with the convolution: the projection of Gouk et al. 2018.

    To be called after each update of the weights. σ is an estimate from below, so the norm may stay above λ by as
    much as the iteration lacks.

    Args:
      kernel: ``(*spatial, c_in // groups, c_out)``.
      maximum: λ > 0, a scalar array.
      state: from `ryu_init` or the call before.
      spec: the layer's `ConvSpec`.
      iterations: at least 1.

    Returns:
      The kernel, a copy of its own dtype, and the new state.
    """
    norm, state = ryu_step(kernel, state, spec, iterations=iterations)
    return (kernel / jnp.maximum(1, norm / maximum)).astype(kernel.dtype), state


@entry(input_shape=sizes, warmup=count(0))
def sedghi_init(
    kernel: Array,
    input_shape: tuple[int, ...],
    spec: ConvSpec = CIRCULAR,
    *,
    key: Array,
    warmup: int = 20,
) -> frequency.GridState:
    """Random vectors at every frequency of a circular layer, for `sedghi_step`."""
    kernels, grid = _circular(kernel, input_shape, spec)
    state = frequency.start(key, kernels, len(grid.points))
    iterate = lambda _, s: frequency.power_step(kernels, s, grid.points, grid.sizes)[1]  # noqa: E731
    return lax.fori_loop(0, warmup, iterate, vary_as(state, kernels))


@entry(input_shape=sizes, iterations=count(1))
def sedghi_step(
    kernel: Array,
    state: frequency.GridState,
    input_shape: tuple[int, ...],
    spec: ConvSpec = CIRCULAR,
    *,
    iterations: int = 1,
) -> tuple[Array, frequency.GridState]:
    """The circular norm by power iteration on all frequencies at once, warm-started.

    The paper's adaptation of Sedghi et al. 2019, who decompose every symbol. **An estimate from below.**

    Args:
      kernel: ``(*spatial, c_in // groups, c_out)``.
      state: from `sedghi_init` or the step before.
      input_shape: spatial size of the input.
      spec: its padding must be ``"CIRCULAR"``, and its strides divide the input.
      iterations: at least 1; each multiplies the kernel by two columns a frequency, half of the grid, twice.

    Returns:
      The estimate, differentiable with constant vectors, and the new state.
    """
    same_kind("state", state, frequency.GridState, "sedghi_init(kernel, input_shape, spec, key=…)")
    kernels, grid = _circular(kernel, input_shape, spec)
    constant = lax.stop_gradient(kernels)
    if state.vectors.shape != (len(kernels), len(grid.points), 2, kernels.shape[-1]):
        raise ValueError("this state belongs to another layer: make one with sedghi_init(kernel, input_shape, …)")
    iterate = lambda _, s: frequency.power_step(constant, s, grid.points, grid.sizes)[1]  # noqa: E731
    state = lax.fori_loop(0, iterations - 1, iterate, vary_as(lax.stop_gradient(state), kernels))
    top, state = frequency.power_step(constant, state, grid.points, grid.sizes)
    return frequency.differentiable(kernels, top), state


@entry(input_shape=sizes, iterations=count(1))
def estimate_sedghi(
    kernel: Array,
    input_shape: tuple[int, ...],
    spec: ConvSpec = CIRCULAR,
    *,
    key: Array,
    iterations: int = 50,
) -> Array:
    """The norm of a circular layer by `sedghi_step` from a random start: **an estimate from below**."""
    state = sedghi_init(kernel, input_shape, spec, key=key, warmup=0)
    return sedghi_step(kernel, state, input_shape, spec, iterations=iterations)[0]


def _circular(kernel: Array, input_shape: tuple[int, ...], spec: ConvSpec) -> tuple[Array, Grid]:
    kernel = real_array(kernel, "kernel")
    layer = geometry(kernel.shape, spec)
    shape = check_circular(input_shape, layer, spec)
    return canonical(kernel, spec, shape).kernels, frequency_grid(layer, spec, shape)


@entry(iterations=count(1), starts=count(1))
def estimate_tnn(
    kernel: Array,
    spec: ConvSpec = ConvSpec(),  # noqa: B008 (frozen)
    *,
    key: Array,
    iterations: int = 50,
    starts: int = 4,
) -> Array:
    """√taps · the complex spectral norm of the kernel as a tensor (Grishina, Gorbunov & Rakhuba 2024).

    max |Σ K[t, i, o] a_t1 b_t2 … u_i v_o| over complex unit vectors, one an axis. The maximum lies between σ∞ and
    the four bounds, but alternating iteration ends in local maxima: **an estimate**, from below, of an upper bound;
    it may be on either side of the norm.

    Args:
      kernel: ``(*spatial, c_in // groups, c_out)``.
      spec: the layer's `ConvSpec`.
      key: a ``jax.random.key``.
      iterations: sweeps over the vectors.
      starts: random starts, of which the best counts.

    Returns:
      Scalar, times the padding's factor; differentiable with constant vectors.
    """
    kernels, factor = canonical(kernel, spec)
    _, constant = unit(lax.stop_gradient(kernels))  # squares of its numbers neither overflow nor vanish
    shape = kernels.shape[1:]
    letters = "abcde"[: len(shape)]

    def contract(tensor: Array, vectors: list[Array], leave: int | None) -> Array:
        kept = [i for i in range(len(shape)) if i != leave]
        terms = ",".join([letters, *(letters[i] for i in kept)])
        out = "" if leave is None else letters[leave]
        return jnp.einsum(f"{terms}->{out}", tensor, *(vectors[i] for i in kept), precision=HIGHEST, optimize="greedy")

    def search(tensor: Array, key: Array) -> tuple[Array, list[Array]]:
        keys = jax.random.split(key, len(shape))
        width = jnp.result_type(tensor.dtype, jnp.complex64)
        vectors = [jax.random.normal(k, (n,), width) for k, n in zip(keys, shape, strict=True)]
        vectors = [v / jnp.linalg.norm(v) for v in vectors]

        def sweep(_: Array, vectors: list[Array]) -> list[Array]:
            for axis in range(len(shape)):
                new = contract(tensor, vectors, axis).conj()
                norm = jnp.linalg.norm(new)
                vectors[axis] = jnp.where(norm > 0, new / jnp.where(norm > 0, norm, 1), vectors[axis])
            return vectors

        vectors = lax.fori_loop(0, iterations, sweep, vary_as(vectors, tensor))
        return jnp.abs(contract(tensor, vectors, None)), vectors

    keys = jax.random.split(key, (len(kernels), starts))
    values, vectors = jax.vmap(jax.vmap(search, (None, 0)))(constant, keys)
    group, start = jnp.divmod(jnp.argmax(values), starts)
    chosen = [lax.stop_gradient(v[group, start]) for v in vectors]
    value = contract(kernels[group], chosen, None).real  # its phase is 0 after a sweep
    return value * math.sqrt(math.prod(shape[:-2])) * factor
