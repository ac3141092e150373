"""The wrappers of linen and NNX: the layers that they leave alone, hold and penalise; their state in real training."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import linen as nn
from flax import nnx, serialization

import fantastic4 as f4
from fantastic4 import linen, lipschitz, network
from fantastic4 import nnx as f4nnx

KEY = jax.random.key(0)
X = jax.random.normal(KEY, (2, 6, 6, 4))
LAYERS = {
    "conv": (nn.Conv, nnx.Conv, {"kernel_size": (3, 3), "strides": 2, "padding": "REFLECT"}),
    "grouped": (nn.Conv, nnx.Conv, {"kernel_size": (3, 3), "feature_group_count": 2, "kernel_dilation": 2}),
    "transposed": (nn.ConvTranspose, nnx.ConvTranspose, {"kernel_size": (3, 3), "strides": (2, 2)}),
    "dense": (nn.Dense, nnx.Linear, {}),
}


def pair(name, **options):
    """The same layer in linen and NNX, unwrapped, wrapped, with the same weights and state."""
    old, new, fields = LAYERS[name]
    plain = old(4, **fields)
    wrapped = linen.SpectralBound(old(4, **fields), **options)
    variables = wrapped.init(KEY, X)
    layer = new(4, 4, rngs=nnx.Rngs(0), **fields)
    module = f4nnx.SpectralBound(layer, rngs=nnx.Rngs(0), **options)
    params = variables["params"]["layer_instance"]
    layer.kernel[...], layer.bias[...] = params["kernel"], params["bias"]
    for key, value in variables["spectral_stats"]["state"].items():
        module.state[key][...] = value
    return plain, params, wrapped, variables, module


def bound_of(name, kernel):
    spec = f4.ConvSpec.from_layer(LAYERS[name][0](4, **LAYERS[name][2])) if name != "dense" else None
    return float(f4.dense.bound(kernel) if spec is None else f4.four_bounds(kernel, spec).min())


@pytest.mark.parametrize("name", LAYERS)
def test_linen_and_nnx_agree_and_hold(name):
    """Soft with room leaves the layer as it is; hard makes its bound the maximum; both frameworks alike."""
    plain, params, _, _, _ = pair(name)
    free = plain.apply({"params": params}, X)
    bound = bound_of(name, params["kernel"])
    bias = params["bias"]
    for mode, maximum, factor in (
        ("penalty", 1.0, 1.0), ("soft", 2 * bound, 1.0), ("soft", bound / 2, 0.5), ("hard", 2 * bound, 2.0),
    ):  # fmt: skip
        _, _, wrapped, variables, module = pair(name, mode=mode, maximum=maximum, warmup=200)
        theirs, new = wrapped.apply(variables, X, mutable=["spectral_stats", "losses"])
        ours = module(X, update_stats=True)
        np.testing.assert_allclose(theirs, (free - bias) * factor + bias, rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(new["spectral_stats"]["bound"], bound, rtol=1e-3)
        np.testing.assert_allclose(module.bound[...], new["spectral_stats"]["bound"], rtol=1e-6)
        for key, value in new["spectral_stats"]["state"].items():
            np.testing.assert_allclose(module.state[key][...], value, rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(variables["params"]["layer_instance"]["kernel"], params["kernel"])
        np.testing.assert_array_equal(module.layer_instance.kernel[...], params["kernel"])  # google/flax#5576
        assert ("losses" in new) is (mode == "penalty")
        if mode == "penalty":
            np.testing.assert_allclose(f4nnx.penalty(module), new["losses"]["spectral"], rtol=1e-6)
        else:
            assert float(f4nnx.penalty(module)) == 0


def test_a_wrapped_and_an_unwrapped_layer_agree_bit_for_bit_below_the_maximum():
    plain, params, wrapped, variables, module = pair("conv", mode="soft", maximum=1e3)
    free = plain.apply({"params": params}, X)
    np.testing.assert_array_equal(wrapped.apply(variables, X), free)
    np.testing.assert_allclose(module(X, update_stats=False), free, rtol=1e-6, atol=1e-6)


def test_iterations_are_those_of_a_call():
    """From random vectors many come near the bound, one does not."""
    for iterations, near in ((1, False), (60, True)):
        _, _, wrapped, variables, module = pair("conv", warmup=0, iterations=iterations)
        truth = bound_of("conv", variables["params"]["layer_instance"]["kernel"])
        _, updated = wrapped.apply(variables, X, mutable=["spectral_stats"])
        module(X)
        for value in (updated["spectral_stats"]["bound"], module.bound[...]):
            assert (float(value) > 0.99 * truth) == near


def test_without_update_nothing_changes():
    _, _, wrapped, variables, module = pair("conv", mode="hard", warmup=0)
    before = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(module)))
    first, same = wrapped.apply(variables, X, update_stats=False, mutable=["spectral_stats"])
    again = wrapped.apply(variables, X)
    np.testing.assert_array_equal(first, again)
    for a, b in zip(jax.tree.leaves(same), jax.tree.leaves(variables["spectral_stats"]), strict=True):
        np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(module(X, update_stats=False), module(X, update_stats=False))
    for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(nnx.to_pure_dict(nnx.state(module))), strict=True):
        np.testing.assert_array_equal(a, b)
    module(X, update_stats=True)
    assert float(np.abs(before["state"]["vectors"] - module.state["vectors"][...]).max()) > 0
    frozen = nnx.view(module, update_stats=False)
    np.testing.assert_array_equal(frozen(X), frozen(X))


def test_a_convolution_in_the_scope_of_its_parent():
    class Shared(nn.Module):
        @nn.compact
        def __call__(self, x):
            layer = linen.Conv(4, (3, 3))
            nn.share_scope(self, layer)
            return layer(x)

    x = jnp.ones((1, 8, 8, 3))
    variables = Shared().init(KEY, x)
    assert set(variables["params"]) == {"kernel", "bias"}
    assert Shared().apply(variables, x).shape == (1, 8, 8, 4)


def test_masks_are_respected():
    mask = jnp.zeros((3, 3, 4, 4)).at[1, 1].set(1.0)
    wrapped = linen.SpectralBound(nn.Conv(4, (3, 3), mask=mask), mode="hard", method="weighted", warmup=300)
    variables = wrapped.init(KEY, X)
    kernel = variables["params"]["layer_instance"]["kernel"]
    bound = float(wrapped.apply(variables, X, mutable=True)[1]["spectral_stats"]["bound"])
    layer = nnx.Conv(4, 4, (3, 3), mask=mask, rngs=nnx.Rngs(0))
    layer.kernel[...] = kernel
    module = f4nnx.SpectralBound(layer, mode="hard", method="weighted", warmup=300, rngs=nnx.Rngs(1))
    weights = f4.bound(kernel * mask, method="weighted")
    np.testing.assert_allclose([bound, module.bound[...]], weights, rtol=2e-2)
    out = wrapped.apply(variables, X) - variables["params"]["layer_instance"]["bias"]
    np.testing.assert_allclose(out, X @ (kernel[1, 1] / bound), atol=2e-3)
    np.testing.assert_allclose(module(X), X @ (kernel[1, 1] / bound), atol=2e-3)


class Model(nn.Module):
    """A drop-in, a wrapper with a name, one without, and a plain layer."""

    drop_in: bool = True

    @nn.compact
    def __call__(self, x, train=False):
        conv = (lambda **k: linen.Conv(4, (3, 3), **k)) if self.drop_in else (lambda **k: nn.Conv(4, (3, 3), **k))
        x = nn.relu(conv(name="first")(x))
        layer = nn.Conv(4, (3, 3), padding="CIRCULAR")
        x = nn.relu(linen.SpectralBound(layer)(x, update_stats=train) if self.drop_in else layer(x))
        x = x.mean((1, 2))
        layer = nn.Dense(3, name="head")
        return linen.SpectralBound(layer, name="bound")(x, update_stats=train) if self.drop_in else layer(x)


def test_params_are_where_they_are_without_the_wrappers():
    wrapped = Model().init(KEY, X)
    plain = Model(drop_in=False).init(KEY, X)["params"]
    assert jax.tree.map(jnp.shape, wrapped["params"]) == jax.tree.map(jnp.shape, plain)
    assert set(wrapped["spectral_stats"]) == {"first", "SpectralBound_0", "bound"}
    np.testing.assert_allclose(
        Model().apply({**wrapped, "params": plain}, X), Model(drop_in=False).apply({"params": plain}, X), atol=1e-6
    )


def linen_train(variables, steps):
    """The usual step of linen with two collections."""
    model, tx = Model(), optax.adam(0.01)

    @jax.jit
    def step(params, stats, state):
        def loss(params):
            variables = {"params": params, "spectral_stats": stats}
            y, new = model.apply(variables, X, train=True, mutable=["spectral_stats", "losses"])
            return jnp.mean(y**2) + 0.1 * sum(jax.tree.leaves(new["losses"])), new["spectral_stats"]

        gradient, stats = jax.grad(loss, has_aux=True)(params)
        updates, state = tx.update(gradient, state, params)
        return optax.apply_updates(params, updates), stats, state

    params, stats, state = variables
    state = tx.init(params) if state is None else state
    for _ in range(steps):
        params, stats, state = step(params, stats, state)
    return params, stats, state


def test_linen_trains_and_continues_from_a_checkpoint(tmp_path):
    start = Model().init(KEY, X)
    before = network.report(start["params"]).product
    params, stats, state = linen_train((start["params"], start["spectral_stats"], None), 20)
    assert network.report(params).product < 0.7 * before
    # While the weights move fast the estimates lag by a tenth; once they rest, more calls bring them to the bounds.
    still = stats
    update = jax.jit(
        lambda still: Model().apply(
            {"params": params, "spectral_stats": still}, X, train=True, mutable=["spectral_stats"]
        )[1]["spectral_stats"]
    )
    for _ in range(60):
        still = update(still)
    for name, path in (("first", "first"), ("SpectralBound_0", "Conv_0")):
        np.testing.assert_allclose(still[name]["bound"], f4.four_bounds(params[path]["kernel"]).min(), rtol=0.01)
    saved = serialization.to_bytes({"params": params, "stats": stats})
    back = serialization.from_bytes({"params": params, "stats": stats}, saved)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "orbax", {"params": params, "stats": stats})
        checkpointer.wait_until_finished()
        orbax = checkpointer.restore(tmp_path / "orbax", {"params": params, "stats": stats})
    straight = linen_train((params, stats, state), 1)
    for restored in (back, orbax):
        resumed = linen_train((restored["params"], restored["stats"], state), 1)
        for a, b in zip(jax.tree.leaves(straight), jax.tree.leaves(resumed), strict=True):
            np.testing.assert_array_equal(a, b)


class NnxModel(nnx.Module):
    def __init__(self, rngs, mode="penalty"):
        self.conv = f4nnx.SpectralBound(nnx.Conv(4, 4, (3, 3), rngs=rngs), mode=mode, rngs=rngs)
        self.head = f4nnx.SpectralBound(nnx.Linear(4, 3, rngs=rngs), mode=mode, rngs=rngs)

    def __call__(self, x):
        return self.head(nnx.relu(self.conv(x)).mean((1, 2)))


def nnx_train(model, optimizer, steps):
    @nnx.jit
    def step(model, optimizer, x):
        def loss(model):
            return jnp.mean(model(x) ** 2) + 0.1 * f4nnx.penalty(model)

        optimizer.update(model, nnx.grad(loss)(model))

    for _ in range(steps):
        step(model, optimizer, X)


@pytest.mark.parametrize("graph", [True, False])
def test_nnx_trains_and_continues_from_a_checkpoint(tmp_path, graph):
    with nnx.set_graph_mode(graph):
        model = NnxModel(nnx.Rngs(0))
        before = float(model.conv.bound[...])

        @nnx.jit
        def step(model, x):
            def loss(params, rest):
                model = nnx.merge(split, params, rest, copy=True)
                value = jnp.mean(model(x) ** 2) + 0.1 * f4nnx.penalty(model)
                return value, nnx.state(model, f4nnx.SpectralStats)

            split, params, rest = nnx.split(model, nnx.Param, ...)
            gradient, stats = jax.grad(loss, has_aux=True)(params, rest)
            return jax.tree.map(lambda p, g: p - 0.1 * g, params, gradient), stats

        for _ in range(10):
            params, stats = step(model, X)
            nnx.update(model, params, stats)
        assert float(model.conv.bound[...]) < 0.9 * before
        for _ in range(60):  # at rest the estimate comes to the bound
            stats = step(model, X)[1]
            nnx.update(model, stats)
        exact = f4.four_bounds(model.conv.layer_instance.kernel[...]).min()
        np.testing.assert_allclose(model.conv.bound[...], exact, rtol=0.01)
        split, state = nnx.split(model)
        pure = nnx.to_pure_dict(state)
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(tmp_path / "orbax", pure)
            checkpointer.wait_until_finished()
            back = checkpointer.restore(tmp_path / "orbax", pure)
        for a, b in zip(jax.tree.leaves(pure), jax.tree.leaves(back), strict=True):
            np.testing.assert_array_equal(a, b)
        nnx.replace_by_pure_dict(state, back)
        resumed = nnx.merge(split, state)
        for a, b in zip(jax.tree.leaves(step(model, X)), jax.tree.leaves(step(resumed, X)), strict=True):
            np.testing.assert_array_equal(a, b)


def test_nnx_optimizer():
    model = NnxModel(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.Param)
    before = float(model.conv.bound[...])
    nnx_train(model, optimizer, 10)
    assert float(model.conv.bound[...]) < 0.9 * before


def test_nnx_eval_keeps_the_state_as_it_is():
    """So that what is evaluated may be jitted, differentiated, and bounded."""
    rngs = nnx.Rngs(0)
    model = nnx.Sequential(f4nnx.SpectralBound(nnx.Linear(3, 4, rngs=rngs), rngs=rngs, mode="hard", warmup=1))
    x = jnp.ones((1, 3))
    model.eval()
    before = np.asarray(model(x))
    np.testing.assert_allclose(jax.jit(lambda x: model(x))(x), before, rtol=1e-6)
    np.testing.assert_array_equal(model(x), before)
    assert lipschitz.bound(model, x).value > 0
    nnx.view(model, use_running_average=False)(x)
    moved = np.asarray(model(x))
    assert (moved != before).any()
    model.train()
    model(x)
    assert (model(x) != moved).any()


def test_linen_makes_a_state_for_params_from_elsewhere():
    plain, wrapped = nn.Conv(4, (3, 3)), linen.SpectralBound(nn.Conv(4, (3, 3)), mode="hard", warmup=100)
    x = jnp.ones((1, 6, 6, 2))
    params = plain.init(jax.random.key(0), x)["params"]
    state = wrapped.init(jax.random.key(1), x)["params"].keys()
    variables = {"params": params if "kernel" in state else dict.fromkeys(state, params)}
    with pytest.raises(ValueError, match="make them for params from elsewhere"):
        wrapped.apply(variables, x)
    how = {"mutable": ["spectral_stats"], "rngs": {"params": jax.random.key(2)}}
    for update_stats in (None, False):  # as of a model that was given train=False
        _, new = wrapped.apply(variables, x, update_stats=update_stats, **how)
        bound = jax.tree.leaves(new["spectral_stats"])[0]
        np.testing.assert_allclose(bound, f4.four_bounds(params["kernel"]).min(), rtol=1e-3)
        wrapped.apply({**variables, **new}, x)


def test_params_that_setup_puts_elsewhere_are_named():
    class Model(nn.Module):
        wrap: bool

        def setup(self):
            layer = nn.Conv(4, (3, 3))
            self.stem = linen.SpectralBound(layer) if self.wrap else layer

        def __call__(self, x):
            return self.stem(x)

    x = jnp.ones((1, 6, 6, 2))
    plain, wrapped = (Model(wrap).init(jax.random.key(0), x) for wrap in (False, True))
    assert wrapped["params"]["stem"].keys() == {"layer_instance"}
    with pytest.raises(ValueError, match=r"no kernel among its params, .* in 'layer_instance', below the name of its"):
        Model(True).apply({**wrapped, **plain}, x)


def test_nnx_layers_in_scan_and_vmap():
    @nnx.split_rngs(splits=3)
    @nnx.vmap
    def make(rngs):
        return f4nnx.SpectralBound(nnx.Conv(4, 4, (3, 3), rngs=rngs), mode="hard", rngs=rngs)

    layers = make(nnx.Rngs(0))
    kernels = layers.layer_instance.kernel[...]
    assert kernels.shape == (3, 3, 3, 4, 4)
    before = np.asarray(layers.state["vectors"][...])

    @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
    def run(layer, x):
        return layer(x, update_stats=True)

    y = run(layers, X)
    assert float(np.abs(before - layers.state["vectors"][...]).max()) > 0
    bounds = layers.bound[...]
    x = X
    for kernel, bound in zip(kernels, bounds, strict=True):
        x = nn.Conv(4, (3, 3), use_bias=False).apply({"params": {"kernel": kernel / bound}}, x)
    np.testing.assert_allclose(y, x, rtol=1e-4, atol=1e-5)


def test_linen_layers_under_scan():
    class Deep(nn.Module):
        @nn.compact
        def __call__(self, x):
            def body(layer, x, _):
                return layer(x), None

            layers = nn.scan(
                body, variable_axes={"params": 0, "spectral_stats": 0}, split_rngs={"params": True}, length=3
            )
            return layers(linen.SpectralBound(nn.Conv(4, (3, 3)), mode="hard"), x, None)[0]

    variables = Deep().init(KEY, X)
    assert jax.tree.leaves(variables["params"])[1].shape == (3, 3, 3, 4, 4)
    _, new = Deep().apply(variables, X, mutable=["spectral_stats"])
    assert jax.tree.leaves(new)[0].shape[0] == 3


@pytest.mark.parametrize("mode", ["penalty", "hard"])
def test_an_ensemble_under_vmap_with_jit_and_grad(mode):
    """flax#4623 and equinox#705 were here: tracers that leak, layers that cannot be batched."""
    wrapped = linen.SpectralBound(nn.Conv(4, (3, 3)), mode=mode)
    many = jax.vmap(lambda key: wrapped.init(key, X))(jax.random.split(KEY, 3))

    @jax.jit
    def gradients(many):
        def loss(params, stats):
            y, new = wrapped.apply({"params": params, "spectral_stats": stats}, X, mutable=["spectral_stats", "losses"])
            return jnp.mean(y**2) + sum(jax.tree.leaves(new.get("losses", {})), start=0.0)

        return jax.vmap(jax.grad(loss))(many["params"], many["spectral_stats"])

    gradient = gradients(many)["layer_instance"]["kernel"]
    assert gradient.shape == (3, 3, 3, 4, 4)
    assert bool(jnp.isfinite(gradient).all())


