"""The four bounds and their warm-started step: values, tightness, derivatives, transformations."""

import cases
import chex
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

import fantastic4 as f4
from fantastic4 import unfolding

KERNEL = cases.draw(np.random.default_rng(3), (3, 2, 4, 5), "normal")
SHAPES = [(3, 2, 4, 5), (4, 3, 2), (2, 3, 2, 2, 3)]


def start(kernel, spec=f4.ConvSpec(), **options):  # noqa: B008
    return f4.init(kernel, spec, key=jax.random.key(0), **options)


@pytest.mark.parametrize("shape", SHAPES)
def test_values_are_the_norms_of_the_unfoldings(shape):
    kernel = cases.draw(np.random.default_rng(0), shape, "normal")
    root = np.sqrt(np.prod(shape[:-2]))
    four = f4.four_bounds(kernel)
    truth = {name: root * value for name, value in oracle.unfoldings(kernel).items()}
    assert set(four.names) == set(truth)
    for name in four.names:
        assert truth[name] <= float(four[name]) <= 1.001 * truth[name]
    assert four.t is not None
    assert float(four.t) == float(four["T"])
    assert float(four.u) == float(four["U"])


def test_unfoldings_of_small_kernels_share_a_program_and_large_ones_those_of_one_shape():
    groups = lambda *shapes: {
        tuple(same): stacked.shape for same, stacked in unfolding.stacks([jnp.ones((2, *shape)) for shape in shapes])
    }
    assert groups((9, 6), (3, 18), (27, 2)) == {(0, 1, 2): (3, 2, 27, 6)}
    assert groups((48, 48), (144, 16), (16, 144)) == {(0,): (1, 2, 48, 48), (1, 2): (2, 2, 144, 16)}


def test_names_are_those_of_the_paper():
    four = f4.four_bounds(KERNEL)
    matrices = {name: np.sqrt(6) * oracle.norm(m) for name, m in oracle.matrices_2d(KERNEL).items()}
    assert four.names == ("R", "S", "T", "U")
    np.testing.assert_allclose([four.r, four.s, four.t, four.u], [matrices[n] for n in "RSTU"], rtol=1e-3)
    np.testing.assert_array_equal(four.values, [four.r, four.s, four.t, four.u])
    with pytest.raises(ValueError, match=r"no unfolding 'R': this kernel has T, U"):
        _ = f4.four_bounds(KERNEL[0]).r


def test_equal_taps_are_exact_and_a_single_tap_is_off_by_the_root_of_their_number():
    rng = np.random.default_rng(0)
    ones = cases.draw(rng, (3, 5, 3, 4), "ones")
    truth = 15 * oracle.norm(ones[0, 0])
    assert truth <= float(f4.four_bounds(ones).min()) <= 1.001 * truth
    single = cases.draw(rng, (3, 5, 3, 4), "one-tap")
    truth = np.sqrt(15) * oracle.norm(single.sum((0, 1)))
    for value in f4.four_bounds(single).values:
        assert truth <= float(value) <= 1.001 * truth


def test_one_by_one_is_exact():
    kernel = cases.draw(np.random.default_rng(0), (1, 1, 6, 9), "normal")
    truth = oracle.norm(kernel[0, 0])
    values = np.asarray(f4.four_bounds(kernel).values)
    assert (truth <= values).all()
    assert (values <= 1.001 * truth).all()


def test_bracket():
    """max ‖M‖ ≤ σ_circ(n ≥ k) ≤ √(hw) min ‖M‖: no bound is off by more than √(hw)."""
    four = f4.four_bounds(KERNEL)
    exact = oracle.circular_values(KERNEL, (8, 8))[0]
    assert float(four.values.max()) / np.sqrt(6) <= 1.001 * exact
    assert exact <= float(four.min())


def test_step_is_plain_power_iteration_on_all_four():
    """The fused two-pass products against explicit matrices, from the same vectors."""
    state = start(KERNEL, warmup=0)
    count = 3
    four, _ = f4.step(KERNEL, state, iterations=count)
    outputs = np.asarray(state.vectors[0], np.float64)
    parts = np.split(outputs, np.cumsum([3, 2, 1]))  # of 3×2 taps: R has a vector a row, S a column, T one, U a tap
    vectors = {name: part.ravel() for name, part in zip("RSTU", parts, strict=True)}
    truth = oracle.power_unfoldings(KERNEL, vectors, count)
    np.testing.assert_allclose(four.values / np.sqrt(6), [truth[n] for n in "RSTU"], rtol=1e-5)


