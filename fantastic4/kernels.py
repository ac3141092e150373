"""The kernels in a tree of params: which leaves they are, and what a shape cannot tell of their layers.

A params tree is a pytree: of linen (nested dicts), NNX (an ``nnx.State`` or a module), Equinox (a module), Haiku, or
one's own. Its kernels are found by name and shape; strides, groups and padding come as specs.
"""

from __future__ import annotations

import dataclasses
import difflib
import fnmatch
import inspect
import math
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import Array

from fantastic4.conv import ConvSpec, geometry

T = TypeVar("T")
Select = str | Sequence[str] | Callable[[str, Any], bool]

_NAMES = ("kernel", "w", "weight")  # of Flax, Haiku and Equinox
_ADDED = ("bias", "offset")  # to what a layer makes
_BESIDE = (*_ADDED, "b", "scale")  # of layers that have kernels
# Of Equinox: their weights are scales, or rows that are looked up.
_NO_KERNEL = ("LayerNorm", "RMSNorm", "GroupNorm", "BatchNorm", "Embedding")
_ATTENTION = {"query": 1, "key": 1, "value": 1, "out": -1}  # Flax's DenseGeneral in attention: how many input axes
_MATRICES = ("DenseGeneral", "LinearGeneral", "Einsum")  # as Flax names layers that have no name


@dataclasses.dataclass(frozen=True)
class Dense:
    """That a kernel is a matrix: its first ``inputs`` axes are inputs, all others outputs (negative: but so many).

    Attributes:
      inputs: number of axes; 1 is Flax's ``Dense``, 2 a ``DenseGeneral(axis=(-2, -1))``.
    """

    inputs: int = 1


@dataclasses.dataclass(frozen=True)
class Stacked:
    """That the first axis of a kernel counts layers, as ``nn.scan``, ``nnx.scan`` and ``vmap`` make them.

    Attributes:
      layer: what each layer is.
    """

    layer: ConvSpec | Dense = dataclasses.field(default_factory=ConvSpec)


Spec = ConvSpec | Dense | Stacked


@dataclasses.dataclass(frozen=True)
class Layer:
    """A kernel in a params tree, static.

    Attributes:
      path: where it is, as ``"Conv_0/kernel"``.
      shape: of the leaf.
      spec: what the layer does with it.
      torch_order: whether it is ``(c_out, c_in, *spatial)``, as Equinox keeps it.
    """

    path: str
    shape: tuple[int, ...]
    spec: Spec
    torch_order: bool

    @property
    def conv(self) -> ConvSpec:
        """The convolution that it is: of a matrix, one with a single tap."""
        spec = self.spec.layer if isinstance(self.spec, Stacked) else self.spec
        return ConvSpec() if isinstance(spec, Dense) else spec

    @property
    def is_dense(self) -> bool:
        """Whether it is a matrix."""
        return isinstance(self.spec.layer if isinstance(self.spec, Stacked) else self.spec, Dense)

    @property
    def kind(self) -> Hashable:
        """What layers have in common that one program can serve."""
        return self.shape, self.spec, self.torch_order

    @property
    def names(self) -> tuple[str, ...]:
        """A name for each layer in it: one, but for a `Stacked` kernel."""
        return (
            tuple(f"{self.path}[{i}]" for i in range(self.shape[0])) if isinstance(self.spec, Stacked) else (self.path,)
        )

    def kernel(self, leaf: Array) -> Array:
        """The leaf, or one layer of a `Stacked` one, as a kernel in Flax's order; of a matrix, with one tap."""
        if self.torch_order:
            leaf = jnp.moveaxis(leaf, (0, 1), (-1, -2))
        spec = self.spec.layer if isinstance(self.spec, Stacked) else self.spec
        return leaf.reshape(1, math.prod(leaf.shape[: spec.inputs]), -1) if isinstance(spec, Dense) else leaf

    def kernels(self, leaf: Array) -> Array:
        """The kernels in the leaf, stacked: one, but for a `Stacked` leaf."""
        return jax.vmap(self.kernel)(leaf) if isinstance(self.spec, Stacked) else self.kernel(leaf)[None]


