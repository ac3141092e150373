"""Whole params trees: kernels found, penalties, states, reports; trees of linen, NNX, Equinox and Haiku."""

import functools
import re

import chex
import equinox as eqx
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from flax import linen as nn
from flax import nnx

import fantastic4 as f4
from fantastic4 import dense, ladder, network
from fantastic4.tables import at_most

KEY = jax.random.key(0)


class Small(nn.Module):
    @nn.compact
    def __call__(self, x):
        for i, stride in enumerate((1, 2, 1)):
            x = nn.relu(nn.GroupNorm(2)(nn.Conv(4, (3, 3), strides=stride, name=f"conv{i}")(x)))
        return nn.Dense(3, name="head")(x.mean((1, 2)))


@pytest.fixture(scope="module")
def params():
    return Small().init(KEY, jnp.ones((1, 6, 6, 4)))["params"]


def test_linen(params):
    layers = network.find(params)
    assert [layer.path for layer in layers] == ["conv0/kernel", "conv1/kernel", "conv2/kernel", "head/kernel"]
    state = network.init(params, key=KEY, warmup=100)
    penalty, state = network.step(params, state)
    truth = [float(f4.four_bounds(params[f"conv{i}"]["kernel"]).min()) for i in range(3)]
    truth.append(np.linalg.norm(np.asarray(params["head"]["kernel"]), 2))
    by_name = state.by_name()
    np.testing.assert_allclose([by_name[layer.path] for layer in layers], truth, rtol=1e-3)
    np.testing.assert_allclose(penalty, sum(truth), rtol=1e-3)
    assert state.values.shape == (4,)


def test_nnx():
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.convs = nnx.List([nnx.Conv(2, 2, (3, 3), rngs=rngs) for _ in range(2)])
            self.out = nnx.Linear(2, 3, rngs=rngs)

    model = Model(nnx.Rngs(0))
    paths = ["convs/0/kernel", "convs/1/kernel", "out/kernel"]
    graph, state = nnx.split(model)
    for tree in (state, nnx.state(model, nnx.Param), nnx.to_pure_dict(state), model):
        assert [layer.path for layer in network.find(tree)] == paths
        values = network.step(tree, network.init(tree, key=KEY, warmup=60))[1].by_name()
        np.testing.assert_allclose(
            values["convs/1/kernel"], f4.four_bounds(model.convs[1].kernel[...]).min(), rtol=1e-3
        )
    gradient = jax.grad(lambda s: network.step(s, network.init(s, key=KEY))[0])(state)
    assert float(jnp.abs(gradient["out"]["kernel"][...]).sum()) > 0
    assert float(jnp.abs(gradient["out"]["bias"][...]).sum()) == 0


def test_equinox():
    keys = jax.random.split(KEY, 3)
    model = eqx.nn.Sequential(
        [
            eqx.nn.Conv2d(2, 3, (3, 2), key=keys[0]),
            eqx.nn.Lambda(jax.nn.relu),
            eqx.nn.ConvTranspose2d(3, 2, 3, stride=2, key=keys[1]),
            eqx.nn.Linear(4, 2, key=keys[2]),
        ]
    )
    specs = {"layers/2/weight": f4.ConvSpec(strides=2, padding="VALID", transposed=True)}
    state = network.init(model, key=KEY, specs=specs, warmup=100)
    _, state = network.step(model, state)
    values = state.by_name()
    first = f4.from_torch(np.asarray(model.layers[0].weight))
    np.testing.assert_allclose(values["layers/0/weight"], f4.four_bounds(first).min(), rtol=1e-3)
    # The layer itself, column by column: Equinox's own function.
    layer, columns = model.layers[2], []
    for i in range(3 * 4):
        x = jnp.zeros(12).at[i].set(1).reshape(3, 2, 2)
        columns.append(np.ravel(layer(x) - layer(0 * x)))
    truth = np.linalg.norm(np.stack(columns), 2)
    bounds = network.bounds(model, network.find(model, specs=specs))
    assert truth <= float(bounds["layers/2/weight"]) <= 3 * truth
    np.testing.assert_allclose(values["layers/3/weight"], np.linalg.norm(model.layers[3].weight, 2), rtol=1e-3)


