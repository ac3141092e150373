"""All kernels of a network at once: find them in any tree of params, bound each, penalise them together.

A params tree is a pytree: of linen (nested dicts), NNX (an ``nnx.State`` or a module), Equinox (a module), Haiku, or
one's own. Its kernels are found by name and shape; what a shape cannot tell (strides, groups, padding) comes as specs.
"""

from __future__ import annotations

import dataclasses
import difflib
import fnmatch
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from fantastic4 import dense as dense_norms
from fantastic4 import ladder
from fantastic4.bounds import METHODS, bound
from fantastic4.conv import ConvSpec, geometry
from fantastic4.entry import choice, count, number, optional, same_kind

Select = str | Sequence[str] | Callable[[str, Any], bool]
REDUCTIONS = ("sum", "squared", "log")

_NAMES = ("kernel", "w", "weight")  # of Flax, Haiku and Equinox
_ATTENTION = {"query": 1, "key": 1, "value": 1, "out": -1}  # Flax's DenseGeneral in attention: how many input axes
_ALONE = 2**16  # entries from which a kernel is no longer put beside others of its shape: the copy costs more


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
    def names(self) -> tuple[str, ...]:
        """A name for each layer in it: one, but for a `Stacked` kernel."""
        return (
            tuple(f"{self.path}[{i}]" for i in range(self.shape[0])) if isinstance(self.spec, Stacked) else (self.path,)
        )

    def kernels(self, leaf: Array) -> Array:
        """The leaf as kernels in Flax's order, ``(layers, *spatial, c_in // groups, c_out)``; of a matrix, one tap."""
        stacked = leaf if isinstance(self.spec, Stacked) else leaf[None]
        if self.torch_order:
            stacked = jnp.moveaxis(stacked, (1, 2), (-1, -2))
        spec = self.spec.layer if isinstance(self.spec, Stacked) else self.spec
        if not isinstance(spec, Dense):
            return stacked
        axes = stacked.shape[1:]
        n_in = math.prod(axes[: spec.inputs])
        return stacked.reshape(len(stacked), 1, n_in, -1)


def _path(keys: Sequence[Any]) -> tuple[str, ...]:
    """The path of a leaf as words; an NNX variable's own ``.value`` is no part of it."""
    words = [str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in keys]
    return tuple(words[:-1]) if len(words) > 1 and words[-1] == "value" and words[-2] in _NAMES else tuple(words)