def test_two_forwards_before_one_backward():
    """A GAN's discriminator sees two batches; the first call's state must not spoil the second's gradient."""
    wrapped = linen.SpectralBound(nn.Conv(4, (3, 3)), mode="hard")
    variables = wrapped.init(KEY, X)

    def twice(params):
        stats = variables["spectral_stats"]
        total = 0.0
        for x in (X, -2 * X):
            y, new = wrapped.apply({"params": params, "spectral_stats": stats}, x, mutable=["spectral_stats"])
            stats, total = new["spectral_stats"], total + jnp.mean(jnp.tanh(y))
        return total

    params, direction = variables["params"], jax.tree.map(jnp.ones_like, variables["params"])
    gradient = jax.grad(twice)(params)
    h = 1e-2
    # Finite differences move the vectors too, which near the top pair changes nothing.
    shifted = [twice(jax.tree.map(lambda p, d: p + s * d, params, direction)) for s in (h, -h)]
    along = sum(jax.tree.leaves(jax.tree.map(lambda g, d: jnp.vdot(g, d), gradient, direction)))
    np.testing.assert_allclose(along, (shifted[0] - shifted[1]) / (2 * h), rtol=2e-2, atol=1e-4)
    module = f4nnx.SpectralBound(nnx.Conv(4, 4, (3, 3), rngs=nnx.Rngs(0)), mode="hard", rngs=nnx.Rngs(0))
    found = nnx.jit(nnx.grad(lambda m: jnp.mean(jnp.tanh(m(X))) + jnp.mean(jnp.tanh(m(-2 * X)))))(module)
    assert bool(jnp.isfinite(found["layer_instance"]["kernel"][...]).all())


