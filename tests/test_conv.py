"""Specs and kernels from elsewhere: Flax layers, PyTorch weights."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from flax import linen as nn
from flax import nnx

import fantastic4 as f4
from fantastic4 import jacobian

OPTIONS = [
    {},
    {"strides": 2, "padding": "VALID"},
    {"strides": (1, 2), "kernel_dilation": 2, "padding": [(1, 0), (2, 2)]},
    {"feature_group_count": 2, "padding": "CIRCULAR"},
    {"padding": "REFLECT", "kernel_dilation": (1, 2)},
    {"padding": 1},
]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("module", ["linen", "nnx"])
def test_spec_of_a_conv_layer(options, module):
    x = jax.random.normal(jax.random.key(0), (6, 5, 4))
    if module == "linen":
        layer = nn.Conv(2, (3, 3), **options)
        params = layer.init(jax.random.key(1), x)
        y, kernel, bias = layer.apply(params, x), params["params"]["kernel"], params["params"]["bias"]
    else:
        layer = nnx.Conv(4, 2, (3, 3), **options, rngs=nnx.Rngs(1))
        y, kernel, bias = layer(x), layer.kernel[...], layer.bias[...]
    ours = jacobian.forward(kernel, x, f4.ConvSpec.from_layer(layer)) + bias
    np.testing.assert_allclose(ours, y, atol=1e-5)


@pytest.mark.parametrize(
    "options", [{}, {"strides": (2, 3), "padding": "CIRCULAR"}, {"strides": (2, 2), "transpose_kernel": True}]
)
@pytest.mark.parametrize("module", ["linen", "nnx"])
def test_spec_of_a_transposed_layer(options, module):
    x = jax.random.normal(jax.random.key(0), (4, 3, 4))
    if module == "linen":
        layer = nn.ConvTranspose(2, (3, 3), use_bias=False, **options)
        params = layer.init(jax.random.key(1), x)
        y, kernel = layer.apply(params, x), params["params"]["kernel"]
    else:
        layer = nnx.ConvTranspose(4, 2, (3, 3), use_bias=False, **options, rngs=nnx.Rngs(1))
        y, kernel = layer(x), layer.kernel[...]
    np.testing.assert_allclose(jacobian.forward(kernel, x, f4.ConvSpec.from_layer(layer)), y, atol=1e-5)


def test_a_mask_multiplies_the_kernel():
    mask = np.tril(np.ones((3, 2, 2), np.float32))
    layer = nn.Conv(2, (3,), mask=mask, use_bias=False)
    params = layer.init(jax.random.key(0), jnp.ones((1, 8, 2)))
    kernel = params["params"]["kernel"] * mask
    x = jax.random.normal(jax.random.key(1), (8, 2))
    np.testing.assert_allclose(
        jacobian.forward(kernel, x, f4.ConvSpec.from_layer(layer)), layer.apply(params, x), atol=1e-6
    )


def test_specs_are_static_and_equal_by_value():
    a, b = f4.ConvSpec(strides=[2, 1], padding=[[1, 0], 2]), f4.ConvSpec(strides=(2, 1), padding=((1, 0), 2))
    assert a == b
    assert hash(a) == hash(b)
    assert jax.tree.leaves(a) == []


def torch_conv(weight, x, stride):
    """PyTorch's conv1d and conv2d, valid: cross-correlation, as its documentation writes it."""
    c_out, c_in, *taps = weight.shape
    size = [(n - k) // stride + 1 for n, k in zip(x.shape[1:], taps, strict=True)]
    y = np.zeros((c_out, *size))
    for place in itertools.product(*map(range, size)):
        window = x[(slice(None), *(slice(p * stride, p * stride + k) for p, k in zip(place, taps, strict=True)))]
        y[(slice(None), *place)] = np.tensordot(weight, window, x.ndim)
    return y


def torch_transposed(weight, x, stride, groups):
    """PyTorch's conv_transpose: every input pixel adds its weighted kernel to the output."""
    c_in, per_group, *taps = weight.shape
    y = np.zeros((per_group * groups, *((n - 1) * stride + k for n, k in zip(x.shape[1:], taps, strict=True))))
    for i, place in itertools.product(range(c_in), itertools.product(*map(range, x.shape[1:]))):
        g = i // (c_in // groups)
        window = tuple(slice(p * stride, p * stride + k) for p, k in zip(place, taps, strict=True))
        y[(slice(g * per_group, (g + 1) * per_group), *window)] += weight[i] * x[(i, *place)]
    return y


@pytest.mark.parametrize("taps", [(3,), (3, 2)])
def test_from_torch(taps):
    rng = np.random.default_rng(0)
    weight, x = rng.standard_normal((5, 4, *taps)), rng.standard_normal((4, *(7 for _ in taps)))
    kernel = f4.from_torch(weight.astype(np.float32))
    ours = jacobian.forward(kernel, np.moveaxis(x, 0, -1).astype(np.float32), f4.ConvSpec(strides=2, padding="VALID"))
    np.testing.assert_allclose(np.moveaxis(ours, -1, 0), torch_conv(weight, x, 2), atol=1e-5)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("taps", [(3,), (3, 2)])
def test_from_torch_transposed(taps, groups):
    rng = np.random.default_rng(0)
    weight, x = rng.standard_normal((4, 3, *taps)), rng.standard_normal((4, *(4 for _ in taps)))
    kernel = f4.from_torch(weight.astype(np.float32), transposed=True, groups=groups)
    spec = f4.ConvSpec(strides=2, padding=tuple((k - 1, k - 1) for k in taps), transposed=True, groups=groups)
    ours = jacobian.forward(kernel, np.moveaxis(x, 0, -1).astype(np.float32), spec)
    np.testing.assert_allclose(np.moveaxis(ours, -1, 0), torch_transposed(weight, x, 2, groups), atol=1e-5)
    truth = oracle.norm(jacobian.materialise(kernel, x.shape[1:], spec))
    assert float(f4.four_bounds(kernel, spec).min()) >= truth


def test_from_torch_is_traced_where_jax_traces():
    weight = np.random.default_rng(0).standard_normal((4, 3, 2)).astype(np.float32)
    plain = f4.from_torch(weight)
    np.testing.assert_array_equal(jax.jit(f4.from_torch)(weight), plain)
    np.testing.assert_array_equal(jax.vmap(f4.from_torch)(weight[None])[0], plain)
    loss = lambda w: jnp.sum(f4.from_torch(w) ** 2)
    np.testing.assert_allclose(jax.grad(loss)(jnp.asarray(weight)), 2 * weight)


def test_from_torch_takes_tensors_by_the_array_protocol():
    class Tensor:
        def __array__(self, dtype=None, copy=None):
            return np.zeros((2, 3, 1), np.float32)

    assert f4.from_torch(Tensor()).shape == (1, 3, 2)


def test_what_flax_takes_besides():
    """Words in lower case, and strides that are an array."""
    layer = nn.Conv(2, (3, 3), strides=np.array([2, 1]), padding="same")
    assert f4.ConvSpec.from_layer(layer) == f4.ConvSpec(strides=(2, 1), padding="SAME")