def _leaves(params: Any) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every leaf that has a shape and a floating dtype, with its path."""
    for keys, leaf in jax.tree_util.tree_flatten_with_path(params)[0]:
        if hasattr(leaf, "shape") and hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.floating):
            yield _path(keys), leaf


def _matches(select: Select, path: str, leaf: Any) -> bool:
    if callable(select):
        return bool(select(path, leaf))
    return any(fnmatch.fnmatchcase(path, glob) for glob in ([select] if isinstance(select, str) else select))


def _guess(words: tuple[str, ...], shape: tuple[int, ...]) -> Spec | None:
    """What a leaf is by its name and shape; None for no kernel."""
    if words[-1] not in _NAMES or not 2 <= len(shape) <= 5 or 0 in shape:
        return None
    if len(shape) == 2:
        return Dense()
    parent = words[-2] if len(words) > 1 else ""
    if len(shape) == 3 and words[-1] == "kernel" and parent in _ATTENTION:
        return Dense(_ATTENTION[parent])
    return ConvSpec()


def find(params: Any, *, select: Select | None = None, specs: Mapping[str, Spec] | None = None) -> tuple[Layer, ...]:
    """The kernels of a params tree.

    A kernel is a leaf named ``kernel`` (Flax), ``w`` (Haiku) or ``weight`` (Equinox: ``(c_out, c_in, *spatial)``).
    With two axes it is a matrix, with three to five a convolution; the projections of Flax's attention are matrices.
    Unless ``specs`` says otherwise a convolution has `ConvSpec`'s defaults: whatever its strides, dilation, groups,
    zero or circular padding, and transposed too, its norm is at most that; a spec with strides or groups is tighter.
    REFLECT and EDGE padding add to the norm: there a spec is needed.

    Args:
      params: any pytree.
      select: which of them: a glob on the path (``"*Conv*"``), several, or a function of path and leaf.
      specs: for paths or globs, a `ConvSpec`, `Dense` or `Stacked`; an exact path goes before a glob, a glob before
        those after it. What is named here is a kernel whatever its own name; globs pass over leaves with one axis.

    Returns:
      A `Layer` each, in the order of the tree.

    Raises:
      ValueError: no kernel; a spec for a path that does not exist, or that does not fit its kernel.

    Example:
      >>> import jax.numpy as jnp
      >>> from fantastic4 import network
      >>> params = {"conv": {"kernel": jnp.ones((3, 3, 4, 8)), "bias": jnp.ones(8)}, "scale": jnp.ones(8)}
      >>> [layer.path for layer in network.find(params)]
      ['conv/kernel']
    """
    specs = dict(specs or {})
    layers, unused, seen = [], set(specs), []
    for words, leaf in _leaves(params):
        path = "/".join(words)
        seen.append(path)
        # A glob passes over biases and scales, which have one axis; a path is taken at its word.
        fits = [glob for glob in specs if glob == path or (leaf.ndim > 1 and fnmatch.fnmatchcase(path, glob))]
        given = path if path in fits else next(iter(fits), None)
        unused -= set(fits)
        spec = specs[given] if given is not None else _guess(words, leaf.shape)
        if spec is None or (select is not None and not _matches(select, path, leaf)):
            continue
        layer = Layer(path, tuple(leaf.shape), spec, words[-1] == "weight")
        _check(layer)
        layers.append(layer)
    if unused:
        raise ValueError(
            f"a spec for {sorted(unused)[0]!r}, but no such path: this tree has {_some(seen, sorted(unused)[0])}"
        )
    if not layers:
        raise ValueError(
            f"no kernel found: a kernel is a leaf named {', '.join(_NAMES)} with 2 to 5 axes, or one that select and "
            f"specs name; this tree has {_some(seen)}"
        )
    return tuple(layers)


def _some(paths: Sequence[str], near: str | None = None) -> str:
    """A few paths for a message, those that look like ``near`` first."""
    close = difflib.get_close_matches(near, paths, n=4, cutoff=0.3) if near else []
    paths = list(dict.fromkeys([*close, *paths]))
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
        if not -len(shape) < inner.inputs < len(shape) or inner.inputs == 0 or len(shape) < 2:
            raise ValueError(f"{layer.path}: Dense(inputs={inner.inputs}) does not split a kernel of shape {shape}")
        return
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
                f"which has {_some(list(there), layer.path)}"
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


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class NetworkState:
    """What the next `step` starts from: a pytree, to be kept with the optimiser's state and in checkpoints.

    Attributes:
      inner: a state for each group of kernels of one shape, stacked.
      values: ``(layers,)``, the estimates of the last step, in the order of `names`; NaN before the first.
      layers: the kernels, static.
      groups: which of them go together, static.
    """

    inner: tuple[ladder.LadderState, ...]
    values: Array
    layers: tuple[Layer, ...] = dataclasses.field(metadata={"static": True})
    groups: tuple[tuple[int, ...], ...] = dataclasses.field(metadata={"static": True})

    @property
    def names(self) -> tuple[str, ...]:
        """The layers' names, in the order of `values`."""
        return tuple(name for group in self.groups for i in group for name in self.layers[i].names)

    def by_name(self) -> dict[str, Array]:
        """The estimates of the last step, for a log: ``{"Conv_0/kernel": 1.2, …}``."""
        return dict(zip(self.names, self.values, strict=True))


def _groups(layers: Sequence[Layer]) -> tuple[tuple[int, ...], ...]:
    """Small kernels of one shape and spec go together: one set of operations for all of them."""
    together: dict[Any, list[int]] = {}
    for i, layer in enumerate(layers):
        small = math.prod(layer.shape) < _ALONE and not isinstance(layer.spec, Stacked)
        together.setdefault((layer.shape, layer.spec, layer.torch_order) if small else i, []).append(i)
    return tuple(map(tuple, together.values()))


def _stack(leaves: Mapping[str, Array], layers: Sequence[Layer]) -> Array:
    kernels = [layer.kernels(leaves[layer.path]) for layer in layers]
    return kernels[0] if len(kernels) == 1 else jnp.concatenate(kernels)