def test_haiku():
    model = hk.transform(lambda x: hk.Linear(4)(hk.Conv2D(3, 3)(x).mean((1, 2))))
    params = model.init(KEY, jnp.ones((1, 5, 5, 2)))
    assert [layer.path for layer in network.find(params)] == ["conv2_d/w", "linear/w"]


@pytest.mark.parametrize("use_bias", [False, True])
def test_attention_with_fewer_heads_of_keys_and_values(use_bias):
    """Taken for convolutions, the projections would have bounds below their norms."""
    layer = nnx.MultiHeadAttention(4, 8, 16, num_kv_heads=2, use_bias=use_bias, decode=False, rngs=nnx.Rngs(0))
    layer.query.kernel[...] = jnp.zeros((8, 4, 4)).at[0].set(jnp.eye(4))
    bounds = {row.name.split("/")[0]: row.bound for row in network.report(nnx.state(layer, nnx.Param)).rows}
    for name, axes in {"query": 1, "key": 1, "value": 1, "out": 2}.items():
        kernel = np.asarray(getattr(layer, name).kernel[...], np.float64)
        norm = np.linalg.norm(kernel.reshape(np.prod(kernel.shape[:axes]), -1), 2)
        assert norm <= bounds[name] <= norm * 1.01


def test_attention_is_made_of_matrices():
    params = nn.MultiHeadDotProductAttention(2, qkv_features=6).init(KEY, jnp.ones((1, 5, 4)))["params"]
    bounds = network.bounds(params, network.find(params))
    assert set(bounds) == {f"{name}/kernel" for name in ("query", "key", "value", "out")}
    for name, inputs in (("query", 4), ("out", 6)):
        truth = np.linalg.norm(np.reshape(params[name]["kernel"], (inputs, -1)), 2)
        assert truth <= float(bounds[f"{name}/kernel"]) <= 1.01 * truth


@pytest.mark.parametrize("name", ["query", "key", "value", "out"])
def test_a_convolution_of_a_name_in_attention_is_none_of_its_matrices(name):
    params = {name: {"kernel": jnp.zeros((3, 2, 2)).at[:, 0, 0].set(1.0), "bias": jnp.zeros(2)}}
    (layer,) = network.find(params)
    assert network.bounds(params, (layer,))[layer.path] >= 3


def test_what_is_not_known_by_its_name_is_refused():
    with pytest.raises(ValueError, match="two leaves of this tree have the path 'a/b/w'"):
        network.find({"a": {"b": {"w": jnp.eye(2) * 5}}, "a/b": {"w": jnp.eye(2)}})
    local = nn.ConvLocal(3, (3,), padding="VALID").init(KEY, jnp.ones((1, 5, 1)))["params"]
    with pytest.raises(ValueError, match="ConvLocal has a kernel for every pixel"):
        network.find({"ConvLocal_0": local})


def test_a_bias_of_several_axes_tells_a_matrix():
    layer, x = nn.DenseGeneral((4, 5), axis=(-2, -1), name="heads"), jnp.ones((1, 2, 3))
    params = {"heads": layer.init(KEY, x)["params"], "conv": nn.Conv(3, (2, 2)).init(KEY, x[None])["params"]}
    found = {layer.path: layer for layer in network.find(params)}
    assert found["heads/kernel"].spec == network.Dense(-2)
    assert found["conv/kernel"].spec == f4.ConvSpec()
    truth = np.linalg.norm(np.reshape(params["heads"]["kernel"], (6, 20)), 2)
    assert truth <= float(network.bounds(params, tuple(found.values()))["heads/kernel"]) <= 1.01 * truth


def test_stacked_layers():
    kernel = jax.random.normal(KEY, (5, 3, 3, 2, 4))
    tree = {"layers": {"kernel": kernel}}
    spec = {"layers/kernel": network.Stacked(f4.ConvSpec(groups=2))}
    state = network.init(tree, key=KEY, specs=spec, warmup=100)
    _, state = network.step(tree, state)
    truth = [float(f4.four_bounds(k, f4.ConvSpec(groups=2)).min()) for k in kernel]
    np.testing.assert_allclose(state.values, truth, rtol=1e-3)
    assert state.names[1] == "layers/kernel[1]"
    bounds = network.bounds(tree, network.find(tree, specs=spec))["layers/kernel"]
    np.testing.assert_allclose(bounds, truth, rtol=1e-6)


