"""Train networks on MNIST so that their predictions can be certified, from scratch, and certify all 10,000 test images.

    python -m benchmarks.certify            # make certify-mnist
    python -m benchmarks.certify --network conv

Three networks: "dense", 784-1024-10 with softplus, as published (Singla & Feizi 2020), and "conv", convolutions of two
sizes side by side with softplus, averaged over shifts of the image by a pixel, and a dense layer, both certified by the
curvature of their margins; "lipschitz", a convolutional network of normalised layers, certified by its Lipschitz
bounds. A prediction counts at ε when it is right and no image within ℓ2 distance ε has another class, against every
other class.

Training for curvature: cross-entropy at the point x* = x₀ - ε ∇f(x*)/‖∇f(x*)‖ where the margin f against the runner-up
is smallest. The certificate finds that very point where the curvature bound m of the margin is at most ‖∇f(x*)‖/ε; so
what is penalised, β times, is only what m ε exceeds ‖∇f(x*)‖ by (with a tenth more, for safety). With two layers
m_yt = ¼‖diag(√(w_y - w_t)⁻) A‖², A the first layer; one warm-started power iteration a step follows all ninety of them.
"""

from __future__ import annotations

import argparse
import functools
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from flax import serialization
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from benchmarks import data, harness
from fantastic4 import linen, lipschitz, robustness

EPSILON = 1.58  # in pixel values from 0 to 1; published figures are at it
OUTPUT = Path("out")
CLASSES = 10
SIDE = 28  # of an image

Shifts = tuple[tuple[tuple[int, int], float], ...]  # pixels down and right, and the weight
STILL: Shifts = (((0, 0), 1.0),)
CROSS: Shifts = (((0, 0), 0.4), ((1, 0), 0.15), ((-1, 0), 0.15), ((0, 1), 0.15), ((0, -1), 0.15))


def moved(images: jax.Array, by: tuple[int, int]) -> jax.Array:
    """Images ``(batch, 28, 28, 1)`` a pixel, or none, further down and right; zeros come in."""
    if by == (0, 0):
        return images
    down, right = by
    padded = jnp.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)))
    return padded[:, 1 - down : 1 - down + SIDE, 1 - right : 1 - right + SIDE]


class Dense(nn.Module):
    """784-1024-10 with softplus."""

    hidden: int = 1024
    shifts: ClassVar[Shifts] = STILL

    def setup(self) -> None:
        """Two layers."""
        self.first = nn.Dense(self.hidden, kernel_init=nn.initializers.normal(784**-0.5))
        self.last = nn.Dense(CLASSES, kernel_init=nn.initializers.normal(self.hidden**-0.5))

    def __call__(self, x: jax.Array) -> jax.Array:
        """Logits ``(batch, 10)``."""
        return self.last(nn.softplus(self.first(x.reshape(len(x), -1))))

    def first_layer(self, params: Any) -> tuple[jax.Array, jax.Array]:
        """Its matrix ``(784, hidden)`` and bias."""
        return params["first"]["kernel"], params["first"]["bias"]