def init(
    params: Any,
    *,
    key: Array,
    select: Select | None = None,
    specs: Mapping[str, Spec] | None = None,
    method: str = "four",
    points: int | None = None,
    warmup: int = 20,
) -> NetworkState:
    """A start for `step`: random vectors for every kernel, brought near the top ones by ``warmup`` iterations.

    Args:
      params: any pytree of params.
      key: a ``jax.random.key``.
      select: see `find`.
      specs: see `find`.
      method: ``"four"``, ``"weighted"`` or ``"grid"``, of `fantastic4.ladder`; matrices are the same under each.
      points: of ``"grid"``, points an axis; 3k without.
      warmup: iterations.

    Returns:
      `NetworkState`. For ResNet-50 and ``"four"`` 0.7 % of the params' size, mostly of its 3×3 kernels: a kernel of t
      taps that all differ has 4·t·c_out numbers, a matrix c_out.

    Raises:
      ValueError: what `find` and `fantastic4.ladder.init` refuse.
    """
    layers = find(params, select=select, specs=specs)
    leaves, groups = leaves_at(params, layers), _groups(layers)
    method, points = choice(*ladder.TRAINING_METHODS)("method", method), optional(count(1))("points", points)
    inner = []
    for group in groups:
        members = [layers[i] for i in group]
        kernels = _stack(leaves, members)
        how: dict[str, Any] = {"method": method, "points": points, "warmup": warmup}
        if members[0].is_dense:
            how |= {"method": "four", "points": None}
        # All from one key: a start must not be orthogonal to a top vector, it need not differ from the others.
        start = lambda kernel: ladder.init(kernel, members[0].conv, key=key, **how)  # noqa: B023, E731
        inner.append(_each(start, kernels))
    state = NetworkState(tuple(inner), jnp.zeros(0), layers, groups)
    dtype = jnp.result_type(jnp.float32, *(leaf.dtype for leaf in leaves.values()))
    return dataclasses.replace(state, values=jnp.full(len(state.names), jnp.nan, dtype))


def _each(function: Callable[..., Any], kernels: Array, *rest: Any) -> Any:
    """``function`` of every kernel of a group, stacked; without ``vmap``, which adds an axis, where there is one."""
    if len(kernels) > 1:
        return jax.vmap(function)(kernels, *rest)
    one = function(kernels[0], *jax.tree.map(lambda x: x[0], rest))
    return jax.tree.map(lambda x: x[None], one)


@functools.partial(jax.jit, static_argnames=("reduce", "iterations"))
def _penalty(
    leaves: Mapping[str, Array],
    state: NetworkState,
    weights: Array | None,
    threshold: Any,
    *,
    reduce: str,
    iterations: int,
) -> tuple[Array, NetworkState]:
    values, inner = [], []
    for group, start in zip(state.groups, state.inner, strict=True):
        members = [state.layers[i] for i in group]
        spec = members[0].conv
        advance = lambda kernel, start: ladder.step(kernel, start, spec, iterations=iterations)  # noqa: B023, E731
        value, new = _each(advance, _stack(leaves, members), start)
        values.append(value)
        inner.append(new)
    each = jnp.concatenate([v.astype(state.values.dtype) for v in values])
    excess = each
    if reduce == "log":
        # A zero kernel has no logarithm: it counts as the smallest float, with derivative 0.
        excess = jnp.log(jnp.maximum(each, jnp.finfo(each.dtype).tiny))
        if threshold is not None:
            excess = jnp.maximum(excess - jnp.log(threshold), 0)
    elif threshold is not None:
        excess = jnp.maximum(each - threshold, 0)
    if reduce == "squared":
        excess = excess * excess
    total = jnp.sum(excess if weights is None else weights * excess)
    new = dataclasses.replace(state, inner=tuple(inner), values=jax.lax.stop_gradient(each))
    return total, new


def step(
    params: Any,
    state: NetworkState,
    *,
    reduce: str = "sum",
    threshold: Any = None,
    weights: Mapping[str, float] | None = None,
    iterations: int = 1,
) -> tuple[Array, NetworkState]:
    r"""A penalty on the layers' norms, for a train step, and the new state.

    **Of estimates**: each layer's value comes from warm-started power iteration (`fantastic4.ladder.step`), from
    below; `report` has the sound ones. With b_l the value of layer l and w_l its weight, the penalty is

        "sum":      Σ w_l b_l                      "squared":  Σ w_l b_l²
        "log":      Σ w_l log b_l, the logarithm of the product, which bounds the network's Lipschitz constant

    and with a ``threshold`` c only what exceeds it counts: max(b_l - c, 0), its square, or max(log b_l - log c, 0).

    Args:
      params: the tree that the state was made for, by path and shape.
      state: from `init` or the step before.
      reduce: one of these words.
      threshold: c, a number or scalar; None is no threshold.
      weights: for paths or globs, a number; 1 for all others. A later entry wins.
      iterations: power iterations, at least 1.

    Returns:
      The penalty, a scalar, whose gradient reaches the kernels; and the new `NetworkState`, with ``values``.

    Raises:
      ValueError: a state of another tree, an unknown word, a weight for a path that does not exist.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from fantastic4 import network
      >>> params = {"conv": {"kernel": jnp.ones((3, 3, 1, 1))}, "head": {"kernel": jnp.diag(jnp.array([1.0, 2.0]))}}
      >>> state = network.init(params, key=jax.random.key(0))
      >>> penalty, state = network.step(params, state)
      >>> print(round(float(penalty), 3), {name: round(float(v), 3) for name, v in state.by_name().items()})
      11.0 {'conv/kernel': 9.0, 'head/kernel': 2.0}
    """
    same_kind("state", state, NetworkState, "network.init(params, key=…)")
    leaves = leaves_at(params, state.layers, "the layers of this state")
    scale = None
    if weights is not None:
        scale = jnp.ones(len(state.names), state.values.dtype)
        for glob, weight in weights.items():
            hit = [i for i, name in enumerate(state.names) if name == glob or fnmatch.fnmatchcase(name, glob)]
            if not hit:
                raise ValueError(f"a weight for {glob!r}, but no such path: the layers are {_some(state.names, glob)}")
            scale = scale.at[jnp.array(hit)].set(weight)
    threshold = optional(number)("threshold", threshold)
    reduce, iterations = choice(*REDUCTIONS)("reduce", reduce), count(1)("iterations", iterations)
    return _penalty(leaves, state, scale, threshold, reduce=reduce, iterations=iterations)


