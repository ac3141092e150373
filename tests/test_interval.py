"""Intervals: both ends sound, at every size and at one, against dense Jacobians and fine spectra in float64."""

import importlib
import itertools
import math
import sys

import cases
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

import fantastic4 as f4
from fantastic4 import border, interval, linalg, symbol, threads
from fantastic4.supremum import Enclosure, _slack

LARGE = ["same", "crop", "reflect", "edge", "stride", "stride-circular-wrapping", "stride-three-reflect",
         "dilation-stride-shared", "groups", "transposed-stride", "1d-causal", "3d"]  # fmt: skip


def truth_of(name, kind):
    shape, size, spec = cases.LAYERS[name]
    kernel = cases.kernel(name, kind)
    return kernel, size, spec, oracle.norm(oracle.dense(kernel, size, **spec))


def check(found, truth):
    """The oracle's convolution is float32: it may be off by 3e-7 of the truth, and the interval may be narrower."""
    assert found.lower <= truth * (1 + 3e-7)
    assert found.upper >= truth * (1 - 3e-7)


@pytest.mark.parametrize("name", sorted(cases.LAYERS))
def test_small_layers_are_enclosed_to_rtol(name):
    for kind in ("normal", "one-tap"):
        kernel, size, spec, truth = truth_of(name, kind)
        found = f4.norm_interval(kernel, f4.ConvSpec(**spec), 1e-6, input_shape=size)
        check(found, truth)
        assert found.reached


@pytest.mark.parametrize("name", LARGE)
def test_large_layers_are_enclosed(name, monkeypatch):
    """The path of layers too large for a matrix."""
    monkeypatch.setattr(interval, "_DENSE_SIDE", 0)
    for kind in ("normal", "uneven", "alternating"):
        kernel, size, spec, truth = truth_of(name, kind)
        found = f4.norm_interval(kernel, f4.ConvSpec(**spec), 1e-2, input_shape=size)
        check(found, truth)
        assert found.lower > 0.6 * truth


@pytest.mark.parametrize("name", sorted(cases.LAYERS))
def test_every_size_is_enclosed(name):
    """No size has a norm above the upper end; above the lower end is the supremum of plain kernels."""
    shape, size, spec = cases.LAYERS[name]
    for kind in ("normal", "alternating"):
        kernel, _, _, truth = truth_of(name, kind)
        found = f4.norm_interval(kernel, f4.ConvSpec(**spec), 1e-2)
        assert found.upper >= truth * (1 - 3e-7)
        padding = spec.get("padding")
        loose = padding in ("REFLECT", "EDGE") or (padding == "CIRCULAR" and np.max(spec.get("strides", 1)) > 1)
        assert found.reached or loose
        assert found.lower <= found.upper


@pytest.mark.parametrize(
    "name", ["same", "same-even", "valid", "row", "1d", "3d", "circular-even", "larger-than-input"]
)
@pytest.mark.parametrize("kind", cases.KINDS)
def test_plain_layers_against_a_fine_grid(name, kind):
    kernel = cases.kernel(name, kind)
    taps = kernel.shape[:-2]
    fine = tuple(64 if k > 1 else 1 for k in taps) if len(taps) < 3 else tuple(12 * k for k in taps)
    below = float(oracle.circular_values(kernel, fine)[0])
    above = below / oracle.missed(taps, fine)
    found = f4.norm_interval(kernel, rtol=1e-4)
    assert found.upper >= below * (1 - 1e-13)
    assert found.lower <= above * (1 + 1e-13)
    assert found.upper <= found.lower * (1 + 1.0001e-4)


@pytest.mark.parametrize("name", sorted(cases.LAYERS))
def test_covers_contain_the_layer(name):
    for kind in ("normal", "ones", "alternating", "uneven"):
        kernel, size, spec, truth = truth_of(name, kind)
        for cover in border.covers(kernel.shape, f4.ConvSpec(**spec), size):
            circular = cover.spec
            fields = ("strides", "dilation", "groups", "padding", "transposed", "transpose_kernel")
            dense = oracle.dense(kernel, cover.input_shape, **{f: getattr(circular, f) for f in fields})
            assert cover.factor * oracle.norm(dense) >= truth * (1 - 3e-7), cover


