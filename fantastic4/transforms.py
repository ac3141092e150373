"""The bounds as optax transformations: a penalty's gradient, projection, clipping. The model does not change at all.

Each works on the whole params tree and by path, as `fantastic4.network` does; put it into ``optax.chain``, ``masked``,
``multi_transform`` or ``MultiSteps``; ``inject_hyperparams`` needs the whole numbers (``iterations``, ``warmup``,
``every``) as ``static_args``. For ``tree_utils.tree_map_params`` their states hold no parameters. Projections come last
in a chain, for they must know what will be applied.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array, lax

from fantastic4 import kernels, network
from fantastic4.clipping import clip_singular_values
from fantastic4.devices import on_any_mesh, vary_as
from fantastic4.entry import count, number, positive, sizes
from fantastic4.linalg import after
from fantastic4.network import Layer, NetworkState, Select, Spec
from fantastic4.promotion import usual_promotion

_TRIES = 10  # rounds until rounding no longer lifts a projected kernel above its limit; two are usual


class PenaltyState(NamedTuple):
    """State of `add_spectral_penalty`.

    Attributes:
      updates: how many so far, int32.
      network: `fantastic4.network.NetworkState`; its ``by_name()`` is what to log.
      penalty: the penalty at the last update, without beta.
    """

    updates: Array
    network: NetworkState
    penalty: Array


def add_spectral_penalty(
    beta: float | Array | Callable[[Array], Any],
    *,
    key: Array | None = None,
    select: Select | None = None,
    specs: Mapping[str, Spec] | None = None,
    method: str = "four",
    points: int | None = None,
    warmup: int = 20,
    reduce: str = "sum",
    threshold: Any = None,
    weights: Mapping[str, float] | None = None,
    iterations: int = 1,
) -> optax.GradientTransformation:
    """Add beta times the gradient of `fantastic4.network.step`'s penalty to the updates.

    As the published training does with loss + β Σ bound (Singla & Feizi 2021, §6). It belongs before the optimiser in a
    chain, where updates are still gradients; for a decoupled penalty, as AdamW has for its decay, between
    ``optax.scale_by_adam()`` and ``optax.scale_by_learning_rate(…)``. Behind a learning rate it would raise the bounds.

    Args:
      beta: a number, or a schedule: a function of the count of updates.
      key: a ``jax.random.key`` for the start of the power iterations; ``jax.random.key(0)`` without.
      select: which kernels, see `fantastic4.network.find`.
      specs: their specs, likewise.
      method: see `fantastic4.network.init`.
      points: likewise.
      warmup: likewise.
      reduce: see `fantastic4.network.step`.
      threshold: likewise.
      weights: likewise.
      iterations: likewise.

    Returns:
      A transformation with state `PenaltyState`; its ``update`` needs ``params``.

    Raises:
      ValueError: a beta that is none of these; in ``init`` and ``update``: what `fantastic4.network` refuses, or no
        params.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> from fantastic4 import transforms
      >>> params = {"conv": {"kernel": jnp.ones((3, 3, 1, 1)), "bias": jnp.ones(1)}}
      >>> tx = optax.chain(transforms.add_spectral_penalty(0.1), optax.sgd(1.0))
      >>> updates, state = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
      >>> print(round(float(updates["conv"]["kernel"][0, 0, 0, 0]), 3), float(updates["conv"]["bias"][0]))
      -0.1 -0.0
    """
    if not callable(beta):
        number("beta", beta)

    def init(params: Any) -> PenaltyState:
        if _is_placeholder(params):
            return PenaltyState(jnp.zeros((), jnp.int32), np.zeros(()), jnp.zeros(()))  # type: ignore[arg-type]
        start = jax.random.key(0) if key is None else key
        how: dict[str, Any] = {"select": select, "specs": specs, "method": method, "points": points, "warmup": warmup}
        state = network.init(params, key=start, **how)
        return PenaltyState(jnp.zeros((), jnp.int32), state, jnp.zeros((), state.values.dtype))

    def update(updates: Any, state: PenaltyState, params: Any = None) -> tuple[Any, PenaltyState]:
        leaves = network.leaves_at(_given(params), state.network.layers, "the layers of this optimiser state")
        how: dict[str, Any] = {"reduce": reduce, "threshold": threshold, "weights": weights, "iterations": iterations}
        value, new, gradients = network.step_with_gradients(leaves, state.network, **how)
        scale = beta(state.updates) if callable(beta) else beta
        old = network.leaves_at(updates, state.network.layers, "the layers of this optimiser state")
        scaled = {path: jnp.asarray(scale, gradient.dtype) * gradient for path, gradient in gradients.items()}
        added = {path: old[path] + scaled[path].astype(old[path].dtype) for path in leaves}
        value = value.astype(state.penalty.dtype)
        return network.replace(updates, added), PenaltyState(optax.safe_increment(state.updates), new, value)

    return optax.GradientTransformation(init, update)


def _is_placeholder(params: Any) -> bool:
    """Whether ``optax.tree_utils.tree_map_params`` asks where in a state something stands for each parameter.

    Nowhere here: states go by kernel. A leaf where a whole tree would stand says that all of it is something else.
    """
    return type(params).__module__.startswith("optax.tree_utils")


def _given(params: Any) -> Any:
    if params is None:
        raise ValueError("this transformation needs the params: call tx.update(gradients, state, params)")
    return params


class ProjectionState(NamedTuple):
    """State of `project_spectral_norm` and `clip_spectrum`.

    Attributes:
      updates: how many so far, int32.
    """

    updates: Array


def project_spectral_norm(
    maximum: float | Array,
    *,
    every: int = 1,
    method: str = "four",
    select: Select | None = None,
    specs: Mapping[str, Spec] | None = None,
) -> optax.GradientTransformation:
    """Scale every kernel whose bound exceeds ``maximum`` down to it: W ← W · min(1, maximum / bound(W)).

    The projection of Gouk et al. (2021), by a bound that is sound for the convolution where theirs is an estimate.
    After every projection ``fantastic4.bound(kernel, spec, method=method)`` of what ``optax.apply_updates`` makes is
    at most ``maximum``: the very floats are checked, in half precision too. So it must be last in its chain. Updates
    narrower than their params come out in the params' type. One update in half precision cannot take a kernel far: from
    a hundred times the maximum its direction suffers, from a thousand it may become 0: give those float32 updates.
    Params and updates whose sum overflows stay as they are: their bound is NaN.

    Args:
      maximum: the limit, a positive number.
      every: project at each ``every``-th update; a sound bound costs some tens of passes over the kernel.
      method: of `fantastic4.bound`; matrices have their own.
      select: which kernels, see `fantastic4.network.find`.
      specs: their specs, likewise.

    Returns:
      A transformation with state `ProjectionState`; its ``update`` needs ``params``.

    Raises:
      ValueError: ``every`` < 1; in ``update`` what `fantastic4.network.find` refuses, or no params.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> import fantastic4 as f4
      >>> from fantastic4 import transforms
      >>> params = {"kernel": jnp.ones((3, 3, 1, 1))}
      >>> tx = optax.chain(optax.sgd(0.1), transforms.project_spectral_norm(1.0))
      >>> updates, state = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
      >>> 0.999 <= float(f4.bound(optax.apply_updates(params, updates)["kernel"])) <= 1
      True
    """
    positive("maximum", maximum)

    def project(layer: Layer, old: Array, given: Array) -> Array:
        limit = _not_above(maximum, jnp.promote_types(old.dtype, jnp.float32))
        wide = jnp.promote_types(limit.dtype, given.dtype)
        new = old.astype(wide) + given.astype(wide)

        def of_layers(x: Array) -> Array:
            return x.reshape(x.shape + (1,) * (new.ndim - x.ndim))

        def bound_after(update: Array) -> Array:
            after = optax.apply_updates(old, update)
            return network.bounds({layer.path: after}, [layer], method=method)[layer.path].astype(wide)

        def unfinished(carry: tuple[Array, Array, Array, Array]) -> Array:
            return jnp.any(carry[2]) & (carry[3] <= _TRIES)

        def shrink(carry: tuple[Array, Array, Array, Array]) -> tuple[Array, Array, Array, Array]:
            scale, update, _, tries = carry
            now = bound_after(update)
            above = now > limit
            # More of a margin at each try, for rounding may lift it above the limit again.
            margin = 2 * float(jnp.finfo(old.dtype).eps) * jnp.asarray(4, wide) ** tries
            ratio = limit / now * jnp.maximum(1 - margin, 0)
            scale = jnp.where(above, scale * ratio, scale)
            shrunk = (new * of_layers(scale) - old.astype(wide)).astype(given.dtype)
            return scale, jnp.where(of_layers(above), shrunk, update), above, tries + 1

        # The update that is checked is the loop's own, and lies in memory: computed beside its check, as by a learning
        # rate times a gradient, it might be rounded otherwise there.
        ones = jnp.ones(jax.eval_shape(bound_after, given).shape, wide)
        carry = vary_as((ones, given, ones > 0, jnp.zeros((), jnp.int32)), new)
        _, update, above, _ = lax.while_loop(unfinished, shrink, carry)
        return jnp.where(of_layers(above), -old.astype(given.dtype), update)

    return _projection(project, every, lambda params: network.find(params, select=select, specs=specs))


def clip_spectrum(
    maximum: float | Array,
    input_shapes: Mapping[str, tuple[int, ...]],
    *,
    every: int = 100,
    specs: Mapping[str, Spec] | None = None,
) -> optax.GradientTransformation:
    """Clip the singular values of convolutions, as circular ones at their input sizes (Sedghi et al. 2019).

    Each kernel is replaced by `fantastic4.clip_singular_values` of it, cropped to its own taps. Whatever a layer's own
    padding, its spectrum is taken as that of circular padding: for zero padding the norm may come out larger, and at
    another input size too. Last in its chain, or what follows undoes it.

    Args:
      maximum: the limit, a positive number.
      input_shapes: for paths or globs, the spatial size of the layer's input; kernels without one are left alone.
      every: clip at each ``every``-th update; one decomposition a frequency is expensive.
      specs: specs of the layers, see `fantastic4.network.find`; their padding is not used.

    Returns:
      A transformation with state `ProjectionState`; its ``update`` needs ``params``.

    Raises:
      ValueError: ``every`` < 1, input shapes without paths; in ``init`` or ``update``: an input shape for a path that
        does not exist, for a matrix, or one that the strides do not divide.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> import fantastic4 as f4
      >>> from fantastic4 import transforms
      >>> params = {"kernel": jnp.ones((3, 3, 1, 1))}
      >>> tx = optax.chain(optax.sgd(0.1), transforms.clip_spectrum(1.0, {"kernel": (8, 8)}, every=1))
      >>> updates, state = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
      >>> clipped = optax.apply_updates(params, updates)["kernel"]
      >>> round(float(f4.exact_norm(clipped, (8, 8))), 4)
      1.0
    """
    positive("maximum", maximum)
    if not isinstance(input_shapes, Mapping):
        raise ValueError(
            f"input_shapes must be a dict from paths or globs to spatial sizes, as {{'Conv_*/kernel': (8, 8)}}, "
            f"got {input_shapes!r}"
        )
    shapes = {glob: sizes(f"the input shape of {glob!r}", shape) for glob, shape in input_shapes.items()}

    def shape_of(layer: Layer) -> tuple[int, ...]:
        shape = kernels.meant(shapes, layer.path)
        assert shape is not None  # only such layers are found
        return shape

    def find(params: Any) -> tuple[Layer, ...]:
        there = kernels.paths(params)
        wrong = kernels.idle(shapes, there)  # or find speaks of a select
        layers = () if wrong is not None else network.find(params, select=list(shapes), specs=specs)
        wrong = wrong if wrong is not None else kernels.idle(shapes, [layer.path for layer in layers])
        if wrong is not None:
            has = kernels.some(there, wrong)
            raise ValueError(f"an input shape for {wrong!r}, but no such kernel: this tree has {has}")
        for layer in layers:
            if layer.is_dense:
                raise ValueError(f"{layer.path} is a matrix: clip_spectrum is for convolutions")
        return layers

    def project(layer: Layer, old: Array, given: Array) -> Array:
        spec = dataclasses.replace(layer.conv, padding="CIRCULAR")
        new = optax.apply_updates(old, given)

        def clip(kernel: Array) -> Array:
            return clip_singular_values(kernel, shape_of(layer), maximum, spec)

        # A matrix of permutation: its transpose puts the kernels back where they came from.
        kernels, to_leaf = layer.kernels(new), jax.linear_transpose(layer.kernels, new)
        (clipped,) = to_leaf(lax.map(clip, kernels).astype(kernels.dtype))
        return (clipped - old).astype(given.dtype)

    return _projection(project, every, find, same=shape_of)


def _not_above(maximum: float | Array, dtype: Any) -> Array:
    """A limit in another type, not rounded up."""
    if isinstance(maximum, jax.core.Tracer):
        cast = maximum.astype(dtype)
        return jnp.where(cast > maximum, jnp.nextafter(cast, jnp.zeros_like(cast)), cast)
    kind = np.dtype(dtype).type
    nearest = kind(maximum)
    return jnp.asarray(np.nextafter(nearest, kind(0)) if float(nearest) > float(maximum) else nearest)


def _projection(
    project: Callable[[Layer, Array, Array], Array],
    every: int,
    find: Callable[[Any], tuple[Layer, ...]],
    same: Callable[[Layer], Any] = lambda layer: None,
) -> optax.GradientTransformation:
    """A transformation that replaces the kernels' updates at each ``every``-th one.

    Args:
      project: ``project(layer, old, update)``, the new update.
      every: how often.
      find: the layers in a tree.
      same: what layers of one shape and spec must have in common to be treated alike.
    """
    every = count(1)("every", every)

    def init(params: Any) -> ProjectionState:
        if not _is_placeholder(params):
            find(params)
        return ProjectionState(jnp.zeros((), jnp.int32))

    def projected(layers: tuple[Layer, ...], old: dict[str, Array], given: dict[str, Array]) -> dict[str, Array]:
        alike: dict[Any, list[str]] = {}
        for layer in layers:
            path = layer.path
            kind = (layer.kind, old[path].dtype, given[path].dtype, same(layer))
            alike.setdefault(kind, []).append(path)
        by_path = {layer.path: layer for layer in layers}
        done: dict[str, Array] = {}
        last = jnp.zeros(())
        # One program for all kernels of a kind, and one kernel after the other: clipping calls LAPACK.
        for paths in alike.values():
            olds = jnp.stack([old[path] for path in paths])
            updates = after(jnp.stack([given[path] for path in paths]), last)
            member = functools.partial(project, by_path[paths[0]])
            last = lax.map(lambda pair: member(*pair), (olds, updates))  # noqa: B023
            done |= dict(zip(paths, last, strict=True))
        return done

    @functools.cache
    def replaced(layers: tuple[Layer, ...]) -> Callable[..., dict[str, Array]]:
        """One program for the same layers, outside of jit too."""

        def new(old: dict[str, Array], given: dict[str, Array], counted: Array) -> dict[str, Array]:
            change = functools.partial(projected, layers, old)
            return change(given) if every == 1 else lax.cond(counted % every == 0, change, lambda x: x, given)

        return jax.jit(new, inline=True)

    def update(updates: Any, state: ProjectionState, params: Any = None) -> tuple[Any, ProjectionState]:
        layers = find(_given(params))
        old = network.leaves_at(params, layers)
        given = network.leaves_at(updates, layers, "the layers of these params")
        # In narrower updates no kernel could be brought to where it must be.
        given = {path: x.astype(jnp.promote_types(x.dtype, old[path].dtype)) for path, x in given.items()}
        counted = optax.safe_increment(state.updates)

        new = usual_promotion(on_any_mesh(replaced(layers)))(old, given, counted)
        return network.replace(updates, new), ProjectionState(counted)

    return optax.GradientTransformation(init, update)