def _path(keys: Sequence[Any]) -> tuple[str, ...]:
    """The path of a leaf as words; an NNX variable's own ``.value`` is no part of it."""
    if len(keys) > 1 and getattr(keys[-1], "name", "") == "value":
        keys = keys[:-1]
    return tuple(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in keys)


def arrays(params: Any) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every leaf that has a shape and a dtype, with its path."""
    for keys, leaf in jax.tree_util.tree_flatten_with_path(params)[0]:
        if hasattr(leaf, "shape") and hasattr(leaf, "dtype"):
            yield _path(keys), leaf


def _leaves(params: Any) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Those that hold real numbers, of 16 bits or more: JAX computes with no others."""
    return ((words, leaf) for words, leaf in arrays(params) if _is_real(leaf.dtype))


def _is_real(dtype: Any) -> bool:
    return jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).bits >= 16


def paths(params: Any) -> list[str]:
    """The paths of all arrays in a tree, kernels or not."""
    return ["/".join(words) for words, _ in arrays(params)]


def power_states(params: Any) -> set[str]:
    """Paths of vectors and scales of power iterations: in states of `fantastic4.network`, and of NNX's wrappers."""
    there = {words for words, _ in arrays(params)}
    wrapped = {words[:i] for words in there for i, word in enumerate(words) if word == "layer_instance"}
    found = set()
    for words in filter(None, there):
        *parent, last = words[:-1] if words[-1:] == ("value",) else words  # as Orbax writes an NNX state
        within = tuple(parent[:-1])
        if last in ("vectors", "scales") and (
            parent[-1:] == ["inner"] or (parent[-1:] == ["state"] and within in wrapped)
        ):
            found.add("/".join(words))
    return found


def meant(given: Mapping[str, T], path: str) -> T | None:
    """What is given for a path, or for the first glob that fits it."""
    glob = next((glob for glob in given if fnmatch.fnmatchcase(path, glob)), path)
    return given.get(path, given.get(glob))


def idle(given: Mapping[str, Any], paths: Sequence[str]) -> str | None:
    """The first path or glob that fits none of ``paths``."""
    return next((glob for glob in given if glob not in paths and not fnmatch.filter(paths, glob)), None)


def _without_kernel(params: Any) -> set[tuple[str, ...]]:
    """Paths of Equinox's modules whose ``weight`` is no kernel."""

    def is_one(module: Any) -> bool:
        kinds = type(module).__mro__  # what is made of one, too
        return any(kind.__module__.startswith("equinox.nn") and kind.__name__ in _NO_KERNEL for kind in kinds)

    found = jax.tree_util.tree_flatten_with_path(params, is_leaf=is_one)[0]
    return {_path(keys) for keys, module in found if is_one(module)}


def _globs(select: Any) -> Sequence[str]:
    globs = [select] if isinstance(select, str) else select
    if not isinstance(globs, Sequence) or not all(isinstance(glob, str) for glob in globs):
        raise ValueError(f"select must be a glob, several, or a function of path and leaf, got {select!r}")
    return globs


def _matches(select: Select, path: str, leaf: Any) -> bool:
    if callable(select):
        try:
            inspect.signature(select).bind(path, leaf)
        except TypeError:
            raise ValueError(f"select must take two arguments, the path and the leaf: {select!r} does not") from None
        return bool(select(path, leaf))
    return any(fnmatch.fnmatchcase(path, glob) for glob in _globs(select))


Shapes = Mapping[tuple[str, ...], tuple[int, ...]]