def test_covers_in_one_dimension():
    """Every way in which borders, strides and dilation can meet, by hand."""
    rng = np.random.default_rng(0)
    paddings = ["SAME", "VALID", "CIRCULAR", "REFLECT", "EDGE", ((2, 0),), ((-1, 3),)]
    tried = 0
    for padding, stride, dilation, n in itertools.product(paddings, (1, 2, 3), (1, 2), (1, 3, 6, 7)):
        spec = {"padding": padding, "strides": stride, "dilation": dilation}
        kernel = cases.draw(rng, (3, 1, 1), ("normal", "ones", "alternating")[tried % 3])
        truth = oracle.norm(oracle.dense(kernel, (n,), **spec))
        for cover in border.covers(kernel.shape, f4.ConvSpec(**spec), (n,)):
            circle = {"padding": "CIRCULAR", "strides": cover.spec.strides, "dilation": dilation}
            dense = oracle.dense(kernel, cover.input_shape, **circle) if cover.factor else np.zeros((1, 1))
            assert cover.factor * oracle.norm(dense) >= truth * (1 - 3e-7), (spec, n, cover)
        tried += 1
    assert tried == 168


@pytest.mark.parametrize("strides", [2, 3])
def test_the_lower_end_of_a_strided_circle_is_reached_by_some_size(strides):
    """Taps whose strided circles are smaller than the circle without the stride says."""
    kernel = np.float32([1, -0.5, 1, 0.7]).reshape(4, 1, 1)
    sizes = [oracle.norm(oracle.line(kernel, n, padding="CIRCULAR", strides=strides)) for n in range(6, 62)]
    found = f4.norm_interval(kernel, f4.ConvSpec(strides=strides, padding="CIRCULAR"))
    assert found.lower <= max(sizes) * (1 + 3e-7)
    assert found.upper >= max(sizes) * (1 - 3e-7)


@pytest.mark.parametrize(("taps", "pads", "stride"), [(5, (4, 0), 1), (5, (0, 4), 1), (4, (3, 1), 2), (5, (4, 1), 3)])
def test_what_hangs_over_one_end_of_a_transposed_convolution(taps, pads, stride):
    """It must not wrap into the window that is kept."""
    spec = {"padding": (pads,), "strides": stride, "transposed": True}
    for n, kind in itertools.product((1, 2, 3, 5), ("ones", "alternating", "normal")):
        kernel = cases.draw(np.random.default_rng(n), (taps, 1, 1), kind)
        truth = oracle.norm(oracle.dense(kernel, (n,), **spec))
        for cover in border.covers(kernel.shape, f4.ConvSpec(**spec), (n,)):
            fields = ("strides", "padding", "transposed", "transpose_kernel")
            dense = oracle.dense(kernel, cover.input_shape, **{f: getattr(cover.spec, f) for f in fields})
            assert cover.factor * oracle.norm(dense) >= truth * (1 - 3e-7), (n, kind, cover)


def test_zero_padding_uses_the_input_size():
    """SAME at 8×8 is bounded by the circle of 9, below the norm on large inputs."""
    kernel = cases.draw(np.random.default_rng(3), (3, 3, 16, 16), "normal")
    (cover,) = border.covers(kernel.shape, f4.ConvSpec(), (8, 8))
    assert cover.input_shape == (9, 9)
    own, every = f4.norm_interval(kernel, input_shape=(8, 8)), f4.norm_interval(kernel)
    assert own.upper < every.lower


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e12, 1e30])
def test_scale_is_exact(scale):
    kernel = cases.kernel("same")
    power = 2.0 ** round(math.log2(scale))
    plain, scaled = f4.norm_interval(kernel), f4.norm_interval(kernel * np.float32(power))
    assert (scaled.lower, scaled.upper) == (plain.lower * power, plain.upper * power)


