"""Fourier transforms and complex numbers on the way: never below singular values of the real map that JAX computes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from fantastic4 import lipschitz

RNG = np.random.default_rng(3)


def complex_draw(*shape):
    return (RNG.standard_normal(shape) + 1j * RNG.standard_normal(shape)).astype(np.complex64)


MODES, PLANE = complex_draw(3, 3, 4), complex_draw(2, 3, 3, 3)
VECTOR, MATRIX = complex_draw(5), complex_draw(5, 4)


def layer(x):
    """Of a Fourier neural operator: a matrix for each of the lowest frequencies."""
    low = jnp.einsum("bkc,cdk->bkd", jnp.fft.rfft(x, axis=1)[:, :4], MODES)
    out = jnp.zeros((*x.shape[:1], 5, 3), low.dtype).at[:, :4].set(low)
    return jnp.fft.irfft(out, n=8, axis=1)


def layer_of_planes(x):
    modes = jnp.fft.rfft2(x, axes=(1, 2))
    both = [jnp.einsum("bxyc,cdxy->bxyd", part, PLANE[:, :2]) for part in (modes[:, :3, :3], modes[:, -3:, :3])]
    out = jnp.zeros((1, 6, 4, 2), modes.dtype).at[:, :3, :3].set(both[0]).at[:, -3:, :3].set(both[1])
    return jnp.fft.irfft2(out, s=(6, 6), axes=(1, 2))


# The function, the shape of its input, and how many times the truth its bound may be.
LINEAR = {
    "a layer of an operator": (layer, (1, 8, 3), 1.42),
    "a layer of planes": (layer_of_planes, (1, 6, 6, 2), 2.01),
    "there and back": (lambda x: jnp.fft.irfft(jnp.fft.rfft(x), n=7), (7,), 1.4143),
    "there and back, complex": (lambda x: jnp.fft.ifft2(jnp.fft.fft2(x)).real, (3, 5), 1.0001),
    "both parts": (lambda x: (lambda y: jnp.concatenate([y.real, y.imag]))(jnp.fft.rfft(x)), (6,), 1.4143),
    "complex outputs": (lambda x: jnp.fft.fft(x), (6,), 1.0001),
    "half the frequencies": (lambda x: jnp.fft.rfft(x), (1, 6), 1.0001),
    "put together": (lambda x: jax.lax.complex(x, 2 * x) * VECTOR, (5,), 1.0001),
    "with an imaginary constant": (lambda x: jax.lax.complex(x, jnp.ones(5)) * VECTOR, (5,), 1.0001),
    "a matrix": (lambda x: (x.astype(jnp.complex64) @ MATRIX), (2, 5), 1.5),
    "a matrix from the left": (lambda x: MATRIX.T @ jax.lax.complex(x, -x), (5,), 1.5),
    "scaled, divided, moved": (
        lambda x: jnp.fft.fftshift(jnp.fft.fft(x / 3)).conj() * VECTOR / (VECTOR[::-1] * 1j), (5,), 1.5
    ),
    "added and subtracted": (lambda x: (lambda y: y[::-1] - 2 * y + 1j)(jnp.fft.fft(x)), (5,), 1.5),
    "chosen by a mask": (lambda x: jnp.fft.irfft(jnp.where(np.arange(5) < 2, jnp.fft.rfft(x), 0), n=8), (8,), 1.4143),
    "frequencies that stand for two": (
        lambda x: jnp.fft.irfft(jnp.pad(x, 1).astype(jnp.complex64), n=10), (4,), 1.0001
    ),
    "sum": (lambda x: jnp.fft.fft(x).sum(), (5,), 1.0001),
}  # fmt: skip
CURVED = {
    "sizes": (lambda x: jnp.abs(jnp.fft.fft(x)), (6,)),
    "an operator": (lambda x: jax.nn.gelu(layer(x) + x @ np.eye(3, dtype=np.float32)), (1, 8, 3)),
    "a function of a part": (lambda x: jnp.fft.irfft2(jnp.tanh(jnp.fft.rfft2(x).real) + 0j, s=(4, 5)), (4, 5)),
    "a real function made complex": (lambda x: (lambda y: y * VECTOR + y)(jnp.sin(x).astype(jnp.complex64)), (5,)),
}


def truth(fn, shape):
    """The largest norm of Jacobians of all parts, in float64."""

    def flat(v):
        y = jnp.ravel(fn(v.reshape(shape)))
        return jnp.concatenate([jnp.real(y), jnp.imag(y)])

    with jax.enable_x64(True):
        at = np.random.default_rng(0).standard_normal((6, int(np.prod(shape))))
        jacobians = jax.jit(jax.vmap(jax.jacfwd(flat)))(jnp.asarray(at))
    return np.linalg.norm(np.asarray(jacobians, np.float64), 2, axis=(1, 2)).max()


@pytest.mark.parametrize("name", LINEAR)
def test_linear_maps_by_complex_numbers(name):
    fn, shape, most = LINEAR[name]
    exact = truth(fn, shape)
    found = float(lipschitz.bound(fn, jax.ShapeDtypeStruct(shape, jnp.float32)).value)
    assert exact * (1 - 1e-7) <= found <= most * exact


@pytest.mark.parametrize("name", CURVED)
def test_functions_around_complex_numbers(name):
    fn, shape = CURVED[name]
    found = float(lipschitz.bound(fn, jax.ShapeDtypeStruct(shape, jnp.float32)).value)
    assert truth(fn, shape) * (1 - 1e-7) <= found < np.inf


def test_constants_under_jit_and_in_float64():
    scale = lambda c, x: float(lipschitz.bound(lambda x: (jnp.fft.fft(x) * c).real, x).value)
    np.testing.assert_allclose(scale(VECTOR, jnp.ones(5)), 5**0.5 * np.abs(VECTOR).max(), rtol=1e-5)
    traced = jax.jit(lambda c: lipschitz.bound(lambda x: (jnp.fft.fft(x) * c).real, jnp.ones(5)).value)
    np.testing.assert_allclose(traced(VECTOR), scale(VECTOR, jnp.ones(5)), rtol=1e-6)
    with jax.enable_x64(True):
        wide = VECTOR.astype(np.complex128) * 1e-200
        assert scale(wide, jnp.ones(5)) >= 5**0.5 * np.abs(wide).max()
    assert np.isnan(scale(np.where(np.arange(5) == 2, np.nan, VECTOR), jnp.ones(5)))
    assert scale(np.full(5, 3e38 + 3e38j, np.complex64), jnp.ones(5)) == np.inf


def test_sizes_of_complex_numbers_have_a_kink():
    with pytest.raises(lipschitz.UnboundedError, match="'abs'"):
        lipschitz.curvature(lambda x: jnp.abs(jnp.fft.fft(x)).sum(), jnp.ones(5))
    assert lipschitz.curvature(lambda x: jnp.tanh(jnp.fft.fft(x).real), jnp.ones(5)).value < np.inf


def converted(z, kind):
    """As ``astype``, which will warn."""
    return lax.convert_element_type_p.bind(z, new_dtype=np.dtype(kind), weak_type=False, sharding=None)


def where_finite(z):
    """3x where all of z is numbers, x elsewhere."""
    return lambda x: jnp.where(jnp.isfinite(z(x + 0j).real[:5]), x, 3 * x)


INFINITE = np.array([1, 2, np.inf, 1, 1], np.complex64)
REFUSED = {
    "whole numbers": lambda x: converted(x + 0j, np.int32) * 1.0,
    "bytes": lambda x: converted(jnp.fft.fft(x), np.uint8) * 1.0,
    "truth values": lambda x: converted(x + 0j, bool) * 1.0,
    "where infinite constants are met": where_finite(lambda z: z * INFINITE),
    "where one infinite constant is met": where_finite(lambda z: z * np.complex64(np.inf)),
    "where infinity is added": where_finite(lambda z: z + INFINITE),
    "where NaN is added": where_finite(lambda z: z + np.complex64(np.nan)),
    "where a matrix is infinite": where_finite(lambda z: z @ np.diag(INFINITE)),
    "where the padding is infinite": where_finite(lambda z: jnp.pad(z, (1, 0), constant_values=np.inf)),
    "where infinite entries stand beside": where_finite(lambda z: jnp.concatenate([INFINITE, z])),
    "where the filler is infinite": where_finite(
        lambda z: jnp.take(z, np.array([0, 9, 1, 2, 3]), mode="fill", fill_value=np.inf)
    ),
    "a product": lambda x: (jnp.fft.fft(x) * jnp.fft.fft(x)).real,
    "a square": lambda x: (jnp.fft.fft(x) ** 2).real,
    "a quotient": lambda x: (VECTOR / jnp.fft.fft(x)).real,
    "a function": lambda x: jnp.tanh(jnp.fft.fft(x)).real,
    "a product of matrices": lambda x: (jnp.fft.fft(x)[None] @ jnp.fft.fft(x)).real,
    "a choice": lambda x: jnp.where(x > 0, jnp.fft.fft(x), 0).real,
    "an angle": lambda x: jnp.angle(jnp.fft.fft(x)),
}


def test_masks_of_complex_constants_that_are_not_known_while_tracing():
    of = jax.jit(lambda c: lipschitz.bound(where_finite(lambda z: z * c), jnp.ones(5)).value)
    assert np.isnan(of(INFINITE))
    assert of(VECTOR) == 1
    assert np.isnan(jax.jit(lambda c: lipschitz.bound(where_finite(lambda z: z / c), jnp.ones(5)).value)(0 * VECTOR))


def test_a_complex_filler():
    fn = lambda x: jnp.take(jnp.fft.fft(x), np.array([0, 9]), mode="fill", fill_value=1j).real
    assert 5**0.5 * (1 - 1e-7) <= lipschitz.bound(fn, jnp.ones(5)).value < np.inf


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_linear_in_complex_numbers_is_refused(name):
    with pytest.raises(lipschitz.UnboundedError):
        lipschitz.bound(REFUSED[name], jnp.ones(5))