def _is_attention(module: tuple[str, ...], shapes: Shapes) -> bool:
    """Whether a module has all four projections of Flax's attention, in shapes that go together."""
    query, key, value, out = (shapes.get((*module, name, "kernel"), ()) for name in _ATTENTION)
    bias = shapes.get((*module, "query", "bias"), query[1:])
    if not len(query) == len(key) == len(out) == 3 or not query[1:] == out[:2] == bias:
        return False
    # Several heads of queries may share one of keys and values.
    return key[1:] == value[1:] and query[2] == key[2] and query[1] % max(key[1], 1) == 0


def _looks_stacked(shape: tuple[int, ...], bias: tuple[int, ...], *, torch_order: bool) -> bool:
    """Whether a bias has one axis more than that of one layer, as long as the first of its kernel."""
    if torch_order:  # (layers, c_out, …); a convolution's own is (c_out, 1, …)
        return len(bias) > 1 and bias[:2] == shape[:2] and shape[1] != 1
    return bias == (shape[0], shape[-1]) and (bias != shape[-2:] or len(shape) == 3)


def _guess(words: tuple[str, ...], shapes: Shapes) -> Spec | None:
    """What a leaf is by its name, its shape and its neighbours; None for no kernel.

    Raises:
      ValueError: a layer that is no convolution by its name.
    """
    shape = shapes[words]
    if not words or words[-1] not in _NAMES or len(shape) < 2 or 0 in shape:
        return None
    if len(shape) > 5:
        raise ValueError(
            f"{'/'.join(words)}: a kernel of shape {shape} has more axes than a 3-D convolution: pass specs with "
            "network.Stacked(…) or network.Dense(inputs=…) for it, or select others"
        )
    if len(shape) == 2:
        return Dense()
    parent = words[-2] if len(words) > 1 else ""
    if parent in _ATTENTION and _is_attention(words[:-2], shapes):
        return Dense(_ATTENTION[parent])
    path, bias = "/".join(words), shapes.get((*words[:-1], "b" if words[-1] == "w" else "bias"), ())
    if parent.startswith("ConvLocal"):
        raise ValueError(f"{path}: ConvLocal has a kernel for every pixel, whose norm is not known: select others")
    if _looks_stacked(shape, bias, torch_order=words[-1] == "weight"):
        layer = "network.Dense()" if len(shape) == 3 else "fantastic4.ConvSpec()"
        raise ValueError(
            f"{path}: a kernel of shape {shape} beside a bias of shape {bias} looks like {shape[0]} layers, as nn.scan "
            f"and vmap stack them: pass specs={{{path!r}: network.Stacked({layer})}}, or network.Dense(inputs=1) if it "
            "is one DenseGeneral"
        )
    # A convolution's bias has one axis: one of several is that of a matrix, or of many convolutions side by side.
    matrix = words[-1] == "kernel" and 1 < len(bias) < len(shape) and shape[-len(bias) :] == bias
    if matrix and (len(bias) == len(shape) - 1 or bias[0] != shape[0]):
        return Dense(-len(bias))
    if matrix or parent.startswith(_MATRICES):
        raise ValueError(
            f"{path}: a kernel of shape {shape} does not tell which of its axes are inputs: pass "
            f"specs={{{path!r}: network.Dense(inputs=1)}}, or with as many as there are, or network.Stacked(…) if its "
            "first axis counts layers"
        )
    return ConvSpec()


