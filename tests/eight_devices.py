"""What holds on a mesh of eight devices. Run by test_devices.py, in a process that has them."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import fantastic4 as f4
from fantastic4 import dense, heuristics, jacobian, linen, lipschitz, network, robustness, transforms

KEY = jax.random.key(0)
SHARDINGS = {
    "replicated": P(),
    "outputs": P(None, "model"),  # tensor parallel
    "inputs": P("model", None),
    "both": P("data", "model"),
    "fsdp": P(None, ("data", "model")),
}


@pytest.fixture(scope="module")
def mesh():
    assert jax.device_count() == 8
    return jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Auto, AxisType.Auto))


@pytest.fixture(scope="module")
def explicit_mesh():
    return jax.make_mesh((2, 4), ("data", "model"))


def gathered(compiled, shapes):
    """Collectives of the program that move as many numbers as one of the kernels has."""
    least = min(int(np.prod(shape)) for shape in shapes)
    found = []
    for line in compiled.as_text().splitlines():
        # XLA joins collectives: what they give may be a tuple.
        match = re.search(r"= (.*?) (all-gather|all-to-all|collective-permute|all-reduce)", line)
        results = re.findall(r"f32\[([0-9,]*)\]", match[1]) if match else []
        if any(int(np.prod([int(n) for n in result.split(",") if n])) >= least for result in results):
            found.append(line.strip()[:160])
    return found


def tree():
    """Two kernels of one shape, which are stacked, a larger one, a matrix."""
    keys = jax.random.split(KEY, 4)
    return {
        "a": {"kernel": jax.random.normal(keys[0], (3, 3, 32, 32))},
        "b": {"kernel": jax.random.normal(keys[1], (3, 3, 32, 32))},
        "c": {"kernel": jax.random.normal(keys[2], (3, 3, 64, 128))},
        "d": {"kernel": jax.random.normal(keys[3], (256, 512))},
    }


def shard(params, mesh, axes):
    def place(leaf):
        return jax.device_put(leaf, NamedSharding(mesh, P(*(None,) * (leaf.ndim - 2), *axes) if len(axes) else P()))

    return jax.tree.map(place, params)


def one_for_each(fn, mesh):
    """In ``shard_map``: a device's own of everything that has a leading axis."""
    first = lambda tree: jax.tree.map(lambda x: x[0], tree)
    lone = lambda *args: jax.tree.map(lambda x: x[None], fn(*map(first, args)))
    places = P(("data", "model"))
    return jax.shard_map(lone, mesh=mesh, in_specs=places, out_specs=places)


def by_autodiff(params, state):
    return jax.value_and_grad(lambda p: network.step(p, state), has_aux=True)(params)


def written_out(params, state):
    penalty, state, gradients = network.step_with_gradients(params, state)
    return (penalty, state), network.replace(jax.tree.map(jnp.zeros_like, params), gradients)


def check_the_step(mesh, name, step=by_autodiff):
    """Of sharded params, the step is what it is of whole ones, and gathers no kernel."""
    alone = tree()
    start = network.init(alone, key=KEY)
    (value, new), gradient = jax.jit(step)(alone, start)
    params = shard(alone, mesh, SHARDINGS[name])
    state = jax.jit(lambda p: network.init(p, key=KEY))(params)  # its vectors lie as the kernels do
    placed = jax.tree.map(lambda p: p.sharding, params)
    compiled = jax.jit(step, out_shardings=((None, None), placed)).lower(params, state).compile()
    assert not gathered(compiled, [leaf.shape for leaf in jax.tree.leaves(params)])
    (ours, advanced), theirs = compiled(params, state)
    np.testing.assert_allclose(ours, value, rtol=1e-5)
    np.testing.assert_allclose(advanced.values, new.values, rtol=1e-5)
    for a, b in zip(jax.tree.leaves(theirs), jax.tree.leaves(gradient), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5 * float(jnp.abs(b).max()))


@pytest.mark.parametrize("name", SHARDINGS)
def test_the_step_is_the_same_and_gathers_no_kernel(mesh, name):
    check_the_step(mesh, name)


@pytest.mark.parametrize("name", ["both", "fsdp"])
def test_gradients_written_out_gather_no_kernel(mesh, name):
    check_the_step(mesh, name, written_out)


@pytest.mark.parametrize("name", ["inputs", "both"])
def test_a_mesh_with_explicit_axes(explicit_mesh, name):
    check_the_step(explicit_mesh, name)


def test_gradients_written_out_on_a_mesh_with_explicit_axes(explicit_mesh):
    check_the_step(explicit_mesh, "both", written_out)