def test_flat_spectra_cost_nothing():
    """A single tap, and an orthogonal layer, have the same norm at every frequency."""
    tap = cases.kernel("same", "one-tap")
    orthogonal = np.zeros((2, 1, 2, 2))  # x ↦ (shifted first channel, second channel), then rotated
    c, s = math.cos(0.3), math.sin(0.3)
    rotation = np.array([[c, s], [-s, c]])
    orthogonal[0, 0], orthogonal[1, 0] = rotation * [[1], [0]], rotation * [[0], [1]]
    for kernel in (tap, orthogonal):
        values = np.ldexp(np.asarray(kernel, float), -1)
        with jax.enable_x64(True):
            enclosure = Enclosure(jnp.asarray(values)[None])
            found = enclosure.everywhere(1e-9, 10_000)
        assert found.tests <= 100
        assert found.upper <= found.lower * (1 + 1e-9)


def test_rtol_that_float64_cannot_certify():
    with pytest.raises(ValueError, match=r"rtol 1e-14 is below what float64 can certify for this kernel: the least is"):
        f4.norm_interval(cases.kernel("same"), rtol=1e-14)


def test_out_of_tests_the_ends_still_hold():
    kernel = cases.draw(np.random.default_rng(0), (5, 5, 4, 4), "normal")
    full, short = f4.norm_interval(kernel, rtol=1e-4), f4.norm_interval(kernel, rtol=1e-4, max_tests=1)
    assert full.reached
    assert not short.reached
    assert short.lower <= full.upper
    assert short.upper >= full.lower
    assert short.upper < 2 * full.upper


def test_values_that_are_no_numbers():
    kernel = cases.kernel("same").copy()
    for bad in (np.nan, np.inf):
        kernel[0, 0, 0, 0] = bad
        assert all(math.isnan(x) for x in f4.norm_interval(kernel)[:2])
    assert f4.norm_interval(np.zeros((3, 3, 2, 2), np.float32)) == (0.0, 0.0, True)
    assert f4.norm_interval(cases.kernel("same"), f4.ConvSpec(padding="VALID"), input_shape=(2, 2)) == (0.0, 0.0, True)


def test_half_precision_is_taken_as_it_is_held():
    kernel = jnp.asarray(cases.kernel("same"), jnp.bfloat16)
    assert f4.norm_interval(kernel) == f4.norm_interval(kernel.astype(jnp.float32))


@pytest.mark.parametrize("taps", [(3, 3), (2, 5), (3,), (2, 2, 3)])
def test_the_slack_of_a_gram_matrix_covers_what_float32_loses(taps):
    """The same algorithm in float32, whose slack is 2²⁹ times as large, against float64."""
    rng = np.random.default_rng(0)
    worst = 0.0
    for c_in, c_out in ((4, 7), (9, 3), (16, 16)):
        kernels = rng.standard_normal((1, *taps, c_in, c_out)) * np.exp(rng.standard_normal((1, *taps, 1, 1)))
        kernels = kernels.astype(np.float32)
        sizes = tuple(11 + i for i in range(len(taps)))
        points = symbol.half_grid(sizes)
        turns = symbol.turns(points, sizes, symbol.lags(taps))
        flat = kernels[0].reshape(-1, c_in, c_out).astype(float)
        exact = np.tensordot(
            np.exp(2j * np.pi * points / np.array(sizes) @ np.indices(taps).reshape(len(taps), -1)), flat, 1
        )
        exact = np.einsum("fio,fjo->fij" if c_in <= c_out else "foi,foj->fij", exact, exact.conj())
        ours = symbol.evaluate(symbol.gram(jnp.asarray(kernels)), *(jnp.asarray(t, jnp.float32) for t in turns))
        lost = np.linalg.norm(np.asarray(ours, complex)[:, 0] - exact, 2, axis=(1, 2)).max()
        size = np.sqrt((flat**2).sum((1, 2))).sum()
        worst = max(worst, lost / (_slack(taps, c_in, c_out).gram * 2.0**29 * size**2))
    assert 1e-6 < worst < 1


