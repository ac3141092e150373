"""Norms of plain matrices."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

from fantastic4 import dense

MATRIX = np.random.default_rng(0).standard_normal((12, 7)).astype(np.float32)


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (9, 1), (12, 7), (7, 12), (80, 90), (300, 5)])
def test_bound_and_exact(shape):
    matrix = np.random.default_rng(1).standard_normal(shape).astype(np.float32)
    truth = oracle.norm(matrix)
    assert truth <= float(dense.bound(matrix)) <= 1.001 * truth
    np.testing.assert_allclose(dense.exact_norm(matrix), truth, rtol=1e-6)


def test_step_converges_from_below():
    state = dense.init(MATRIX, key=jax.random.key(0), warmup=0)
    values = []
    for _ in range(60):
        value, state = dense.step(MATRIX, state)
        values.append(float(value))
    assert values[0] < 0.99 * oracle.norm(MATRIX)
    assert max(values) <= oracle.norm(MATRIX) * (1 + 1e-6)
    np.testing.assert_allclose(values[-1], oracle.norm(MATRIX), rtol=1e-3)
    several, _ = dense.step(MATRIX, dense.init(MATRIX, key=jax.random.key(0), warmup=0), iterations=60)
    np.testing.assert_allclose(several, values[-1], rtol=1e-5)


def test_a_zero_kernel_leaves_the_state_as_it_was():
    state = dense.init(MATRIX, key=jax.random.key(0))
    value, after = dense.step(0 * MATRIX, state)
    assert value == 0
    np.testing.assert_array_equal(after.vector, state.vector)


def test_gradients():
    left, values, right = np.linalg.svd(MATRIX.astype(np.float64))
    expected = np.outer(left[:, 0], right[0])
    state = dense.init(MATRIX, key=jax.random.key(0), warmup=100)
    for function in (dense.bound, dense.exact_norm, lambda m: dense.step(m, state)[0]):
        chex.assert_trees_all_close(jax.grad(function)(MATRIX), expected.astype(np.float32), atol=2e-3)
        _, forward = jax.jvp(function, (jnp.asarray(MATRIX),), (jnp.ones_like(MATRIX),))
        np.testing.assert_allclose(forward, expected.sum(), atol=2e-2)


def test_zero_empty_and_nan():
    zero = jnp.zeros((3, 4))
    for function in (dense.bound, dense.exact_norm, lambda m: dense.step(m, dense.init(m, key=jax.random.key(0)))[0]):
        value, gradient = jax.value_and_grad(function)(zero)
        assert float(value) == 0
        assert np.isfinite(gradient).all()
        assert np.isnan(function(zero.at[0, 0].set(jnp.nan)))
        assert np.isnan(function(zero.at[0, 0].set(jnp.inf)))
    assert float(dense.bound(jnp.zeros((0, 4)))) == float(dense.exact_norm(jnp.zeros((4, 0)))) == 0


def test_vmap():
    matrices = np.random.default_rng(2).standard_normal((5, 6, 4)).astype(np.float32)
    matrices[2] = 0
    truth = [oracle.norm(m) for m in matrices]
    ours = np.asarray(jax.vmap(dense.bound)(matrices))
    assert (ours >= truth).all()
    np.testing.assert_allclose(ours, truth, rtol=1e-3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: dense.bound(jnp.ones((3, 3, 2, 2))), r"\(n_in, n_out\), got \(3, 3, 2, 2\): for a convolution use"),
        (lambda: dense.exact_norm(jnp.ones((3, 3), jnp.int32)), "real floating dtype, got int32"),
        (lambda: dense.step(MATRIX, dense.PowerState(jnp.ones(3))), r"needs \(7,\): make one with dense.init"),
        (
            lambda: dense.step(MATRIX, dense.PowerState(jnp.ones(7)), iterations=0),
            "iterations must be at least 1, got 0",
        ),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_infinity_does_not_hang_the_decomposition():
    matrix = jnp.asarray(MATRIX).at[0, 0].set(jnp.inf)
    value, gradient = jax.value_and_grad(dense.exact_norm)(matrix)
    assert np.isnan(value)
    assert gradient.shape == matrix.shape


def test_the_gap_where_rounding_adds_most():
    """All singular values equal: what the docstring says of it."""
    for n, gap in ((100, 1.0004), (300, 1.001)):
        bound = float(dense.bound(jnp.eye(n)))
        assert 1 <= bound <= gap
