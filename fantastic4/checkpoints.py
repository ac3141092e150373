"""Params out of a checkpoint on disk: as trees of NumPy arrays, from the formats that JAX's users keep them in."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from fantastic4.kernels import arrays, power_states

_PARAMS = ("params", "model")  # what a checkpoint of a whole training run calls them, first choice first
_CONVERSIONS = {
    (".pt", ".pth", ".bin", ".ckpt"): "; save its state_dict() by safetensors.torch.save_file",
    (".h5", ".hdf5", ".keras"): "; save it by numpy.savez, a kernel a name",
}
_NOT_PARAMS = {"opt_state", "optimizer"}  # have leaves of the same names: moments
_NO_KERNELS = _NOT_PARAMS | {"batch_stats", "spectral_stats", "cache", "intermediates", "losses", "metrics", "rngs"}


class Params(NamedTuple):
    """What `read` found.

    Attributes:
      tree: nested dicts and lists of NumPy arrays.
      at: the keys that led to it.
      path: the file or folder that it was read from: of a run's folder, that of the last step.
      beside: what else holds arrays of two axes or more there, and is no state of an optimiser or of batch norm: keys,
        as ``"ema_params"``. Nothing, where ``at`` was given.
    """

    tree: Any
    at: tuple[str, ...]
    path: Path
    beside: tuple[str, ...] = ()


def read(path: str | Path, at: str | None = None) -> Params:
    """The params in a checkpoint.

    Args:
      path: a folder that Orbax wrote, or that of an ``orbax.checkpoint.CheckpointManager``, whose last step is taken;
        or a file: ``.msgpack`` of ``flax.serialization``, ``.safetensors``, ``.npz``. Names with dots or slashes, as
        ``layer1.0.weight``, are paths.
      at: keys that lead to the params, as ``"ema_params"`` or ``"state/params"``. Without, what is called ``params`` at
        the top or one level below, or ``model`` where nothing else may be params; all of it where nothing is.

    Returns:
      `Params`.

    Raises:
      ValueError: a file of another kind, a key that is not there, or several trees of which none is called params.
      FileNotFoundError: nothing at this path.
      ImportError: ``safetensors`` is needed and not installed.
    """
    path = Path(path).expanduser()
    if not path.exists():
        raise FileNotFoundError(f"no checkpoint at {path}")
    if path.is_dir():
        return _orbax(_item(path), at)
    if path.suffix not in _READERS:
        fix = next((fix for suffixes, fix in _CONVERSIONS.items() if path.suffix in suffixes), "")
        raise ValueError(f"{path.name} is no checkpoint of a known kind: a folder of Orbax, {', '.join(_READERS)}{fix}")
    whole = _READERS[path.suffix](path)
    keys = _where(whole, at)
    return Params(_bare(_follow(whole, keys)), keys, path, _beside(whole, keys, at))


def _is_item(folder: Path) -> bool:
    return (folder / "_METADATA").is_file()


def _item(folder: Path) -> Path:
    """The folder of a tree that Orbax wrote, within that of a step or of a whole run."""
    if _is_item(folder):
        return folder
    inside = [path for path in sorted(folder.iterdir()) if path.is_dir()]
    items = [path for path in inside if _is_item(path)]
    if len(items) == 1:
        return items[0]
    if items:
        raise ValueError(f"{folder} has several trees: name one of {', '.join(str(path) for path in items)}")
    steps = {int(number): path for path in inside if (number := path.name.rpartition("_")[2]).isdecimal()}
    if not steps:
        raise ValueError(f"{folder} is no checkpoint that Orbax wrote: neither it nor a folder in it has _METADATA")
    return _item(steps[max(steps)])


def _orbax(folder: Path, at: str | None) -> Params:
    import orbax.checkpoint as ocp

    # A handler: a checkpointer warns of a step's metadata that the folder of a tree in it does not have.
    handler, folder = ocp.PyTreeCheckpointHandler(), folder.absolute()
    try:
        whole = handler.metadata(folder).tree
    except ValueError as error:  # of JSON
        raise ValueError(f"{folder} is no checkpoint that Orbax wrote, or a part of one: {error}") from error
    first = (at or "").strip("/").partition("/")
    if first[0] == folder.name and isinstance(whole, Mapping) and first[0] not in whole:
        at = first[2]  # the tree's own name, as in the table's title
    keys = _where(whole, at)
    # Only this part is read: an optimiser's state is twice as large. As NumPy: its devices may not be here.
    wanted = _follow(whole, keys)
    for key in reversed(keys):
        wanted = {key: wanted}
    arrays = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), wanted)
    restored = handler.restore(
        folder, args=ocp.args.PyTreeRestore(item=wanted, restore_args=arrays, partial_restore=True)
    )
    return Params(_bare(_follow(restored, keys)), keys, folder, _beside(whole, keys, at))


def _msgpack(path: Path) -> Any:
    from flax import serialization

    try:
        return serialization.msgpack_restore(path.read_bytes())
    except Exception as error:
        raise ValueError(f"{path} is no checkpoint that flax.serialization wrote: {error}") from error


def _npz(path: Path) -> Any:
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            flat = dict(archive)
    except Exception as error:  # of NumPy, of zipfile, of pickle
        raise ValueError(f"{path} is no archive that numpy.savez wrote: {error}") from error
    return _nested(flat)


def _safetensors(path: Path) -> Any:
    try:
        from safetensors.numpy import load_file
    except ImportError as error:
        raise ImportError(f"{path.name} needs safetensors: pip install 'fantastic4[cli]'") from error
    try:
        flat = load_file(path)
    except AttributeError as error:  # of a type that NumPy does not have
        raise ValueError(
            f"{path} holds numbers of a type that NumPy has not, as float8: convert them ({error})"
        ) from error
    except Exception as error:  # its own error is of no public class
        raise ValueError(f"{path} is no safetensors file: {error}") from error
    return _nested(flat)


_READERS: dict[str, Callable[[Path], Any]] = {".msgpack": _msgpack, ".safetensors": _safetensors, ".npz": _npz}


def _nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    """A tree of names that are paths: with slashes, or else with dots."""
    separator = "/" if any("/" in name for name in flat) else "."
    tree: dict[str, Any] = {}
    for name, value in flat.items():
        *words, last = name.split(separator)
        branch = tree
        for word in words:
            branch = branch.setdefault(word, {})
            if not isinstance(branch, dict):
                raise ValueError(f"{name} goes through an array of that name's beginning")
        branch[last] = value
    return tree


def _where(tree: Any, at: str | None) -> tuple[str, ...]:
    """The keys that lead to the params."""
    if at is not None:
        keys = tuple(at.strip("/").split("/")) if at.strip("/") else ()
        _follow(tree, keys)
        return keys
    if not isinstance(tree, Mapping):
        return ()
    below = [(a, b) for a, inner in tree.items() if isinstance(inner, Mapping) and a not in _NOT_PARAMS for b in inner]
    for name in _PARAMS:
        if isinstance(tree.get(name), Mapping) and (name == "params" or not _beside(tree, (name,))):
            return (name,)
        found = [keys for keys in below if keys[1] == name and isinstance(tree[keys[0]][name], Mapping)]
        found = [keys for keys in found if name == "params" or not _beside(tree, keys)]
        if len(found) == 1:
            return found[0]
        if found:
            raise ValueError(f"several trees of params: choose by --at one of {', '.join(map('/'.join, found))}")
    if _NOT_PARAMS & set(_keys(tree)):
        raise ValueError(
            f"nothing in this checkpoint is called {' or '.join(_PARAMS)}: choose by --at one of {', '.join(tree)}"
        )
    return ()


def _beside(tree: Any, keys: tuple[str, ...], at: str | None = None) -> tuple[str, ...]:
    """What else in a tree may be params, on the way by ``keys``."""
    found = []
    for depth, key in enumerate(keys if at is None else ()):
        here = _follow(tree, keys[:depth])
        others = [other for other in here if other != key and other not in _NO_KERNELS and _has_matrix(here[other])]
        found += ["/".join(map(str, (*keys[:depth], other))) for other in others]
    return tuple(found)


def _has_matrix(tree: Any) -> bool:
    """Whether there is an array with two axes or more that is no power iteration's."""
    states = power_states(tree)
    return any(len(leaf.shape) > 1 and "/".join(words) not in states for words, leaf in arrays(tree))


def _keys(tree: Any) -> Iterator[str]:
    """All keys, at any depth."""
    if isinstance(tree, Mapping):
        yield from tree
    for inner in tree.values() if isinstance(tree, Mapping) else tree if isinstance(tree, list | tuple) else ():
        yield from _keys(inner)


def _follow(tree: Any, keys: tuple[str, ...]) -> Any:
    for i, key in enumerate(keys):
        if not isinstance(tree, Mapping) or key not in tree:
            there = f"it has {', '.join(map(str, tree))}" if isinstance(tree, Mapping) else "there is an array"
            raise ValueError(f"no {'/'.join(keys[: i + 1])} in this checkpoint: {there}")
        tree = tree[key]
    return tree


def _bare(tree: Any) -> Any:
    """Without the ``value`` that Orbax writes around each array of an NNX state."""
    if isinstance(tree, Mapping):
        if set(tree) == {"value"} and not isinstance(tree["value"], Mapping | list):
            return tree["value"]
        return {str(key): _bare(value) for key, value in tree.items()}
    return [_bare(value) for value in tree] if isinstance(tree, list | tuple) else tree
