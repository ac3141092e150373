"""What every benchmark shares: fair timing, a clean process for each part, a record of the machine, a table."""

from __future__ import annotations

import argparse
import contextlib
import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

RESULTS = Path(__file__).parent / "results"


def interleaved(calls: dict[str, Callable[[], Any]], rounds: int, warm: int = 3) -> dict[str, float]:
    """Median milliseconds of each; a round times each after ``warm`` untimed calls of its own.

    Three, because for about ten milliseconds after a call that frees much memory everything is slower.
    """
    return {name: float(np.median(t)) for name, t in timed(calls, rounds, warm).items()}


def timed(calls: dict[str, Callable[[], Any]], rounds: int, warm: int) -> dict[str, list[float]]:
    """The milliseconds of every round, as `interleaved` takes them."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            for _ in range(warm):
                jax.block_until_ready(call())
            begin = time.perf_counter()
            jax.block_until_ready(call())
            times[name].append(1e3 * (time.perf_counter() - begin))
    return times


def in_clean_process(name: str, part: str, rounds: int) -> dict[str, Any]:
    """Run a part where NumPy's BLAS chooses its own kernel."""
    environment = {k: v for k, v in os.environ.items() if k not in ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE")}
    command = [sys.executable, "-m", f"benchmarks.{name}", "--part", part, "--rounds", str(rounds)]
    return json.loads(subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout)


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        names = [
            line.split(":")[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if "model name" in line
        ]
        cpu = f"{names[0]}, {len(names)} cores" if names else cpu
    installed = {}
    for name in ("fantastic4", "jax", "jaxlib", "flax", "optax", "equinox", "numpy", "torch"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            installed[name] = importlib.metadata.version(name)
    return {
        "date": datetime.date.today().isoformat(),
        "cpu": cpu,
        "device": jax.devices()[0].device_kind,
        "python": platform.python_version(),
        "versions": installed,
    }


def main(name: str, parts: Mapping[str, Callable[[int], dict[str, Any]]], description: str | None) -> None:
    """Measure every part in a process of its own, print a table, store ``results/NAME-BACKEND.json``."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=sorted(parts), help="one part only, as JSON on standard output")
    parser.add_argument("--rounds", type=int, default=30, help="timed calls of each (default %(default)s)")
    parser.add_argument("--only", choices=sorted(parts), help="measure this part again, keep the other figures")
    options = parser.parse_args()
    if options.part:
        print(json.dumps(parts[options.part](options.rounds)))
        return
    console = Console()
    RESULTS.mkdir(exist_ok=True)
    target = RESULTS / f"{name}-{jax.default_backend()}.json"
    figures: dict[str, Any] = json.loads(target.read_text()) if options.only else {}
    now = machine()
    if options.only:
        figures.setdefault("measured again", {})[options.only] = now
    else:
        figures["machine"] = now
    table = Table("figure", "value", title=now["cpu"])
    for part in [options.only] if options.only else parts:
        with console.status(f"{name}: measuring {part} …"):
            figures[part] = in_clean_process(name, part, options.rounds)
        target.write_text(json.dumps(figures, indent=2) + "\n")  # after each part, so that nothing is lost
        for label, value in figures[part].items():
            if isinstance(value, int | float):
                table.add_row(label, f"{value:.3g}", style="bold" if label.startswith("ratio") else None)
        table.add_section()
    console.print(table)
    console.print(f"stored in {target.relative_to(Path.cwd()) if target.is_relative_to(Path.cwd()) else target}")