def test_a_glob_of_stacked_layers_passes_over_their_biases():
    params = nn.vmap(nn.Conv, {"params": 0}, {"params": True}, axis_size=3)(4, (3, 3)).init(
        KEY, jnp.ones((3, 1, 5, 5, 2))
    )
    (layer,) = network.find(params["params"], specs={"*": network.Stacked()})
    assert layer.path == "kernel"


@pytest.mark.parametrize(
    ("layer", "x"),
    [(nn.Dense, jnp.ones((3, 1, 4))), (nn.Dense, jnp.ones((3, 1, 5))), (nn.Conv, jnp.ones((3, 7, 2)))],
)
def test_a_stack_without_a_spec_is_known_by_its_bias(layer, x):
    """As one layer its number would be smaller than the product of all."""
    many = nn.vmap(layer, {"params": 0}, {"params": True}, axis_size=3)
    model = many(4) if layer is nn.Dense else many(4, (3,))
    params = model.init(KEY, x)["params"]
    with pytest.raises(ValueError, match=r"looks like 3 layers, as nn\.scan and vmap stack them") as caught:
        network.report(params)
    proposed = re.search(r"pass specs=(\{.*?\}), or", str(caught.value)).group(1)
    (found,) = network.find(params, specs=eval(proposed, {"network": network, "fantastic4": f4}))
    assert found.spec == network.Stacked(network.Dense() if layer is nn.Dense else f4.ConvSpec())


@pytest.mark.parametrize(
    "make",
    [
        lambda key: eqx.nn.Linear(4, 5, key=key),
        lambda key: eqx.nn.Linear(4, 4, key=key),
        lambda key: eqx.nn.Conv2d(2, 5, 3, key=key),
        lambda key: {"w": jax.random.normal(key, (4, 4)), "b": jnp.zeros(4)},  # Haiku's names
        lambda key: {"w": jax.random.normal(key, (3, 3, 4, 5)), "b": jnp.zeros(5)},
    ],
)
def test_stacks_of_other_libraries_are_known_by_their_bias_too(make):
    assert len(network.find(make(KEY))) == 1
    with pytest.raises(ValueError, match="looks like 3 layers"):
        network.find(eqx.filter_vmap(make)(jax.random.split(KEY, 3)))


def test_what_is_no_kernel_is_left_alone_and_named():
    class Scaled(eqx.nn.LayerNorm):
        pass

    keys = jax.random.split(KEY, 4)
    model = {
        "norm": eqx.nn.LayerNorm((4, 6, 6)),
        "own": Scaled((3, 4)),
        "words": eqx.nn.Embedding(7, 4, key=keys[0]),
        "cell": eqx.nn.GRUCell(4, 6, key=keys[1]),
        "head": eqx.nn.Linear(6, 2, key=keys[2]),
        "flax": {"embedding": jnp.ones((3, 2)), "bias": jnp.ones((2, 2)), "scale": jnp.ones(2)},
    }
    report = network.report(eqx.filter(model, eqx.is_inexact_array))
    assert [row.name for row in report.rows] == ["head/weight"]
    left = {"cell/weight_hh", "cell/weight_ih", "flax/embedding", "norm/weight", "own/weight", "words/weight"}
    assert {path for path, _ in report.left_out} == left
    assert "left out, no kernels by their names: cell/weight_ih (18×4), " in str(report)
    (layer,) = network.find(model, select="words*", specs={"words/weight": network.Dense()})
    assert layer.shape == (7, 4)
    assert network.report(model, select="head*").left_out == ()


def test_paths_of_nnx_are_those_of_its_variables():
    class Model(nnx.Module):
        def __init__(self):
            self.mix = nnx.Param(2 * jnp.eye(3))
            self.layer = nnx.Linear(3, 3, rngs=nnx.Rngs(0))

    model = Model()
    for tree in (model, nnx.state(model), nnx.to_pure_dict(nnx.state(model))):
        assert {layer.path for layer in network.find(tree, specs={"mix": network.Dense()})} == {"mix", "layer/kernel"}
    moved = network.replace(nnx.state(model), {"mix": jnp.zeros((3, 3))})
    assert not nnx.to_pure_dict(moved)["mix"].any()