class Convolutional(nn.Module):
    """Convolutions of the image side by side, softplus, an average over shifts of the image, and a dense layer.

    Attributes:
      kernels: of each convolution its channels, the sides of its kernel, its stride and its padding.
      shifts: and their weights in the average.
    """

    kernels: tuple[tuple[int, int, int, str], ...] = ((512, 28, 1, "VALID"), (64, 14, 7, "SAME"))
    shifts: Shifts = STILL

    def setup(self) -> None:
        """A layer for each convolution, and the last."""
        self.first = [
            nn.Conv(channels, (side, side), stride, padding, kernel_init=nn.initializers.normal(1 / side))
            for channels, side, stride, padding in self.kernels
        ]
        self.last = nn.Dense(CLASSES, kernel_init=nn.initializers.normal(0.01))

    def __call__(self, x: jax.Array) -> jax.Array:
        """Logits ``(batch, 10)``."""

        def features(x: jax.Array) -> jax.Array:
            return jnp.concatenate([nn.softplus(conv(x)).reshape(len(x), -1) for conv in self.first], axis=1)

        return self.last(sum(weight * features(moved(x, by)) for by, weight in self.shifts))

    def first_layer(self, params: Any) -> tuple[jax.Array, jax.Array]:
        """All convolutions as one matrix ``(784, hidden)``, and their biases: what trains fastest here.

        A column is a kernel, padded to the image from where it stands.
        """
        columns, biases = [], []
        for i, (_, side, stride, padding) in enumerate(self.kernels):
            kernel, bias = params[f"first_{i}"]["kernel"], params[f"first_{i}"]["bias"]
            ((before, after),) = jax.lax.padtype_to_pads((SIDE,), (side,), (stride,), padding)
            starts = range(-before, SIDE + after - side + 1, stride)
            for top in starts:
                for left in starts:
                    around = [(start, SIDE - start - side, 0) for start in (top, left)]
                    padded = jax.lax.pad(kernel, jnp.zeros((), kernel.dtype), [*around, (0, 0, 0), (0, 0, 0)])
                    columns.append(padded.reshape(SIDE**2, -1))
                    biases.append(bias)
        return jnp.concatenate(columns, axis=1), jnp.concatenate(biases)


def sorted_pairs(x: jax.Array) -> jax.Array:
    """GroupSort of every two channels, by max and min: ``jnp.sort`` takes 18 times as long on a CPU."""
    a, b = x[..., ::2], x[..., 1::2]
    return jnp.stack([jnp.minimum(a, b), jnp.maximum(a, b)], axis=-1).reshape(x.shape)


class Normalised(nn.Module):
    """Convolutions and dense layers, each divided by the estimate of its bound, with GroupSort between."""

    @nn.compact
    def __call__(self, x: jax.Array, update_stats: bool = False) -> jax.Array:
        """Logits ``(batch, 10)``."""

        def layer(module: nn.Module, x: jax.Array) -> jax.Array:
            return linen.SpectralBound(module, mode="hard", method="grid")(x, update_stats=update_stats)

        x = sorted_pairs(layer(nn.Conv(32, (4, 4), strides=2), x))
        x = sorted_pairs(layer(nn.Conv(64, (4, 4), strides=2), x))
        x = sorted_pairs(layer(nn.Dense(256), x.reshape(len(x), -1)))
        return layer(nn.Dense(CLASSES), x)


class Recipe(NamedTuple):
    """How a network is trained.

    Attributes:
      model: the network.
      epochs: passes over the training images.
      batch: images in a step.
      rate: of Adam, with cosine decay.
      beta: weight of the excess curvature.
      shift: probability, for each axis, that an image is moved by a pixel.
      sharpness: cross-entropy of the logits times this, divided by it: below 1 it goes on beyond a small margin.
      flatness: the loss is (1 - p^q)/q, p the probability of the class and q going from the first number to the second;
        at 0 it is cross-entropy (Zhang & Sabuncu 2018). So that in the end the images that are lost count less.
      seed: of the order of the images and their shifts.
    """

    model: nn.Module
    epochs: int
    batch: int
    rate: float
    beta: float
    shift: float
    sharpness: float
    flatness: tuple[float, float] = (0.0, 0.0)
    seed: int = 0


_CONVOLUTIONAL = Recipe(Convolutional(), 60, 64, 3e-3, beta=0.06, shift=0.15, sharpness=0.5, flatness=(0.0, 0.3))
_AVERAGED = _CONVOLUTIONAL._replace(model=Convolutional(shifts=CROSS), epochs=8, rate=6e-4, flatness=(0.3, 0.3), seed=1)
# One after the other, each from the params of the one before.
RECIPES = {
    "dense": (Recipe(Dense(), 40, 128, 4e-3, beta=0.1, shift=0.15, sharpness=0.5),),
    "conv": (_CONVOLUTIONAL, _AVERAGED),
    "lipschitz": (Recipe(Normalised(), 10, 128, 5e-3, beta=0.0, shift=0.0, sharpness=8.0),),
}
_STEPS = 4  # towards the worst point of the ball