def test_a_success_of_cholesky_means_what_it_says():
    """In float32, where its slack shows: τ just below the largest eigenvalue must fail by the margin at the latest."""
    rng = np.random.default_rng(0)
    for n in (5, 24, 60):
        matrix = rng.standard_normal((n, n)) + 1j * rng.standard_normal((n, n))
        gram = (matrix @ matrix.conj().T).astype(np.complex64)
        top = np.linalg.eigvalsh(gram.astype(complex))[-1]
        slack = _slack((1,), n, n).cholesky * 2.0**29
        shrink = top / (1 + slack)
        tests = [float(shrink * (1 - d)) for d in (0, 1e-5, 1e-3)] + [float(top * 1.001)]
        passed = [bool(symbol.below(jnp.asarray(gram)[None], jnp.float32(t))[0]) for t in tests]
        assert passed == [False, False, False, True]


@pytest.mark.parametrize("small", [1e-200, 1.23e-161])
def test_the_taps_that_meet_the_input_may_be_the_small_ones(small):
    """At n = 1 only the middle tap is read: its square must not vanish beside the others."""
    found = f4.norm_interval(np.array([1, small, 1]).reshape(3, 1, 1), input_shape=(1,))
    assert found.lower <= small <= found.upper
    assert found.reached


@pytest.mark.parametrize("spec", [{}, {"transposed": True}, {"groups": 2}])
@pytest.mark.parametrize("small", [3.3e-20, 1e-300])
def test_the_taps_that_meet_the_input_may_be_nothing_beside_the_others(spec, small):
    """By more than float64 spans: scaled by the largest of all, they would be 0, and so would the bound."""
    kernel = np.zeros((3, 1, 2))
    kernel[0], kernel[2], kernel[1, 0] = 1e300, 1e300, (small, small / 2)
    found = f4.norm_interval(kernel, f4.ConvSpec(**spec), input_shape=(1,))
    truth = small if "groups" in spec else math.hypot(small, small / 2)
    assert truth * (1 - 1e-3) <= found.lower <= truth * (1 + 1e-12)
    assert truth * (1 - 1e-12) <= found.upper <= truth * (1 + 1e-3)
    everywhere = f4.norm_interval(kernel, f4.ConvSpec(**spec))
    assert everywhere.lower <= everywhere.upper
    assert everywhere.upper >= 1e300


@pytest.mark.filterwarnings("error")
def test_the_ends_of_the_floats():
    tiny, huge = np.full((1, 1, 2), 5e-324), np.full((3, 1, 1), 1e308)
    for shape in (None, (4,)):
        assert f4.norm_interval(tiny, input_shape=shape).upper >= math.sqrt(2) * 5e-324
        found = f4.norm_interval(huge, input_shape=shape)
        assert found.upper == math.inf
        assert 1e308 < found.lower < math.inf


@pytest.mark.parametrize("size", [None, (800,), (6,)])
def test_the_smallest_rtol_ends(size, monkeypatch):
    """Where the maximum lies on a grid point, rounding decides: it must neither loop nor lie."""
    monkeypatch.setattr(interval, "_DENSE_SIDE", 0)
    for kernel in (np.ones((1, 1, 1)), np.abs(cases.draw(np.random.default_rng(0), (3, 2, 2), "normal"))):
        spec = f4.ConvSpec(padding="CIRCULAR")
        with pytest.raises(ValueError, match="the least is") as error:
            f4.norm_interval(kernel, spec, 1e-15, input_shape=size)
        least = float(str(error.value).split("the least is ")[1])
        for factor in (1, 1.5, 4):
            found = f4.norm_interval(kernel, spec, factor * least, input_shape=size)
            truth = oracle.norm(kernel.sum(0, dtype=float))
            assert found.lower <= truth * (1 + 1e-15)
            assert found.upper >= truth * (1 - 1e-15)


