"""Float32 bounds against float64 truth, where rounding could put them below it."""

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

import fantastic4 as f4
from fantastic4 import dense, rounding

SIZES = [(5, 5), (33, 70), (96, 96)]  # few, so that few programs are compiled


def orthogonal(rng, n):
    return np.linalg.qr(rng.standard_normal((n, n)))[0]


def hostile(rng, shape):
    """Matrices whose norm is delicate, by name."""
    rows, columns = shape
    small = min(shape)
    geometric = lambda base: (
        (orthogonal(rng, rows)[:, :small] * base ** np.arange(small)) @ orthogonal(rng, columns)[:small]
    )
    return {
        "gaussian": rng.standard_normal(shape),
        "positive": rng.random(shape),
        "rank one": np.outer(rng.standard_normal(rows), rng.standard_normal(columns)),
        "equal singular values": geometric(1.0),
        "two nearly equal": geometric(1.0) + 1e-6 * rng.standard_normal(shape),
        "ill-conditioned": geometric(0.3),
        "slowly falling": geometric(0.999),
        "ones": np.ones(shape),
        "just above one": 1 + 2.0**-23 * rng.integers(0, 4, shape),
        "sparse": rng.standard_normal(shape) * (rng.random(shape) < 0.05),
        "one entry": np.eye(1, rows * columns, int(rng.integers(rows * columns))).reshape(shape) * (1 + 2.0**-23),
        "wide range": rng.standard_normal(shape) * 10.0 ** rng.uniform(-20, 3, shape),
        "signs": rng.choice([-1.0, 1.0], shape),
    }


@pytest.mark.parametrize("shape", SIZES)
@pytest.mark.parametrize("scale", [1e-30, 1e-19, 1.0, 3.7e10, 1e30])
def test_dense_bound_is_never_below(shape, scale):
    for name, matrix in hostile(np.random.default_rng(0), shape).items():
        matrix = (matrix * scale).astype(np.float32)
        bound, truth = float(dense.bound(matrix)), oracle.norm(matrix)
        assert bound >= truth, name
        assert bound <= 1.001 * truth, name


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_step_and_spectrum_at_every_scale(scale):
    base = np.random.default_rng(0).standard_normal((3, 3, 3, 4)).astype(np.float32)
    kernel = base * np.float32(scale)
    four, _ = f4.step(kernel, f4.init(kernel, key=jax.random.key(0)), iterations=50)
    np.testing.assert_allclose(four.values / scale, f4.four_bounds(base).values, rtol=1e-2)
    gradient = jax.grad(lambda k: f4.four_bounds(k).min())(kernel)
    np.testing.assert_allclose(gradient, jax.grad(lambda k: f4.four_bounds(k).min())(base), rtol=1e-2, atol=1e-3)
    truth = oracle.circular_values(kernel, (4, 4))
    np.testing.assert_allclose(f4.singular_values(kernel, (4, 4)) / scale, truth / scale, atol=1e-5 * truth[0] / scale)


def test_subnormal_and_huge_entries():
    for matrix in (
        np.full((5, 5), 1e-40, np.float32),
        np.full((5, 5), 1e-45, np.float32),
        np.diag(np.float32([1e-40, 1, 1e-45, 0, 0])),
        np.full((5, 5), 3e37, np.float32),
        np.full((5, 5), np.finfo(np.float32).tiny),
    ):
        assert float(dense.bound(matrix)) >= oracle.norm(matrix) > 0
    assert float(dense.bound(np.full((5, 5), 3e38, np.float32))) == np.inf  # it does not fit: honest, not NaN


def test_many_entries_that_compilers_may_flush():
    """Each is nothing beside the largest; together they are the norm."""
    many = np.full((400, 400), 1.1e-38, np.float32)
    beside = many.copy()
    beside[0, 0] = 1.2e-38  # a float that no compiler flushes
    for matrix in (many, beside):
        assert float(dense.bound(matrix)) >= oracle.norm(matrix)
        assert float(dense.frobenius_bound(jnp.asarray(matrix))) >= np.linalg.norm(matrix.astype(np.float64))


