"""A matrix with few entries, all of them known: what a graph network does over its edges."""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from fantastic4.lipschitz.fixed import Fixed, Scaled
from fantastic4.lipschitz.graph import Label, Signal, whole
from fantastic4.lipschitz.nodes import settled
from fantastic4.lipschitz.operands import is_known

_WORK = 2e7  # entries times iterations
_SMALLEST = 1e-30  # of the entries beside the largest: smaller ones count as this
_TINY = float(np.finfo(np.float64).tiny)
_APART = 1e-100  # how far the entries of a vector may be from one another


@dataclasses.dataclass(eq=False)
class Sparse(Fixed):
    """A matrix applied to all entries of a node, plus any constant, with either sign.

    Attributes:
      rows: for each entry of the matrix, which entry of this node it adds to. Several may lie in one place.
      columns: which entry of the node before it is multiplied.
      values: their absolute values, in float64, not below them.
    """

    rows: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0, np.int64))
    columns: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0, np.int64))
    values: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0))

    def scaled(self, by: object, label: Label) -> Sparse | None:
        """Its results times constants, of a shape that broadcasts to it; None where they are not known."""
        if not is_known(by):
            return None
        sizes = sizes_of(by, self.shape).ravel()[self.rows]
        values = self.values * sizes
        values[(values < _TINY) & (self.values > 0) & (sizes > 0)] = _TINY  # a product that vanishes is no 0
        return matrix(label, self.shape, self.inputs[0], self.rows, self.columns, values)


def matrix(
    label: Label, shape: tuple[int, ...], signal: Signal, rows: np.ndarray, columns: np.ndarray, values: np.ndarray
) -> Sparse:
    """The node of a matrix that is applied to a signal, with its norm."""
    factor = norm_above(rows, columns, values)
    return Sparse(label, shape, (signal,), factor, linear=True, rows=rows, columns=columns, values=values)


def added_up(label: Label, shape: tuple[int, ...], signal: Signal, places: np.ndarray) -> Sparse:
    """Entries of a signal added into places of ``shape``; negative ones are left out.

    Where the signal is another's times known constants, both are one matrix: that of a graph with the usual weights has
    the norm 1, and the graph's own norm times the largest weight is more.
    """
    read = settled(signal)
    columns, values = read.places.ravel(), np.ones(read.places.size)
    if isinstance(read.node, Scaled) and is_known(read.node.by):
        scaled = read.node
        before = settled(scaled.inputs[0])
        inside = columns >= 0
        at = np.where(inside, columns, 0)
        values = sizes_of(scaled.by, scaled.shape).ravel()[at]
        columns = np.where(inside, before.places.ravel()[at], -1)
        read = before
    kept = (columns >= 0) & (places.ravel() >= 0)
    return matrix(label, shape, whole(read.node), places.ravel()[kept], columns[kept], values[kept])


def sizes_of(by: object, shape: tuple[int, ...]) -> np.ndarray:
    """Absolute values of constants, each up by what a quotient has lost."""
    constants = np.asarray(by)
    up = 1 + 4 * float(np.finfo(constants.dtype).eps)
    return np.broadcast_to(np.abs(constants.astype(np.float64)) * up, shape)


def norm_above(rows: np.ndarray, columns: np.ndarray, values: np.ndarray) -> float:
    """An upper bound of the norm of a matrix with these entries, from their absolute values.

    For A ≥ 0 and any v > 0, ‖A‖² = ρ(AᵀA) ≤ max_j (AᵀA v)_j / v_j (Collatz 1942), the product of the largest row and
    column sums where v is constant (Schur), and the norm itself in the limit of power iteration.

    Args:
      rows: of the entries.
      columns: likewise.
      values: at least their absolute values, float64. Those in one place add up.

    Returns:
      The bound, NaN where an entry is.
    """
    largest = float(values.max(initial=0.0))
    if largest == 0 or not math.isfinite(largest):
        return largest
    there = values > 0
    rows, columns = (np.unique(places[there], return_inverse=True)[1].ravel() for places in (rows, columns))
    entries = np.maximum(values[there] / largest, _SMALLEST)
    terms = int(np.bincount(rows).max()) + int(np.bincount(columns).max())
    v = np.ones(int(columns.max()) + 1)
    best = math.inf
    for _ in range(max(1, min(50, int(_WORK / len(entries))))):
        image = np.bincount(columns, entries * np.bincount(rows, entries * v[columns])[rows])
        best = min(best, float((image / v).max()))
        v = image / image.max()
        if v.min() < _APART:
            break
    return largest * math.sqrt(best) * (1 + (terms + 16) * 2.0**-52)
