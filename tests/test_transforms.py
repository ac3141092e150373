"""optax: the penalty's gradient, projection and clipping in real chains."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest
from flax import linen as nn
from flax import serialization

import fantastic4 as f4
from fantastic4 import network, transforms

KEY = jax.random.key(0)


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(4, (3, 3), name="conv0")(x))
        x = nn.relu(nn.Conv(4, (3, 3), strides=2, name="conv1")(x))
        return nn.Dense(3, name="head")(x.mean((1, 2)))


NET = Net()
X = jax.random.normal(KEY, (8, 6, 6, 2))
Y = jnp.arange(8) % 3


@pytest.fixture(scope="module")
def params():
    return jax.tree.map(lambda p: 3 * p, NET.init(KEY, X)["params"])


def loss(params):
    return optax.softmax_cross_entropy_with_integer_labels(NET.apply({"params": params}, X), Y).mean()


def train(tx, params, steps):
    """Final params, state, and how often the step was traced."""
    traces = []

    @jax.jit
    def step(params, state):
        traces.append(1)
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for _ in range(steps):
        params, state = step(params, state)
    assert len(traces) == 1, "compiled more than once"
    return params, state


def test_penalty_is_part_of_the_loss(params):
    """The same as differentiating loss + beta · penalty by hand."""
    tx = optax.chain(transforms.add_spectral_penalty(0.01, key=KEY), optax.sgd(0.1))
    ours, (state, _) = train(tx, params, 5)
    theirs, start = params, network.init(params, key=KEY)
    for _ in range(5):
        (_, start), gradient = jax.value_and_grad(
            lambda p: (lambda v: (loss(p) + 0.01 * v[0], v[1]))(network.step(p, start)),
            has_aux=True,
        )(theirs)
        theirs = jax.tree.map(lambda p, g: p - 0.1 * g, theirs, gradient)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
    assert int(state.updates) == 5
    np.testing.assert_allclose(state.penalty, start.values.sum(), rtol=1e-4)


def test_penalty_follows_a_schedule_and_lowers_the_bounds(params):
    tx = optax.chain(transforms.add_spectral_penalty(optax.linear_schedule(0, 0.1, 20)), optax.adam(0.05))
    plain, _ = train(optax.adam(0.05), params, 40)
    ours, _ = train(tx, params, 40)
    assert network.report(ours).product < 0.5 * network.report(plain).product
    first, _ = train(
        optax.chain(transforms.add_spectral_penalty(lambda count: 1.0 * (count > 0)), optax.sgd(0.1)), params, 1
    )
    once, _ = train(optax.sgd(0.1), params, 1)
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(once), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("every", [1, 2])
def test_outside_of_jit_too_a_projection_is_compiled_once(every, caplog):
    params = {"conv": {"kernel": jnp.full((3, 3, 2, 4), 0.5)}, "dense": {"kernel": jnp.eye(3) * 5}}
    tx = optax.chain(
        transforms.project_spectral_norm(1.0, every=every),
        transforms.clip_spectrum(0.9, {"conv/kernel": (4, 4)}, every=every),
    )
    state, updates = tx.init(params), jax.tree.map(jnp.zeros_like, params)
    _, state = tx.update(updates, state, params)
    with jax.log_compiles(), caplog.at_level("WARNING"):
        for _ in range(2):
            _, state = tx.update(updates, state, params)
    assert not [record for record in caplog.records if "compil" in record.message.lower()]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_projection_holds_after_every_step(params, dtype):
    """Sound: the true norms, by dense matrices in float64, of the very floats that training has."""
    params = jax.tree.map(lambda p: p.astype(dtype), params)
    tx = optax.chain(optax.sgd(0.5), transforms.project_spectral_norm(0.9))

    @jax.jit
    def step(params, state):
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for i in range(6):
        params, state = step(params, state)
        for row in network.report(params).rows:
            assert row.bound <= 0.9
            # At first all are far above; later a gradient may take one below.
            assert i or row.bound >= (0.88 if dtype == jnp.bfloat16 else 0.8999), "shrunk too far"
        exact = jax.tree.map(lambda p: np.asarray(p, np.float64), params)
        assert oracle.norm(oracle.dense(exact["conv0"]["kernel"], (5, 5))) <= 0.9
        assert np.linalg.norm(exact["head"]["kernel"], 2) <= 0.9


def test_projection_leaves_small_kernels_alone(params):
    free, _ = train(optax.sgd(0.1), params, 3)
    projected, _ = train(optax.chain(optax.sgd(0.1), transforms.project_spectral_norm(1e3)), params, 3)
    for a, b in zip(jax.tree.leaves(free), jax.tree.leaves(projected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7)


def test_two_hundred_steps_of_projected_training(params):
    tx = optax.chain(optax.adam(0.02), transforms.project_spectral_norm(1.0, every=4))
    after, _ = train(tx, params, 200)
    for row in network.report(after).rows:
        assert row.bound <= 1.0 * (1 + 1e-3)
    assert float(loss(after)) < float(loss(jax.tree.map(jnp.zeros_like, params)))


def test_projection_waits_for_its_turn(params):
    tx = optax.chain(optax.sgd(0.0), transforms.project_spectral_norm(0.5, every=3, select="conv*"))
    for steps in (2, 3):
        after, _ = train(tx, params, steps)
        bounds = {row.name: row.bound for row in network.report(after).rows}
        assert (bounds["conv0/kernel"] <= 0.5) is (steps == 3)
        assert bounds["head/kernel"] > 0.5


def test_clip_spectrum(params):
    tx = optax.chain(optax.sgd(0.1), transforms.clip_spectrum(0.8, {"conv0/kernel": (6, 6), "conv1*": (6, 6)}, every=2))
    before, _ = train(optax.sgd(0.1), params, 1)
    after, _ = train(tx, params, 1)
    np.testing.assert_allclose(before["conv0"]["kernel"], after["conv0"]["kernel"], atol=1e-7)
    after, _ = train(tx, params, 2)
    truth = oracle.circular_values(np.asarray(after["conv0"]["kernel"]), (6, 6))
    assert 0.6 < truth[0] <= 0.8 * (1 + 1e-6)
    strided = f4.singular_values(after["conv1"]["kernel"], (6, 6), f4.ConvSpec(padding="CIRCULAR"))
    assert float(strided[0]) <= 0.8 * (1 + 1e-6)


SGD = optax.sgd(0.1)
WRAPPERS = {
    "masked": lambda before, behind: optax.chain(masked(before), SGD, masked(behind)),
    "multi_transform": lambda before, behind: optax.multi_transform(
        {"all": optax.chain(before, SGD, behind), "none": SGD},
        lambda p: jax.tree_util.tree_map_with_path(lambda path, _: "all" if "conv" in str(path[0]) else "none", p),
    ),
    "MultiSteps": lambda before, behind: optax.MultiSteps(optax.chain(before, SGD, behind), every_k_schedule=2),
    "inject": lambda before, behind: optax.chain(before, optax.inject_hyperparams(optax.sgd)(0.1), behind),
}


def masked(tx):
    return optax.masked(tx, lambda p: jax.tree.map(lambda x: x.ndim > 1, p))


@pytest.fixture(scope="module", params=WRAPPERS)
def wrapper(request, params):
    """One of them, and what it comes to with nothing in it."""
    wrapped = WRAPPERS[request.param]
    free, _ = train(wrapped(optax.identity(), optax.identity()), params, 4)
    return wrapped, float(f4.exact_norm(free["conv0"]["kernel"], (6, 6)))


@pytest.mark.parametrize("kind", ["penalty", "project", "clip"])
def test_within_optax(params, wrapper, kind):
    wrapped, free = wrapper
    tx = {
        "penalty": lambda: transforms.add_spectral_penalty(0.05),
        "project": lambda: transforms.project_spectral_norm(0.7),
        "clip": lambda: transforms.clip_spectrum(0.7, {"conv0/kernel": (6, 6)}, every=1),
    }[kind]()
    nothing = optax.identity()
    after, _ = train(wrapped(*((tx, nothing) if kind == "penalty" else (nothing, tx))), params, 4)
    value = float(f4.exact_norm(after["conv0"]["kernel"], (6, 6)))
    assert value < free
    if kind != "penalty":
        assert value <= 0.7 * (1 + 1e-6)


def test_a_limit_may_be_an_array(params):
    """Known, while something else is traced."""
    limit, below_zero = jnp.float32([0.7, -0.7])
    tx = transforms.clip_spectrum(limit, {"conv0/kernel": (6, 6)}, every=1)
    after = jax.jit(lambda p: optax.apply_updates(p, tx.update(jax.tree.map(jnp.zeros_like, p), tx.init(p), p)[0]))(
        params
    )
    assert float(f4.exact_norm(after["conv0"]["kernel"], (6, 6))) <= 0.7 * (1 + 1e-6)
    with pytest.raises(ValueError, match="maximum must be a positive number"):
        jax.jit(lambda k: f4.clip_singular_values(k, (6, 6), below_zero))(params["conv0"]["kernel"])


def test_a_state_has_a_sharding_of_its_own(params):
    """As for any of optax's own: parameters' shardings where parameters stand, another elsewhere."""
    tx = optax.chain(
        transforms.add_spectral_penalty(0.1),
        optax.trace(0.9),
        transforms.project_spectral_norm(1.0),
        transforms.clip_spectrum(1.0, {"conv0/kernel": (6, 6)}),
    )
    state = tx.init(params)
    names = jax.tree_util.tree_map_with_path(lambda path, _: jax.tree_util.keystr(path), params)
    found = optax.tree_utils.tree_map_params(tx, lambda _, name: name, state, names, transform_non_params=lambda _: "")
    assert found[1].trace == names
    assert set(jax.tree.leaves((found[0], found[2:]))) == {""}
    everywhere = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    placed = optax.tree_utils.tree_map_params(
        tx, lambda _: everywhere, state, transform_non_params=lambda _: everywhere
    )
    jax.tree.map(np.testing.assert_array_equal, jax.device_put(state, placed), state)


def test_equinox_order_is_kept():
    """A kernel in PyTorch's order comes back in PyTorch's order."""
    weight = jax.random.normal(KEY, (4, 2, 3, 3))
    for tx in (transforms.project_spectral_norm(1.0), transforms.clip_spectrum(1.0, {"weight": (6, 6)}, every=1)):
        updates, _ = tx.update({"weight": 0 * weight}, tx.init({"weight": weight}), {"weight": weight})
        after = optax.apply_updates({"weight": weight}, updates)["weight"]
        assert 0.3 < float(f4.exact_norm(f4.from_torch(np.asarray(after)), (6, 6))) <= 1 + 1e-6
        assert float(jnp.vdot(after, weight)) > 0.5 * float(jnp.linalg.norm(after) * jnp.linalg.norm(weight))


BAD = {
    "needs the params: call tx.update": lambda p: transforms.project_spectral_norm(1.0).update(p, None, None),
    "no kernel found": lambda p: transforms.project_spectral_norm(1.0).init({"bias": jnp.ones(3)}),
    "every must be at least 1, got 0": lambda p: transforms.project_spectral_norm(1.0, every=0),
    "maximum must be a positive number, got 0": lambda p: transforms.project_spectral_norm(0),
    "an input shape for 'conv7', but no such kernel": lambda p: transforms.clip_spectrum(
        1.0, {"conv0*": (6, 6), "conv7": (6, 6)}
    ).init(p),
    "input_shapes must be a dict from paths": lambda p: transforms.clip_spectrum(1.0, (6, 6)),
    "beta must be a number or a scalar array, got None": lambda p: transforms.add_spectral_penalty(None),
    "maximum must be a number .*: for a schedule, optax.inject_hyperparams": lambda p: transforms.project_spectral_norm(
        lambda count: 1.0
    ),
    "iterations must be an int, .*inject_hyperparams keeps it out with static_args='iterations'": lambda p: jax.jit(
        optax.inject_hyperparams(transforms.add_spectral_penalty)(beta=1.0).update
    )(p, optax.inject_hyperparams(transforms.add_spectral_penalty)(beta=1.0).init(p), p),
    "head/kernel is a matrix": lambda p: transforms.clip_spectrum(1.0, {"head*": (6,)}).init(p),
    "belong to another tree: no conv0/kernel": lambda p: transforms.add_spectral_penalty(1.0).update(
        p, transforms.add_spectral_penalty(1.0).init(p), {"head": p["head"]}
    ),
}


@pytest.mark.parametrize("message", BAD)
def test_errors(params, message):
    with pytest.raises(ValueError, match=message):
        BAD[message](params)


def test_kernels_of_one_shape_share_a_program_and_nothing_else():
    """Each comes out as it does alone; nor does one that is not finite touch the others."""
    keys = jax.random.split(KEY, 3)
    many = {name: {"kernel": (i + 1) * jax.random.normal(keys[i], (3, 3, 2, 2))} for i, name in enumerate("abc")}
    many["b"]["kernel"] = many["b"]["kernel"].at[0].set(jnp.nan)
    sizes = {"a/kernel": (6, 6), "b/kernel": (6, 6), "c/kernel": (4, 4)}
    for tx, one in (
        (transforms.project_spectral_norm(1.0), lambda name: transforms.project_spectral_norm(1.0)),
        (
            transforms.clip_spectrum(1.0, sizes, every=1),
            lambda name: transforms.clip_spectrum(1.0, {f"{name}/kernel": sizes[f"{name}/kernel"]}, every=1),
        ),
    ):
        zeros = jax.tree.map(jnp.zeros_like, many)
        together, _ = jax.jit(tx.update)(zeros, tx.init(many), many)
        assert jnp.isnan(many["b"]["kernel"] + together["b"]["kernel"]).any()
        for name in "ac":
            alone = {name: many[name]}
            tx = one(name)
            expected, _ = jax.jit(tx.update)({name: zeros[name]}, tx.init(alone), alone)
            np.testing.assert_allclose(together[name]["kernel"], expected[name]["kernel"], rtol=1e-5, atol=1e-6)


def test_clipping_calls_lapack_one_after_the_other():
    """Two batches beside each other may wait for one another for ever: found, for ResNet-32 on two cores."""
    params = {"a": {"kernel": jnp.ones((3, 3, 2, 2))}, "b": {"kernel": jnp.ones((3, 3, 3, 2))}}
    tx = transforms.clip_spectrum(1.0, {"*": (4, 4)}, every=1)
    closed = jax.make_jaxpr(lambda u: tx.update(u, tx.init(params), params)[0])(jax.tree.map(jnp.zeros_like, params))
    jaxpr = closed.jaxpr
    while len(within := [eqn for eqn in jaxpr.eqns if "svd" in str(eqn)]) == 1 and "jaxpr" in within[0].params:
        jaxpr = within[0].params["jaxpr"].jaxpr  # of jit, where it is not written out
    calls, derived = [], set()
    for equation in jaxpr.eqns:
        inputs = {id(v) for v in equation.invars}
        if "svd" in str(equation):
            assert not calls or inputs & derived
            calls.append(equation)
        if "svd" in str(equation) or inputs & derived:
            derived |= {id(v) for v in equation.outvars}
    assert len(calls) >= 2


def project_once(params, updates, limit, jit=False):
    tx = transforms.project_spectral_norm(limit)
    update = jax.jit(tx.update) if jit else tx.update
    return optax.apply_updates(params, update(updates, tx.init(params), params)[0])


@pytest.mark.parametrize("jit", [False, True])
def test_sums_in_half_precision_are_checked_as_they_are_stored(jit):
    """1 + 0.0045 is 1.0078125 in bfloat16: XLA may keep the sum itself for a bound of it."""
    params = {"kernel": jnp.ones((1, 1, 1, 1), jnp.bfloat16)}
    updates = {"kernel": jnp.full((1, 1, 1, 1), 0.0045, jnp.bfloat16)}
    assert float(project_once(params, updates, 1.0055, jit)["kernel"].ravel()[0]) <= 1.0055


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_narrower_updates_reach_the_limit(dtype):
    conv = {"kernel": jax.random.normal(jax.random.key(0), (3, 3, 8, 8))}
    found = project_once(conv, {"kernel": jnp.zeros((3, 3, 8, 8), dtype)}, 0.01)
    assert 0.0099 < float(f4.bound(found["kernel"])) <= 0.01
    dense = {"kernel": jnp.full((2, 2), 1e5)}
    assert 0.9 < np.linalg.norm(project_once(dense, {"kernel": jnp.zeros((2, 2), dtype)}, 1.0)["kernel"], 2) <= 1


def test_an_update_is_checked_as_it_is_rounded():
    """p - lr g in one rounding lies below p + (-lr g) in two."""
    norm = jax.jit(f4.dense.bound)
    p, g, lr = np.float32(1.3658593), np.float32(0.40995896), 0.1
    limit = norm(jnp.full((1, 1), np.float32(float(p) + float(np.float32(-lr)) * float(g))))
    params = {"kernel": jnp.full((1, 1), p)}
    assert float(norm(jnp.full((1, 1), p + np.float32(-lr) * g))) > float(limit)

    @jax.jit
    def update(params, gradient, limit):
        tx = optax.chain(optax.sgd(lr), transforms.project_spectral_norm(limit))
        return tx.update(gradient, tx.init(params), params)[0]

    updates = update(params, {"kernel": jnp.full((1, 1), g)}, limit)
    assert float(norm(optax.apply_updates(params, updates)["kernel"])) <= float(limit)


def test_a_limit_is_not_rounded_up():
    near = jnp.asarray(np.float32(0.1) - np.arange(500) * np.float32(7.45e-9))[:, None, None]
    bounds = jax.vmap(f4.dense.bound)(near)
    at = int(np.nonzero(np.asarray(bounds) == np.float32(0.1))[0][0])  # which is above 0.1
    found = project_once({"kernel": near[at]}, {"kernel": jnp.zeros((1, 1))}, 0.1)
    assert float(f4.dense.bound(found["kernel"])) <= 0.1


def test_a_layer_within_its_limit_is_left_alone_beside_another():
    stacked = {"layers": {"kernel": jnp.stack([1e-4 * jnp.eye(3), 1e30 * jnp.ones((3, 3))])}}
    tx = transforms.project_spectral_norm(1e-3, specs={"layers/kernel": network.Stacked(network.Dense())})
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, stacked), tx.init(stacked), stacked)
    found = optax.apply_updates(stacked, updates)["layers"]["kernel"]
    np.testing.assert_array_equal(found[0], stacked["layers"]["kernel"][0])
    assert np.linalg.norm(found[1], 2) <= 1e-3


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_projection_of_narrow_params_among_wide_numbers(dtype, x64):
    tree = {"kernel": jnp.ones((3, 3, 2, 2), dtype)}
    tx = transforms.project_spectral_norm(0.5)
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, tree), tx.init(tree), tree)
    after = optax.apply_updates(tree, updates)["kernel"]
    assert after.dtype == dtype
    assert 0.45 < float(f4.bound(after)) <= 0.5


def test_penalty_keeps_its_type_among_wide_numbers(x64):
    tree = {"kernel": jnp.ones((3, 3, 2, 2), jnp.float32)}
    tx = transforms.add_spectral_penalty(np.float64(0.1), threshold=np.float64(0.2))
    updates, after = tx.update(tree, tx.init(tree), tree)
    assert jax.tree.map(lambda x: x.dtype, after) == jax.tree.map(lambda x: x.dtype, tx.init(tree))
    assert updates["kernel"].dtype == jnp.float32


@pytest.mark.parametrize("method", ["four", "grid"])
def test_states_are_kept_by_msgpack(params, method):
    """Of an optimiser, with all that is static in it; and training goes on from the bytes as from the state."""
    tx = optax.chain(transforms.add_spectral_penalty(0.1, method=method), optax.adam(1e-2))
    step = jax.jit(lambda state: tx.update(params, state, params))
    _, state = step(tx.init(params))
    kept = serialization.from_bytes(tx.init(params), serialization.to_bytes(state))
    assert jax.tree.structure(kept) == jax.tree.structure(state)
    jax.tree.map(np.testing.assert_array_equal, kept, state)
    jax.tree.map(np.testing.assert_array_equal, step(kept), step(state))
    with pytest.raises(ValueError, match="LadderState has 2 arrays, what was kept has 1"):
        serialization.from_state_dict(network.init(params, key=KEY).inner[0], {"0": 1.0})