def test_an_ensemble_has_the_values_of_each_member():
    params = {name: {"kernel": size * jnp.eye(3)} for name, size in (("a", 1.0), ("b", 2.0))}
    ensemble = jax.tree.map(lambda leaf: jnp.stack([leaf, 10 * leaf, 100 * leaf]), params)
    state = jax.vmap(lambda p: network.init(p, key=KEY))(ensemble)
    values = jax.vmap(network.step)(ensemble, state)[1].by_name()
    np.testing.assert_allclose(values["a/kernel"], [1, 10, 100], rtol=1e-3)
    np.testing.assert_allclose(values["b/kernel"], [2, 20, 200], rtol=1e-3)


def test_a_state_starts_with_numbers():
    with jax.debug_nans(True), jax.debug_infs(True):
        state = jax.jit(lambda p: network.init(p, key=KEY, warmup=1))({"kernel": jnp.eye(3)})
    assert not state.values.any()


def test_a_report_of_known_numbers_is_made_while_something_else_is_traced(params):
    found = []
    jax.jit(lambda x: x * (found.append(network.report(params)) or 1))(1.0)
    assert found[0] == network.report(params)


def test_bounds_find_their_layers_themselves(params):
    found = jax.jit(network.bounds)(params)
    assert found.keys() == network.bounds(params, network.find(params)).keys()
    with pytest.raises(ValueError, match=r"inside, call fantastic4\.network\.bounds"):
        jax.jit(network.report)(params)


@pytest.mark.parametrize("method", ladder.TRAINING_METHODS)
def test_together_or_alone_the_numbers_are_the_same(params, method, monkeypatch):
    """Kernels of one shape go through one vmap; each must come out as by itself."""
    state = network.init(params, key=KEY, method=method, warmup=100)
    assert max(map(len, state.groups)) == 3
    together = network.step(params, state)[1].by_name()
    monkeypatch.setattr(network, "_ALONE", 0)
    alone = network.init(params, key=KEY, method=method, warmup=100)
    assert max(map(len, alone.groups)) == 1
    alone = network.step(params, alone)[1].by_name()
    for name, value in together.items():
        np.testing.assert_allclose(value, alone[name], rtol=1e-3)


REDUCED = {
    "sum": lambda b, c: np.maximum(b - c, 0),
    "squared": lambda b, c: np.maximum(b - c, 0) ** 2,
    "log": lambda b, c: np.maximum(np.log(b / c), 0),
}


@pytest.mark.parametrize("globs_first", [True, False])
def test_a_path_goes_before_a_glob(params, globs_first):
    specs = {"*": f4.ConvSpec(strides=2), "conv1/kernel": f4.ConvSpec(padding="REFLECT")}
    specs = specs if globs_first else dict(reversed(specs.items()))
    found = {
        layer.path: layer.spec for layer in network.find(params, specs=specs, select=lambda path, _: "conv" in path)
    }
    assert found["conv1/kernel"] == f4.ConvSpec(padding="REFLECT")
    assert found["conv0/kernel"] == found["conv2/kernel"] == f4.ConvSpec(strides=2)


@pytest.mark.parametrize("step", [network.step, network.step_with_gradients])
def test_every_step_goes_on_from_the_one_before(params, step):
    state = network.init(params, key=KEY, warmup=0)
    _, state, *_ = step(params, state)
    first = state.values
    for _ in range(60):
        _, state, *_ = step(params, state)
    truth = network.step(params, network.init(params, key=KEY, warmup=200))[1].values
    assert np.min(first / truth) < 0.99
    np.testing.assert_allclose(state.values, truth, rtol=1e-2)


