"""Many devices: a function of many frequencies, each device its share of them; and a function on any mesh."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import jax
from jax import Array, lax
from jax.sharding import AxisType, Mesh, PartitionSpec, auto_axes, get_abstract_mesh, use_abstract_mesh

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")


def spread(function: Callable[..., Any], mesh: Mesh | None, shared: int, split: int) -> Callable[..., Any]:
    """``function``, compiled, with the leading axis of its last arguments and of its results over all of ``mesh``.

    Args:
      function: of ``shared`` arguments that every device gets whole, and ``split`` ones that are divided.
      mesh: None is one device.
      shared: number of arguments.
      split: number of arguments, whose leading axis the number of devices divides.

    Returns:
      A compiled function of the same arguments.
    """
    if mesh is None:
        return jax.jit(function)
    whole, part = PartitionSpec(), PartitionSpec(mesh.axis_names)
    specs = (*(whole,) * shared, *(part,) * split)
    of_xla = Mesh(mesh.devices, mesh.axis_names)
    # What varies over the mesh is seen by in_specs; the loops inside start from constants, which the check refuses.
    divided = jax.jit(jax.shard_map(function, mesh=of_xla, in_specs=specs, out_specs=part, check_vma=False))

    def call(*args: Any) -> Any:
        if mesh.abstract_mesh == of_xla.abstract_mesh or get_abstract_mesh() == of_xla.abstract_mesh:
            return divided(*args)
        with use_abstract_mesh(mesh.abstract_mesh):
            return auto_axes(divided, out_sharding=whole)(*args)

    return call


def varying_axes(kind: Any) -> frozenset[str]:
    """The axes of a ``shard_map`` over which an array of this type varies."""
    manual = getattr(kind, "manual_axis_type", None)
    return manual.varying if manual is not None else getattr(kind, "vma", None) or frozenset()


def vary_over(tree: T, axes: frozenset[str]) -> T:
    """Arrays that vary over axes of a ``shard_map``, whatever they did."""

    def vary(x: Array) -> Array:
        missing = tuple(axes - varying_axes(jax.typeof(x)))
        return lax.pcast(x, missing, to="varying") if missing else x

    return jax.tree.map(vary, tree)


def vary_as(tree: T, *others: Any) -> T:
    """Arrays that vary over the devices of a ``shard_map`` as any of the others do.

    What a loop starts from must, if it will: a constant does not, and JAX refuses a loop whose carry becomes something
    else than it was. What a map is transposed by must too: the transpose of one that takes what does not vary adds
    up what all devices have.
    """
    kinds = (x if isinstance(x, jax.ShapeDtypeStruct) else jax.typeof(x) for x in jax.tree.leaves(others))
    return vary_over(tree, frozenset().union(*map(varying_axes, kinds)))


def size(mesh: Mesh | None) -> int:
    """How many devices."""
    return 1 if mesh is None else mesh.size


def on_any_mesh(function: Callable[P, R]) -> Callable[P, R]:
    """``function``, which leaves it to XLA where its numbers lie, for arrays on a mesh with explicit axes too.

    JAX makes such axes part of an array's type, and refuses a sum over one of them that does not say where its result
    lies. Inside, the axes are of XLA. Outside, a result of an argument's shape lies as that argument does, and of one
    that ends in an axis of the same length that axis: beside a sharded kernel a state that is replicated makes XLA
    gather the kernel. All others are replicated: they are small, but for a batch that `jacobian` maps.
    """

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        leaves, tree = jax.tree.flatten((args, kwargs))
        arrays = {i: leaf for i, leaf in enumerate(leaves) if hasattr(leaf, "dtype")}
        types = map(jax.typeof, arrays.values())
        sharded = [t for t in types if any(axis is not None for axis in t.sharding.spec)]
        mesh = next((t.sharding.mesh for t in sharded if AxisType.Explicit in t.sharding.mesh.axis_types), None)
        if mesh is None:
            return function(*args, **kwargs)
        alike = {t.shape: t.sharding.spec for t in reversed(sharded)}
        last = {t.shape[-1]: t.sharding.spec[-1] for t in reversed(sharded)}

        def lies(result: Any) -> PartitionSpec:
            ends = (*(None,) * (result.ndim - 1), last.get(result.shape[-1])) if result.ndim else ()
            return alike.get(result.shape, PartitionSpec(*ends))

        def flat(arrays: dict[int, Any]) -> Any:
            args, kwargs = jax.tree.unflatten(tree, [arrays.get(i, leaf) for i, leaf in enumerate(leaves)])
            return function(*args, **kwargs)

        with use_abstract_mesh(mesh):
            results = jax.eval_shape(auto_axes(flat, out_sharding=PartitionSpec()), arrays)
            return auto_axes(flat, out_sharding=jax.tree.map(lies, results))(arrays)

    return call