def _bound(layer: Layer, method: str, kernel: Array) -> Array:
    return dense_norms.bound(kernel[0]) if layer.is_dense else bound(kernel, layer.conv, method=method)


def bounds(params: Any, layers: Sequence[Layer], *, method: str = "four") -> dict[str, Array]:
    """A sound upper bound of every layer's norm, by path: never below it, rounding included.

    Args:
      params: any pytree.
      layers: from `find`.
      method: of `fantastic4.bound`; a matrix has its own.

    Returns:
      A scalar each, or ``(layers,)`` for a `Stacked` kernel; differentiable.
    """
    method = choice(*METHODS)("method", method)
    found = {}
    for layer, leaf in zip(layers, leaves_at(params, layers).values(), strict=True):
        values = _each(functools.partial(_bound, layer, method), layer.kernels(leaf))
        found[layer.path] = values if isinstance(layer.spec, Stacked) else values[0]
    return found


@dataclasses.dataclass(frozen=True)
class Row:
    """A layer in a `Report`.

    Attributes:
      name: its path.
      shape: of its kernel, in Flax's order.
      bound: a sound upper bound of its norm.
    """

    name: str
    shape: tuple[int, ...]
    bound: float


@dataclasses.dataclass(frozen=True)
class Report:
    """Every layer of a network with a sound bound of its norm; ``print`` it.

    Attributes:
      rows: a `Row` a layer.
      method: of `fantastic4.bound`.
    """

    rows: tuple[Row, ...]
    method: str

    @property
    def product(self) -> float:
        """Product of the bounds: for layers in sequence with 1-Lipschitz functions between, a Lipschitz bound."""
        return math.prod(row.bound for row in self.rows)

    def __str__(self) -> str:
        table = [("layer", "shape", "norm at most")]
        table += [(row.name, "×".join(map(str, row.shape)), f"{row.bound:.4g}") for row in self.rows]
        table += [("product", "", f"{self.product:.4g}")]
        wide = [max(len(line[i]) for line in table) for i in range(3)]
        return "\n".join(f"{a:<{wide[0]}}  {b:<{wide[1]}}  {c:>{wide[2]}}" for a, b, c in table)


def report(
    params: Any, *, select: Select | None = None, specs: Mapping[str, Spec] | None = None, method: str = "four"
) -> Report:
    """A sound bound of every layer, as a table: on the host, outside of jit.

    Args:
      params: any pytree.
      select: see `find`.
      specs: see `find`.
      method: of `fantastic4.bound`: ``"grid"`` is tighter and slower than ``"four"``.

    Returns:
      `Report`.

    Raises:
      ValueError: what `find` refuses, or an unknown method.

    Example:
      >>> import jax.numpy as jnp
      >>> from fantastic4 import network
      >>> print(network.report({"conv": {"kernel": jnp.ones((3, 3, 1, 1))}}))
      layer        shape    norm at most
      conv/kernel  3×3×1×1             9
      product                          9
    """
    layers = find(params, select=select, specs=specs)
    found = bounds(params, layers, method=method)
    leaves = leaves_at(params, layers)
    rows = []
    for layer in layers:
        shape = jax.eval_shape(layer.kernels, leaves[layer.path]).shape[1 + layer.is_dense :]
        values = jnp.ravel(found[layer.path])
        rows += [Row(name, shape, float(value)) for name, value in zip(layer.names, values, strict=True)]
    return Report(tuple(rows), method)