def _take(values: jax.Array, classes: jax.Array) -> jax.Array:
    return jnp.take_along_axis(values, classes[:, None], axis=1)[:, 0]


def _runner_up(logits: jax.Array, labels: jax.Array) -> jax.Array:
    return jnp.argmax(jnp.where(jax.nn.one_hot(labels, CLASSES, dtype=bool), -jnp.inf, logits), axis=1)


def loss(logits: jax.Array, labels: jax.Array, sharpness: float, q: jax.Array | float = 0.0) -> jax.Array:
    """(1 - p^q)/q, cross-entropy at q = 0, the mean over a batch; its slope is that of the logits, however sharp."""
    entropy = optax.softmax_cross_entropy_with_integer_labels(sharpness * logits, labels)
    flat = jnp.where(q > 0, -jnp.expm1(-q * entropy) / jnp.where(q > 0, q, 1), entropy)
    return flat.mean() / sharpness


def shifted(images: jax.Array, probability: float, key: jax.Array) -> jax.Array:
    """Each image moved by a pixel up or down, and left or right, each with this probability."""
    whether, where = jax.random.split(key)
    size = (len(images), 2)
    moves = jax.random.bernoulli(whether, probability, size) * jax.random.choice(where, jnp.array([-1, 1]), size)
    padded = jnp.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)))
    cut = lambda image, move: jax.lax.dynamic_slice(image, (1 + move[0], 1 + move[1], 0), images.shape[1:])  # noqa: E731
    return jax.vmap(cut)(padded, moves)


def _weights_below(params: Any) -> jax.Array:
    """¼ (w_i - w_j)⁻ for all margins: ``(10, 10, hidden)``."""
    last = params["last"]["kernel"].T
    return jnp.maximum(last[None] - last[:, None], 0) / 4


def logits_of(layers: Any, x: jax.Array, shifts: Shifts) -> jax.Array:
    """Logits of images ``(batch, 784)`` by a written-out first layer and the last: the network, but for rounding."""
    (matrix, bias), last = layers
    images = x.reshape(-1, SIDE, SIDE, 1)
    every = jnp.concatenate([moved(images, by) for by, _ in shifts]).reshape(-1, SIDE**2)
    hidden = nn.softplus(every @ matrix + bias).reshape(len(shifts), len(x), -1)
    return jnp.tensordot(jnp.array([weight for _, weight in shifts]), hidden, 1) @ last["kernel"] + last["bias"]