@pytest.mark.parametrize("name", [
    "same", "groups", "depthwise", "one-tap", "row", "transposed", "1d", "3d", "stride", "stride-mixed",
    "dilation-stride", "groups-stride", "transposed-valid", "1d-causal-stride", "3d-transposed",
])  # fmt: skip
def test_step_comes_from_below_and_converges(name):
    spec = f4.ConvSpec(**cases.LAYERS[name][2])
    kernel = cases.kernel(name)
    sound = np.asarray(f4.four_bounds(kernel, spec).values)
    rough, state = f4.step(kernel, start(kernel, spec, warmup=0), spec)
    for _ in range(200):  # one by one: a program of many steps would have to be compiled
        fine, state = f4.step(kernel, state, spec)
    assert (np.asarray(rough.values) <= sound).all()
    assert (np.asarray(fine.values) <= sound).all()
    np.testing.assert_allclose(fine.values, sound, rtol=2e-3)


def test_an_estimate_is_no_bound():
    """Why `step` is not called one: a step from random vectors lies below the exact norm of a 1×1 layer.

    This is also the test that the one-sided tests can fail."""
    kernel = cases.draw(np.random.default_rng(0), (1, 1, 64, 64), "normal")
    four, _ = f4.step(kernel, start(kernel, warmup=0))
    assert float(four.min()) < 0.9 * oracle.norm(kernel[0, 0])


def numeric(function, kernel, direction, step=1e-3):
    return (float(function(kernel + step * direction)) - float(function(kernel - step * direction))) / (2 * step)


@pytest.mark.parametrize("name", ["same", "groups-stride", "transposed-stride", "3d", "reflect"])
def test_gradient(name):
    spec = f4.ConvSpec(**cases.LAYERS[name][2])
    kernel = jnp.asarray(cases.kernel(name))
    direction = jnp.asarray(cases.draw(np.random.default_rng(1), kernel.shape, "normal"))
    state = start(kernel, spec)
    sound = lambda k: f4.four_bounds(k, spec).min()
    converged = lambda k: f4.step(k, state, spec, iterations=300)[0].min()
    derivatives = lambda f: jax.jit(lambda k: (*jax.jvp(f, (k,), (direction,)), jnp.vdot(jax.grad(f)(k), direction)))
    expected = None
    for function in (derivatives(converged), derivatives(sound)):
        _, forward, reverse = function(kernel)
        if expected is None:
            expected = numeric(lambda k, f=function: f(k)[0], kernel, direction)
        np.testing.assert_allclose(reverse, forward, rtol=1e-4)
        np.testing.assert_allclose(reverse, expected, rtol=2e-2, atol=2e-2)


def test_gradient_of_each_value():
    kernel = jnp.asarray(KERNEL)
    jacobian = jax.jacrev(lambda k: f4.four_bounds(k).values)(kernel)
    chex.assert_trees_all_close(jacobian, jax.jacfwd(lambda k: f4.four_bounds(k).values)(kernel), rtol=1e-4, atol=1e-5)
    for label, gradient in zip("RSTU", jacobian, strict=True):  # √(hw) u vᵀ, folded back
        left, values, right = np.linalg.svd(oracle.matrices_2d(KERNEL)[label])
        inner = np.sum(np.asarray(gradient) * KERNEL)  # homogeneous of degree one
        np.testing.assert_allclose(inner, np.sqrt(6) * values[0], rtol=1e-3)
        np.testing.assert_allclose(oracle.norm(oracle.matrices_2d(gradient)[label]), np.sqrt(6), rtol=1e-3)
    best = int(f4.four_bounds(kernel).argmin())
    chex.assert_trees_all_close(
        jacobian[best], jax.grad(lambda k: f4.four_bounds(k).min())(kernel), rtol=1e-4, atol=1e-5
    )


def test_second_derivative_is_that_of_constant_vectors():
    state = start(KERNEL)
    hessian = jax.hessian(lambda s: f4.step(s * jnp.asarray(KERNEL), state)[0].min())(1.0)
    assert float(hessian) == 0.0