@pytest.mark.parametrize("reduce", network.REDUCTIONS)
def test_penalties(params, reduce):
    state = network.init(params, key=KEY, warmup=100)
    _, state = network.step(params, state)
    values = np.asarray(state.values, np.float64)
    plain, _ = network.step(params, state, reduce=reduce)
    wanted = np.log(values).sum() if reduce == "log" else (values ** (2 if reduce == "squared" else 1)).sum()
    np.testing.assert_allclose(plain, wanted, rtol=1e-3)
    c = float(np.median(values))
    penalty, _ = network.step(params, state, reduce=reduce, threshold=c, weights={"conv*": 0.5, "conv1/kernel": 3.0})
    scale = np.array([3.0 if n == "conv1/kernel" else 0.5 if n.startswith("conv") else 1.0 for n in state.names])
    np.testing.assert_allclose(penalty, (scale * REDUCED[reduce](values, c)).sum(), rtol=1e-3)


@pytest.mark.parametrize("reduce", network.REDUCTIONS)
def test_gradient_is_that_of_the_penalty(params, reduce):
    """Against finite differences of the sound bounds' minimum, which the penalty has reached."""
    state = network.init(params, key=KEY, warmup=300)
    gradient = jax.grad(lambda p: network.step(p, state, reduce=reduce, threshold=0.5)[0])(params)
    direction = jax.tree.map(lambda p: jax.random.normal(KEY, p.shape), params)

    def exact(p):
        values = [oracle_four(np.asarray(p[f"conv{i}"]["kernel"], np.float64)) for i in range(3)]
        values.append(np.linalg.norm(np.asarray(p["head"]["kernel"], np.float64), 2))
        return REDUCED[reduce](np.array(values), 0.5).sum()

    h = 1e-4
    shifted = [exact(jax.tree.map(lambda p, d: np.float64(p) + s * np.float64(d), params, direction)) for s in (h, -h)]
    along = sum(jnp.vdot(g, d) for g, d in zip(jax.tree.leaves(gradient), jax.tree.leaves(direction), strict=True))
    np.testing.assert_allclose(along, (shifted[0] - shifted[1]) / (2 * h), rtol=5e-3)