@pytest.mark.parametrize("rtol", [1e200, 10.0, np.float32(1e-3)])
def test_any_positive_rtol(rtol, monkeypatch):
    monkeypatch.setattr(interval, "_DENSE_SIDE", 0)
    kernel = cases.kernel("1d")
    for shape in (None, (8,)):
        assert f4.norm_interval(kernel, rtol=rtol, input_shape=shape).reached or shape
    with pytest.raises(ValueError, match="rtol must be a positive number, got inf"):
        f4.norm_interval(kernel, rtol=math.inf)


def test_max_tests_are_kept():
    """A spectrum that is the same along planes: every level has nine times as many points that may be highest."""
    kernel = np.zeros((3, 3, 3, 2, 2))
    kernel[range(3), range(3), range(3)] = np.random.default_rng(0).standard_normal((3, 2, 2))
    with jax.enable_x64(True):
        found = Enclosure(jnp.asarray(kernel)[None] / 4).everywhere(1e-3, 5_000)
    line = f4.norm_interval(kernel[range(3), range(3), range(3)], rtol=1e-6)
    assert found.tests <= 5_000 + 4_000
    assert found.lower <= line.upper / 4
    assert found.upper >= line.lower / 4


def test_krylov_space_of_low_rank():
    """The space is exhausted after two steps; what is left then is rounding, and must not be taken for a direction."""
    found = f4.norm_interval(
        np.ones((3, 1, 2), np.float32), f4.ConvSpec(strides=3, padding="REFLECT"), input_shape=(1230,)
    )
    np.testing.assert_allclose(found.lower, math.sqrt(10), rtol=1e-6)
    rng = np.random.default_rng(0)
    for rank in (1, 2):
        factor = jnp.asarray(rng.standard_normal((50, 20, rank)), jnp.float32)
        grams = factor @ jnp.swapaxes(factor, -1, -2)
        x = linalg.krylov_top(lambda x, g=grams: jnp.einsum("pij,pj->pi", g, x), jnp.ones((50, 20)), 12)
        quotient = jnp.einsum("pi,pij,pj->p", x, grams, x)
        np.testing.assert_allclose(quotient, np.linalg.eigvalsh(np.asarray(grams, float))[:, -1], rtol=1e-4)


@pytest.mark.parametrize(("shape", "size", "padding", "stride"), [((3, 3, 3), 8, (5, 1), 1), ((4, 2, 2), 3, (5, 1), 1),
                                                                  ((5, 2, 2), 6, (-4, 3), 4)])  # fmt: skip
def test_wide_padding_reads_nothing_out_of_bounds(shape, size, padding, stride):
    """XLA's CPU convolution does (its float32 one), where the padding it is asked for is very negative."""
    kernel = cases.draw(np.random.default_rng(0), shape, "normal")
    spec = f4.ConvSpec(padding=(padding,), strides=stride)
    matrix = np.asarray(f4.jacobian.materialise(kernel, (size,), spec), float)
    outputs = matrix.shape[0] // shape[-1]
    assert np.abs(matrix).max() <= np.abs(kernel).max()
    for y in np.eye(matrix.shape[0], dtype=np.float32):
        ours = f4.jacobian.adjoint(kernel, y.reshape(outputs, -1), (size,), spec)
        np.testing.assert_allclose(np.ravel(ours), matrix.T @ y, atol=1e-6)


def test_the_grid_point_nearest_to_the_maximum_has_its_share():
    """Both thresholds, where they are tight: one lag alone, its maximum between the points; and random kernels."""
    alone = np.zeros((3, 1, 1))
    alone[0], alone[2] = 0.5, -0.5  # |F|² = (1 - cos 2ω)/2, largest at π/2
    rng = np.random.default_rng(0)
    kernels = [alone, *(cases.draw(rng, (k, 2, 2), kind) / 4 for k in (2, 3, 5) for kind in ("normal", "alternating"))]
    tight = 1.0
    for kernel in kernels:
        with jax.enable_x64(True):
            enclosure = Enclosure(jnp.asarray(kernel, float)[None])
            angles = np.linspace(0, np.pi, 20_001)
            waves = np.exp(1j * np.outer(angles, np.arange(len(kernel))))
            values = np.linalg.norm(np.tensordot(waves, np.asarray(kernel, float), 1), 2, axis=(1, 2)) ** 2
            top, where = values.max(), angles[values.argmax()]
            for n in range(2 * len(kernel), 40):
                nearest = 2 * np.pi * np.round(where * n / (2 * np.pi)) / n
                here = np.tensordot(np.exp(1j * nearest * np.arange(len(kernel))), np.asarray(kernel, float), 1)
                share = enclosure.share((n,), top)
                assert np.linalg.norm(here, 2) ** 2 >= share * (1 - 1e-7)
                tight = min(tight, np.linalg.norm(here, 2) ** 2 / share - 1)
    assert tight < 1e-6  # a larger share would be wrong


