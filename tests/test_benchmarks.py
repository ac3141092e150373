"""The parts of the benchmarks that decide what is reported: arms, means, ratios, and that they stop at a violation."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fantastic4 as f4
from benchmarks import certify, core, models, speed, tightness, train_cifar
from benchmarks.models import convolutions
from fantastic4 import lipschitz

RNG = np.random.default_rng(11)
TINY = train_cifar.Setting(blocks=1, width=4, epochs=4, images=256)
PARAMS = TINY.model.init(jax.random.key(0), jnp.zeros((1, 32, 32, 3)))["params"]
PATHS = list(convolutions(TINY.model, 32))


def kernel(tree, path):
    for key in path.split("/"):
        tree = tree[key]
    return tree


def updated(arm, times=1):
    """Params after updates with zero gradients, so that only the arm's own part acts."""
    tx = train_cifar.optimiser(arm, TINY, PARAMS)

    @jax.jit
    def update(params, state):
        updates, state = tx.update(jax.tree.map(jnp.zeros_like, params), state, params)
        return optax.apply_updates(params, updates), state

    params, state = PARAMS, tx.init(PARAMS)
    for _ in range(times):
        params, state = update(params, state)
    return params


def test_no_arm_changes_anything_by_itself():
    assert all(np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, (updated("none"), PARAMS)), strict=True))


@pytest.mark.parametrize("arm", [arm for arm in train_cifar.ARMS if arm.startswith(("bound, β 0.01", "Yoshida"))])
def test_penalties_shrink_norms_of_convolutions_and_nothing_else(arm):
    after = updated(arm)
    for path in PATHS:
        small, large = (
            np.linalg.norm(kernel(p, path).reshape(-1, kernel(p, path).shape[-1]), 2) for p in (after, PARAMS)
        )
        assert small < large, path
    np.testing.assert_array_equal(after["Dense_0"]["kernel"], PARAMS["Dense_0"]["kernel"])


def test_yoshida_penalty_has_the_gradient_of_its_formula():
    after = updated(arm := next(a for a in train_cifar.ARMS if a.startswith("Yoshida")))
    assert arm.endswith(f"{train_cifar.YOSHIDA:g}")
    path = PATHS[0]
    before = np.asarray(kernel(PARAMS, path), np.float64)
    u, s, vt = np.linalg.svd(before.reshape(-1, before.shape[-1]), full_matrices=False)
    step = -0.1 * train_cifar.YOSHIDA * s[0] * np.outer(u[:, 0], vt[0]).reshape(before.shape)
    np.testing.assert_allclose(kernel(after, path) - before, step, atol=2e-2 * np.abs(step).max())


def test_gouk_projection_brings_every_layer_to_its_maximum():
    large = jax.tree.map(lambda leaf: 10 * leaf if leaf.ndim == 4 else leaf, PARAMS)
    layers = list(f4.network.find(PARAMS, select=lambda _, leaf: leaf.ndim == 4))
    tx = train_cifar.gouk_projection(2.0, tuple(layers), TINY.model)
    updates, _ = jax.jit(tx.update)(jax.tree.map(jnp.zeros_like, large), tx.init(large), large)
    after, where = optax.apply_updates(large, updates), train_cifar.circular_layers(TINY.model)
    for path in PATHS:
        spec, shape = where[path]
        assert float(f4.exact_norm(kernel(after, path), shape, spec)) == pytest.approx(2, rel=0.05), path


def test_augmented_images_are_shifted_and_mirrored_ones():
    images = RNG.random((40, 8, 8, 3))
    after = train_cifar.augmented(images, np.random.default_rng(0))
    mirrored = 0
    for before, now in zip(images, after, strict=True):
        padded = np.pad(before, ((4, 4), (4, 4), (0, 0)))
        shifts = [padded[i : i + 8, j : j + 8] for i in range(9) for j in range(9)]
        plain = any(np.array_equal(now, s) for s in shifts)
        assert plain or any(np.array_equal(now, s[:, ::-1]) for s in shifts)
        mirrored += not plain
    assert 8 < mirrored < 32