def test_round_up_pays_for_its_operations():
    rng = np.random.default_rng(0)
    exact, computed = np.ones(1000), np.ones(1000, np.float32)
    for count in range(1, 40):
        factor = rng.uniform(0.5, 2, 1000).astype(np.float32)
        exact, computed = exact * factor, computed * factor
        raised = np.asarray(rounding.round_up(jnp.asarray(computed), count), np.float64)
        assert (raised >= exact).all()
        assert (raised <= exact * (1 + 4e-7 * (count + 2))).all()
    assert (computed < exact).any()  # without it some lie below: this test can fail


def test_power_of_two_is_exact():
    x = np.float32([1e-38, 2.0**-126, 0.3, 1.0, 1.9999999, 2.0, 3e38])
    p, inverse = map(np.asarray, rounding.power_of_two(jnp.asarray(x)))
    assert (p.astype(np.float64) * inverse == 1).all()
    assert np.array_equal(np.frexp(p)[0], np.full(7, 0.5, np.float32))
    assert (p[1:-1] <= x[1:-1]).all()
    assert (x[1:-1] < 2 * p[1:-1]).all()


def test_gamma_refuses_what_it_cannot_bound():
    assert rounding.gamma(10, np.float32) == pytest.approx(10 * 2.0**-24, rel=1e-5)
    with pytest.raises(ValueError, match="cannot be bounded in float32: use a wider type"):
        rounding.gamma(2**24, np.float32)


@pytest.mark.parametrize("broken", ["no slack", "power iteration", "half the squarings"])
def test_a_broken_bound_would_be_caught(broken):
    """The hunt above finds what it is for: three ways to get it wrong fall below the truth."""
    rng = np.random.default_rng(0)
    below = 0
    for matrix in hostile(rng, (33, 70)).values():
        matrix = matrix.astype(np.float32)
        if broken == "no slack":  # an SVD in float32, unraised
            value = float(np.linalg.norm(matrix, 2))
        elif broken == "power iteration":
            value = float(dense.step(matrix, dense.init(matrix, key=jax.random.key(0)))[0])
        else:  # the lower end of the Gram iteration in place of the upper
            gram = matrix.astype(np.float64) @ matrix.T
            value = float(np.sqrt(np.sum(gram**2) / np.trace(gram)))
        below += value < oracle.norm(matrix)
    assert below > 0


@pytest.mark.parametrize(("rows", "columns", "squarings"), [(400, 400, None), (4000, 200, 20)])
def test_the_bound_survives_the_worst_arithmetic_that_the_model_allows(rows, columns, squarings, monkeypatch):
    """Every sum of products off by all that γ allows, each in the direction that lowers the norm most.

    That is what the slack of a Gram matrix pays for; real rounding never comes near it.
    """
    matrix = np.random.default_rng(0).choice([-1.0, 1.0], (rows, columns)).astype(np.float32)
    truth, gram = oracle.norm(matrix), dense._gram
    top = np.sign(np.linalg.svd(matrix, full_matrices=False)[2][0])
    error = rounding.gamma(sum(dense._blocks(rows)), np.float32) * rows * np.outer(top, top)  # γ |A|ᵀ|A|

    def worst(a):
        return gram(a) if isinstance(a, jax.core.Tracer) else gram(a) - error.astype(np.float32)

    monkeypatch.setattr(dense, "_gram", worst)
    assert float(dense.certified_norm(jnp.asarray(matrix), squarings).bound) >= truth
    monkeypatch.setattr(dense, "_gram_slack", lambda length, dtype: np.zeros((), dtype))
    assert float(dense.certified_norm(jnp.asarray(matrix), squarings).bound) < truth  # without the slack it does not
