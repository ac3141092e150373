"""Every law over one table of layers, against what Flax really computes."""

import cases
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

import fantastic4 as f4
from fantastic4 import jacobian

LAYERS = sorted(cases.LAYERS)


@pytest.mark.parametrize("name", LAYERS)
def test_materialise_is_what_flax_computes(name):
    _, size, spec = cases.LAYERS[name]
    kernel = cases.kernel(name)
    ours = np.asarray(jacobian.materialise(kernel, size, f4.ConvSpec(**spec)))
    truth = oracle.dense(kernel, size, **spec)
    assert ours.shape == truth.shape
    np.testing.assert_allclose(ours, truth, atol=2e-6 * max(1, np.abs(truth).max()))


@pytest.mark.parametrize("name", LAYERS)
def test_adjoint_is_the_transpose(name):
    _, size, spec = cases.LAYERS[name]
    kernel = cases.kernel(name)
    matrix = oracle.dense(kernel, size, **spec)
    spec = f4.ConvSpec(**spec)
    x = jax.ShapeDtypeStruct((*size, matrix.shape[1] // int(np.prod(size))), jnp.float32)
    shape = jax.eval_shape(lambda x: jacobian.forward(kernel, x, spec), x).shape
    y = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    ours = np.asarray(jacobian.adjoint(kernel, y, size, spec)).ravel()
    np.testing.assert_allclose(ours, matrix.T @ y.ravel().astype(float), atol=3e-5)


@pytest.mark.parametrize("name", LAYERS)
def test_four_bounds_are_never_below_the_layer(name):
    shape, size, spec = cases.LAYERS[name]
    for kind in cases.KINDS:
        kernel = cases.kernel(name, kind)
        truth = oracle.norm(oracle.dense(kernel, size, **spec))
        four = f4.four_bounds(kernel, f4.ConvSpec(**spec))
        assert four.values.shape == (2 ** (len(shape) - 2),)
        for label, value in zip(four.names, four.values, strict=True):
            assert float(value) >= truth, f"{kind}: {label} = {float(value)!r} < {truth!r}"
        assert float(four.min()) == float(four.values.min()) == float(four.values[four.argmin()])


@pytest.mark.parametrize("padding", ["SAME", "VALID", "CAUSAL", "CIRCULAR", "REFLECT", "EDGE", 4])
@pytest.mark.parametrize("stride", [1, 2, 3, 4])
@pytest.mark.parametrize("dilation", [1, 2])
def test_four_bounds_hold_at_every_input_size(padding, stride, dilation):
    """Sizes 1 to 8, kernels larger than the input among them; wrapped, mirrored and repeated borders."""
    spec = {"padding": padding, "strides": stride, "dilation": dilation}
    rng = np.random.default_rng([stride, dilation])
    for taps in (3, 4) if dilation == 1 else (3,):
        kernels = [cases.draw(rng, (taps, 1, 1), kind) for kind in ("ones", "alternating", "uneven")]
        bounds = [float(f4.four_bounds(kernel, f4.ConvSpec(**spec)).min()) for kernel in kernels]
        for n in range(1, 9):
            for kernel, bound in zip(kernels, bounds, strict=True):
                truth = oracle.norm(oracle.line(kernel, n, **spec))
                assert bound >= truth, f"n={n}, {kernel.ravel()}: {bound} < {truth}"


@pytest.mark.parametrize("padding", ["SAME", "VALID", "CAUSAL", "CIRCULAR", "REFLECT", "EDGE", 4])
def test_the_oracle_of_lines_is_what_flax_computes(padding):
    for taps, size, strides, dilation in ((3, 7, 1, 2), (4, 5, 2, 1), (4, 1, 3, 2), (3, 2, 4, 2)):
        spec = {"padding": padding, "strides": strides, "dilation": dilation}
        kernel = cases.draw(np.random.default_rng(size), (taps, 1, 1), "normal")
        np.testing.assert_allclose(oracle.line(kernel, size, **spec), oracle.dense(kernel, (size,), **spec), atol=1e-6)


@pytest.mark.parametrize("name", sorted(cases.CIRCULAR))
def test_spectrum_is_that_of_the_layer(name):
    _, size, spec = cases.LAYERS[name]
    for kind in ("normal", "rank-one"):
        kernel = cases.kernel(name, kind)
        truth = np.linalg.svd(oracle.dense(kernel, size, **spec), compute_uv=False)
        ours = np.asarray(f4.singular_values(kernel, size, f4.ConvSpec(**spec)))
        assert ours.shape == truth.shape
        np.testing.assert_allclose(ours, truth, atol=3e-6 * truth[0])
        norm = float(f4.exact_norm(kernel, size, f4.ConvSpec(**spec)))
        np.testing.assert_allclose(norm, truth[0], rtol=3e-6)


def test_sedghi_is_not_a_bound_for_zero_padding():
    """The circular norm can be smaller than that of the SAME layer: it must not be offered for it."""
    rng = np.random.default_rng(0)
    kernels = rng.standard_normal((200, 3, 3, 1, 1)).astype(np.float32)
    circular = jax.vmap(lambda k: f4.exact_norm(k, (5, 5)))(kernels)
    exceeded = sum(
        oracle.norm(oracle.dense(k, (5, 5))) > 1.001 * float(c) for k, c in zip(kernels, circular, strict=True)
    )
    assert exceeded > 0
    with pytest.raises(ValueError, match="exact for CIRCULAR padding, got 'SAME'"):
        f4.exact_norm(kernels[0], (5, 5), f4.ConvSpec())


def test_groups_are_a_maximum_not_a_product():
    rng = np.random.default_rng(0)
    kernel = rng.standard_normal((3, 3, 2, 12)).astype(np.float32)
    spec = f4.ConvSpec(groups=6)
    each = [float(f4.four_bounds(kernel[..., 2 * g : 2 * g + 2]).t) for g in range(6)]
    np.testing.assert_allclose(float(f4.four_bounds(kernel, spec).t), max(each), rtol=1e-5)


def test_dilation_and_stride_reduce_by_their_common_factor():
    """The plain stride-s polyphase kernel is wrong here: found 1.39 times below the truth."""
    kernel = np.ones((3, 1, 1), np.float32)
    truth = oracle.norm(oracle.dense(kernel, (16,), strides=2, dilation=2))
    assert float(f4.four_bounds(kernel, f4.ConvSpec(strides=2, dilation=2)).min()) >= truth > 2.8  # √5 = 2.24 without


def test_polyphase_is_tighter_than_the_unstrided_kernel():
    kernel = cases.draw(np.random.default_rng(1), (3, 3, 4, 4), "normal")
    strided = float(f4.four_bounds(kernel, f4.ConvSpec(strides=2)).min())
    assert strided < 0.8 * float(f4.four_bounds(kernel).min())


def test_a_box_kernel_divided_by_its_bound_does_not_stretch():
    """A zero-padding factor below 1 let the 3×3 box come out at 1.0199 for 16 pixels: no size may exceed 1."""
    box = np.ones((3, 3, 1, 1), np.float32)
    for bound in (float(f4.four_bounds(box).min()), float(f4.bound(box, method="grid")), f4.norm_interval(box).upper):
        for n in (4, 8, 16):
            assert oracle.norm(oracle.dense(box, (n, n))) / bound <= 1
    assert oracle.norm(oracle.dense(box, (16, 16))) > 0.97 * 9


def test_power_iteration_is_not_called_a_bound():
    """For a 1×1 convolution the four bounds are exact, so whatever power iteration has reached is too small."""
    kernel = cases.draw(np.random.default_rng(0), (1, 1, 64, 64), "normal")
    truth = oracle.norm(kernel[0, 0])
    four, _ = f4.step(kernel, f4.init(kernel, key=jax.random.key(0), warmup=5))
    assert float(four.min()) < truth <= float(f4.four_bounds(kernel).min())


@pytest.mark.parametrize("scale", [1e-8, 1e-20])
def test_small_weights_are_not_underestimated(scale):
    """An ε inside a normalisation makes the bound of small weights too small (gloro #8)."""
    kernel = cases.kernel("same")
    small = (kernel * np.float32(scale)).astype(np.float32)
    truth = oracle.norm(oracle.dense(small, (5, 5)))
    for method in ("four", "weighted", "grid"):
        assert float(f4.bound(small, method=method)) >= truth


@pytest.mark.parametrize("taps", [2, 3, 4, 5])
def test_an_even_number_of_taps_reads_the_edge_as_often_as_one_more(taps):
    """Sums of neighbours: at the edge, copies of one entry are read together."""
    kernel = np.ones((taps, 1, 1), np.float32)
    found = float(f4.four_bounds(kernel, f4.ConvSpec(padding="EDGE")).min())
    for n in range(1, 2 * taps):
        assert found >= oracle.norm(oracle.dense(kernel, (n,), padding="EDGE")) * (1 - 3e-7), n
