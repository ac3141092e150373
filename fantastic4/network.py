"""All kernels of a network at once: penalise them together in training, and report a bound of each.

`fantastic4.kernels` finds them in any tree of params, and `fantastic4.layerwise` has what is sound; their names that
users need are here too.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from fantastic4 import ladder, msgpack
from fantastic4.devices import on_any_mesh
from fantastic4.entry import choice, count, number, optional, same_kind
from fantastic4.entry import key as checked_key
from fantastic4.kernels import Dense, Layer, Select, Spec, Stacked, find, leaves_at, replace, some
from fantastic4.layerwise import Report, Row, bounds, report
from fantastic4.linalg import each
from fantastic4.promotion import usual_promotion

__all__ = [
    "Dense", "Layer", "NetworkState", "Report", "Row", "Select", "Spec", "Stacked",
    "bounds", "find", "init", "leaves_at", "replace", "report", "step", "step_with_gradients",
]  # fmt: skip

REDUCTIONS = ("sum", "squared", "log")
_ALONE = 2**14  # entries from which a kernel is not put beside others of its shape: to copy and to compile costs more


@msgpack.state
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class NetworkState:
    """What the next `step` starts from: a pytree, to be kept with the optimiser's state and in checkpoints.

    Attributes:
      inner: a state for each group of kernels of one shape, stacked.
      values: ``(layers,)``, the estimates of the last step, in the order of `names`; 0 before the first.
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
        """The estimates of the last step, for a log: ``{"Conv_0/kernel": 1.2, …}``; of an ensemble one each."""
        return {name: self.values[..., i] for i, name in enumerate(self.names)}


def _groups(layers: Sequence[Layer]) -> tuple[tuple[int, ...], ...]:
    """Small kernels of one shape and spec go together: one set of operations for all of them."""
    together: dict[Any, list[int]] = {}
    for i, layer in enumerate(layers):
        small = math.prod(layer.shape) < _ALONE and not isinstance(layer.spec, Stacked)
        together.setdefault(layer.kind if small else i, []).append(i)
    return tuple(map(tuple, together.values()))


def _kernels(leaves: Sequence[Array], layer: Layer) -> Array:
    """The kernels of a group, stacked; that of a layer by itself has no axis for it, which would cost at each step."""
    if isinstance(layer.spec, Stacked):
        return layer.kernels(leaves[0])
    kernels = [layer.kernel(leaf) for leaf in leaves]
    return kernels[0] if len(kernels) == 1 else jnp.stack(kernels)


def _map(function: Callable[..., Any], leaves: Sequence[Array], layer: Layer, *states: Any) -> Any:
    """``function`` of every kernel of a group and of the state that goes with it."""
    alone = len(leaves) == 1 and not isinstance(layer.spec, Stacked)
    kernels = _kernels(leaves, layer)
    return function(kernels, *states) if alone else each(function, kernels, *states)


@usual_promotion
@on_any_mesh
def _starts(
    leaves: Mapping[str, Array],
    key: Array,
    layers: Sequence[Layer],
    groups: tuple[tuple[int, ...], ...],
    how: Mapping[str, Any],
) -> tuple[ladder.LadderState, ...]:
    """The start of every group; ``how`` is for convolutions, matrices have one way only."""
    starts = []
    for group in groups:
        layer, ours = layers[group[0]], [leaves[layers[i].path] for i in group]
        ways = dict(how) | ({"method": "four", "points": None} if layer.is_dense else {})
        start = functools.partial(ladder.init, spec=layer.conv, key=key, **ways)
        starts.append(_map(start, ours, layer))
    return tuple(starts)