def test_no_gradient_through_the_state():
    kernel = jnp.asarray(KERNEL)

    def twice(kernel):
        _, state = f4.step(kernel, start(kernel))
        return sum(jnp.sum(leaf) for leaf in jax.tree.leaves(state))

    assert not np.any(jax.grad(twice)(kernel))


def test_two_forwards_before_one_backward():
    """State is a value: a second step does not disturb the derivative of the first."""
    kernel = jnp.asarray(KERNEL)
    state = start(kernel)

    def once(kernel):
        return f4.step(kernel, state)[0].min()

    def with_another(kernel):
        four, new = f4.step(kernel, state)
        f4.step(2 * kernel, new)
        return four.min()

    chex.assert_trees_all_close(jax.grad(once)(kernel), jax.grad(with_another)(kernel))


def test_vmap_scan_and_jit_agree_with_a_loop():
    kernels = jnp.stack([jnp.asarray(cases.draw(np.random.default_rng(i), (3, 3, 2, 3), "normal")) for i in range(4)])
    each = jnp.stack([f4.four_bounds(k).values for k in kernels])
    chex.assert_trees_all_close(jax.vmap(lambda k: f4.four_bounds(k).values)(kernels), each, rtol=2e-4)
    gradients = jnp.stack([jax.grad(f4.bound)(k) for k in kernels])
    chex.assert_trees_all_close(jax.vmap(jax.grad(f4.bound))(kernels), gradients, rtol=1e-3, atol=1e-3)
    states = jax.vmap(lambda k: start(k))(kernels)
    batched, _ = jax.vmap(lambda k, s: f4.step(k, s))(kernels, states)
    single = [f4.step(k, start(k))[0].values for k in kernels]
    chex.assert_trees_all_close(batched.values, jnp.stack(single), rtol=1e-5)

    def body(state, _):
        four, state = f4.step(kernels[0], state)
        return state, four.min()

    _, history = jax.lax.scan(body, start(kernels[0], warmup=0), length=5)
    state = start(kernels[0], warmup=0)
    for value in history:
        four, state = f4.step(kernels[0], state)
        np.testing.assert_allclose(value, four.min(), rtol=1e-5)

    @jax.grad
    def through_scan(kernel):
        def body(state, _):
            four, state = f4.step(kernel, state)
            return state, four.min()

        return jax.lax.scan(body, start(kernel), length=3)[1].sum()

    np.testing.assert_allclose(jnp.vdot(through_scan(kernels[0]), kernels[0]), 3 * f4.bound(kernels[0]), rtol=2e-2)


def test_a_second_call_traces_nothing():
    state = start(KERNEL)
    step = jax.jit(chex.assert_max_traces(lambda k, s: f4.step(k, s), n=1))
    for _ in range(3):
        _, state = step(KERNEL, state)
    bounds = jax.jit(chex.assert_max_traces(lambda k: f4.four_bounds(k, f4.ConvSpec(strides=[2, 1])), n=1))
    bounds(KERNEL)
    bounds(KERNEL + 1)


def equations(jaxpr):
    for equation in jaxpr.eqns:
        yield equation
        for value in equation.params.values():
            for inner in value if isinstance(value, tuple | list) else (value,):
                if hasattr(inner, "jaxpr"):
                    yield from equations(inner.jaxpr)
                elif hasattr(inner, "eqns"):
                    yield from equations(inner)


@pytest.mark.parametrize("strides", [1, 2])
def test_a_step_reads_the_kernel_twice_and_its_gradient_writes_it_once(strides):
    kernel, spec = jnp.ones((3, 3, 64, 64)), f4.ConvSpec(strides=strides)
    state = start(kernel, spec)
    jaxpr = jax.make_jaxpr(lambda k: f4.step(k, state, spec)[0].min())(kernel)
    reads = [
        e
        for e in equations(jaxpr.jaxpr)
        if e.primitive.name == "dot_general" and any(v.aval.size == kernel.size for v in e.invars)
    ]
    assert len(reads) == 2
    compiled = jax.jit(jax.value_and_grad(lambda k: f4.step(k, state, spec)[0].min())).lower(kernel).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < kernel.nbytes / 2


