"""The circular spectrum beyond the table: large grids, chunks, derivatives."""

import contextlib

import chex
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

import fantastic4 as f4
from fantastic4 import spectrum, symbol, threads
from fantastic4.linalg import map_rows

KERNEL = np.random.default_rng(0).standard_normal((3, 2, 3, 4)).astype(np.float32)


@pytest.mark.parametrize("size", [(1, 1), (1, 6), (7, 4), (6, 9)])
def test_all_values_against_numpy(size):
    truth = oracle.circular_values(KERNEL, size)
    ours = np.asarray(f4.singular_values(KERNEL, size))
    np.testing.assert_allclose(ours, truth, atol=3e-6 * truth[0])
    np.testing.assert_allclose(f4.exact_norm(KERNEL, size), truth[0], rtol=3e-6)


def test_a_kernel_larger_than_the_input_folds_and_is_not_cropped():
    kernel = np.random.default_rng(1).standard_normal((5, 5, 1, 1)).astype(np.float32)
    truth = oracle.circular_values(kernel, (3, 3))
    cropped = oracle.circular_values(kernel[:3, :3], (3, 3))
    np.testing.assert_allclose(f4.singular_values(kernel, (3, 3)), truth, atol=1e-5)
    assert abs(truth[0] - cropped[0]) > 0.1


def test_half_the_spectrum_is_computed():
    for sizes in ((8, 8), (7, 5), (6, 5, 4)):
        grid = symbol.grid(sizes, (1,) * len(sizes))
        assert len(grid.points) == (np.prod(sizes) + np.prod([2 - n % 2 for n in sizes])) / 2
        assert len(grid.of) == np.prod(sizes)


def test_chunks_do_not_change_the_values(monkeypatch):
    whole = np.asarray(f4.singular_values(KERNEL, (6, 5)))
    monkeypatch.setattr(spectrum, "CHUNK_BYTES", 7 * 3 * 4 * 8)  # seven of eighteen frequencies at a time
    jax.clear_caches()
    np.testing.assert_allclose(f4.singular_values(KERNEL, (6, 5)), whole, rtol=1e-5)
    jax.clear_caches()


@pytest.mark.parametrize("groups", [1, 2])
def test_gradients(groups):
    spec = f4.ConvSpec(padding="CIRCULAR", strides=2, groups=groups)
    kernel = jnp.asarray(KERNEL)
    direction = jax.random.normal(jax.random.key(0), kernel.shape)

    def matrix_norm(k):
        return oracle.norm(oracle.dense(k, (4, 6), strides=2, groups=groups, padding="CIRCULAR"))

    expected = (matrix_norm(kernel + 1e-3 * direction) - matrix_norm(kernel - 1e-3 * direction)) / 2e-3
    for function in (
        lambda k: f4.exact_norm(k, (4, 6), spec),
        lambda k: f4.singular_values(k, (4, 6), spec)[0],
    ):
        np.testing.assert_allclose(jnp.vdot(jax.grad(function)(kernel), direction), expected, rtol=2e-3, atol=2e-3)
        np.testing.assert_allclose(jax.jvp(function, (kernel,), (direction,))[1], expected, rtol=2e-3, atol=2e-3)


def test_the_sum_of_squares_is_that_of_the_layer():
    """Σ σ² = ‖J‖_F² = N Σ K²: every value counted as often as it occurs. And so is its gradient."""
    energy = lambda k: jnp.sum(f4.singular_values(k, (6, 7)) ** 2)
    value, gradient = jax.value_and_grad(energy)(jnp.asarray(KERNEL))
    np.testing.assert_allclose(value, 42 * np.sum(KERNEL**2), rtol=1e-5)
    np.testing.assert_allclose(gradient, 84 * KERNEL, rtol=1e-3, atol=1e-3)


def test_vmap():
    kernels = jnp.stack([KERNEL, 2 * KERNEL, 0 * KERNEL])
    each = jnp.stack([f4.singular_values(k, (4, 4)) for k in kernels])
    chex.assert_trees_all_close(jax.vmap(lambda k: f4.singular_values(k, (4, 4)))(kernels), each, rtol=1e-5, atol=1e-5)
    chex.assert_trees_all_close(jax.vmap(lambda k: f4.exact_norm(k, (4, 4)))(kernels), each[:, 0], rtol=1e-5)


