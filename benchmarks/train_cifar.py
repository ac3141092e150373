"""Does it help? The paper's ResNet on CIFAR-10 under each way to hold the norms of its convolutions, several seeds.

    python -m benchmarks.train_cifar           # about an hour on two cores: ResNet-8, 5,000 images, 15 epochs
    python -m benchmarks.train_cifar --paper   # ResNet-32, all 50,000 images, 200 epochs: for a GPU
    python -m benchmarks.train_cifar --cost    # only what a step costs in each arm

SGD with momentum 0.9 and batches of 128; the rate is 0.1, a tenth of that after half of the epochs, a hundredth after
three quarters. Every finished run is stored at once, its kernels too, and not repeated: an interrupted call goes on
where it stopped.
The arms: nothing; weight decay 1e-4; β Σ min(R,S,T,U) for three β; the regulariser ½ λ Σ ‖T‖² of Yoshida & Miyato;
clipping of the spectrum every 100 steps (Sedghi et al.); projection after every step (Gouk et al.).
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

import fantastic4 as f4
from benchmarks import data, harness
from benchmarks.models import ResNet, convolutions, is_convolution, train_step
from fantastic4 import heuristics, network, transforms

BATCH = 128
OUTPUT = Path("out") / "train_cifar"


class Setting(NamedTuple):
    """What is trained, and on how much.

    Attributes:
      blocks: in each of three stages: 5 is ResNet-32, 1 is ResNet-8.
      width: channels of the first stage.
      epochs: passes over the images.
      images: how many of the 50,000, the first ones.
      augment: shifts by up to 4 pixels, and mirrors, at random.
    """

    blocks: int = 1
    width: int = 16
    epochs: int = 15
    images: int = 5_000
    augment: bool = False

    @property
    def model(self) -> ResNet:
        """The network."""
        return ResNet((self.blocks,) * 3, self.width, 10, small_images=True, pad_shortcut=True)

    @property
    def steps(self) -> int:
        """In an epoch."""
        return self.images // BATCH


PAPER = Setting(5, 16, 200, 50_000, augment=True)


Layers = tuple[network.Layer, ...]
Arm = Callable[[Setting, Layers, optax.GradientTransformation], optax.GradientTransformation]


def circular_layers(model: ResNet) -> dict[str, tuple[f4.ConvSpec, tuple[int, ...]]]:
    """For every kernel's path: its layer, with circular padding, and the size of its input."""
    return {
        path: (f4.ConvSpec(strides=fields["strides"] or 1, padding="CIRCULAR"), shape[:2])
        for path, (fields, shape) in convolutions(model, 32).items()
    }


def _start(params: Any, layers: Layers, start: Callable[[str, Array, Array], Any]) -> dict[str, Any]:
    """``start(path, kernel, key)`` of every kernel, by path."""
    leaves = network.leaves_at(params, layers)
    keys = jax.random.split(jax.random.key(0), len(leaves))
    return {path: start(path, kernel, key) for (path, kernel), key in zip(leaves.items(), keys, strict=True)}


def add_yoshida_penalty(factor: float, layers: Layers) -> optax.GradientTransformation:
    """The gradient of ½ λ Σ ‖T‖², of this library's `fantastic4.heuristics.yoshida_penalty`; its states by path."""

    def init(params: Any) -> dict[str, Any]:
        return _start(params, layers, lambda _, kernel, key: heuristics.miyato_init(kernel, key=key))

    def update(updates: Any, powers: dict[str, Any], params: Any = None) -> tuple[Any, dict[str, Any]]:
        def penalty(leaves: dict[str, Array]) -> tuple[Array, dict[str, Any]]:
            terms = {p: heuristics.yoshida_penalty(kernel, powers[p]) for p, kernel in leaves.items()}
            return sum((v for v, _ in terms.values()), jnp.zeros(())), {p: new for p, (_, new) in terms.items()}

        gradients, new = jax.grad(penalty, has_aux=True)(network.leaves_at(params, layers))
        old = network.leaves_at(updates, layers)
        return network.replace(updates, {p: old[p] + factor * gradients[p] for p in gradients}), new

    return optax.GradientTransformation(init, update)