def test_what_is_sound_on_a_mesh_with_explicit_axes(explicit_mesh):
    with jax.set_mesh(explicit_mesh):
        alone, tx = {name: tree()[name] for name in "ad"}, transforms.project_spectral_norm(1.0)
        params = shard(alone, explicit_mesh, SHARDINGS["both"])
        layers = network.find(params)
        bounds = network.bounds(alone, layers)
        for path, bound in network.bounds(params, layers).items():
            np.testing.assert_allclose(bound, bounds[path], rtol=1e-5)
        np.testing.assert_allclose(f4.bound(params["a"]["kernel"]), bounds["a/kernel"], rtol=1e-5)
        kernel = np.asarray(alone["a"]["kernel"])
        once, spread = f4.norm_interval(kernel), f4.norm_interval(kernel, mesh=explicit_mesh)
        assert once.reached
        assert spread.reached
        assert once.lower <= spread.upper
        assert spread.lower <= once.upper
        updates, _ = jax.jit(tx.update)(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
        after = optax.apply_updates(params, updates)
        assert all(0.999 <= bound <= 1 for bound in network.bounds(after, layers).values())
        assert jax.tree.map(lambda p: p.sharding, after) == jax.tree.map(lambda p: p.sharding, params)


def test_a_train_step_with_optax(mesh):
    alone, tx = tree(), optax.chain(transforms.add_spectral_penalty(0.1), optax.adam(0.01))

    def train(params, state):
        gradient = jax.tree.map(lambda p: 0.1 * p, params)
        updates, state = tx.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    params, state = shard(alone, mesh, SHARDINGS["fsdp"]), None
    state = jax.jit(tx.init)(params)
    other = jax.jit(tx.init)(alone)
    for _ in range(3):
        params, state = jax.jit(train)(params, state)
        alone, other = jax.jit(train)(alone, other)
    assert params["c"]["kernel"].sharding.spec == shard(tree(), mesh, SHARDINGS["fsdp"])["c"]["kernel"].sharding.spec
    for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(alone), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)


def test_the_wrapper_under_data_parallelism(mesh):
    """Batches over the devices, params replicated: one state, the same on all."""
    model = linen.SpectralBound(nn.Conv(8, (3, 3)), mode="hard")
    x = jax.random.normal(KEY, (16, 8, 8, 4))
    variables = model.init(KEY, x)
    y, new = model.apply(variables, x, mutable=["spectral_stats"])
    split = jax.device_put(x, NamedSharding(mesh, P(("data", "model"))))
    whole = jax.device_put(variables, NamedSharding(mesh, P()))
    ours, theirs = jax.jit(lambda v, x: model.apply(v, x, mutable=["spectral_stats"]))(whole, split)
    np.testing.assert_allclose(ours, y, rtol=1e-4, atol=1e-5)
    for a, b in zip(jax.tree.leaves(theirs), jax.tree.leaves(new), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("which", ["mesh", "explicit_mesh"])
def test_spectrum_and_interval_spread_their_frequencies(which, request):
    mesh = request.getfixturevalue(which)
    kernel = jax.random.normal(KEY, (3, 3, 6, 5))
    alone = f4.singular_values(kernel, (7, 9))
    spread = f4.singular_values(kernel, (7, 9), mesh=mesh)
    np.testing.assert_allclose(spread, alone, rtol=1e-5, atol=1e-5)
    text = jax.jit(lambda k: f4.singular_values(k, (7, 9), mesh=mesh)).lower(kernel).compile().as_text()
    batches = {int(n) for n in re.findall(r"f32\[(\d+),1,1,5\]\S* .*custom-call", text)}
    assert batches == {4}  # a device's share of the 32 frequencies
    one = f4.norm_interval(kernel, rtol=1e-4)
    many = f4.norm_interval(kernel, rtol=1e-4, mesh=mesh)
    assert many.reached
    assert many.lower <= one.upper
    assert one.lower <= many.upper
    sized = f4.norm_interval(kernel, f4.ConvSpec(padding="CIRCULAR"), input_shape=(12, 12), mesh=mesh)
    top = float(f4.exact_norm(kernel, (12, 12)))
    assert sized.lower <= top * (1 + 1e-5)
    assert top * (1 - 1e-5) <= sized.upper


def test_a_mesh_must_be_a_mesh():
    with pytest.raises(ValueError, match=r"mesh must be a jax\.sharding\.Mesh, as jax.make_mesh returns it, got int"):
        f4.singular_values(jnp.ones((3, 3, 1, 1)), (4, 4), mesh=8)
    with pytest.raises(ValueError, match=r"mesh must be a jax\.sharding\.Mesh"):
        f4.norm_interval(jnp.ones((3, 3, 1, 1)), mesh="all")


def test_a_network_of_its_own_on_every_device(mesh):
    """In ``shard_map``, whose check of what varies is left on: loops start from constants, which do not."""
    keys = jax.random.split(KEY, 2)
    shapes = {"c": (8, 3, 3, 2, 4), "d": (8, 5, 3)}
    networks = {n: {"kernel": jax.random.normal(k, s)} for k, (n, s) in zip(keys, shapes.items(), strict=True)}
    state = network.init(jax.tree.map(lambda x: x[0], networks), key=KEY)
    project = transforms.project_spectral_norm(0.5)

    def all_of_it(params):
        first = network.init(params, key=KEY)
        four, _ = f4.step(params["c"]["kernel"], f4.init(params["c"]["kernel"], key=KEY), iterations=2)
        penalty = jax.grad(lambda p: network.step(p, state, iterations=2)[0])(params)
        changes = project.update(jax.tree.map(jnp.zeros_like, params), project.init(params), params)[0]
        return first.inner, four.values, penalty, changes

    found = jax.jit(one_for_each(all_of_it, mesh))(networks)
    alone = jax.jit(all_of_it)(jax.tree.map(lambda x: x[5], networks))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a[5], b, rtol=1e-4, atol=1e-5), found, alone)