def test_a_step_is_one_power_iteration_of_each_matrix():
    kernel = cases.draw(np.random.default_rng(5), (3, 3, 32, 7), "normal").astype(np.float32)
    state = start(kernel, warmup=0)
    four, after = f4.step(kernel, state)
    ends = np.cumsum([3, 3, 1])
    old, new = (np.split(np.asarray(x.vectors[0], np.float64), ends) for x in (state, after))
    owned = {"R": ("ho", (3, -1)), "S": ("wo", (3, -1)), "T": ("o", (-1,)), "U": ("hwo", (3, 3, -1))}
    for m, (name, (mine, size)) in enumerate(owned.items()):
        others = "".join(a for a in "hw" if a not in mine) + "i"
        start_from = old[m].reshape(size)
        right = np.einsum(f"hwio,{mine}->{others}", kernel.astype(np.float64), start_from, optimize=True)
        right /= np.linalg.norm(right)
        left = np.einsum(f"hwio,{others}->{mine}", kernel.astype(np.float64), right, optimize=True)
        np.testing.assert_allclose(four[name], 3 * np.linalg.norm(left), rtol=1e-5)
        np.testing.assert_allclose(new[m].reshape(size), left / np.sum(left * left), rtol=0, atol=1e-5 * new[m].max())


@pytest.mark.parametrize(
    ("shape", "strides"), [((3, 3, 2, 4), (2, 2)), ((5, 4, 3, 2), (2, 3)), ((2, 3, 2, 3), (3, 1)), ((7, 2, 3), (3,))]
)
def test_a_strided_step_is_that_of_the_polyphase_kernel(shape, strides):
    """Which is never written down: here it is, tap by tap, as the kernel of a layer that is not strided."""
    kernel = cases.draw(np.random.default_rng(8), shape, "normal").astype(np.float32)
    spatial, (c_in, c_out), phases = shape[:-2], shape[-2:], np.minimum(shape[:-2], strides)
    folded = np.zeros((*-(-np.array(spatial) // phases), *phases, c_in, c_out), np.float32)
    place = {tap: (*(tap // phases), *(tap % phases)) for tap in np.ndindex(spatial)}
    for tap in place:
        folded[place[tap]] = kernel[tap]
    plain = folded.reshape(*folded.shape[: len(spatial)], -1, c_out)

    def run(kernel, spec):
        state = start(kernel, spec)
        step = lambda k: f4.step(k, state, spec, iterations=300)[0]
        return step(kernel).values, jax.grad(lambda k: step(k).min())(kernel)

    values, gradient = run(kernel, f4.ConvSpec(strides=strides))
    truth, of_plain = run(plain, f4.ConvSpec())
    np.testing.assert_allclose(values, truth, rtol=1e-5)
    of_folded = np.asarray(of_plain).reshape(folded.shape)
    for tap in place:
        np.testing.assert_allclose(gradient[tap], of_folded[place[tap]], atol=1e-3)


def test_products_run_at_the_highest_precision():
    """On a GPU the default for float32 is TF32; a CPU cannot show that, the jaxpr can."""
    state = start(KERNEL)
    for function in (
        lambda k: jax.grad(f4.bound)(k),
        lambda k: jax.grad(lambda k: f4.step(k, state, iterations=2)[0].values.sum())(k),
        lambda k: f4.singular_values(k, (4, 4)),
        lambda k: jax.grad(f4.exact_norm)(k, (4, 4)),
    ):
        dots = [e for e in equations(jax.make_jaxpr(function)(KERNEL).jaxpr) if e.primitive.name == "dot_general"]
        assert dots
        for dot in dots:
            assert dot.params["precision"] == (jax.lax.Precision.HIGHEST,) * 2


def test_zero_kernel():
    zero = jnp.zeros((3, 3, 2, 2))
    state = start(zero)
    four, after = f4.step(zero, state)
    for value in (four.min(), f4.bound(zero), *f4.four_bounds(zero).values):
        assert float(value) == 0
    for gradient in (jax.grad(f4.bound)(zero), jax.grad(lambda k: f4.step(k, state)[0].min())(zero)):
        assert np.isfinite(gradient).all()
    chex.assert_trees_all_equal(state.vectors, after.vectors)
    later, _ = f4.step(zero + 1, after, iterations=30)  # the state was not lost
    np.testing.assert_allclose(later.min(), f4.bound(zero + 1), rtol=1e-3)


@pytest.mark.parametrize("shape", [(1, 1, 4, 6), (3, 3, 4, 6), (5, 7, 1, 1)])  # one tap, one matrix, too many rows
def test_a_kernel_that_vanishes_from_almost_nothing(shape):
    """The state of a tiny kernel holds huge vectors: none of them may become infinite, or no number."""
    tiny = 1e-37 * jnp.asarray(cases.draw(np.random.default_rng(5), shape, "normal"), jnp.float32)
    state = start(tiny)
    four, after = f4.step(jnp.zeros_like(tiny), state)
    assert float(four.min()) == 0
    chex.assert_trees_all_equal(state, after)
    later, _ = f4.step(tiny, after, iterations=30)  # the state was not lost
    np.testing.assert_allclose(later.min(), f4.bound(tiny), rtol=1e-3)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_is_computed_in_float32(dtype):
    kernel = jnp.asarray(KERNEL, dtype)
    four = f4.four_bounds(kernel)
    assert four.values.dtype == jnp.float32
    chex.assert_trees_all_equal(four.values, f4.four_bounds(kernel.astype(jnp.float32)).values)
    value, gradient = jax.value_and_grad(lambda k: f4.step(k, start(k))[0].min())(kernel)
    assert value.dtype == jnp.float32
    assert gradient.dtype == dtype
    assert np.isfinite(np.asarray(gradient, np.float32)).all()


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
def test_nan_and_infinity_come_out_as_nan(poison):
    kernel = jnp.asarray(KERNEL).at[0, 0, 0, 0].set(poison)
    assert np.isnan(f4.four_bounds(kernel).values).all()
    assert np.isnan(f4.bound(kernel))
    four, state = f4.step(kernel, start(KERNEL))
    assert np.isnan(four.min())
    four, _ = f4.step(KERNEL, state, iterations=50)  # one bad step does not poison the next
    np.testing.assert_allclose(four.min(), f4.bound(KERNEL), rtol=1e-2)


def test_float64(x64):
    kernel = np.asarray(KERNEL, np.float64)
    four = f4.four_bounds(kernel)
    truth = np.sqrt(6) * np.array([oracle.norm(m) for m in oracle.matrices_2d(kernel).values()])
    assert four.values.dtype == np.float64
    assert (np.asarray(four.values) >= truth).all()
    np.testing.assert_allclose(four.values, truth, rtol=1e-3)


def test_the_unfoldings_that_coincide_are_computed_once():
    assert unfolding.distinct((1, 1)) == (((),), (0, 0, 0, 0))
    assert len(unfolding.distinct((1, 5))[0]) == 2
    assert start(np.ones((1, 1, 4, 6), np.float32)).vectors.shape == (1, 2, 6)


def test_a_nan_among_thousands_is_not_lost():
    """On a CPU a maximum over 4,096 entries or more drops a NaN: in the entries, and in the groups."""
    zero = np.zeros((3, 3, 32, 32), np.float32)
    zero[0, 0, 0, 0] = np.nan
    assert np.isnan(f4.four_bounds(zero).values).all()
    groups = np.ones((1, 1, 1, 4096), np.float32)
    groups[0, 0, 0, 7] = np.nan
    assert np.isnan(f4.four_bounds(groups, f4.ConvSpec(groups=4096)).min())
    assert np.isnan(
        f4.step(groups, start(np.nan_to_num(groups), f4.ConvSpec(groups=4096)), f4.ConvSpec(groups=4096))[0].t
    )


@pytest.mark.parametrize("method", ["four", "weighted", "hybrid", "grid", "gram", "gram_conv"])
def test_a_sum_in_half_precision_is_bounded_as_it_is_stored(method):
    """XLA may drop both conversions, and have a bound of the sum that was never rounded."""

    @jax.jit
    def sum_and_bound(a, b):
        return a + b, f4.bound(a + b, method=method)

    one, little = (jnp.full((1, 1, 1, 1), x, jnp.bfloat16) for x in (1.0, 0.0045))
    stored, bound = sum_and_bound(one, little)
    assert float(bound) >= float(stored.ravel()[0]) == 1.0078125
