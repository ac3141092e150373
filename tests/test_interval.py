"""Intervals: both ends sound, at every size and at one, against dense Jacobians and fine spectra in float64."""

import itertools
import math

import cases
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

import fantastic4 as f4
from fantastic4 import border, interval, symbol
from fantastic4.supremum import Enclosure, _slack

LARGE = ["same", "valid", "int", "crop", "circular-small", "reflect", "edge", "stride", "stride-circular-wrapping",
         "stride-three-reflect", "dilation-stride-shared", "groups", "transposed-stride", "transpose-kernel",
         "1d-causal", "3d"]  # fmt: skip


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
    above = below / math.prod(math.cos(math.pi * (k - 1) / (2 * n)) for k, n in zip(taps, fine, strict=True))
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
        turns = symbol.turns(points, sizes, taps)
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