@pytest.mark.parametrize("shape", [(3, 3, 2, 2), (3, 3, 1, 4)])
def test_zero_half_and_nan(shape):
    zero = jnp.zeros(shape)
    for function in (lambda k: f4.exact_norm(k, (4, 4)), lambda k: f4.singular_values(k, (4, 4)).sum()):
        value, gradient = jax.value_and_grad(function)(zero)
        assert float(value) == 0
        assert np.isfinite(gradient).all()
        assert np.isnan(function(zero.at[0, 0, 0, 0].set(jnp.nan)))
    kernel = jax.random.normal(jax.random.key(0), shape, jnp.bfloat16)
    chex.assert_trees_all_equal(f4.exact_norm(kernel, (4, 4)), f4.exact_norm(kernel.astype(jnp.float32), (4, 4)))


def test_float64(x64):
    truth = oracle.circular_values(KERNEL, (5, 6))
    np.testing.assert_allclose(f4.singular_values(KERNEL.astype(np.float64), (5, 6)), truth, atol=1e-13 * truth[0])


@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_poison_in_one_group_reaches_the_norm(poison):
    kernel = np.ones((3, 3, 2, 8), np.float32)
    kernel[1, 1, 0, 0] = poison
    spec = f4.ConvSpec(groups=4, padding="CIRCULAR")
    assert np.isnan(f4.singular_values(kernel, (4, 4), spec)).all()
    assert np.isnan(f4.exact_norm(kernel, (4, 4), spec))
    jax.block_until_ready(jax.grad(lambda k: f4.singular_values(k, (4, 4), spec)[0])(kernel))  # returns


def test_no_overflow_on_the_way():
    kernel = np.full((3, 4, 4), 2e37, np.float32)
    truth = oracle.circular_values(kernel, (4,))[0]
    np.testing.assert_allclose(f4.exact_norm(kernel, (4,)), truth, rtol=1e-5)
    np.testing.assert_allclose(f4.singular_values(kernel, (4,))[0], truth, rtol=1e-5)


@pytest.mark.parametrize("shape", [(3, 3, 24, 30), (3, 2, 40, 25), (5, 24, 24)])
@pytest.mark.parametrize("seed", range(4))
def test_excluding_frequencies_finds_the_largest(shape, seed):
    """From 24 channels on, nearly all frequencies are excluded unseen: never the one that is largest."""
    assert min(shape[-2:]) >= spectrum._EXCLUDE_FROM
    kernel = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
    if seed == 3:
        kernel[...] = kernel[(0,) * (len(shape) - 2)]  # all energy at frequency 0
    size = (6, 7)[: len(shape) - 2]
    truth = oracle.circular_values(kernel, size)[0]
    np.testing.assert_allclose(f4.exact_norm(kernel, size), truth, rtol=3e-6)
    value, gradient = jax.value_and_grad(f4.exact_norm)(jnp.asarray(kernel), size)
    np.testing.assert_allclose(float(jnp.vdot(gradient, kernel)), value, rtol=1e-5)


def test_excluding_frequencies_among_groups_and_ties():
    rng = np.random.default_rng(0)
    kernel = rng.standard_normal((3, 3, 24, 48)).astype(np.float32)
    kernel[..., 24:] *= 1.01
    truth = max(oracle.circular_values(kernel[..., 24 * g : 24 * g + 24], (5, 6))[0] for g in range(2))
    spec = f4.ConvSpec(padding="CIRCULAR", groups=2)
    np.testing.assert_allclose(f4.exact_norm(kernel, (5, 6), spec), truth, rtol=3e-6)
    rotation = np.zeros((3, 3, 24, 24), np.float32)
    rotation[1, 1] = np.linalg.qr(rng.standard_normal((24, 24)))[0]  # every singular value of every frequency is 1
    np.testing.assert_allclose(f4.exact_norm(rotation, (4, 4)), 1, rtol=3e-6)
    assert float(f4.exact_norm(0 * rotation, (4, 4))) == 0
    assert np.isnan(f4.exact_norm(rotation * np.float32(np.nan), (4, 4)))


