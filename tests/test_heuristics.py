"""The compared systems: each number on its own side of the truth, and clipping's promise kept."""

import cases
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

import fantastic4 as f4
from fantastic4 import dense, heuristics

KEY = jax.random.key(0)
SOME = ["same", "pairs", "circular-small", "reflect", "edge", "stride-odd", "stride-circular-wrapping",
        "dilation-stride-coprime", "groups-stride", "transposed-stride", "transpose-kernel", "1d-causal-stride",
        "3d-circular"]  # fmt: skip


def truth_of(name):
    _, size, spec = cases.LAYERS[name]
    kernel = cases.kernel(name)
    return kernel, size, f4.ConvSpec(**spec), oracle.dense(kernel, size, **spec)


@pytest.mark.parametrize("name", SOME)
def test_ryu_comes_from_below_to_that_very_operator(name):
    kernel, size, spec, matrix = truth_of(name)
    truth = oracle.norm(matrix)
    few = float(f4.estimate_ryu(kernel, size, spec, key=KEY, iterations=1))
    many = float(f4.estimate_ryu(kernel, size, spec, key=KEY, iterations=300))
    assert few <= many * (1 + 1e-6)
    assert 0.97 * truth <= many <= truth * (1 + 1e-6)


def test_ryu_warm_starts_and_its_gradient_is_the_top_pair():
    kernel, size, spec, matrix = truth_of("stride")
    state = heuristics.ryu_init(kernel, size, spec, key=KEY, warmup=200)
    value, state = heuristics.ryu_step(kernel, state, spec)
    np.testing.assert_allclose(value, oracle.norm(matrix), rtol=1e-5)
    gradient = jax.grad(lambda k: heuristics.ryu_step(k, state, spec)[0])(jnp.asarray(kernel))
    np.testing.assert_allclose(float(jnp.vdot(gradient, kernel)), value, rtol=1e-5)
    exact = jax.grad(lambda k: jnp.linalg.norm(f4.jacobian.materialise(k, size, spec), 2))(jnp.asarray(kernel))
    np.testing.assert_allclose(gradient, exact, atol=2e-3 * np.abs(exact).max())


@pytest.mark.parametrize("name", ["circular", "circular-small", "stride-circular", "dilation-circular", "groups-stride",
                                  "dilation-stride-shared", "transposed-circular", "3d-circular"])  # fmt: skip
def test_sedghi_and_clipping(name):
    kernel, size, spec, matrix = truth_of(name)
    truth = oracle.norm(matrix)
    batched = float(f4.estimate_sedghi(kernel, size, spec, key=KEY, iterations=200))
    assert 0.98 * truth <= batched <= truth * (1 + 1e-6)
    for maximum in (0.3, 0.6, 0.95):
        clipped = f4.clip_singular_values(kernel, size, maximum * truth, spec)
        norm = oracle.norm(oracle.dense(clipped, size, **cases.LAYERS[name][2]))
        assert clipped.shape == kernel.shape
        assert 0.7 * maximum * truth <= norm <= maximum * truth  # kept, and not by shrinking everything
    np.testing.assert_array_equal(f4.clip_singular_values(kernel, size, 2 * truth, spec), kernel)


@pytest.mark.parametrize("name", ["circular", "circular-even", "circular-small", "stride-circular",
                                  "stride-over-kernel-circular", "groups-stride", "1d-circular",
                                  "3d-circular"])  # fmt: skip
def test_clipping_without_cropping_is_the_nearest_layer(name):
    """Entry by entry what NumPy makes of the whole matrix: U min(S, c) Vᵀ."""
    kernel, size, spec, matrix = truth_of(name)
    u, s, v = np.linalg.svd(matrix, full_matrices=False)
    wanted = (u * np.minimum(s, 0.5 * s[0])) @ v
    clipped = f4.clip_singular_values(kernel, size, 0.5 * s[0], spec, crop=False)
    ours = oracle.dense(clipped, size, **cases.LAYERS[name][2])
    np.testing.assert_allclose(ours, wanted, atol=2e-6 * s[0])