def gouk_projection(maximum: float, layers: Layers, model: ResNet) -> optax.GradientTransformation:
    """`fantastic4.heuristics.gouk_project` after every update: one iteration, at the layer's input size."""
    where = circular_layers(model)

    def init(params: Any) -> dict[str, Any]:
        def start(path: str, kernel: Array, key: Array) -> heuristics.RyuState:
            spec, shape = where[path]
            return heuristics.ryu_init(kernel, shape, spec, key=key)

        return _start(params, layers, start)

    def update(updates: Any, powers: dict[str, Any], params: Any = None) -> tuple[Any, dict[str, Any]]:
        old, given = network.leaves_at(params, layers), network.leaves_at(updates, layers)
        done = {p: heuristics.gouk_project(old[p] + given[p], maximum, powers[p], where[p][0]) for p in old}
        projected = {p: kernel - old[p] for p, (kernel, _) in done.items()}
        return network.replace(updates, projected), {p: power for p, (_, power) in done.items()}

    return optax.GradientTransformation(init, update)


def clipping(setting: Setting, every: int) -> optax.GradientTransformation:
    """Sedghi's, of every convolution at its own input size."""
    where = circular_layers(setting.model)
    shapes, specs = {p: shape for p, (_, shape) in where.items()}, {p: spec for p, (spec, _) in where.items()}
    return transforms.clip_spectrum(CLIP, shapes, every=every, specs=specs)


BETAS = 8e-4, 3e-3, 1e-2  # the first is the paper's
DECAY, YOSHIDA, CLIP, GOUK = 1e-4, 1e-2, 1.0, 2.0
CLIPPING = f"Sedghi clip at {CLIP:g}, every 100"


def bound_arm(beta: float) -> str:
    """Its name."""
    return f"bound, β {beta:g}"


def _with_bound(beta: float) -> Arm:
    penalty = transforms.add_spectral_penalty(beta, select=is_convolution)
    return lambda setting, layers, sgd: optax.chain(penalty, sgd)


ARMS: dict[str, Arm] = {
    "none": lambda setting, layers, sgd: sgd,
    f"weight decay {DECAY:g}": lambda setting, layers, sgd: optax.chain(optax.add_decayed_weights(DECAY), sgd),
    **{bound_arm(beta): _with_bound(beta) for beta in BETAS},
    f"Yoshida & Miyato, λ {YOSHIDA:g}": lambda setting, layers, sgd: optax.chain(
        add_yoshida_penalty(YOSHIDA, layers), sgd
    ),
    CLIPPING: lambda setting, layers, sgd: optax.chain(sgd, clipping(setting, every=100)),
    f"Gouk projection to {GOUK:g}": lambda setting, layers, sgd: optax.chain(
        sgd, gouk_projection(GOUK, layers, setting.model)
    ),
}