def test_summary_has_means_and_deviations_over_seeds():
    figures = {"train": 0.9, "log10 product of norms": 3.0, "log10 product of bounds": 4.0, "epoch_s": 2.0}
    runs = {f"none / {seed}": {**figures, "test": test} for seed, test in enumerate((0.5, 0.6, 0.7))}
    (row,) = train_cifar.summary({"runs": runs})
    assert row["seeds"] == 3
    assert row["test"] == pytest.approx((0.6, 0.1))
    assert row["gap"] == pytest.approx((0.3, 0.1))
    assert row["epoch_s"] == 2


CASE = tightness.Case("small", RNG.normal(size=(3, 3, 2, 3)).astype(np.float32), 6)


def test_a_row_has_every_method_beside_the_norm():
    row = tightness.measure(CASE)
    assert set(tightness.BOUNDS) < set(row)
    assert row["four"]["ratio"] == pytest.approx(min(row[name]["ratio"] for name in "RSTU"), rel=1e-6)
    frequencies = np.fft.fft2(CASE.kernel, (48, 48), axes=(0, 1))
    assert row["sup"][0] == pytest.approx(np.linalg.norm(frequencies, 2, axis=(2, 3)).max(), rel=1e-2)
    assert row["Miyato"]["ratio"] * row["sup"][0] == pytest.approx(
        np.linalg.norm(CASE.kernel.reshape(-1, 3), 2), rel=1e-5
    )


def test_a_bound_below_the_norm_stops_the_benchmark(monkeypatch):
    whole = tightness.methods_of
    monkeypatch.setattr(tightness, "methods_of", lambda case: {"gram": lambda: 0.4 * whole(case)["gram"]()})
    with pytest.raises(AssertionError, match="small: gram below the norm"):
        tightness.measure(CASE)


def test_the_peers_get_the_layers_of_resnet18():
    kernels = [(*fields["kernel_size"], shape[-1], fields["features"])
               for fields, shape in convolutions(models.resnet18(), 224).values()]  # fmt: skip
    assert kernels == core.resnet18_shapes()
    sides = [(side, spec.strides) for side, spec in speed.layers()]
    assert sides[0] == (224, 2)
    assert sides[5:8] == [(56, 2), (28, 1), (56, 2)]  # the second stage: 3×3, 3×3, the shortcut
    assert sides[-1] == (7, 1)


def test_the_papers_setting_is_the_papers():
    paper = train_cifar.PAPER
    assert len(convolutions(paper.model, 32)) == 31
    assert (paper.epochs, paper.images, train_cifar.BATCH, train_cifar.BETAS[0]) == (200, 50_000, 128, 8e-4)
    rate = train_cifar.learning_rate(paper)
    rates = [float(rate(epoch * paper.steps)) for epoch in (0, 99, 101, 149, 151, 199)]
    np.testing.assert_allclose(rates, [0.1, 0.1, 0.01, 0.01, 0.001, 0.001], rtol=1e-6)


def test_power_laws_are_read_off_the_larger_half():
    sizes = [1, 2, 4, 8, 16, 32]
    assert speed._exponent(sizes, [5, 5, 5, *(0.1 * s**2 for s in sizes[3:])]) == pytest.approx(2)


def test_shifted_images_move_by_one_pixel():
    images = RNG.random((60, 5, 5, 1))
    np.testing.assert_array_equal(certify.shifted(jnp.asarray(images), 0.0, jax.random.key(0)), jnp.asarray(images))
    moved = np.asarray(certify.shifted(jnp.asarray(images), 0.5, jax.random.key(0)))
    seen = set()
    for before, now in zip(np.float32(images), moved, strict=True):
        padded = np.pad(before, ((1, 1), (1, 1), (0, 0)))
        moves = [(i, j) for i in range(3) for j in range(3) if np.array_equal(now, padded[i : i + 5, j : j + 5])]
        assert len(moves) == 1
        seen |= set(moves)
    assert len(seen) == 9