@usual_promotion
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
      `NetworkState`. For ResNet-50 and ``"four"`` 0.4 % of the params' size: a kernel of k×k taps has (k + 1)²·c_out
      numbers, a matrix 2·c_out.

    Raises:
      ValueError: what `find` and `fantastic4.ladder.init` refuse.
    """
    msgpack.register()
    checked_key(key)
    layers = find(params, select=select, specs=specs)
    leaves, groups = leaves_at(params, layers), _groups(layers)
    method, points = choice(*ladder.TRAINING_METHODS)("method", method), optional(count(1))("points", points)
    # All from one key: a start must not be orthogonal to a top vector, it need not differ from the others.
    how: dict[str, Any] = {"method": method, "points": points, "warmup": warmup}
    state = NetworkState(_starts(leaves, key, layers, groups, how), jnp.zeros(0), layers, groups)
    dtype = jnp.result_type(jnp.float32, *(leaf.dtype for leaf in leaves.values()))
    return dataclasses.replace(state, values=jnp.zeros(len(state.names), dtype))


@jax.custom_jvp
def _summed(values: Array) -> Array:
    """The sum. Behind a barrier: XLA makes a chain of additions of it, and passes over the program once for each."""
    return jnp.sum(jax.lax.optimization_barrier(values))


@_summed.defjvp
def _summed_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    return _summed(*primals), jnp.sum(*tangents)


def _reduce(values: Array, weights: Array | None, threshold: Any, reduce: str) -> Array:
    excess = values
    if reduce == "log":
        # A zero kernel has no logarithm: it counts as the smallest float, with derivative 0.
        excess = jnp.log(jnp.maximum(values, jnp.finfo(values.dtype).tiny))
        if threshold is not None:
            excess = jnp.maximum(excess - jnp.log(threshold), 0)
    elif threshold is not None:
        excess = jnp.maximum(values - threshold, 0)
    if reduce == "squared":
        excess = excess * excess
    return _summed(excess if weights is None else weights * excess)


def _grouped(leaves: Mapping[str, Array], state: NetworkState) -> Iterator[tuple[list[Array], Any, Layer]]:
    """Of every group its leaves, its state and a layer that stands for all of that kind, without a path."""
    for group, start in zip(state.groups, state.inner, strict=True):
        members = [state.layers[i] for i in group]
        yield [leaves[layer.path] for layer in members], start, dataclasses.replace(members[0], path="")


def _after(state: NetworkState, values: Sequence[Array], inner: Sequence[Any]) -> tuple[Array, NetworkState]:
    """The values of all layers, and the new state that has them."""
    together = jnp.concatenate([v.astype(state.values.dtype).ravel() for v in values])
    return together, dataclasses.replace(state, inner=tuple(inner), values=jax.lax.stop_gradient(together))


@usual_promotion
@on_any_mesh
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
    advanced = []
    for ours, start, layer in _grouped(leaves, state):
        advance = functools.partial(ladder.step, spec=layer.conv, iterations=iterations)
        advanced.append(_map(advance, ours, layer, start))
    values, new = _after(state, *zip(*advanced, strict=True))
    return _reduce(values, weights, threshold, reduce), new


@functools.partial(jax.jit, static_argnames=("layer", "iterations"))
def _advance_with_gradients(
    leaves: Sequence[Array], start: ladder.LadderState, *, layer: Layer, iterations: int
) -> tuple[Array, ladder.LadderState, list[Array]]:
    """The step of one group, with the gradient of each value by its own leaf: traced and lowered once for each kind."""
    advance = functools.partial(ladder.step_with_gradient, spec=layer.conv, iterations=iterations)
    # Wide, so that a gradient in half precision is rounded once, when all is known.
    leaves = [leaf.astype(jnp.promote_types(leaf.dtype, jnp.float32)) for leaf in leaves]
    values, new, gradients = _map(advance, leaves, layer, start)
    return values, new, *jax.linear_transpose(functools.partial(_kernels, layer=layer), leaves)(gradients)


@usual_promotion
@on_any_mesh
@functools.partial(jax.jit, static_argnames=("reduce", "iterations"))
def _penalty_with_gradients(
    leaves: Mapping[str, Array],
    state: NetworkState,
    weights: Array | None,
    threshold: Any,
    *,
    reduce: str,
    iterations: int,
) -> tuple[Array, NetworkState, dict[str, Array]]:
    advanced = [
        _advance_with_gradients(ours, start, layer=layer, iterations=iterations)
        for ours, start, layer in _grouped(leaves, state)
    ]
    values, new = _after(state, *zip(*(found[:2] for found in advanced), strict=True))
    paths = [state.layers[i].path for group in state.groups for i in group]
    gradients = dict(zip(paths, (gradient for *_, ours in advanced for gradient in ours), strict=True))
    if reduce == "sum" and weights is None and threshold is None:
        total = _reduce(values, weights, threshold, reduce)  # whose derivatives are 1
    else:
        total, by_value = jax.value_and_grad(_reduce)(values, weights, threshold, reduce)
        lengths = [len(state.layers[i].names) for group in state.groups for i in group]
        for path, part in zip(paths, jax.lax.split(by_value, lengths), strict=True):
            gradients[path] *= part.reshape(-1, *(1,) * (gradients[path].ndim - 1))
    return total, new, {path: gradients[path].astype(leaf.dtype) for path, leaf in leaves.items()}


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
      params: the tree that the state was made for, by path and shape. Kernels that the state does not know, as of a
        layer that was added since, have no share in the penalty: make a new state.
      state: from `init` or the step before.
      reduce: one of these words.
      threshold: c, a number or scalar; None is no threshold.
      weights: for paths or globs, a number; 1 for all others. A later entry wins.
      iterations: power iterations, at least 1.

    Returns:
      The penalty, a scalar, whose gradient reaches the kernels; and the new `NetworkState`, with ``values``.

    Raises:
      ValueError: a state with kernels that ``params`` lack or have in another shape, an unknown word, a weight for a
        path that does not exist.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from fantastic4 import network
      >>> params = {"conv": {"kernel": jnp.ones((3, 3, 1, 1))}, "head": {"kernel": jnp.diag(jnp.array([1.0, 2.0]))}}
      >>> state = network.init(params, key=jax.random.key(0))
      >>> penalty, state = network.step(params, state)
      >>> print(round(float(penalty), 3), {name: round(float(v), 3) for name, v in state.by_name().items()})
      11.0 {'conv/kernel': 9.0, 'head/kernel': 2.0}
    """
    leaves, scale, options = _checked(params, state, reduce, threshold, weights, iterations)
    return _penalty(leaves, state, scale, **options)


