"""A sound bound of every kernel in a params tree, and the table of them; users find both in `fantastic4.network`."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax import Array

from fantastic4 import dense
from fantastic4.bounds import METHODS, bound
from fantastic4.devices import on_any_mesh
from fantastic4.entry import choice
from fantastic4.kernels import Layer, Select, Spec, Stacked, find, leaves_at, left_out
from fantastic4.linalg import each
from fantastic4.now import now
from fantastic4.promotion import usual_promotion
from fantastic4.rounding import times_up
from fantastic4.tables import at_most, columns


def _bound(layer: Layer, method: str, kernel: Array) -> Array:
    return dense.bound(kernel[0]) if layer.is_dense else bound(kernel, layer.conv, method=method)


@usual_promotion
@on_any_mesh
def _bounds(leaves: Mapping[str, Array], layers: Sequence[Layer], method: str) -> dict[str, Array]:
    found = {}
    for layer in layers:
        values = each(functools.partial(_bound, layer, method), layer.kernels(leaves[layer.path]))
        found[layer.path] = values if isinstance(layer.spec, Stacked) else values[0]
    return found


def bounds(params: Any, layers: Sequence[Layer] | None = None, *, method: str = "four") -> dict[str, Array]:
    """A sound upper bound of every layer's norm, by path: never below it, rounding included.

    Args:
      params: any pytree.
      layers: from `find`; all that it finds without.
      method: of `fantastic4.bound`; a matrix has its own.

    Returns:
      A scalar each, or ``(layers,)`` for a `Stacked` kernel; differentiable, and for use under jit too.

    Raises:
      ValueError: what `find` refuses, layers of another tree, or an unknown method.
    """
    method = choice(*METHODS)("method", method)
    layers = find(params) if layers is None else layers
    return _bounds(leaves_at(params, layers), layers, method)


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
      left_out: paths and shapes of leaves with two or more axes that are no kernels by their names, such as embeddings
        and the weights of recurrent cells: nothing here says what they do.
    """

    rows: tuple[Row, ...]
    method: str
    left_out: tuple[tuple[str, tuple[int, ...]], ...] = ()

    @property
    def product(self) -> float:
        """Product of the bounds: for layers in sequence with 1-Lipschitz functions between, a Lipschitz bound."""
        return times_up(*(row.bound for row in self.rows))

    def __str__(self) -> str:
        table = [("layer", "shape", "norm at most")]
        table += [(row.name, "×".join(map(str, row.shape)), at_most(row.bound)) for row in self.rows]
        table += [("product", "", at_most(self.product))]
        lines = [columns(table, left=2)]
        if self.left_out:
            some = [f"{path} ({'×'.join(map(str, shape))})" for path, shape in self.left_out[:8]]
            more = f" and {len(self.left_out) - 8} more" if len(self.left_out) > 8 else ""
            lines.append(f"left out, no kernels by their names: {', '.join(some)}{more}")
        return "\n".join(lines)


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
      ValueError: what `find` refuses, an unknown method, or params that are traced.

    Example:
      >>> import jax.numpy as jnp
      >>> from fantastic4 import network
      >>> print(network.report({"conv": {"kernel": jnp.ones((3, 3, 1, 1))}}))
      layer        shape    norm at most
      conv/kernel  3×3×1×1         9.001
      product                      9.001
    """
    layers = find(params, select=select, specs=specs)
    leaves = leaves_at(params, layers)
    if any(isinstance(leaf, jax.core.Tracer) for leaf in leaves.values()):
        raise ValueError("report writes a table of numbers, outside of jit: inside, call fantastic4.network.bounds")
    with now():
        found = bounds(params, layers, method=method)
    rows = []
    for layer in layers:
        shape = jax.eval_shape(layer.kernels, leaves[layer.path]).shape[1 + layer.is_dense :]
        values = np.ravel(found[layer.path])
        rows += [Row(name, shape, float(value)) for name, value in zip(layer.names, values, strict=True)]
    return Report(tuple(rows), method, left_out(params, layers, select))