@pytest.mark.parametrize(
    "model",
    [
        certify.Dense(5),
        certify.Convolutional(((3, 28, 1, "VALID"), (2, 14, 7, "SAME"), (1, 9, 5, "VALID")), certify.CROSS),
    ],
    ids=["dense", "conv"],
)
def test_the_first_layer_written_out_is_that_of_the_network(model):
    x = jnp.asarray(RNG.normal(size=(4, 28, 28, 1)))
    params = model.init(jax.random.key(0), x)["params"]
    params = jax.tree.map(lambda a: a + 0.01 * jax.random.normal(jax.random.key(a.size), a.shape), params)
    matrix, bias = model.first_layer(params)
    written = certify.logits_of(((matrix, bias), params["last"]), x.reshape(4, -1), model.shifts)
    np.testing.assert_allclose(written, model.apply({"params": params}, x), atol=1e-5)

    # And what training penalises is the curvature of each margin, without shifts, found by power iteration.
    vectors = jnp.asarray(RNG.normal(size=(100, 784)))
    follow = jax.jit(lambda vectors: certify.curvatures(params, matrix, vectors))
    for _ in range(60):
        found, vectors = follow(vectors)
    last = np.asarray(params["last"]["kernel"], np.float64)
    for i, j in [(0, 1), (4, 9), (7, 7)]:
        weights = np.maximum(last[:, j] - last[:, i], 0) / 4
        exact = np.linalg.norm(np.asarray(matrix, np.float64) * np.sqrt(weights), 2) ** 2
        np.testing.assert_allclose(found[i, j], exact, rtol=0.02)


def test_pairs_are_sorted_and_stretch_nothing():
    x = jnp.asarray(RNG.normal(size=(2, 3, 8)))
    pairs = np.sort(np.asarray(x).reshape(2, 3, 4, 2), axis=-1).reshape(x.shape)
    np.testing.assert_array_equal(certify.sorted_pairs(x), pairs)
    assert float(lipschitz.bound(certify.sorted_pairs, x).value) == 1  # not √2, as max and min apart would have it


def test_a_moved_image_is_its_entries_elsewhere():
    images = RNG.random((2, 28, 28, 1))
    for down, right in [(0, 0), (1, 0), (0, -1), (-1, 1)]:
        wanted = np.zeros_like(images)
        for i in range(28):
            for j in range(28):
                if 0 <= i - down < 28 and 0 <= j - right < 28:
                    wanted[:, i, j] = images[:, i - down, j - right]
        np.testing.assert_array_equal(certify.moved(jnp.asarray(images), (down, right)), np.float32(wanted))


def test_the_loss_goes_from_cross_entropy_to_the_share_that_is_lost():
    logits, labels = jnp.asarray(RNG.normal(size=(6, 10)) * 3), jnp.arange(6)
    p = np.exp(np.asarray(logits) / 2)
    p = (p / p.sum(axis=1, keepdims=True))[np.arange(6), labels]
    np.testing.assert_allclose(certify.loss(logits, labels, 0.5), 2 * np.mean(-np.log(p)), rtol=1e-5)
    for q in (0.3, 1.0):
        np.testing.assert_allclose(certify.loss(logits, labels, 0.5, q), 2 * np.mean((1 - p**q) / q), rtol=1e-5)
    assert np.isfinite(jax.grad(lambda logits: certify.loss(logits, labels, 0.5))(logits)).all()


def test_a_training_run_that_broke_off_goes_on_where_it_was(tmp_path):
    recipes, done = [recipe._replace(epochs=5) for recipe in certify.RECIPES["conv"]], []

    def epoch(carry, i):
        if i == 3 and fails:
            raise KeyboardInterrupt
        params, (count, state) = carry
        return {"a": params["a"] * 2 + i}, (count + 1, state)

    fresh = {"a": jnp.array([1.0, -3.0])}, (jnp.array(0), optax.adam(0.1).init({"a": jnp.ones(2)}))
    kept = lambda resume: certify.Kept(tmp_path / "out" / "run.msgpack", recipes, resume, done.append)
    fails = False
    whole = kept(False).run(epoch, fresh)
    fails = True
    with pytest.raises(KeyboardInterrupt):
        kept(False).run(epoch, fresh)
    fails = False
    done.clear()
    resumed = kept(True).run(epoch, fresh)
    assert done == [3, 4, 5]
    jax.tree.map(np.testing.assert_array_equal, whole, resumed)
    assert jax.tree.structure(whole) == jax.tree.structure(resumed)
    recipes[0] = recipes[0]._replace(rate=1.0)  # of what came before it
    with pytest.raises(SystemExit, match="other recipes"):
        kept(True).run(epoch, fresh)
