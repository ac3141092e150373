"""How far a whole network can move its output, by tracing the function that the user already has.

`bound` traces a function of the input once, walks through its operations with a rule for each, and returns a number L
with ‖f(x) - f(y)‖₂ ≤ L ‖x - y‖₂ for all x and y, and the path that made it. See docs/lipschitz.md.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from fantastic4.bounds import METHODS
from fantastic4.entry import choice
from fantastic4.lipschitz import calls, choices, linear, moves, scalars, scatter, spectral, windows  # noqa: F401 (they fill the table)
from fantastic4.lipschitz.graph import Label, Node, Signal, UnboundedError, reachable, whole
from fantastic4.lipschitz.hessian import hessians
from fantastic4.lipschitz.losses import same_margins
from fantastic4.lipschitz.nodes import Joint, Linear
from fantastic4.lipschitz.numbers import ByName, slope
from fantastic4.lipschitz.order import Step, first_order, second_order
from fantastic4.lipschitz.register import register_rule
from fantastic4.lipschitz.traced import Traced, trace
from fantastic4.lipschitz.training import LipschitzState, init, step
from fantastic4.promotion import usual_promotion
from fantastic4.rounding import round_up
from fantastic4.tables import at_most, columns

__all__ = [
    "Bound", "Curvature", "LipschitzState", "Method", "Row", "UnboundedError", "bound",
    "curvature", "init", "margin_curvatures", "margins", "register_rule", "step",
]  # fmt: skip

Method = str | Mapping[str, str]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Row:
    """An operation on the path of a `Bound`.

    Attributes:
      factor: its own constant; of a sum of branches, what it makes of the largest of them.
      total: the constant from the input up to here.
      label: operation, modules and line of code, static.
      shape: of its result, static.
    """

    factor: Array
    total: Array
    label: Label = dataclasses.field(metadata={"static": True})
    shape: tuple[int, ...] = dataclasses.field(metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Bound:
    """A Lipschitz bound with the path that made it: a pytree; ``print`` it outside of jit.

    Attributes:
      value: the bound, a scalar.
      rows: a `Row` an operation that changes it, or could.
    """

    value: Array
    rows: tuple[Row, ...]

    def __str__(self) -> str:
        table = [("operation", "name", "shape", "factor", "total")]
        for row in self.rows:
            shape = "×".join(map(str, row.shape)) or "scalar"
            name = row.label.name or row.label.source
            table.append((row.label.operation, name, shape, at_most(float(row.factor)), at_most(float(row.total))))
        table.append(("Lipschitz at most", "", "", "", at_most(float(self.value))))
        return columns(table, left=3)


def _numbers(traced: Traced, method: Method) -> ByName:
    """The user's ``method``, checked."""
    globs = method if isinstance(method, Mapping) else {"*": method}
    check = choice(*METHODS, "interval")
    for glob in globs:
        if not isinstance(glob, str):
            raise ValueError(f"method maps globs of layer names to methods, got the key {glob!r}")
    return ByName(traced.dtype, {glob: check("method", word) for glob, word in globs.items()})


def _first(outputs: Sequence[Signal], how: ByName) -> tuple[list[Node], list[Step], list[Array]]:
    """The nodes behind outputs in order, the steps, and the outputs' constants."""
    nodes = reachable(outputs)
    steps, totals = first_order(nodes, outputs, how)
    how.check()
    return nodes, steps, totals