def learning_rate(setting: Setting) -> optax.Schedule:
    """0.1, and a tenth of what it was at half of the steps and at three quarters."""
    steps = setting.steps * setting.epochs
    return optax.piecewise_constant_schedule(0.1, {steps // 2: 0.1, steps * 3 // 4: 0.1})


def optimiser(arm: str, setting: Setting, params: Any) -> optax.GradientTransformation:
    """SGD with what the arm puts before or behind it."""
    sgd = optax.sgd(learning_rate(setting), momentum=0.9)
    return ARMS[arm](setting, network.find(params, select=is_convolution), sgd)


def _file(arm: str, seed: int) -> Path:
    return OUTPUT / f"{list(ARMS).index(arm)}-{seed}.npz"


def kernels(arm: str, seed: int) -> dict[str, np.ndarray]:
    """The convolutions of a finished run, by path."""
    if not _file(arm, seed).exists():
        raise FileNotFoundError(f"no {_file(arm, seed)}: run `python -m benchmarks.train_cifar --arms {arm!r}` first")
    with np.load(_file(arm, seed)) as stored:
        return dict(stored)


def augmented(images: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Each shifted by up to 4 pixels, and half of them mirrored."""
    count, size = images.shape[0], images.shape[1]
    padded = np.pad(images, ((0, 0), (4, 4), (4, 4), (0, 0)))
    shifts = rng.integers(0, 9, (2, count, 1)) + np.arange(size)
    cut = padded[np.arange(count)[:, None, None], shifts[0][:, :, None], shifts[1][:, None, :]]
    mirrored = rng.random(count) < 0.5
    cut[mirrored] = cut[mirrored, :, ::-1]
    return cut


def _normalised(given: data.Images) -> data.Images:
    mean, deviation = (np.array(v, np.float32) for v in ([0.4914, 0.4822, 0.4465], [0.2470, 0.2435, 0.2616]))
    return data.Images((given.images - mean) / deviation, given.labels)


def _accuracy(predict: Callable[..., Array], variables: Any, given: data.Images) -> float:
    right = 0
    for begin in range(0, len(given.labels), 500):
        logits = predict(variables, given.images[begin : begin + 500])
        right += int(jnp.sum(jnp.argmax(logits, 1) == given.labels[begin : begin + 500]))
    return right / len(given.labels)


def run(
    arm: str, seed: int, setting: Setting, train: data.Images, test: data.Images, advance: Callable[[], None]
) -> tuple[dict[str, float], dict[str, Array]]:
    """Train once; the figures, and the kernels by path."""
    model, rng = setting.model, np.random.default_rng(seed)
    variables = jax.jit(model.init)(jax.random.key(seed), train.images[:1])
    tx = optimiser(arm, setting, variables["params"])
    opt_state, step = tx.init(variables["params"]), jax.jit(train_step(model, tx), donate_argnums=(0, 1))
    epochs: list[float] = []
    for epoch in range(setting.epochs):
        begin = time.perf_counter()
        for batch in data.batches(train, BATCH, setting.steps, seed=seed * 1000 + epoch):
            images = augmented(batch.images, rng) if setting.augment else batch.images
            variables, opt_state, loss = step(variables, opt_state, images, batch.labels)
        if not np.isfinite(float(loss)):
            raise FloatingPointError(f"{arm}, seed {seed}: the loss is {float(loss)} after {epoch + 1} epochs")
        epochs.append(time.perf_counter() - begin)
        advance()
    predict = jax.jit(model.apply)
    kernels = network.leaves_at(variables["params"], network.find(variables["params"], select=is_convolution))
    where = circular_layers(model)
    norms = [float(f4.exact_norm(kernel, where[p][1], where[p][0])) for p, kernel in kernels.items()]
    bounds = [float(f4.bound(kernel)) for kernel in kernels.values()]
    figures = {
        "train": _accuracy(predict, variables, train),
        "test": _accuracy(predict, variables, test),
        "log10 product of norms": float(np.sum(np.log10(norms))),
        "log10 product of bounds": float(np.sum(np.log10(bounds))),
        "largest norm": max(norms),
        "epoch_s": float(np.median(epochs)),
    }
    return figures, kernels


def cost(setting: Setting, rounds: int) -> dict[str, float]:
    """Seconds an epoch of each arm, from single steps timed in turn; clipping counts once in a hundred."""
    model = setting.model
    images, labels = jax.random.normal(jax.random.key(0), (BATCH, 32, 32, 3)), jnp.arange(BATCH) % 10
    variables = jax.jit(model.init)(jax.random.key(0), images[:1])
    calls: dict[str, Callable[[], Any]] = {}
    for arm in ARMS:
        tx = optimiser(arm, setting, variables["params"])
        calls[arm] = partial(jax.jit(train_step(model, tx)), variables, tx.init(variables["params"]), images, labels)
    tx = clipping(setting, every=1)
    clip, zeros = jax.jit(tx.update), jax.tree.map(jnp.zeros_like, variables["params"])
    calls["clip"] = partial(clip, zeros, tx.init(variables["params"]), variables["params"])
    times = harness.interleaved(calls, rounds, warm=1)
    once = times.pop("clip") / 100
    seconds = {arm: ms * setting.steps / 1e3 for arm, ms in times.items()}
    seconds[CLIPPING] += once * setting.steps / 1e3
    return seconds


def summary(figures: dict[str, Any]) -> list[dict[str, Any]]:
    """A row for each arm: means and standard deviations over its seeds."""
    rows = []
    for arm in ARMS:
        runs = [found for name, found in figures["runs"].items() if name.rsplit(" / ", 1)[0] == arm]
        if not runs:
            continue

        def over(value: Callable[[Any], float], runs: Any = runs) -> tuple[float, float]:
            values = np.array([value(r) for r in runs])
            return float(values.mean()), float(values.std(ddof=1)) if len(values) > 1 else float("nan")

        rows.append({
            "arm": arm, "seeds": len(runs),
            "test": over(lambda r: r["test"]), "train": over(lambda r: r["train"]),
            "gap": over(lambda r: r["train"] - r["test"]),
            "norms": over(lambda r: r["log10 product of norms"]),
            "bounds": over(lambda r: r["log10 product of bounds"]),
            "epoch_s": figures.get("cost", {}).get(arm, over(lambda r: r["epoch_s"])[0]),
        })  # fmt: skip
    return rows


COLUMNS = "arm", "seeds", "test, %", "train, %", "train - test", "∏ norms", "∏ bounds", "s an epoch"


def cells(row: dict[str, Any]) -> list[str]:
    """A row of `summary` under `COLUMNS`."""
    percent = [f"{100 * row[key][0]:.1f} ± {100 * row[key][1]:.1f}" for key in ("test", "train", "gap")]
    powers = [f"10^{row[key][0]:.1f}" for key in ("norms", "bounds")]
    return [row["arm"], str(row["seeds"]), *percent, *powers, f"{row['epoch_s']:.1f}"]


def table(figures: dict[str, Any]) -> Table:
    """The summary for a terminal."""
    shown = Table(title="CIFAR-10: mean ± standard deviation over seeds", caption="norms: of circular convolutions")
    for i, column in enumerate(COLUMNS):
        shown.add_column(column, justify="right" if i else "left")
    for row in summary(figures):
        shown.add_row(*cells(row))
    return shown


def main() -> None:
    """Train what is missing, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--paper", action="store_true", help="the paper's size, whatever the next five say")
    small = Setting()
    parser.add_argument("--blocks", type=int, default=small.blocks, help="in each stage (default %(default)s)")
    parser.add_argument("--width", type=int, default=small.width, help="of the first stage (default %(default)s)")
    parser.add_argument("--epochs", type=int, default=small.epochs, help="default %(default)s")
    parser.add_argument("--images", type=int, default=small.images, help="for training (default %(default)s)")
    parser.add_argument("--augment", action="store_true", help="shift and mirror images at random")
    parser.add_argument(
        "--arms", nargs="+", choices=list(ARMS), default=list(ARMS), metavar="ARM", help=f"of {', '.join(ARMS)}"
    )
    parser.add_argument("--seeds", type=int, default=3, help="runs of each arm (default %(default)s)")
    parser.add_argument("--data", type=Path, default=data.FOLDER, help="has CIFAR-10's files (default %(default)s)")
    parser.add_argument("--cost", action="store_true", help="measure what a step costs instead of training")
    parser.add_argument("--results", type=Path, help=f"default {OUTPUT}/results-BACKEND[-paper].json")
    options = parser.parse_args()
    setting = Setting(options.blocks, options.width, options.epochs, options.images, options.augment)
    setting = PAPER if options.paper else setting
    backend = jax.default_backend() + ("-paper" if options.paper else "")
    target = options.results or OUTPUT / f"results-{backend}.json"
    figures: dict[str, Any] = json.loads(target.read_text()) if target.exists() else {"runs": {}}
    if figures.setdefault("setting", setting._asdict()) != setting._asdict():
        parser.error(f"{target} has runs of {figures['setting']}: name another file with --results, or delete it")
    figures["machine"] = harness.machine()

    def store() -> None:
        target.parent.mkdir(parents=True, exist_ok=True)
        part = target.with_suffix(".part")
        part.write_text(json.dumps(figures, indent=2, ensure_ascii=False) + "\n")
        part.replace(target)

    console = Console()
    if options.cost:
        figures["cost"] = cost(setting, 7)
        store()
        for arm, seconds in figures["cost"].items():
            console.print(f"{arm}: {seconds:.1f} s an epoch", highlight=False)
    else:
        train, test = (_normalised(part) for part in data.cifar10(options.data))
        train = data.Images(train.images[: setting.images], train.labels[: setting.images])
        todo = [(arm, seed) for seed in range(options.seeds) for arm in options.arms]
        todo = [(arm, seed) for arm, seed in todo if f"{arm} / {seed}" not in figures["runs"]]
        columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
        with Progress(*columns, console=console) as progress:
            task = progress.add_task("epochs", total=len(todo) * setting.epochs)
            for arm, seed in todo:
                progress.update(task, description=f"{arm}, seed {seed}")
                found, trained = run(arm, seed, setting, train, test, lambda: progress.advance(task))
                OUTPUT.mkdir(parents=True, exist_ok=True)
                arrays: dict[str, Any] = {path: np.asarray(kernel) for path, kernel in trained.items()}
                np.savez(_file(arm, seed), **arrays)
                figures["runs"][f"{arm} / {seed}"] = found
                store()
    if figures["runs"]:
        console.print(table(figures), width=max(console.width, 130))
    console.print(f"stored in {target}")


if __name__ == "__main__":
    main()