def test_refinement_keeps_the_whole_cell():
    """Of a point: itself and both neighbours on every axis at half the spacing, up to ω ~ -ω."""
    with jax.enable_x64(True):
        enclosure = Enclosure(jnp.ones((1, 3, 3, 1, 1)))
    sizes, points = enclosure._refine((8, 8), np.array([[3, 1]]))
    assert sizes == (16, 16)
    expected = {min((a % 16, b % 16), (-a % 16, -b % 16)) for a in (5, 6, 7) for b in (1, 2, 3)}
    assert {tuple(p) for p in points.tolist()} == expected


@pytest.mark.parametrize("installed", [True, False])
def test_lapack_has_one_thread_for_each_matrix(installed, monkeypatch):
    """Two wait for one another wherever other programs take the processors: 25 s instead of 3."""
    if not installed:
        monkeypatch.setitem(sys.modules, "threadpoolctl", None)
    threads._limit.cache_clear()
    with jax.enable_x64(True):
        enclosure = Enclosure(jnp.ones((1, 3, 1, 2, 2)))
    seen = []

    def counted(*arguments):
        seen.extend(lib["num_threads"] for lib in controller.info() if lib["user_api"] == "blas")
        return symbol_below(*arguments)

    controller = importlib.import_module("threadpoolctl").ThreadpoolController() if installed else None
    symbol_below = enclosure.below
    if installed:
        monkeypatch.setattr(enclosure, "below", counted)
    with jax.enable_x64(True):
        beyond = enclosure.exceeding((4, 1), np.array([[0, 0], [2, 0]]), 9.0)  # λ = 36 and 4
    assert list(beyond) == [True, False]
    assert set(seen) == ({1} if installed else set())
    threads._limit.cache_clear()


def test_overlapping_callers_leave_the_threads_as_they_were():
    controller = importlib.import_module("threadpoolctl").ThreadpoolController()
    count = lambda: {lib["num_threads"] for lib in controller.info() if lib["user_api"] == "blas"}
    with controller.limit(limits=2, user_api="blas"):
        first, second = threads.one_each(), threads.one_each()
        first.__enter__()
        second.__enter__()
        first.__exit__(None, None, None)
        assert count() == {1}
        second.__exit__(None, None, None)
        assert count() == {2}


def test_a_threshold_within_the_rounding_certifies_nothing():
    with jax.enable_x64(True):
        enclosure = Enclosure(jnp.zeros((1, 3, 3, 2, 2)) + 1e-3)
        assert enclosure.exceeding((8, 8), symbol.half_grid((8, 8)), 0.5 * enclosure.gram_slack).all()


@pytest.mark.parametrize("entry", [1.7e308, 5e-324])
def test_ends_at_the_end_of_the_floats_are_not_reached(entry):
    found = f4.norm_interval(np.full((1, 1, 2, 2), entry))
    assert found.reached == (found.upper <= (1 + 1e-3) * found.lower)


@pytest.mark.parametrize("input_shape", [None, (3,)])
def test_a_known_kernel_is_enclosed_while_something_else_is_traced(input_shape):
    kernel = np.random.default_rng(0).standard_normal((3, 2, 2))
    found = []

    @jax.jit
    def traced(x):
        found.append(f4.norm_interval(kernel, input_shape=input_shape))
        return x

    traced(1.0)
    assert found[0] == f4.norm_interval(kernel, input_shape=input_shape)