def step_with_gradients(
    params: Any,
    state: NetworkState,
    *,
    reduce: str = "sum",
    threshold: Any = None,
    weights: Mapping[str, float] | None = None,
    iterations: int = 1,
) -> tuple[Array, NetworkState, dict[str, Array]]:
    """`step` with the penalty's gradient: that of ``jax.value_and_grad``, but JAX traces it faster.

    Args:
      params: see `step`, as all others.
      state: likewise.
      reduce: likewise.
      threshold: likewise.
      weights: likewise.
      iterations: likewise.

    Returns:
      The penalty, the new state, and the gradient by each kernel, by path; all are constants to a further derivative.

    Raises:
      ValueError: what `step` refuses.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from fantastic4 import network
      >>> params = {"head": {"kernel": jnp.diag(jnp.array([1.0, 2.0]))}}
      >>> _, _, gradients = network.step_with_gradients(params, network.init(params, key=jax.random.key(0)))
      >>> jnp.round(jnp.abs(gradients["head/kernel"]), 3).tolist()
      [[0.0, 0.0], [0.0, 1.0]]
    """
    leaves, scale, options = _checked(params, state, reduce, threshold, weights, iterations)
    return _penalty_with_gradients(jax.lax.stop_gradient(leaves), state, scale, **options)


def _checked(
    params: Any, state: Any, reduce: Any, threshold: Any, weights: Mapping[str, float] | None, iterations: Any
) -> tuple[dict[str, Array], Array | None, dict[str, Any]]:
    """The kernels, the weights as an array, and the options, all of them valid."""
    same_kind("state", state, NetworkState, "network.init(params, key=…)")
    leaves = leaves_at(params, state.layers, "the layers of this state")
    scale = None
    if weights is not None:
        scale = jnp.ones(len(state.names), state.values.dtype)
        for glob, weight in weights.items():
            hit = [i for i, name in enumerate(state.names) if name == glob or fnmatch.fnmatchcase(name, glob)]
            if not hit:
                raise ValueError(f"a weight for {glob!r}, but no such path: the layers are {some(state.names, glob)}")
            scale = scale.at[jnp.array(hit)].set(weight)
    options = {
        "threshold": optional(number)("threshold", threshold),
        "reduce": choice(*REDUCTIONS)("reduce", reduce),
        "iterations": count(1)("iterations", iterations),
    }
    return leaves, scale, options
