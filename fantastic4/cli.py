"""The command ``fantastic4``: the norms of a checkpoint's layers, as a table, for those who write no Python."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

try:
    import click
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
    from rich.table import Table
    from rich.text import Text
except ImportError as error:
    raise SystemExit(f"the command needs {error.name}: pip install 'fantastic4[cli]'") from error

import fantastic4
from fantastic4 import audit as audits
from fantastic4 import checkpoints
from fantastic4.conv import ConvSpec
from fantastic4.interval import Interval
from fantastic4.kernels import Dense, Layer, Spec, Stacked, find, left_out, meant, power_states
from fantastic4.rounding import times_up
from fantastic4.tables import at_least, at_most

_CONV = {field.name for field in dataclasses.fields(ConvSpec)}
_OTHERS = {"dense", "stacked", "input_shape"}


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(fantastic4.__version__, prog_name="fantastic4")
def main() -> None:
    """How much can this convolution stretch a vector? Sound bounds for JAX and Flax."""


@main.command()
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.option("--at", metavar="KEYS", help="Where the params are in it, as ema_params or state/params.")
@click.option("--select", metavar="GLOB", multiple=True, help="Only the kernels at these paths; may be repeated.")
@click.option(
    "--specs",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="TOML: for paths or globs, what the layers are: see docs/audit.md.",
)
@click.option("--rtol", default=1e-3, show_default=True, help="Wanted width: upper / lower - 1.")
@click.option("--max-norm", type=click.FloatRange(min=0), help="Exit with 1 unless all is proved to be at most this.")
@click.option(
    "--out",
    type=click.Path(dir_okay=False, path_type=Path),
    help="JSON lines, one a layer as soon as it is known; what stands there already is not computed again.",
)
def audit(
    checkpoint: Path,
    at: str | None,
    select: tuple[str, ...],
    specs: Path | None,
    rtol: float,
    max_norm: float | None,
    out: Path | None,
) -> None:
    """The norm of every layer of CHECKPOINT, between two numbers that cannot lie.

    CHECKPOINT is a folder that Orbax wrote (of a whole run the last step is taken), or a file: .msgpack of
    flax.serialization, .safetensors, .npz.
    """
    with _plain_errors():
        params = checkpoints.read(checkpoint, at)
        given, input_shapes, ordered = _specs(specs) if specs else ({}, {}, {})
        chosen = list(select) or None
        layers = find(params.tree, select=chosen, specs=given)
        tasks = audits.tasks(params.tree, layers, input_shapes=input_shapes, rtol=rtol)
        _check_order(layers, ordered)
        states = power_states(params.tree)
        passed_over = [(path, shape) for path, shape in left_out(params.tree, layers, chosen) if path not in states]
        done = _kept(out)
    rows: list[tuple[audits.Task, Interval]] = []
    interrupted = False
    try:
        with _plain_errors(), _progress(len(tasks)) as advance:
            for task in tasks:
                advance(task.name, 0)
                found = done.get(task.fingerprint)
                if found is None:
                    found = task.run()
                    _keep(out, task, found)
                rows.append((task, found))
                advance(task.name, 1)
    except KeyboardInterrupt:
        interrupted = True
    where = f"{params.path}" + (f", {'/'.join(params.at)}" if params.at else "")
    _print(where, rows, rtol, max_norm)
    unsaid = [task for task in tasks if task.spec == ConvSpec() and math.prod(task.kernel.shape[:-2]) > 1]
    if unsaid:
        click.echo(
            "Convolutions without a spec: at most, for all strides, dilations, groups, zero and circular padding, and\n"
            "transposed; at least, for stride 1, one group, large inputs. REFLECT and EDGE padding add to it: --specs."
        )
    left = ", ".join(f"{path} ({'×'.join(map(str, shape))})" for path, shape in passed_over)
    if left:
        click.echo(f"Left out, no kernels by their names: {left}")
    beside = ", ".join(params.beside)
    if beside:
        click.echo(f"Not looked at: {beside}. Choose by --at; --at / is all of it.")
    if interrupted:
        kept = f"; the same command goes on from {out}" if out else "; with --out the next run goes on from here"
        click.echo(f"Interrupted: {len(rows)} of {len(tasks)} layers{kept}", err=True)
        sys.exit(130)
    if max_norm is not None:
        beyond = [task.name for task, found in rows if not found.upper <= max_norm]
        if beyond:
            click.echo(f"Not proved to be at most {max_norm:g}: {', '.join(beyond)}", err=True)
        if left:
            click.echo("Nothing is known of what was left out: say what it is by --specs, or --select others", err=True)
        if beside:
            click.echo(f"Nothing is known of {beside}: choose by --at", err=True)
        sys.exit(1 if beyond or left or beside else 0)


@contextmanager
def _plain_errors() -> Iterator[None]:
    """What users can mend, without a traceback."""
    try:
        yield
    except (ValueError, OSError, ImportError) as error:
        raise click.ClickException(str(error)) from error


def _specs(path: Path) -> tuple[dict[str, Spec], dict[str, tuple[int, ...]], dict[str, bool]]:
    """What a TOML file says of the layers: their specs, sizes of inputs, and ``transpose_kernel`` where it says so."""
    try:
        tables = tomllib.loads(path.read_text())
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{path}: {error}") from error
    specs: dict[str, Spec] = {}
    shapes, ordered = {}, {}
    for glob, table in tables.items():
        if not isinstance(table, dict):
            raise ValueError(f'{path}: {glob} is no table: write ["{glob}"] and its fields below')
        unknown = sorted(set(table) - _CONV - _OTHERS)
        if unknown:
            raise ValueError(f"{path}: [{glob}] has no {unknown[0]}: choose from {', '.join(sorted(_CONV | _OTHERS))}")
        if "input_shape" in table:
            shapes[glob] = table["input_shape"]
        if "transpose_kernel" in table:
            ordered[glob] = table["transpose_kernel"]
        conv = {name: value for name, value in table.items() if name in _CONV}
        if "dense" in table and conv:
            raise ValueError(f"{path}: [{glob}] is a matrix by dense, and has {', '.join(conv)}: leave one out")
        try:
            inner = Dense(table["dense"]) if "dense" in table else ConvSpec(**conv)
        except ValueError as error:
            raise ValueError(f"{path}: [{glob}]: {error}") from error
        stacked = table.get("stacked", False)
        if not isinstance(stacked, bool):
            raise ValueError(f"{path}: [{glob}]: stacked is true or false, got {stacked!r}")
        if set(table) - {"input_shape"}:
            specs[glob] = Stacked(inner) if stacked else inner
    return specs, shapes, ordered


def _check_order(layers: Sequence[Layer], ordered: Mapping[str, bool]) -> None:
    """Refuse transposed layers of which nothing tells in which order their channels are."""
    for layer in layers:
        if layer.torch_order and layer.conv.transposed and meant(ordered, layer.path) is None:
            raise ValueError(
                f"{layer.path}: PyTorch keeps the weight of a transposed layer as (inputs, outputs, …), Equinox as "
                "(outputs, inputs, …): write transpose_kernel = true for PyTorch's, false for Equinox's"
            )


def _kept(out: Path | None) -> dict[str, Interval]:
    """What an earlier run has written."""
    found: dict[str, Interval] = {}
    if out is None or not out.exists():
        if out is not None and not out.absolute().parent.is_dir():
            raise ValueError(f"no folder {out.absolute().parent} to write {out.name} into")
        return found
    written = out.read_text(encoding="utf-8", errors="replace")
    if written and not written.endswith("\n"):  # cut off within a line, which is left aside
        with out.open("a") as file:
            file.write("\n")
    for line in written.splitlines():
        try:
            row = json.loads(line)
            if row["version"] == fantastic4.__version__:
                lower, upper = (math.nan if row[end] is None else row[end] for end in ("lower", "upper"))
                found[row["fingerprint"]] = Interval(lower, upper, row["reached"])
        except (json.JSONDecodeError, KeyError, TypeError):
            continue
    return found


def _keep(out: Path | None, task: audits.Task, found: Interval) -> None:
    if out is None:
        return
    spec = None if task.is_dense else dataclasses.asdict(task.spec)
    lower, upper = (end if math.isfinite(end) else None for end in (found.lower, found.upper))  # JSON has no NaN
    row = {"layer": task.name, "shape": task.shape, "spec": spec, "input_shape": task.input_shape, "rtol": task.rtol}
    row |= {"lower": lower, "upper": upper, "reached": found.reached}
    row |= {"version": fantastic4.__version__, "fingerprint": task.fingerprint}
    with out.open("a") as file:
        file.write(json.dumps(row) + "\n")


@contextmanager
def _progress(total: int) -> Iterator[Callable[[str, int], None]]:
    """A bar on the error stream: a function of the layer at work and of how many more are done."""
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        bar = progress.add_task("", total=total)
        yield lambda name, done: progress.update(bar, description=name, advance=done)


def _print(where: str, rows: Sequence[tuple[audits.Task, Interval]], rtol: float, max_norm: float | None) -> None:
    """The table: lower ends rounded down, upper ones up, in as many digits as tell them apart."""
    digits = max(4, 2 - math.floor(math.log10(rtol)))
    table = Table(title=Text(where), title_justify="left", caption_justify="left")
    table.add_column("layer", overflow="fold")
    for name in ("shape", "norm at least", "norm at most"):
        table.add_column(name, justify="right", no_wrap=True)
    for task, found in rows:
        marks = "" if found.reached or math.isnan(found.upper) else " *"
        style = "bold red" if max_norm is not None and not found.upper <= max_norm else None
        shape = "×".join(map(str, task.shape))
        table.add_row(
            Text(task.name), shape, at_least(found.lower, digits), at_most(found.upper, digits) + marks, style=style
        )
    table.add_section()
    table.add_row("product", "", "", at_most(times_up(*(found.upper for _, found in rows))))
    console = Console()
    console.print(table)
    if any(math.isnan(found.upper) for _, found in rows):
        console.print("nan: the kernel holds NaN or infinite numbers.", highlight=False)
    if not all(found.reached or math.isnan(found.upper) for _, found in rows):
        console.print(
            f"* the two ends stay further apart than {rtol:g}: see fantastic4.norm_interval.", highlight=False
        )
