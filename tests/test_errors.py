"""Bad input: refused at trace time, in one sentence that says what came, what is allowed, and the fix."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import fantastic4 as f4
from fantastic4 import jacobian, linen, lipschitz, network, robustness, transforms
from fantastic4 import nnx as f4nnx

K = np.ones((3, 3, 2, 4), np.float32)
KEY = jax.random.key(0)
CIRCULAR = f4.ConvSpec(padding="CIRCULAR")


def state(kernel, spec=f4.ConvSpec()):  # noqa: B008
    return f4.init(kernel, spec, key=jax.random.key(0), warmup=0)


class Tenfold(nn.Conv):
    def __call__(self, x):
        return 10 * super().__call__(x)


CASES = {
    "rank 2": (lambda: f4.four_bounds(K[0, 0]), r"1 to 3 spatial axes, got \(2, 4\): for a dense kernel use fantastic4.dense"),
    "rank 6": (lambda: f4.four_bounds(np.ones((1,) * 6, np.float32)), "1 to 3 spatial axes, got"),
    "empty axis": (lambda: f4.four_bounds(K[:0]), r"at least one tap and one channel on every axis, got \(0, 3, 2, 4\)"),
    "integers": (lambda: f4.four_bounds(K.astype(np.int32)), "kernel must have a real floating dtype, got int32: cast it"),
    "complex": (lambda: f4.four_bounds(K.astype(np.complex64)), "real floating dtype, got complex64"),
    "booleans": (lambda: f4.bound(K > 0), "real floating dtype, got bool"),
    "a list": (lambda: f4.four_bounds([[[1.0]]]), "kernel must be an array \\(or a tree of arrays\\): jnp.asarray makes one, got a list with float in four_bounds"),
    "unknown method": (lambda: f4.bound(K, method="five"), "unknown method 'five': choose one of four"),
    "a layer for a spec": (lambda: f4.bound(K, nn.Conv(4, (3, 3))), r"spec must be a ConvSpec \(of a layer, ConvSpec.from_layer\(layer\)\), got Conv in bound"),
    "the spec of a class": (lambda: f4.ConvSpec.from_layer(nn.Conv), r"Conv is a class: pass a layer, as Conv\(…\)"),
    "a class in a wrapper": (lambda: linen.SpectralBound(nn.Dense).init(KEY, jnp.ones((1, 3))), r"Dense is a class: wrap a layer, as Dense\(…\)"),
    "a layer of NNX in linen": (lambda: linen.SpectralBound(nnx.Linear(3, 3, rngs=nnx.Rngs(0))).init(KEY, jnp.ones((1, 3))), "Linear is a layer of NNX: fantastic4.nnx.SpectralBound is for those"),
    "a key for rngs": (lambda: f4nnx.SpectralBound(nnx.Linear(3, 3, rngs=nnx.Rngs(0)), rngs=KEY), r"rngs must be an nnx.Rngs, as nnx.Rngs\(0\), got PRNGKeyArray"),
    "a method for no layer": (lambda: lipschitz.bound(lambda x: 2 * x, jnp.ones(3), method={"foo": "grid"}), "a method for 'foo', but no such layer: this function has none"),
    "labels that are no classes": (lambda: robustness.certified_accuracy(lambda x: x, jnp.ones((2, 3)), jnp.ones(2), jnp.ones(2), 0.1), "labels must be integers, the classes, got float32"),
    "one spec for all": (lambda: network.report({"kernel": K}, specs=f4.ConvSpec()), "specs must be a dict from paths or globs to specs"),
    "select of the path alone": (lambda: network.report({"kernel": K}, select=lambda path: True), "select must take two arguments, the path and the leaf"),
    "sizes for no kernel": (lambda: transforms.clip_spectrum(1.0, {"foo": (8, 8)}).init({"kernel": K}), "an input shape for 'foo', but no such kernel: this tree has kernel"),
    "no spec": (lambda: jacobian.materialise(K, (4, 4), None), r"spec must be a ConvSpec, got NoneType: for a layer, ConvSpec.from_layer"),
    "groups that do not fit": (lambda: f4.four_bounds(K, f4.ConvSpec(groups=3)), "groups 3 must divide the last axis of the kernel"),
    "strides of another rank": (lambda: f4.four_bounds(K, f4.ConvSpec(strides=(2, 2, 2))), r"strides \(2, 2, 2\) has 3 entries, the kernel .* has 2 spatial axes"),
    "dilation of another rank": (lambda: f4.four_bounds(K, f4.ConvSpec(dilation=(2,))), r"dilation \(2,\) has 1 entries"),
    "pads of another rank": (lambda: f4.four_bounds(K, f4.ConvSpec(padding=((1, 1),))), r"\(low, high\) for each of the 2 spatial axes"),
    "pads that are no ints": (lambda: f4.four_bounds(K, f4.ConvSpec(padding=((1, 1.5), (0, 0)))), "padding must be a word, an int, or an int or"),
    "causal 2-D": (lambda: f4.four_bounds(K, f4.ConvSpec(padding="CAUSAL")), "CAUSAL padding is for one spatial axis, the kernel .* has 2"),
    "unknown padding": (lambda: f4.ConvSpec(padding="SOME"), "padding 'SOME' is not one of SAME, .*EDGE for a convolution"),
    "transposed reflect": (lambda: f4.ConvSpec(padding="REFLECT", transposed=True), "not one of SAME, VALID, CIRCULAR for a transposed"),
    "stride 0": (lambda: f4.ConvSpec(strides=0), "strides must be ints of at least 1, got 0"),
    "stride 1.5": (lambda: f4.ConvSpec(strides=1.5), "strides must be ints of at least 1, got 1.5"),
    "groups as a tuple": (lambda: f4.ConvSpec(groups=(1, 2)), r"groups must be an int, got \(1, 2\)"),
    "padding as a boolean": (lambda: f4.ConvSpec(padding=True), "padding must be a word, an int, or an int or .low, high. an axis, got True"),
    "padding without a value": (lambda: f4.ConvSpec(padding=None), "padding must be a word, an int"),
    "transpose_kernel alone": (lambda: f4.ConvSpec(transpose_kernel=True), "needs transposed=True"),
    "transpose_kernel with groups": (lambda: f4.ConvSpec(transposed=True, transpose_kernel=True, groups=2), "goes with groups=1"),
    "spectrum of zero padding": (lambda: f4.singular_values(K, (4, 4), f4.ConvSpec()), "exact for CIRCULAR padding, got 'SAME', whose norm may be larger"),
    "spectrum, stride does not divide": (lambda: f4.exact_norm(K, (5, 4), f4.ConvSpec(strides=2, padding="CIRCULAR")), r"strides \(2, 2\) must divide input_shape \(5, 4\).*the nearest size is \(4, 4\)"),
    "spectrum, wrong rank": (lambda: f4.singular_values(K, (4,), CIRCULAR), r"input_shape \(4,\) must have 2 entries of at least 1: the spatial size"),
    "spectrum, size 0": (lambda: f4.singular_values(K, (4, 0), CIRCULAR), "entries of at least 1"),
    "another kernel's state": (lambda: f4.step(K, state(np.ones((5, 5, 2, 4), np.float32))), r"this state has vectors of shape \(1, 36, 4\).*needs \(1, 16, 4\): make one with fantastic4.init"),
    "another spec's state": (lambda: f4.step(K, state(K), f4.ConvSpec(strides=2)), "make one with fantastic4.init"),
    "no iterations": (lambda: f4.step(K, state(K), iterations=0), "iterations must be at least 1, got 0"),
    "negative warmup": (lambda: f4.init(K, key=jax.random.key(0), warmup=-1), "warmup must be at least 0, got -1"),
    "a fraction of an iteration": (lambda: f4.step(K, state(K), iterations=1.5), "iterations must be an int, got 1.5"),
    "no key": (lambda: f4.init(K, key=0), "key must be a key, as jax.random.key makes it, got int in init"),
    "a padding as spec": (lambda: f4.four_bounds(K, "SAME"), r"spec must be a ConvSpec \(of a layer, ConvSpec.from_layer\(layer\)\), got str in four_bounds"),
    "swapped spec and state": (lambda: f4.step(K, CIRCULAR, state(K)), r"state must be a PowerState from fantastic4.init\(kernel, spec, key=…\), got ConvSpec"),
    "fractional size": (lambda: f4.exact_norm(K, (4.5, 4)), r"input_shape must be a tuple of ints, got \(4.5, 4\)"),
    "size as booleans": (lambda: jacobian.materialise(K, (True, 4)), r"input_shape must be a tuple of ints, got \(True, 4\)"),
    "size as a string": (lambda: jacobian.materialise(K, "44"), "input_shape must be a tuple of ints, got '44'"),
    "transposed as a word": (lambda: f4.ConvSpec(transposed="no"), "transposed must be True or False, got 'no'"),
    "strides as a boolean": (lambda: f4.ConvSpec(strides=True), "strides must be ints of at least 1, got True"),
    "torch of integers": (lambda: f4.from_torch(np.ones((4, 3, 3), int)), "weight must be an array of real floats, got dtype int64"),
    "torch of nothing": (lambda: f4.from_torch(None), "weight must be an array of real floats, got dtype object"),
    "input of another kernel": (lambda: jacobian.forward(K, jnp.ones((4, 4, 3))), r"x has shape \(4, 4, 3\), the kernel .* takes \(\*spatial, 2\)"),
    "output of another size": (lambda: jacobian.adjoint(K, jnp.ones((5, 4, 4)), (4, 4)), r"y has shape \(5, 4, 4\), the layer's output at input \(4, 4\) is \(4, 4, 4\)"),
    "torch of rank 2": (lambda: f4.from_torch(np.ones((4, 3))), r"3 to 5 axes, \(c_out, c_in, \*spatial\), got \(4, 3\)"),
    "torch groups": (lambda: f4.from_torch(np.ones((4, 3, 3)), transposed=True, groups=3), "groups 3 must divide the first axis"),
    "a dense layer": (lambda: f4.ConvSpec.from_layer(nn.Dense(3)), "Dense is not a Flax convolution: .* fantastic4.dense.bound"),
    "a local layer": (lambda: f4.ConvSpec.from_layer(nn.ConvLocal(3, (3, 3))), "ConvLocal has a kernel for every pixel"),
    "input dilation": (lambda: f4.ConvSpec.from_layer(nn.Conv(3, (3, 3), input_dilation=2)), "write it as ConvTranspose"),
    "an injected convolution": (lambda: f4.ConvSpec.from_layer(nn.Conv(3, (3,), conv_general_dilated=lambda *a, **k: None)), "its own conv_general_dilated"),
    "an injected convolution of NNX": (lambda: f4.ConvSpec.from_layer(nnx.Conv(2, 3, (3,), conv_general_dilated=print, rngs=nnx.Rngs(0))), "its own conv_general_dilated"),
    "a convolution that computes something else": (lambda: f4.ConvSpec.from_layer(Tenfold(3, (3, 3))), "Tenfold has a call or a param method of its own"),
    "a convolution with another kernel": (lambda: f4.ConvSpec.from_layer(nn.Conv(3, (3, 3), promote_dtype=print)), "Conv has its own promote_dtype"),
    "a dictionary as spec": (lambda: f4.bound(K, {"strides": 2}), r"spec must be a ConvSpec \(of a layer, ConvSpec.from_layer\(layer\)\), got a dict with int in bound"),
    "a dictionary as state": (lambda: f4.step(K, {"vectors": 1}), "state must be what init, or the step before, returned, got a dict with int in step"),
    "objects": (lambda: f4.bound(K.astype(object)), "kernel has dtype object, which JAX does not know: cast it, .* in bound"),
    "extended precision": (lambda: f4.bound(K.astype(np.longdouble)), "kernel has dtype (longdouble|float128), which JAX does not know"),
    "a key of nothing": (lambda: f4.init(K, key=None), "key must be .* got NoneType in init"),
    "a key of floats": (lambda: f4.init(K, key=jnp.ones(2)), "key must be a key, as jax.random.key makes it, got float32"),
    "padding below zero": (lambda: jacobian.materialise(K, (3, 3), f4.ConvSpec(padding=-3)), r"padding \(\(-3, -3\), \(-3, -3\)\) crops more than an input of spatial size \(3, 3\) has"),
    "an array as method": (lambda: f4.bound(K, method=np.ones(3)), "unknown method"),
    "unknown ladder method": (lambda: f4.ladder.init(K, key=KEY, method="gram"), "unknown method 'gram': choose one of four, weighted, grid"),
    "a grid too coarse": (lambda: f4.bound(K, method="grid", points=2), r"a grid of \(2, 2\) points is too coarse for \(3, 3\) taps: .* as taps, \(3, 3\)"),
    "a training grid too coarse": (lambda: f4.ladder.init(K, key=KEY, points=2), "too coarse"),
    "a hybrid grid too coarse": (lambda: f4.bound(K, method="hybrid", points=1), "too coarse for .* taps"),
    "half a point": (lambda: f4.bound(K, method="grid", points=6.5), "points must be an int, got 6.5"),
    "points of no grid": (lambda: f4.bound(K, points=6), "points belong to the methods 'grid' and 'hybrid', not to 'four'"),
    "points in training": (lambda: f4.ladder.init(K, key=KEY, method="four", points=6), "points belong to method 'grid', not to 'four'"),
    "iterations of no Gram": (lambda: f4.bound(K, method="grid", iterations=6), "iterations belong to the methods 'gram'"),
    "no Gram iterations": (lambda: f4.bound(K, method="gram", iterations=0), "iterations must be at least 1, got 0"),
    "another ladder state": (lambda: f4.ladder.step(np.ones((5, 5, 2, 4), np.float32), f4.ladder.init(K, key=KEY)), "this state belongs to another kernel .*ladder.init"),
    "a power state on the ladder": (lambda: f4.ladder.step(K, state(K)), "state must be a LadderState from ladder.init"),
    "a traced interval": (lambda: jax.jit(lambda k: f4.norm_interval(k).upper)(K), "norm_interval is a host function .* inside jit use fantastic4.bound"),
    "rtol of zero": (lambda: f4.norm_interval(K, rtol=0.0), "rtol must be a positive number, got 0.0"),
    "rtol too small": (lambda: f4.norm_interval(K, rtol=1e-15), "rtol 1e-15 is below what float64 can certify .* the least is"),
    "no tests": (lambda: f4.norm_interval(K, max_tests=0), "max_tests must be at least 1, got 0"),
    "float8": (
        lambda: f4.bound(K.astype(jnp.float8_e4m3fn)), "real floating dtype of 16 bits or more, got float8_e4m3fn: cast"
    ),
    "the other byte order": (lambda: f4.bound(np.asarray(K).astype(">f4")), r"kernel has dtype >f4, which JAX does not"),
    "interval in the other byte order": (lambda: f4.norm_interval(np.ones((3, 1, 1), ">f8")), "kernel has dtype >f8"),
    "interval of long doubles": (lambda: f4.norm_interval(np.ones((3, 1, 1), np.longdouble)), r"cast it, \.astype"),
    "interval of integers": (lambda: f4.norm_interval(np.ones((3, 3, 2, 4), int)), "kernel must have a real floating dtype"),
    "interval at size 0": (lambda: f4.norm_interval(K, input_shape=(0, 4)), "entries of at least 1"),
    "interval at a wrong rank": (lambda: f4.norm_interval(K, input_shape=(4,)), r"input_shape \(4,\) must have 2 entries"),
    "clipping zero padding": (lambda: f4.clip_singular_values(K, (4, 4), 1.0, f4.ConvSpec()), "exact for CIRCULAR padding"),
    "clipping to a word": (lambda: f4.clip_singular_values(K, (4, 4), "one"), "maximum must be a number or a scalar array, got 'one'"),
    "clipping to a negative number": (lambda: f4.clip_singular_values(K, (4, 4), -1.0), "maximum must be a positive number, got -1.0"),
    "a selection by number": (lambda: network.find({"kernel": K}, select=3), "select must be a glob, several, or a function of path and leaf, got 3"),
    "a matrix of unknown inputs": (lambda: network.find({"DenseGeneral_0": {"kernel": K[0]}}), r"DenseGeneral_0/kernel: a kernel of shape \(3, 2, 4\) does not tell which of its axes are inputs: pass specs="),
    "many convolutions or one matrix": (lambda: network.find({"a": {"kernel": np.ones((2, 3, 2, 4)), "bias": np.ones((2, 4))}}), "does not tell which of its axes are inputs"),
    "negative curvatures": (lambda: robustness.curvature_radii(lambda x: x, np.ones((1, 2), np.float32), -1.0), "curvatures must not be negative"),
    "negative margins": (lambda: robustness.lipschitz_radii(lambda x: x, np.ones((1, 2), np.float32), -1.0), "margins must not be negative"),
    "an attack inwards": (lambda: robustness.attack(lambda x: x, jnp.ones((1, 2)), jnp.zeros(1, int), -1.0, key=KEY), "epsilon must be a finite number that is not negative"),
    "clipping without cropping, dilated": (lambda: f4.clip_singular_values(K, (4, 4), 1.0, f4.ConvSpec(padding="CIRCULAR", dilation=2), crop=False), "crop=False is for convolutions without dilation"),
    "another layer's Ryu state": (lambda: f4.heuristics.ryu_step(K, state(K)), "state must be a RyuState from ryu_init"),
    "another layer's Sedghi state": (lambda: f4.heuristics.sedghi_step(K, f4.heuristics.sedghi_init(K, (4, 4), key=KEY), (6, 6)), "this state belongs to another layer"),
    "Sedghi of zero padding": (lambda: f4.estimate_sedghi(K, (4, 4), f4.ConvSpec(), key=KEY), "exact for CIRCULAR padding"),
    "vectors of zero padding": (lambda: f4.singular_vectors(K, (4, 4), f4.ConvSpec()), "exact for CIRCULAR padding"),
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(CASES))
def test_bad_input_is_a_value_error_that_names_the_fix(name):
    call, message = CASES[name]
    with pytest.raises(ValueError, match=message):
        call()


def test_it_is_raised_while_tracing():
    with pytest.raises(ValueError, match="groups 3 must divide"):
        jax.jit(lambda k: f4.four_bounds(k, f4.ConvSpec(groups=3)).min()).lower(K)


def test_a_missing_argument_names_the_function():
    with pytest.raises(TypeError, match="estimate_tnn: missing a required argument: 'key'"):
        f4.estimate_tnn(jnp.ones((3, 3, 1, 1)))


@pytest.mark.parametrize(
    ("setting", "strict"), [("numpy_rank_promotion", "raise"), ("numpy_dtype_promotion", "strict")]
)
def test_a_strict_configuration_is_for_the_users_code(setting, strict):
    """What is set to find mistakes in a training script finds none here, under differentiation either.

    It finds them in what is traced: hardly anything need run.
    """
    kernel = jax.random.normal(jax.random.key(0), (2, 1, 2, 3))
    w = jnp.ones((3, 3))
    with getattr(jax, setting)(strict):
        for method in ("weighted", "hybrid", "grid", "gram_conv"):
            jax.eval_shape(jax.grad(lambda k, method=method: f4.bound(k, method=method)), kernel)
        assert f4.norm_interval(kernel, input_shape=(3, 3)).lower <= f4.norm_interval(kernel).upper
        jax.eval_shape(lambda k: f4.exact_norm(f4.clip_singular_values(k, (4, 4), 1.0), (4, 4)), kernel)
        jax.eval_shape(lambda w: lipschitz.curvature(lambda x: jnp.sum(jnp.tanh(x @ w)), jnp.ones((1, 3))), w)
        state = jax.eval_shape(lambda k: network.init({"kernel": k}, method="grid", key=jax.random.key(1)), kernel)
        jax.eval_shape(jax.grad(lambda params, state: network.step(params, state)[0]), {"kernel": kernel}, state)
        half = {"kernel": kernel.astype(jnp.bfloat16)}
        penalty = transforms.add_spectral_penalty(lambda count: 0.1 * jnp.ones(()))
        jax.eval_shape(lambda half: penalty.update(half, penalty.init(half), half), half)
        for mode in ("soft", "hard"):
            layer = linen.SpectralBound(nn.Dense(3, param_dtype=jnp.bfloat16, dtype=jnp.bfloat16), mode=mode)
            jax.eval_shape(layer.init, jax.random.key(0), jnp.ones((1, 3), jnp.bfloat16))