EVERY_KIND = {  # of leaf, spec and unfolding
    "strided": {"kernel": (3, 3, 4, 5)},
    "depthwise": {"kernel": (3, 3, 1, 6)},
    "transposed": {"kernel": (2, 2, 4, 3)},
    "reflect": {"kernel": (3, 4, 5)},
    "matrices": {"kernel": (3, 4, 4)},
    "same": {"kernel": (1, 1, 4, 6)},
    "too": {"kernel": (1, 1, 4, 6)},
    "torch": {"weight": (5, 4, 3)},
    "heads": {"kernel": (2, 3, 4)},
    "wide": {"kernel": (9, 7)},
}
SPECS = {
    "strided/kernel": f4.ConvSpec(strides=2),
    "depthwise/kernel": f4.ConvSpec(groups=6),
    "transposed/kernel": f4.ConvSpec(transposed=True, strides=2),
    "reflect/kernel": f4.ConvSpec(padding="REFLECT"),
    "matrices/kernel": network.Stacked(network.Dense()),
    "heads/kernel": network.Dense(2),
}


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("four", {"reduce": "log", "threshold": 1.5, "iterations": 2}),
        ("four", {"reduce": "squared", "weights": {"torch/*": 3.0, "matrices/kernel[[]1]": 0.5}}),
        ("weighted", {"weights": {"strided/kernel": 0.25}}),
        ("grid", {}),
    ],
)
def test_gradients_written_out_are_those_of_autodiff(method, options):
    leaves, tree = jax.tree.flatten(EVERY_KIND, is_leaf=lambda x: isinstance(x, tuple))
    rng = np.random.default_rng(0)
    params = jax.tree.unflatten(tree, [jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in leaves])
    params["wide"]["kernel"] = params["wide"]["kernel"].astype(jnp.bfloat16)
    state = network.init(params, key=KEY, specs=SPECS, method=method)
    penalty = functools.partial(network.step, state=state, **options)
    (value, new), gradient = jax.jit(jax.value_and_grad(penalty, has_aux=True))(params)
    written = network.step_with_gradients(params, state, **options)
    chex.assert_trees_all_close((value, new), written[:2], rtol=1e-5, atol=1e-6)
    assert set(written[2]) == {layer.path for layer in state.layers}
    given = network.replace(jax.tree.map(jnp.zeros_like, params), written[2])
    assert given["wide"]["kernel"].dtype == jnp.bfloat16
    chex.assert_trees_all_close(gradient, given, rtol=1e-2, atol=1e-5)
    chex.assert_trees_all_close(*(x | {"wide": 0} for x in (gradient, given)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("iterations", [1, 2])
def test_gradients_written_out_are_constants(iterations):
    """A derivative of a whole update, as meta-learning takes it, looks into no power iteration."""
    params = {"kernel": jnp.asarray(np.random.default_rng(0).standard_normal((1, 1, 4, 6)), jnp.float32)}
    state = network.init(params, key=KEY, warmup=2)

    def total(params):
        penalty, _, gradients = network.step_with_gradients(params, state, iterations=iterations)
        return penalty + jnp.sum(gradients["kernel"] ** 3)

    assert not np.any(jax.grad(total)(params)["kernel"])


def oracle_four(kernel):
    h, w, i, o = kernel.shape
    matrices = (
        kernel.transpose(0, 3, 1, 2).reshape(h * o, w * i),
        kernel.transpose(1, 3, 0, 2).reshape(w * o, h * i),
        kernel.reshape(-1, o),
        kernel.transpose(0, 1, 3, 2).reshape(-1, i),
    )
    return np.sqrt(h * w) * min(np.linalg.norm(m, 2) for m in matrices)


def test_one_trace_and_no_second(params):
    traces = []

    @jax.jit
    def train(params, state):
        traces.append(1)
        (penalty, state), gradient = jax.value_and_grad(lambda p: network.step(p, state, reduce="log"), has_aux=True)(
            params
        )
        return jax.tree.map(lambda p, g: p - 0.1 * g, params, gradient), state, penalty

    state = network.init(params, key=KEY)
    penalties = []
    for _ in range(4):
        params, state, penalty = train(params, state)
        penalties.append(float(penalty))
    assert len(traces) == 1
    assert penalties == sorted(penalties, reverse=True)


def test_half_precision_and_zeros(params):
    half = jax.tree.map(lambda p: p.astype(jnp.bfloat16), params)
    state = network.init(half, key=KEY, warmup=60)
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(state))
    for tree in (half, jax.tree.map(jnp.zeros_like, half)):
        for reduce in network.REDUCTIONS:
            (penalty, new), gradient = jax.value_and_grad(
                lambda p: network.step(p, state, reduce=reduce), has_aux=True
            )(tree)
            assert np.isfinite(penalty)
            assert all(g.dtype == jnp.bfloat16 and bool(jnp.isfinite(g).all()) for g in jax.tree.leaves(gradient))
            assert all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(new))


def test_ensemble_under_vmap(params):
    many = jax.tree.map(lambda p: jnp.stack([p, 2 * p, 3 * p]), params)
    states = jax.vmap(lambda p: network.init(p, key=KEY, warmup=60))(many)
    penalties, _ = jax.vmap(network.step)(many, states)
    np.testing.assert_allclose(penalties / penalties[0], [1, 2, 3], rtol=1e-3)


def test_report_is_sound(params):
    report = network.report(params, method="grid")
    assert [row.name for row in report.rows] == ["conv0/kernel", "conv1/kernel", "conv2/kernel", "head/kernel"]
    for row, i in zip(report.rows, range(3), strict=False):
        assert row.bound >= oracle.norm(oracle.dense(np.asarray(params[f"conv{i}"]["kernel"]), (5, 5)))
        assert row.shape == (3, 3, 4, 4)
    assert report.rows[3].bound >= np.linalg.norm(np.asarray(params["head"]["kernel"], np.float64), 2)
    np.testing.assert_allclose(report.product, np.prod([row.bound for row in report.rows]))
    assert "conv0/kernel  3×3×4×4" in str(report)


def test_selection(params):
    assert len(network.find(params, select="conv*")) == 3
    assert len(network.find(params, select=["conv0/*", "head/*"])) == 2
    assert len(network.find(params, select=lambda path, leaf: leaf.ndim == 2)) == 1
    own = {"my_weights": jnp.ones((3, 2, 2))}
    assert network.find(own, specs={"my_weights": f4.ConvSpec()})[0].path == "my_weights"