@usual_promotion
def bound(fn: Callable[..., Any], x: Any, *, method: Method = "four") -> Bound:
    r"""A sound bound L of a function's Lipschitz constant: ‖f(x) - f(y)‖₂ ≤ L ‖x - y‖₂ for all x, y.

    The norms are over all entries, so for a function that treats a batch example by example, L is that of one example.
    Sound in real arithmetic on the constants as JAX computes them, with all rounding of the bound itself included; what
    the network's own evaluation rounds is not part of it.

    Composition multiplies, a sum of branches adds, concatenation takes the root of the sum of squares. Tighter than the
    product of layers: batch norm and scales are folded into the convolution or matrix before them, two matrices in a
    row become one, a function of one number (GELU, SiLU, x + tanh x, …) is recognised whatever operations it is written
    in and its steepest slope is proved, entries that are moved, padded or repeated count exactly.

    Args:
      fn: any JAX function of the input alone, with the params closed over: ``lambda x: model.apply(variables, x)``, an
        NNX module, an Equinox module.
      x: an example input, an array or a tree of them, or ``jax.ShapeDtypeStruct``; only shapes and dtypes matter.
      method: how convolutions are bounded: a method of `fantastic4.bound`, or ``"interval"`` for
        `fantastic4.norm_interval` (outside of jit); or a mapping from globs of layer names to these, a later one wins.

    Returns:
      `Bound`, in float32 (float64 for a float64 input). Differentiable by the params and made under ``jit`` like any
      other JAX function of them. NaN where a kernel or a scale is NaN, where a product of two matrices in a row
      overflows, and where a mask like ``isfinite`` rests on a constant that turns out not to be finite under ``jit``.

    Raises:
      UnboundedError: an operation without a Lipschitz constant on the whole space, or without one that is known; it
        names the operation, its line in the user's code, and what can be done.
      ValueError: an input that is not of real floating arrays, an unknown method, a glob that no layer fits.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from fantastic4 import lipschitz
      >>> kernel = jnp.diag(jnp.array([3.0, 2.0]))
      >>> print(round(float(lipschitz.bound(lambda x: jax.nn.sigmoid(x @ kernel), jnp.ones((1, 2))).value), 3))
      0.75
    """
    traced = trace(fn, x)
    how = _numbers(traced, method)
    outputs = traced.outputs
    if len(outputs) > 1:  # entries of one node count once
        size = sum(math.prod(o.shape) for o in outputs)
        outputs = (whole(Joint(Label("outputs"), (size,), outputs)),)
    _, steps, totals = _first(outputs, how)
    value = totals[0] if totals else jnp.zeros((), traced.dtype)
    return Bound(traced.sure(value), tuple(Row(s.factor, s.total, s.label, s.shape) for s in steps))


@usual_promotion
def margins(fn: Callable[..., Any], x: Any, *, method: Method = "four") -> Array:
    """Lipschitz bounds of all margins ``z_i - z_j`` of a classifier's logits: tighter than √2 times the whole one.

    Where the logits are ``h @ W + b``, the margin's is that of h times ‖w_i - w_j‖.

    Args:
      fn: as for `bound`, with logits ``(…, classes)``.
      x: as for `bound`.
      method: as for `bound`.

    Returns:
      ``(classes, classes)``, 0 on the diagonal; differentiable.

    Raises:
      ValueError: what `bound` raises, or a function whose output is not one array of logits.

    Example:
      >>> import jax.numpy as jnp
      >>> from fantastic4 import lipschitz
      >>> weights = jnp.array([[1.0, 0.0, 0.0], [0.0, 3.0, 0.0]])
      >>> print(lipschitz.margins(lambda x: x @ weights, jnp.ones((1, 2))).round(2)[0])
      [0.        3.1599998 1.       ]
    """
    traced = trace(fn, x)
    if len(traced.outputs) != 1 or not traced.outputs[0].shape:
        raise ValueError("margins are of one array of logits: let fn return (…, classes)")
    logits = same_margins(traced.outputs[0])
    how = _numbers(traced, method)
    _, _, (total,) = _first([logits], how)
    classes = logits.shape[-1]
    apart = ~jnp.eye(classes, dtype=bool)
    plain = jnp.where(apart, how.times(2**0.5 * (1 + 1e-15), total), 0)
    last = logits.node
    if not (isinstance(last, Linear) and last.is_last_matrix and logits.is_shifted and logits.shape == last.shape):
        return traced.sure(plain)
    below = how.times(how.root(last.inputs[0]), slope(last.inputs[0]), how.of(last.inputs[0].node))
    columns = last.kernel[0].T

    def from_one(column: Array) -> Array:
        squares = jnp.sum((columns - column) ** 2, axis=1)
        return jnp.where(squares == 0, 0, jnp.sqrt(jnp.where(squares == 0, 1, squares)))

    # Differences are right to one rounding; sums of squares as long as a column.
    distances = round_up(lax.map(from_one, columns), columns.shape[1] + 8)
    vanished = float(jnp.finfo(columns.dtype).tiny) ** 0.5 * columns.shape[1]  # squares below the smallest float
    exact = how.times(how.narrow(round_up(distances + last.lost * 2 + vanished, 4)), below)
    return traced.sure(jnp.where(apart, jnp.minimum(plain, exact), 0))


class Curvature(NamedTuple):
    """Where the eigenvalues of a Hessian lie: between ``-lower`` and ``upper``.

    Attributes:
      lower: m, not negative.
      upper: M, not negative.
    """

    lower: Array
    upper: Array

    @property
    def value(self) -> Array:
        """A bound of the Hessian's norm, the Lipschitz constant of the gradient."""
        return jnp.maximum(self.lower, self.upper)