def test_the_penalty_of_a_model_that_keeps_no_state_has_a_gradient():
    """As of one that is tuned with its batch norms frozen; of stacked layers too."""
    make = lambda rngs: f4nnx.SpectralBound(nnx.Linear(4, 4, rngs=rngs), rngs=rngs, warmup=200)
    for model in (make(nnx.Rngs(0)), nnx.vmap(make)(nnx.Rngs(1).split(2))):
        before = jax.tree.map(np.asarray, nnx.state(model))
        model.eval()
        gradient = nnx.grad(f4nnx.penalty)(model)["layer_instance"]["kernel"][...]
        left, _, right = np.linalg.svd(np.asarray(model.layer_instance.kernel[...], float))
        np.testing.assert_allclose(gradient, left[..., :, :1] @ right[..., :1, :], atol=1e-3)
        assert all(jax.tree.leaves(jax.tree.map(np.array_equal, before, nnx.state(model))))


@pytest.mark.parametrize("dtype", [{"dtype": jnp.bfloat16}, {"dtype": jnp.bfloat16, "param_dtype": jnp.bfloat16}])
@pytest.mark.parametrize("mode", ["penalty", "soft", "hard"])
def test_half_precision_and_zero_kernels(dtype, mode):
    zeros = nn.initializers.zeros_init()
    for kernel_init in (nn.initializers.lecun_normal(), zeros):
        wrapped = linen.SpectralBound(nn.Conv(4, (3, 3), kernel_init=kernel_init, **dtype), mode=mode)
        variables = wrapped.init(KEY, X)
        assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(variables["spectral_stats"]))

        def loss(params, wrapped=wrapped, variables=variables):
            y, new = wrapped.apply({**variables, "params": params}, X, mutable=["spectral_stats", "losses"])
            return y.astype(jnp.float32).sum() + sum(jax.tree.leaves(new.get("losses", {})), start=0.0), (y, new)

        gradient, (y, new) = jax.grad(loss, has_aux=True)(variables["params"])
        assert y.dtype == jnp.bfloat16
        for leaf in jax.tree.leaves((gradient, y, new)):
            assert bool(jnp.isfinite(leaf).all())
        module = f4nnx.SpectralBound(
            nnx.Conv(4, 4, (3, 3), kernel_init=kernel_init, rngs=nnx.Rngs(0), **dtype), mode=mode, rngs=nnx.Rngs(0)
        )
        out = module(X)
        assert out.dtype == jnp.bfloat16
        assert bool(jnp.isfinite(out).all())
        assert module.state["vectors"].dtype == jnp.float32