def test_cropping_alone_would_break_the_promise():
    """The reason for the last division: crop what NumPy clips, and the norm is above the threshold."""
    kernel, size, spec, matrix = truth_of("circular")
    s = np.linalg.svd(matrix, compute_uv=False)
    whole = f4.clip_singular_values(kernel, size, 0.5 * s[0], spec, crop=False)
    shift = [(n - 1) // 2 - (k - 1) // 2 for n, k in zip(size, kernel.shape, strict=False)]
    cropped = np.roll(whole, [-x for x in shift], (0, 1))[: kernel.shape[0], : kernel.shape[1]]
    assert oracle.norm(oracle.dense(cropped, size, padding="CIRCULAR")) > 1.02 * 0.5 * s[0]


def cancelling():
    """Taps whose sum is as small as a float may be."""
    kernel = np.full((99, 1, 1), -np.finfo(np.float32).tiny, np.float32)
    kernel[0] *= -100
    return kernel, (1,), 2 * float(np.finfo(np.float32).tiny)


NORMAL = np.random.default_rng(0).standard_normal((5, 5, 8, 8)).astype(np.float32)


@pytest.mark.parametrize(
    ("kernel", "size", "maximum"),
    [
        cancelling(),
        *((NORMAL, (6, 6), 10**exponent) for exponent in (-35.5, -35.0, -33.0, -30.0)),
        (np.zeros((3, 1, 1), np.float32), (4,), 1e-40),
        (np.full((3, 1, 1), 1e-41, np.float32), (4,), 1e-40),
    ],
)
def test_clipping_to_the_smallest_of_floats(kernel, size, maximum):
    """Entries that fall below the smallest normal number vanish, and then the others add up to more."""
    clipped = np.asarray(f4.clip_singular_values(kernel, size, maximum), np.float64)
    truth = oracle.circular_values(clipped / maximum, size)[0]
    assert truth <= 1
    assert truth > 0.9 or maximum < 1e-33


def test_one_shape_with_and_without_x64():
    values = []
    for wide in (False, True, False):
        with jax.enable_x64(wide):
            values.append(np.asarray(f4.singular_values(NORMAL, (6, 6))))
            f4.clip_singular_values(NORMAL, (6, 6), 1.0)
    np.testing.assert_array_equal(values[0], values[2])
    np.testing.assert_allclose(values[0], values[1], rtol=1e-5)


def test_clipping_inside_a_jitted_step_with_a_traced_threshold():
    kernel = jnp.asarray(cases.kernel("circular"))
    clip = jax.jit(lambda k, c: f4.clip_singular_values(k, (4, 5), c))
    assert float(f4.exact_norm(clip(kernel, 1.5), (4, 5))) <= 1.5
    assert np.isnan(clip(kernel.at[0, 0, 0, 0].set(jnp.nan), 1.0)).any()
    np.testing.assert_array_equal(clip(0 * kernel, 1.0), 0 * kernel)


def test_singular_vectors_are_those_of_the_layer():
    """The waves of the docstring, through what Flax computes."""
    size = (5, 6)
    kernel = cases.draw(np.random.default_rng(0), (3, 2, 3, 4), "normal")
    found = f4.singular_vectors(kernel, size)
    values = np.asarray(found.values)
    np.testing.assert_allclose(values.max(), f4.exact_norm(kernel, size), rtol=1e-5)
    matrix = oracle.dense(kernel, size, padding="CIRCULAR")
    places = np.indices(size).reshape(2, -1).T
    for index in (0, 4, 9):
        wave = np.exp(2j * np.pi * places @ (np.asarray(found.frequencies[index]) / np.array(size)))
        for r in range(3):
            x = (wave[:, None] * np.asarray(found.left)[index, 0, :, r].conj()).ravel()
            y = (wave[:, None] * np.asarray(found.right)[index, 0, :, r].conj()).ravel()
            image = matrix @ x
            np.testing.assert_allclose(np.linalg.norm(image), values[index, 0, r] * np.linalg.norm(x), rtol=1e-4)
            overlap = abs(np.vdot(y, image)) / np.linalg.norm(y) / np.linalg.norm(image)
            np.testing.assert_allclose(overlap, 1, rtol=1e-4)


def test_miyato_is_a_lower_bound_and_flax_divides_by_it():
    kernel = jnp.asarray(cases.draw(np.random.default_rng(0), (3, 3, 4, 6), "ones"))
    four = f4.four_bounds(kernel)
    np.testing.assert_allclose(3 * f4.estimate_miyato(kernel), four.t, rtol=1e-3)
    state = heuristics.miyato_init(kernel, key=KEY)
    normalised, state = heuristics.miyato_normalise(kernel, state)
    assert isinstance(state, dense.PowerState)
    np.testing.assert_allclose(f4.estimate_miyato(normalised), 1, rtol=1e-4)
    assert float(f4.norm_interval(normalised).lower) > 2.9  # what the heuristic promises to be 1
    penalty, _ = heuristics.yoshida_penalty(kernel, state)
    np.testing.assert_allclose(penalty, 0.5 * f4.estimate_miyato(kernel) ** 2, rtol=1e-4)
    zero, _ = heuristics.miyato_normalise(0 * kernel, state)
    np.testing.assert_array_equal(zero, 0 * kernel)


def test_gouk_projects_and_leaves_small_kernels_alone():
    kernel, size, spec, matrix = truth_of("stride")
    truth = oracle.norm(matrix)
    state = heuristics.ryu_init(kernel, size, spec, key=KEY, warmup=200)
    projected, _ = heuristics.gouk_project(kernel, 0.5 * truth, state, spec)
    np.testing.assert_allclose(oracle.norm(oracle.dense(projected, size, strides=2)), 0.5 * truth, rtol=1e-4)
    same, _ = heuristics.gouk_project(kernel, 2 * truth, state, spec)
    np.testing.assert_array_equal(same, kernel)


@pytest.mark.parametrize("shape", [(2, 4, 3, 2), (4, 3, 3)])
def test_tnn_lies_between_the_norm_and_the_four(shape):
    kernel = cases.draw(np.random.default_rng(0), shape, "normal")
    value, gradient = jax.jit(jax.value_and_grad(lambda k: f4.estimate_tnn(k, key=KEY)))(jnp.asarray(kernel))
    value = float(value)
    assert f4.norm_interval(kernel).lower <= value <= float(f4.four_bounds(kernel).min())
    np.testing.assert_allclose(np.vdot(gradient, kernel), value, rtol=1e-3)


def test_tnn_scales_with_the_kernel():
    kernel = cases.draw(np.random.default_rng(0), (3, 3, 3, 4), "normal")
    tnn = jax.jit(lambda k: f4.estimate_tnn(k, key=KEY, iterations=5))
    value = float(tnn(jnp.asarray(kernel)))
    for scale in (1e-30, 1e-20, 1e20, 1e30):
        assert float(tnn(jnp.asarray(kernel * np.float32(scale)))) == pytest.approx(value * scale, rel=1e-4)
    assert tnn(jnp.zeros((3, 3, 3, 4))) == 0


def test_tnn_of_padding_by_copies_counts_them():
    kernel = cases.draw(np.random.default_rng(0), (3, 3, 3, 4), "normal")
    plain, mirrored = (f4.estimate_tnn(kernel, f4.ConvSpec(padding=p), key=KEY) for p in ("SAME", "REFLECT"))
    assert float(mirrored) == pytest.approx(2 * float(plain), rel=1e-5)  # √2 an axis


def test_what_is_normalised_or_projected_keeps_its_dtype():
    """So it may be carried through a loop."""
    kernel = jnp.ones((3, 3, 2, 2), jnp.bfloat16)
    start = heuristics.miyato_init(kernel, key=KEY, warmup=0), heuristics.ryu_init(kernel, (4, 4), key=KEY, warmup=0)

    def both(carry, _):
        kernel, (miyato, ryu) = carry
        kernel, miyato = heuristics.miyato_normalise(kernel, miyato)
        kernel, ryu = heuristics.gouk_project(kernel, np.float64(1), ryu)
        return (kernel, (miyato, ryu)), None

    for dtype in (jnp.bfloat16, jnp.float32):
        first = jax.tree.map(lambda x: x.astype(jnp.float32), start)
        assert jax.eval_shape(lambda k, s: jax.lax.scan(both, (k, s), length=2), kernel.astype(dtype), first)


def test_taps_that_fold_share_the_change():
    """5×4 taps on 3×2 inputs: nothing is cropped, so the clipped kernel is the nearest layer itself, hardly shrunk."""
    kernel, size, spec, matrix = truth_of("circular-small")
    u, s, v = np.linalg.svd(matrix, full_matrices=False)
    wanted = (u * np.minimum(s, 0.5 * s[0])) @ v
    clipped = f4.clip_singular_values(kernel, size, 0.5 * s[0], spec)
    ours = oracle.dense(clipped, size, padding="CIRCULAR")
    np.testing.assert_allclose(ours, wanted, atol=2e-4 * s[0])