BAD = {
    "no kernel found: .* this tree has bias": lambda p: network.find({"bias": jnp.ones(3)}),
    "select 'nothing.' chooses nothing": lambda p: network.find(p, select="nothing*"),
    "select 'bb/.' chooses nothing": lambda p: network.report(p, select=["*", "bb/*"]),
    "no kernel found: select .* chooses nothing": lambda p: network.find(p, select=lambda path, leaf: False),
    "b/kernel holds complex64": lambda p: network.find({**p, "b": {"kernel": 1j * jnp.eye(3)}}),
    "b/w holds float8_e4m3fn, and bounds are of float16": lambda p: network.find(
        {**p, "b": {"w": jnp.eye(3, dtype=jnp.float8_e4m3fn)}}
    ),
    "key must be a key, as jax.random.key makes it, got Rngs": lambda p: network.init(p, key=nnx.Rngs(0)),
    "b/kernel: a kernel of shape .* has more axes than a 3-D convolution: .*Stacked": lambda p: network.report(
        {**p, "b": {"kernel": jnp.ones((2, 3, 3, 3, 2, 4))}}
    ),
    "no kernel found: .* this tree has ": lambda p: network.find(jnp.ones((3, 4))),
    "b/w holds int8": lambda p: network.find({**p, "b": {"w": jnp.eye(3, dtype=jnp.int8)}}),
    "a spec for 'conv9/kernel', but no such path: this tree has conv[0-2]/kernel, conv[0-2]/kernel": lambda p: (
        network.find(p, specs={"conv9/kernel": f4.ConvSpec()})
    ),
    r"conv1/kernel: groups 3 must divide": lambda p: network.find(p, specs={"conv1/kernel": f4.ConvSpec(groups=3)}),
    r"conv1/kernel: a spec is a ConvSpec, network.Dense or network.Stacked, got int": lambda p: network.find(
        p, specs={"conv1/kernel": 3}
    ),
    r"head/kernel: Dense\(inputs=2\) does not split": lambda p: network.find(
        p, specs={"head/kernel": network.Dense(2)}
    ),
    "belong to another tree: no conv0/kernel in this one, which has bias": lambda p: network.step(
        {"bias": jnp.ones(2)}, network.init(p, key=KEY)
    ),
    r"another tree: head/kernel has shape \(4, 2\) here, \(4, 3\) there": lambda p: network.step(
        p | {"head": {"kernel": jnp.ones((4, 2))}}, network.init(p, key=KEY)
    ),
    "state must be a NetworkState from network.init": lambda p: network.step(p, 3),
    "a weight for 'tail', but no such path: the layers are .*conv0/kernel": lambda p: network.step(
        p, network.init(p, key=KEY), weights={"tail": 2.0}
    ),
    "unknown reduce 'product': choose one of sum, squared, log": lambda p: network.step(
        p, network.init(p, key=KEY), reduce="product"
    ),
    "unknown method 'six': choose one of four, weighted, grid": lambda p: network.init(p, key=KEY, method="six"),
    "threshold must be a number": lambda p: network.step(p, network.init(p, key=KEY), threshold="c"),
}


@pytest.mark.parametrize("message", BAD)
def test_errors(params, message):
    with pytest.raises(ValueError, match=message):
        BAD[message](params)


def test_dense_is_a_convolution_of_one_tap(params):
    kernel = params["head"]["kernel"]
    state = network.init({"kernel": kernel}, key=KEY, warmup=50)
    value, _ = network.step({"kernel": kernel}, state)
    np.testing.assert_allclose(value, dense.exact_norm(kernel), rtol=1e-5)


def test_printed_bounds_are_rounded_up():
    """To the nearest, 1.00049 would be printed as a norm of at most 1."""
    assert str(network.report({"kernel": jnp.array([[1.00049]])})).split()[-1] == "1.001"
    numbers = [1.0, 0.0, 1.0000001, 9.99901, 12345.6, 1e-30, 3.4e38, 5e-324, 1.7976931348623157e308, 0.5]
    for number in [*numbers, *np.exp(np.random.default_rng(0).normal(0, 50, 300))]:
        printed = float(at_most(number))
        assert number <= printed <= number * 1.00101
    assert (at_most(np.inf), at_most(np.nan)) == ("inf", "nan")