class Odd(nn.Dense):
    def __call__(self, x):
        return x


INJECTED = {"conv_general_dilated": lambda *a, **k: jax.lax.conv_general_dilated(*a, **k)}
BAD = {
    "enc/Conv_0: Conv has its own conv_general_dilated": lambda: Outer(nn.Conv, {"kernel_size": (3,), **INJECTED}),
    "enc/Embed_0: Embed is not a Conv, ConvTranspose": lambda: Outer(nn.Embed, {"num_embeddings": 3}),
    "enc/Odd_0: Odd has a call or a param method": lambda: Outer(Odd, {}),
    "enc/Dense_0: Dense has its own dot_general": lambda: Outer(nn.Dense, {"dot_general": lambda *a, **k: 0}),
}


class Outer(nn.Module):
    kind: type
    fields: dict

    @nn.compact
    def __call__(self, x):
        return Inner(self.kind, self.fields, name="enc")(x)


class Inner(nn.Module):
    kind: type
    fields: dict

    @nn.compact
    def __call__(self, x):
        return linen.SpectralBound(self.kind(features=4, **self.fields), name="bound")(x)


@pytest.mark.parametrize("message", BAD)
def test_errors_name_the_path(message):
    message, model = message.replace("enc/", "enc/bound/"), BAD[message]()
    with pytest.raises(ValueError, match=message):
        model.init(KEY, X)