def find(params: Any, *, select: Select | None = None, specs: Mapping[str, Spec] | None = None) -> tuple[Layer, ...]:
    """The kernels of a params tree.

    A kernel is a leaf named ``kernel`` (Flax), ``w`` (Haiku) or ``weight`` (Equinox: ``(c_out, c_in, *spatial)``, but
    of its norms and embeddings). **Leaves of other names are no kernels**, as those of recurrent cells: `report` lists
    what it left out; specs name what is to be one. With two axes it is a matrix, with three to five a convolution; the
    projections of Flax's attention are matrices, and so is what has a bias of several axes. **A ``DenseGeneral`` of
    another name, or a stack of layers, with no such bias, is taken for a convolution**: give it a spec.

    Unless ``specs`` says otherwise a convolution has `ConvSpec`'s defaults: whatever its strides, dilation, groups,
    zero or circular padding, and transposed too, its norm is at most that; a spec with strides or groups is tighter.
    REFLECT and EDGE padding add to the norm: there a spec is needed. PyTorch keeps a transposed layer's ``weight`` the
    other way around than Equinox: its spec has ``transpose_kernel=True``.

    Args:
      params: any pytree.
      select: which of them: a glob on the path (``"*Conv*"``), several, or a function of path and leaf.
      specs: for paths or globs, a `ConvSpec`, `Dense` or `Stacked`; an exact path goes before a glob, a glob before
        those after it. What is named here is a kernel whatever its own name; globs pass over biases and scales: leaves
        with one axis, of a `Stacked` layer two.

    Returns:
      A `Layer` each, in the order of the tree.

    Raises:
      ValueError: no kernel; a glob of ``select`` that no leaf fits; a kernel of a ``DenseGeneral`` whose inputs are not
        known, of a ``ConvLocal``, or of no real numbers; one that looks `Stacked` by its bias and has no spec; two
        leaves of one path; a spec for a path that does not exist, or that does not fit its kernel.

    Example:
      >>> import jax.numpy as jnp
      >>> from fantastic4 import network
      >>> params = {"conv": {"kernel": jnp.ones((3, 3, 4, 8)), "bias": jnp.ones(8)}, "scale": jnp.ones(8)}
      >>> [layer.path for layer in network.find(params)]
      ['conv/kernel']
    """
    if specs is not None and not isinstance(specs, Mapping):
        raise ValueError(f"specs must be a dict from paths or globs to specs, as {{'Conv_*/kernel': …}}, got {specs!r}")
    specs = dict(specs or {})
    layers, unused, seen = [], set(specs), []
    shapes = {words: tuple(leaf.shape) for words, leaf in _leaves(params)}
    without = _without_kernel(params)
    for words, leaf in arrays(params):
        path = "/".join(words)
        seen.append(path)

        def is_meant(glob: str, path: str = path, leaf: Any = leaf) -> bool:
            # A path is taken at its word.
            axes = leaf.ndim - isinstance(specs[glob], Stacked)
            return glob == path or (axes > 1 and fnmatch.fnmatchcase(path, glob))

        fits = [glob for glob in specs if is_meant(glob)]
        given = path if path in fits else next(iter(fits), None)
        unused -= set(fits)
        if select is not None and not _matches(select, path, leaf):
            continue
        if words not in shapes:
            if given is not None or (words[-1] in _NAMES and leaf.ndim > 1):
                raise ValueError(
                    f"{path} holds {leaf.dtype}, and bounds are of float16 and wider: convert it, or select others"
                )
            continue
        if given is not None:
            spec: Spec | None = specs[given]
        else:
            spec = None if words[:-1] in without else _guess(words, shapes)
        if spec is None:
            continue
        if seen.count(path) > 1:
            raise ValueError(f"two leaves of this tree have the path {path!r}: name one of them without '/'")
        layer = Layer(path, tuple(leaf.shape), spec, words[-1] == "weight")
        _check(layer)
        layers.append(layer)
    wrong = None if select is None or callable(select) else idle(dict.fromkeys(_globs(select)), seen)
    if wrong is not None:
        raise ValueError(f"select {wrong!r} chooses nothing; this tree has {some(seen, wrong)}")
    if unused:
        raise ValueError(
            f"a spec for {sorted(unused)[0]!r}, but no such path: this tree has {some(seen, sorted(unused)[0])}"
        )
    if not layers:
        if callable(select) and not any(_matches(select, "/".join(words), leaf) for words, leaf in arrays(params)):
            raise ValueError(f"no kernel found: select {select!r} chooses nothing; this tree has {some(seen)}")
        raise ValueError(
            f"no kernel found: a kernel is a leaf named {', '.join(_NAMES)} with two axes or more, or one that "
            f"specs name; this tree has {some(seen)}"
        )
    return tuple(layers)