def test_exact_norm_does_not_take_lanczos_at_its_word():
    """So many values close to the top that 48 steps end 1e-4 below it: then the singular values decide."""
    values = 1 - (np.arange(512) / 520) ** 2
    taps = np.stack([np.diag(values), np.diag(values) / 2]).astype(np.float32)
    np.testing.assert_allclose(f4.exact_norm(taps, (8,)), 1.5, rtol=2e-6)


def test_most_frequencies_are_excluded():
    """What it is for: of a trained kernel's frequencies few are within a percent of the top. One decomposition then."""
    decay = np.exp(-np.arange(32) / 2)
    kernel = np.random.default_rng(0).standard_normal((3, 3, 32, 32)) * decay + 3 * np.eye(32)
    grid = symbol.grid((8, 8), (1, 1))
    calls = []
    real = spectrum._values
    try:
        spectrum._values = lambda s: jax.debug.callback(lambda _: calls.append(1), s.real) or real(s)
        found = jax.jit(lambda k: spectrum._by_exclusion(k, spectrum.gram(k), grid).value)(
            jnp.asarray(kernel, jnp.float32)[None]
        )
        jax.block_until_ready(found)
        jax.effects_barrier()
    finally:
        spectrum._values = real
    np.testing.assert_allclose(found, oracle.circular_values(np.asarray(kernel, np.float32), (8, 8))[0], rtol=3e-6)
    assert len(calls) <= 4 < len(grid.points)


@pytest.mark.parametrize("size", [1, 3, 5, 7, 9])
def test_rows_in_chunks_are_the_rows(size):
    x = np.arange(14.0, dtype=np.float32).reshape(7, 2)
    traced = []

    def function(row):
        traced.append(row)
        return row[0] * row[1], row

    products, rows = map_rows(function, x, size)
    np.testing.assert_array_equal(products, x[:, 0] * x[:, 1])
    np.testing.assert_array_equal(rows, x)
    assert len(traced) == 1


def test_no_batch_of_lapack_runs_beside_another():
    """Two wait for one another for ever, once in some dozen calls: 28 x 28 frequencies are no multiple of a chunk."""
    kernel = jnp.ones((3, 3, 128, 128))
    spectrum = str(jax.make_jaxpr(lambda k: f4.singular_values(k, (28, 28)))(kernel))
    assert spectrum.count("= svd[") == 1
    norms = [str(jax.make_jaxpr(lambda k, n=n: f4.exact_norm(k, (n, n)))(kernel)) for n in (8, 28)]
    once = norms[0].count("= cholesky")  # 8 x 8 fit into one chunk
    assert once > 0
    assert norms[1].count("= cholesky") == once


@pytest.mark.parametrize("function", ["singular_values", "exact_norm", "singular_vectors", "clip_singular_values"])
def test_numbers_are_decomposed_by_one_thread_each(function, monkeypatch):
    """And what is traced, or has large matrices, as the user has set it."""
    entered = []

    @contextlib.contextmanager
    def counted():
        entered.append(True)
        yield

    monkeypatch.setattr(threads, "one_each", counted)
    call = getattr(f4, function)
    options = {"maximum": 1.0} if function == "clip_singular_values" else {}
    kernel = jax.random.normal(jax.random.key(0), (2, 2, 3))
    result = jax.tree.leaves(call(kernel, (4,), **options))
    assert entered == [True]
    inside = jax.tree.leaves(jax.jit(lambda k: call(k, (4,), **options))(kernel))
    constant = jax.tree.leaves(jax.jit(lambda x: jax.tree.map(lambda y: y + x, call(kernel, (4,), **options)))(0.0))
    for one, other, third in zip(result, inside, constant, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(one, third, rtol=1e-5, atol=1e-6)
    monkeypatch.setattr(threads, "SMALL", 1)
    entered.clear()
    call(kernel, (4,), **options)
    assert not entered