def _smaller(found: Array, composed: Array) -> Array:
    """The smaller of two bounds, of which one may have met 0 · ∞ where the other is infinite."""
    return jnp.where(jnp.isnan(found) & (composed == jnp.inf), jnp.inf, jnp.minimum(found, composed))


@usual_promotion
def curvature(fn: Callable[..., Any], x: Any, *, method: Method = "four") -> Curvature:
    r"""Sound bounds of the eigenvalues of the Hessian of a function, for all inputs: -m ≤ ∇²f ≤ M.

    Two ways, the smaller of both: composition, C(f ∘ g) ≤ C(f) L(g)² + L(f) C(g), on the walk of `bound`; and the exact
    form of the Hessian of a graph of linear maps and elementwise functions with intervals for what multiplies each
    (`fantastic4.lipschitz.hessian`), never above the recursion of Singla & Feizi (2020).

    Args:
      fn: any JAX function of the input with one number as its output, as ``lambda x: z(x)[0, y] - z(x)[0, t]``. Of more
        outputs, the Lipschitz constant of the Jacobian in the operator norm is bounded, by composition alone.
      x: as for `bound`; a batch of one is tightest.
      method: as for `bound`.

    Returns:
      `Curvature`; differentiable by the params, under ``jit`` too.

    Raises:
      UnboundedError: what `bound` refuses, and functions without a bounded second derivative: ReLU, max pooling.
      ValueError: what `bound` raises.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from fantastic4 import lipschitz
      >>> found = lipschitz.curvature(lambda x: 2 * jnp.sum(jax.nn.softplus(3 * x)), jnp.ones(2))
      >>> print(round(float(found.lower), 3), round(float(found.upper), 3))  # ¼ · 2 · 9, and softplus is convex
      0.0 4.5
    """
    traced = trace(fn, x)
    how = _numbers(traced, method)
    nodes, _, _ = _first(traced.outputs, how)
    seconds = second_order(nodes, traced.outputs, how)
    zero = jnp.zeros((), traced.dtype)
    composed = traced.sure(how.root_sum_squares(seconds) if seconds else zero)
    found = None
    if len(traced.outputs) == 1 and math.prod(traced.outputs[0].shape) == 1:
        found = hessians(nodes, traced.outputs[0], jnp.ones((1, 1), traced.dtype), how)
    return Curvature(composed, composed) if found is None else Curvature(*_smaller(found[0], composed))


@usual_promotion
def margin_curvatures(fn: Callable[..., Any], x: Any, *, method: Method = "four") -> Array:
    """The lower bounds m_ij of the Hessians of all margins ``z_i - z_j`` of a classifier: ``∇²(z_i - z_j) ≥ -m_ij``.

    Their upper bounds are the transposed: M_ij = m_ji.

    Args:
      fn: as for `bound`, with logits ``(1, classes)`` or ``(classes,)``.
      x: one example, as a batch of one or alone.
      method: as for `bound`.

    Returns:
      ``(classes, classes)``, 0 on the diagonal; differentiable.

    Raises:
      ValueError: what `curvature` raises, or a function whose output is not one example's logits.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from fantastic4 import lipschitz
      >>> logits = lambda x: jax.nn.softplus(x) @ jnp.array([[1.0, 0.0], [0.0, 2.0]])
      >>> print(lipschitz.margin_curvatures(logits, jnp.ones((1, 2))).round(3))
      [[0.   0.5 ]
       [0.25 0.  ]]
    """
    traced = trace(fn, x)
    shape = traced.outputs[0].shape if len(traced.outputs) == 1 else ()
    if not shape or math.prod(shape) != shape[-1]:
        raise ValueError("margins are of one example: let fn return logits (1, classes), and give it a batch of one")
    logits = same_margins(traced.outputs[0])
    classes = logits.shape[-1]
    how = _numbers(traced, method)
    nodes, _, _ = _first([logits], how)
    (second,) = second_order(nodes, [logits], how)
    composed = traced.sure(how.times(2**0.5 * (1 + 1e-15), second))
    first, last = np.triu_indices(classes, 1)
    seeds = (jnp.eye(classes)[first] - jnp.eye(classes)[last]).astype(traced.dtype)
    found = hessians(nodes, logits, seeds, how)
    both = jnp.broadcast_to(composed, (len(seeds), 2)) if found is None else _smaller(found, composed)
    return jnp.zeros((classes, classes), traced.dtype).at[first, last].set(both[:, 0]).at[last, first].set(both[:, 1])