def left_out(
    params: Any, layers: Sequence[Layer], select: Select | None = None
) -> tuple[tuple[str, tuple[int, ...]], ...]:
    """Leaves with two or more axes that are no kernels: their paths and shapes. Of layers in ``layers`` no biases."""
    known = {layer.path for layer in layers}
    modules = {path.rpartition("/")[0] for path in known}
    return tuple(
        (path, tuple(leaf.shape))
        for words, leaf in arrays(params)
        if (path := "/".join(words)) not in known
        and leaf.ndim > 1
        and 0 not in leaf.shape
        and words[-1] not in _ADDED
        and not (words[-1] in _BESIDE and "/".join(words[:-1]) in modules)
        and (select is None or _matches(select, path, leaf))
    )


def some(paths: Sequence[str], near: str | None = None) -> str:
    """A few paths for a message, those that look like ``near`` first, then those of kernels."""
    close = difflib.get_close_matches(near, paths, n=4, cutoff=0.3) if near else []
    kernels = [path for path in paths if path.rpartition("/")[2] in _NAMES]
    paths = list(dict.fromkeys([*close, *kernels, *paths]))
    return (", ".join(paths[:8]) + (f" and {len(paths) - 8} more" if len(paths) > 8 else "")) or "no arrays"


def _check(layer: Layer) -> None:
    """Refuse a spec that does not fit, naming the path."""
    spec = layer.spec
    inner = spec.layer if isinstance(spec, Stacked) else spec
    if not isinstance(inner, ConvSpec | Dense):
        kind = type(inner).__name__
        raise ValueError(f"{layer.path}: a spec is a ConvSpec, network.Dense or network.Stacked, got {kind}")
    shape = layer.shape[isinstance(spec, Stacked) :]
    if isinstance(inner, Dense):
        whole = isinstance(inner.inputs, int) and not isinstance(inner.inputs, bool)
        if not whole or not -len(shape) < inner.inputs < len(shape) or inner.inputs == 0 or len(shape) < 2:
            raise ValueError(f"{layer.path}: Dense(inputs={inner.inputs}) does not split a kernel of shape {shape}")
        return
    if len(shape) == 2:
        raise ValueError(
            f"{layer.path}: a kernel of shape {shape} is a matrix, which no ConvSpec fits: network.Dense(), "
            "or dense = 1 in a file of specs, or none"
        )
    try:
        geometry(jax.eval_shape(layer.kernels, jax.ShapeDtypeStruct(layer.shape, jnp.float32)).shape[1:], inner)
    except ValueError as error:
        raise ValueError(f"{layer.path}: {error}") from None


def leaves_at(params: Any, layers: Sequence[Layer], whose: str = "these layers") -> dict[str, Array]:
    """The leaves of ``layers``, by path.

    Raises:
      ValueError: a path that is not in the tree, or holds another shape.
    """
    there = {"/".join(words): leaf for words, leaf in _leaves(params)}
    for layer in layers:
        if layer.path not in there:
            raise ValueError(
                f"{whose} belong to another tree: no {layer.path} in this one, "
                f"which has {some(list(there), layer.path)}"
            )
        if tuple(there[layer.path].shape) != layer.shape:
            raise ValueError(
                f"{whose} belong to another tree: {layer.path} has shape {there[layer.path].shape} here, "
                f"{layer.shape} there"
            )
    return {layer.path: there[layer.path] for layer in layers}


def replace(params: Any, new: Mapping[str, Array]) -> Any:
    """``params`` with the leaves at the paths of ``new`` replaced."""
    return jax.tree_util.tree_map_with_path(lambda keys, leaf: new.get("/".join(_path(keys)), leaf), params)