def curvatures(params: Any, matrix: jax.Array, vectors: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Estimates of all m_ij from one power iteration, differentiable, and the new vectors ``(100, 784)``.

    Those of the unshifted image: no shift has a larger one, nor has their average.
    """
    constant = jax.lax.stop_gradient(matrix)
    weights = _weights_below(params).reshape(len(vectors), -1)
    moved = (vectors @ constant * jax.lax.stop_gradient(weights)) @ constant.T
    size = jnp.linalg.norm(moved, axis=1, keepdims=True)
    moved = moved / jnp.where(size > 0, size, 1)
    return jnp.sum((moved @ matrix) ** 2 * weights, axis=1).reshape(CLASSES, CLASSES), moved


def _order(key: jax.Array, images: int, batch: int) -> jax.Array:
    """A random order of the images, ``(steps, batch)``."""
    steps = images // batch
    return jax.random.permutation(key, images)[: steps * batch].reshape(steps, batch)


class Kept:
    """What a training run has after each epoch, in a file, so that it goes on where it broke off.

    Args:
      path: of the file.
      recipes: of the run so far, its own the last; a file of others is refused.
      resume: go on from the file, where there is one; without, the file goes.
      progress: called with the number of epochs done.

    Attributes:
      seconds: that all its epochs took.
    """

    def __init__(self, path: Path, recipes: Sequence[Recipe], resume: bool, progress: Callable[[int], None]) -> None:
        self.path, self.recipes, self.progress, self.seconds = path, tuple(recipes), progress, 0.0
        if not resume:
            path.unlink(missing_ok=True)

    def run(self, epoch: Callable[[Any, int], Any], carry: Any) -> Any:
        """``carry`` after all epochs, each ``epoch(carry, i)``."""
        begin = 0
        if self.path.exists():
            kept = serialization.msgpack_restore(self.path.read_bytes())
            if kept["recipes"] != repr(self.recipes):
                raise SystemExit(f"{self.path} is of other recipes, {kept['recipes']}: run without --resume")
            begin, self.seconds = kept["epochs"], kept["seconds"]
            carry = serialization.from_state_dict(carry, kept["carry"])
        self.progress(begin)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        for i in range(begin, self.recipes[-1].epochs):
            started = time.perf_counter()
            carry = jax.block_until_ready(epoch(carry, i))
            self.seconds += time.perf_counter() - started
            state = {"recipes": repr(self.recipes), "epochs": i + 1, "seconds": self.seconds}
            state["carry"] = serialization.to_state_dict(carry)
            part = self.path.with_suffix(".part")
            part.write_bytes(serialization.msgpack_serialize(state))
            part.replace(self.path)
            self.progress(i + 1)
        return carry


def _train_curvature(recipe: Recipe, variables: Any, train: data.Images, kept: Kept) -> Any:
    model, start = recipe.model, jax.random.key(recipe.seed)
    images, labels = jnp.asarray(train.images), jnp.asarray(train.labels)
    params, apply = variables["params"], functools.partial(logits_of, shifts=model.shifts)
    tx = optax.adam(optax.cosine_decay_schedule(recipe.rate, len(labels) // recipe.batch * recipe.epochs))

    def loss_fn(params: Any, vectors: jax.Array, x: jax.Array, y: jax.Array, q: jax.Array) -> Any:
        layers = model.first_layer(params), params["last"]
        constant = jax.lax.stop_gradient(layers)

        def margin(x: jax.Array, against: jax.Array) -> jax.Array:
            logits = apply(constant, x)
            return jnp.sum(_take(logits, y) - _take(logits, against))

        against, worst = _runner_up(apply(constant, x), y), x
        for _ in range(_STEPS):
            gradient = jax.grad(margin)(worst, against)
            size = jnp.linalg.norm(gradient, axis=1, keepdims=True)
            worst = x - EPSILON * gradient / jnp.where(size > 0, size, 1)
        logits = apply(layers, worst)
        nearest = _runner_up(jax.lax.stop_gradient(logits), y)
        slope = jnp.linalg.norm(jax.grad(margin)(worst, nearest), axis=1)
        bent, vectors = curvatures(params, layers[0][0], vectors)
        excess = jax.nn.relu(1.1 * EPSILON * bent[y, nearest] - slope)
        return loss(logits, y, recipe.sharpness, q) + recipe.beta * jnp.mean(excess), vectors

    @jax.jit
    def epoch(carry: Any, i: jax.Array) -> Any:
        key, (first, last) = jax.random.fold_in(start, i), recipe.flatness
        q = first + (last - first) * (i + 1) / recipe.epochs
        order = _order(key, len(labels), recipe.batch)

        def step(carry: Any, batch: tuple[jax.Array, jax.Array]) -> Any:
            (params, opt_state, vectors), (chosen, key) = carry, batch
            x = shifted(images[chosen], recipe.shift, key).reshape(recipe.batch, -1)
            (_, vectors), gradients = jax.value_and_grad(loss_fn, has_aux=True)(params, vectors, x, labels[chosen], q)
            updates, opt_state = tx.update(gradients, opt_state)
            return (optax.apply_updates(params, updates), opt_state, vectors), None

        return jax.lax.scan(step, carry, (order, jax.random.split(key, len(order))))[0]

    carry = params, tx.init(params), jax.random.normal(start, (CLASSES**2, SIDE**2))
    return {"params": kept.run(epoch, carry)[0]}


def _train_lipschitz(recipe: Recipe, variables: Any, train: data.Images, kept: Kept) -> Any:
    model, start = recipe.model, jax.random.key(recipe.seed)
    images, labels = jnp.asarray(train.images), jnp.asarray(train.labels)
    variables = dict(variables)
    params = variables.pop("params")
    tx = optax.adam(optax.cosine_decay_schedule(recipe.rate, len(labels) // recipe.batch * recipe.epochs))

    @jax.jit
    def step(carry: Any, chosen: jax.Array) -> Any:
        params, state, opt_state = carry

        def loss_fn(params: Any) -> Any:
            everything = {"params": params, **state}
            logits, new = model.apply(everything, images[chosen], update_stats=True, mutable=list(state))
            # Margins are worth √2 ε each: a hinge beyond that, on a scale on which cross-entropy is sharp.
            y = labels[chosen]
            led = logits + jnp.where(jax.nn.one_hot(y, CLASSES, dtype=bool), 0, 2**0.5 * EPSILON)
            return loss(led, y, recipe.sharpness), new

        (_, state), gradients = jax.value_and_grad(loss_fn, has_aux=True)(params)
        updates, opt_state = tx.update(gradients, opt_state)
        return optax.apply_updates(params, updates), state, opt_state

    def epoch(carry: Any, i: int) -> Any:
        # Not a scan: inside a loop of XLA's a convolution takes ten times as long on a CPU.
        for chosen in _order(jax.random.fold_in(start, i), len(labels), recipe.batch):
            carry = step(carry, chosen)
        return carry

    params, state, _ = kept.run(epoch, (params, variables, tx.init(params)))
    return {"params": params, **state}


def run(name: str, options: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Train one network, certify test images, return the figures."""
    recipes, count, attacks = RECIPES[name], options.count, options.attacks
    if options.epochs is not None:
        recipes = tuple(recipe._replace(epochs=options.epochs) for recipe in recipes)
    model = recipes[-1].model
    train, test = data.mnist(options.data)
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console) as progress:
        how = _train_lipschitz if name == "lipschitz" else _train_curvature
        variables, train_s = model.init(jax.random.key(0), jnp.asarray(train.images[:1])), 0.0
        for i, recipe in enumerate(recipes, start=1):
            task = progress.add_task(f"{name}: epochs", total=recipe.epochs)
            done = functools.partial(lambda task, epochs: progress.update(task, completed=epochs), task)
            kept = Kept(OUTPUT / f"certify-{name}-{i}.msgpack", recipes[:i], options.resume, done)
            variables = how(recipe, variables, train, kept)
            train_s += kept.seconds
        begin = time.perf_counter()
        network: Callable[..., Any] = functools.partial(model.apply, variables)
        x, y = jnp.asarray(test.images[:count]), test.labels[:count]
        if name == "lipschitz":
            logits = network
            radii = np.asarray(robustness.lipschitz_radii(network, x, lipschitz.margins(network, x[:1], method="grid")))
        else:
            task = progress.add_task(f"{name}: margins that need the search", total=None)
            bent = jax.jit(lambda v: lipschitz.margin_curvatures(functools.partial(model.apply, v), x[:1]))
            report = lambda done, total: progress.update(task, completed=done, total=total)  # noqa: E731
            # The same function with its convolutions written out: its gradients take a tenth of the time.
            layers = model.first_layer(variables["params"]), variables["params"]["last"]
            logits = lambda x: logits_of(layers, x.reshape(len(x), -1), model.shifts)  # noqa: E731
            radii = robustness.curvature_radii(logits, x, bent(variables), progress=report)
        certified = time.perf_counter()
    predict = jax.jit(lambda x: jnp.argmax(network(x), axis=1))
    right = np.concatenate([predict(part) for part in np.array_split(x, max(1, count // 1000))]) == y
    np.savez(OUTPUT / f"certify-{name}.npz", radii=radii, right=right)
    console.print(f"{name}: {np.mean(right & (radii > EPSILON)):.2%} certified; {attacks} images are attacked …")
    first = slice(attacks)
    attacked = robustness.attack(logits, x[first], jnp.asarray(y[first]), EPSILON, key=jax.random.key(1))
    survive = np.asarray(predict(attacked)) == y[first]
    sure = right[first] & (radii[first] > EPSILON)
    return {
        "images": count,
        "attacked": attacks,
        "epochs": sum(recipe.epochs for recipe in recipes),
        "clean": float(right.mean()),
        "certified": float(np.mean(right & (radii > EPSILON))),
        "survive the attack": float(survive.mean()),
        "certified but broken": int(np.sum(sure & ~survive)),
        "train_s": train_s,
        "certify_s": certified - begin,
        "curve": [[e, float(np.mean(right & (radii > e)))] for e in np.linspace(0, 3, 61)],
    }


def picture(figures: dict[str, Any], path: Path) -> None:
    """Certified accuracy against ε."""
    figure = Figure(figsize=(6.4, 4), layout="constrained")
    axis = figure.subplots()
    for name, found in figures.items():
        if isinstance(found, dict) and "curve" in found:
            axis.plot(*np.transpose(found["curve"]), label=name)
    axis.axvline(EPSILON, color="grey", linewidth=0.8, linestyle=":")
    axis.scatter([EPSILON], [0.6979], marker="x", color="black", label="published, against the runner-up alone")
    axis.set(xlabel="ε, ℓ2", ylabel="certified accuracy, all 10,000 test images", xlim=(0, 3), ylim=(0, 1))
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, loc="lower left")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def main() -> None:
    """Train, certify, print a table, write figures and a picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", choices=[*RECIPES, "all"], default="dense", help="default %(default)s")
    parser.add_argument("--epochs", type=int, help="instead of each recipe's")
    parser.add_argument("--resume", action="store_true", help="go on from the last epoch that was kept in out/")
    parser.add_argument("--count", type=int, default=10_000, help="test images (default %(default)s)")
    parser.add_argument("--attacks", type=int, default=1000, help="of these are attacked (default %(default)s)")
    parser.add_argument("--data", type=Path, default=data.FOLDER, help="has MNIST's files (default %(default)s)")
    parser.add_argument("--results", type=Path, default=OUTPUT / "certify.json", help="default %(default)s")
    parser.add_argument("--picture", type=Path, default=OUTPUT / "certify.png", help="default %(default)s")
    options = parser.parse_args()
    console = Console()
    figures = json.loads(options.results.read_text()) if options.results.exists() else {}
    figures["machine"] = harness.machine()
    for name in RECIPES if options.network == "all" else [options.network]:
        figures[name] = run(name, options, console)
        options.results.parent.mkdir(parents=True, exist_ok=True)
        options.results.write_text(json.dumps(figures, indent=2) + "\n")
    table = Table(title=f"MNIST, certified at ℓ2 distance {EPSILON} against every other class")
    for column in ("network", "clean", "certified", "survive PGD", "broken", "train", "certify"):
        table.add_column(column)
    for name in RECIPES:
        if name in figures:
            f = figures[name]
            cells = [f"{f[key]:.2%}" for key in ("clean", "certified", "survive the attack")]
            broken = str(f["certified but broken"])
            table.add_row(name, *cells, broken, f"{f['train_s']:.0f} s", f"{f['certify_s']:.0f} s")
    console.print(table)
    picture(figures, options.picture)
    console.print(f"picture: {options.picture}, figures: {options.results}")


if __name__ == "__main__":
    main()