def updated(tx):
    return lambda k: tx.update({"kernel": 0 * k}, tx.init({"kernel": k}), {"kernel": k})[0]


# Kernels of more than 64 rows: those of fewer are one block of every sum.
KINDS = {
    "four": lambda k: f4.four_bounds(k).values,
    **{method: jax.grad(functools.partial(f4.bound, method=method)) for method in f4.bounds.METHODS},
    "matrix": lambda k: dense.bound(k[0, 0]),
    "norm": lambda k: f4.exact_norm(k, (8, 8)),
    "steps": lambda k: f4.step(k, f4.init(k, key=KEY), iterations=3)[0].values,
    "miyato": lambda k: heuristics.miyato_normalise(k, heuristics.miyato_init(k, key=KEY))[0],
    "gouk": lambda k: heuristics.gouk_project(k, 1.0, heuristics.ryu_init(k, (5, 5), key=KEY))[0],
    "ryu": lambda k: f4.estimate_ryu(k, (5, 5), key=KEY, iterations=2),
    "sedghi": lambda k: f4.estimate_sedghi(k, (5, 5), key=KEY, iterations=2),
    "tnn": lambda k: f4.estimate_tnn(k, key=KEY, iterations=2),
    "projected": updated(transforms.project_spectral_norm(1.0)),
    "projected at times": updated(transforms.project_spectral_norm(1.0, every=3)),
    "clipped": updated(transforms.clip_spectrum(0.5, {"kernel": (4, 4)}, every=1)),
    "a grid's step": lambda k: f4.ladder.step(k, f4.ladder.init(k, key=KEY, points=4))[0],
    "attack": lambda k: robustness.attack(
        lambda x: x @ k[0, 0], jnp.ones((2, 70)), jnp.arange(2), 0.1, key=KEY, steps=2, restarts=2
    ),
    "margins": lambda k: lipschitz.margins(lambda x: nn.relu(x @ k[0, 0]) @ k[0, 0, :40], jnp.ones((1, 70))),
    "layer norm": lambda k: lipschitz.bound(
        lambda x: nn.gelu(nn.LayerNorm(use_scale=False).apply({"params": {"bias": k[0, 0, 0]}}, x)), jnp.ones((1, 40))
    ).value,
    "curvature": lambda k: lipschitz.curvature(lambda x: nn.softplus(x @ k[0, 0]).sum(), jnp.ones((1, 70))).value,
}  # fmt: skip


@pytest.mark.parametrize("name", KINDS)
def test_a_large_kernel_of_its_own_on_every_device(mesh, name):
    jax.eval_shape(one_for_each(KINDS[name], mesh), jax.ShapeDtypeStruct((8, 3, 3, 70, 40), jnp.float32))


def test_no_device_adds_up_what_others_have(mesh):
    """The transpose of a map that takes what is the same on all devices would."""
    kernels, y = jax.random.normal(KEY, (8, 3, 3, 5, 4)), jax.random.normal(KEY, (8, 4, 4, 4))

    def all_of_it(kernel, y):
        other = lipschitz.bound(lambda x: nn.relu(x + 1) @ y[0], jnp.ones((1, 4))).value
        pairs = (kernel, y), (kernels[3], y), (kernel, jnp.ones((4, 4, 4)))
        return *(jacobian.adjoint(kernel, y, (4, 4)) for kernel, y in pairs), other

    found = jax.jit(one_for_each(all_of_it, mesh))(kernels, y)
    alone = jax.jit(jax.vmap(all_of_it))(kernels, y)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), found, alone)