def test_errors():
    wrapped = linen.SpectralBound(nn.Conv(4, (3, 3)))
    with pytest.raises(ValueError, match="this layer is wrapped already"):
        linen.SpectralBound(wrapped).init(KEY, X)
    rngs = nnx.Rngs(0)
    with pytest.raises(ValueError, match="this layer is wrapped already"):
        f4nnx.SpectralBound(f4nnx.SpectralBound(nnx.Linear(2, 2, rngs=rngs), rngs=rngs), rngs=rngs)
    params = wrapped.init(KEY, X)["params"]
    with pytest.raises(ValueError, match="no spectral_stats in the variables: pass what init returned"):
        wrapped.apply({"params": params}, X)
    for field, value, message in (
        ("mode", "firm", "unknown mode 'firm': choose one of penalty, soft, hard"),
        ("maximum", 0.0, "maximum must be a positive number, got 0.0"),
        ("method", "gram", "unknown method 'gram': choose one of four, weighted, grid"),
        ("iterations", 0, "iterations must be at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            linen.SpectralBound(nn.Conv(4, (3, 3)), **{field: value}).init(KEY, X)
        with pytest.raises(ValueError, match=message):
            f4nnx.SpectralBound(nnx.Linear(4, 4, rngs=nnx.Rngs(0)), rngs=nnx.Rngs(0), **{field: value})
    with pytest.raises(ValueError, match=r"LoRALinear: LoRALinear has a call or a param method"):
        f4nnx.SpectralBound(nnx.LoRALinear(4, 4, lora_rank=2, rngs=nnx.Rngs(0)), rngs=nnx.Rngs(0))


class Standardised(nn.Conv):
    """Weight standardisation, as it is written in Flax."""

    def param(self, name, *args, **kwargs):
        found = super().param(name, *args, **kwargs)
        return (found - found.mean((0, 1, 2))) / (found.std((0, 1, 2)) + 1e-5) if name == "kernel" else found


@pytest.mark.filterwarnings("ignore:Variable hooks are deprecated")
def test_a_layer_that_computes_with_another_kernel_is_refused():
    """It was bounded by the kernel as stored: held to 1, such a layer had norm 12."""
    tenfold = lambda x, kernel, bias, **_: (x, 10 * kernel, bias)
    doubled = nnx.Linear(4, 4, rngs=nnx.Rngs(0))
    doubled.kernel = nnx.Param(doubled.kernel[...], on_get_value=lambda _, kernel: 2 * kernel)
    with pytest.raises(ValueError, match=r"Standardised has a call or a param method of its own"):
        linen.SpectralBound(Standardised(4, (3, 3)), mode="hard").init(KEY, X)
    for layer in (nn.Dense(4, promote_dtype=tenfold), nn.Conv(4, (3, 3), promote_dtype=tenfold)):
        with pytest.raises(ValueError, match=f"{type(layer).__name__} has its own promote_dtype"):
            linen.SpectralBound(layer, mode="hard").init(KEY, X)
    with pytest.raises(ValueError, match="Conv has its own promote_dtype"):
        linen.Conv(4, (3, 3), promote_dtype=tenfold).init(KEY, X)
    halved = type("Halved", (linen.Conv,), {"param": lambda self, *args: nn.Conv.param(self, *args) / 2})
    with pytest.raises(ValueError, match="Halved has a param method of its own"):
        halved(4, (3, 3)).init(KEY, X)
    for layer, message in (
        (nnx.Linear(4, 4, rngs=nnx.Rngs(0), promote_dtype=tenfold), "Linear has its own promote_dtype"),
        (doubled, "the kernel of Linear has an on_get_value hook"),
    ):
        with pytest.raises(ValueError, match=message):
            f4nnx.SpectralBound(layer, rngs=nnx.Rngs(0), mode="hard")


@pytest.mark.parametrize("mode", ["penalty", "hard"])
def test_kernels_in_boxes(mode):
    """Flax's annotations of sharding: the same numbers, and the params stay in their boxes."""
    boxed = nn.with_partitioning(nn.initializers.lecun_normal(), (None, None, None, "model"))
    for make in (lambda **how: linen.SpectralBound(nn.Conv(4, (3, 3), **how), mode=mode),
                 lambda **how: linen.Conv(4, (3, 3), mode=mode, **how)):  # fmt: skip
        plain, ours = make().init(KEY, X), make(kernel_init=boxed).init(KEY, X)
        assert isinstance(jax.tree.leaves(ours["params"], is_leaf=lambda x: isinstance(x, nn.Partitioned))[1],
                          nn.Partitioned)  # fmt: skip
        assert ours["spectral_stats"]["bound"] == plain["spectral_stats"]["bound"]
        np.testing.assert_array_equal(make(kernel_init=boxed).apply(ours, X), make().apply(plain, X))
        penalty = lambda v: make().apply(v, X, mutable=["losses"])[1].get("losses", {"spectral": jnp.zeros(())})
        gradient = jax.grad(lambda v: penalty(v)["spectral"])(ours)["params"]
        assert jax.tree.structure(gradient) == jax.tree.structure(ours["params"])


def test_losses_that_come_back_are_not_added_up():
    model = linen.SpectralBound(nn.Dense(4))
    variables = model.init(KEY, X)
    for _ in range(3):
        _, new = model.apply(variables, X, mutable=["spectral_stats", "losses"])
        variables = {**variables, **new}
    assert len(jax.tree.leaves(new["losses"])) == 1
    assert new["losses"]["spectral"] == new["spectral_stats"]["bound"]
