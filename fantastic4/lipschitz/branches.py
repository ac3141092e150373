"""Linear branches of one node that are added up and put side by side again, as one matrix.

A rotation [c x - s y, s x + c y], a step of a wavelet, a moving average: branch by branch their constants add up; the
matrix has its norm. It falls apart into blocks of entries that meet, each of which is decomposed.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from fantastic4.expression import affine
from fantastic4.lipschitz.fixed import SILENT, Fixed, Scaled
from fantastic4.lipschitz.graph import Node, Signal
from fantastic4.lipschitz.nodes import Joint, Sum
from fantastic4.lipschitz.operands import is_known
from fantastic4.lipschitz.sparse import norm_above

_MOST = 2**18  # entries of a matrix
_SIDE = 256  # of a block
_ROUNDS = 64  # until entries that meet have found one another
_SMALL, _LARGE = 1e-100, 1e100  # sizes of entries: others may vanish, or overflow, on the way
_KEPT = 1e-30  # a smaller constant may be what stands for one that vanishes, and no longer cancel


@dataclasses.dataclass(frozen=True)
class Matrix:
    """A node as a matrix of another, up to a constant.

    Attributes:
      base: the other node.
      rows: for each entry of the matrix, which entry of the node it adds to, in order.
      columns: which entry of ``base`` it multiplies.
      values: the entries, one for each pair of row and column.
      sizes: sums of the absolute values of what they were added up from.
      lost: what rounding may have changed of an entry, relative to its ``sizes``.
      mixed: whether anything was added, or put side by side.
    """

    base: Node
    rows: np.ndarray
    columns: np.ndarray
    values: np.ndarray
    sizes: np.ndarray
    lost: float
    mixed: bool

    def norm(self) -> float | None:
        """An upper bound of its norm; None where its blocks are too large."""
        if not len(self.values):
            return 0.0
        blocks = _blocks(self.rows, self.columns)
        if blocks is None:
            return None
        block, row, column = blocks
        shape = int(block.max()) + 1, int(row.max()) + 1, int(column.max()) + 1
        if max(shape[1:]) > _SIDE or math.prod(shape) > 2**22:
            return None
        dense = np.zeros(shape)
        dense[block, row, column] = self.values
        largest = float(np.linalg.svd(dense, compute_uv=False)[:, 0].max())
        rounding = self.lost * norm_above(self.rows, self.columns, self.sizes)
        return largest * (1 + 1e-12) + rounding + 1e-13 * float(np.linalg.norm(dense, axis=(1, 2)).max())


def _blocks(rows: np.ndarray, columns: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    """Of every entry its block, with row and column in it; None where what meets is too far apart to tell."""
    rows, columns = (np.unique(places, return_inverse=True)[1].ravel() for places in (rows, columns))
    label = np.arange(columns.max() + 1)
    for _ in range(_ROUNDS):
        of_row = np.full(rows.max() + 1, len(label))
        np.minimum.at(of_row, rows, label[columns])
        new = label.copy()
        np.minimum.at(new, columns, of_row[rows])
        if np.array_equal(new, label):
            break
        label = new
    else:
        return None
    block = np.unique(label[columns], return_inverse=True)[1].ravel()
    return block, _counted(rows, block), _counted(columns, block)


def _counted(places: np.ndarray, block: np.ndarray) -> np.ndarray:
    """Places, counted from 0 in each block; a place is in one block."""
    which, first = np.unique(places, return_index=True)
    order = np.argsort(block[first], kind="stable")
    sizes = np.bincount(block[first])
    within = np.empty(len(which), np.int64)
    within[order] = np.arange(len(which)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    return within[np.searchsorted(which, places)]


def _checked(matrix: Matrix) -> Matrix | None:
    sizes = matrix.sizes
    fits = len(sizes) <= _MOST and np.all((sizes == 0) | ((sizes > _SMALL) & (sizes < _LARGE)))
    return matrix if fits else None


def _read(signal: Signal, known: dict[int, Matrix]) -> Matrix | None:
    """A signal as a matrix: of what its node is one of, or of its node."""
    straight = affine(signal.expr)
    if straight is None or abs(straight[0]) > _LARGE or math.prod(signal.shape) > _MOST:
        return None
    places = signal.places.ravel()
    rows, factor = np.flatnonzero(places >= 0), float(straight[0])
    columns, inner = places[rows], known.get(id(signal.node))
    if inner is None:
        values = np.full(len(rows), factor)
        return _checked(Matrix(signal.node, rows, columns, values, np.abs(values), 2.0**-52, False))
    start, end = (np.searchsorted(inner.rows, columns, side) for side in ("left", "right"))
    count = end - start
    if count.sum() > _MOST:
        return None
    at = np.repeat(start - np.cumsum(count) + count, count) + np.arange(count.sum())
    values, sizes = inner.values[at] * factor, inner.sizes[at] * abs(factor)
    lost = inner.lost + 2.0**-51
    return _checked(Matrix(inner.base, np.repeat(rows, count), inner.columns[at], values, sizes, lost, inner.mixed))


def _added(parts: list[Matrix], size: int) -> Matrix | None:
    """The sum of matrices of one node."""
    rows, columns, values, sizes = (
        np.concatenate([getattr(part, name) for part in parts]) for name in ("rows", "columns", "values", "sizes")
    )
    width = 1 + int(columns.max(initial=0))
    if size * width >= 2**62:
        return None
    key, place = np.unique(rows * width + columns, return_inverse=True)
    values, sizes = (np.bincount(place.ravel(), x, minlength=len(key)) for x in (values, sizes))
    lost = max(part.lost for part in parts) + len(parts) * 2.0**-51
    return _checked(Matrix(parts[0].base, key // width, key % width, values, sizes, lost, True))


def _matrix(node: Node, known: dict[int, Matrix]) -> Matrix | None:
    """A node as a matrix of another, where it is a linear branch or made of such."""
    silent = isinstance(node, Fixed) and node.linear and node.label.operation == SILENT and node.factor == 1
    if not isinstance(node, Sum | Joint | Scaled) and not silent:
        return None
    size = math.prod(node.shape)
    bases = {id(known[id(s.node)].base if id(s.node) in known else s.node) for s in node.inputs}
    if len(bases) != 1 or size > _MOST:
        return None
    parts = [_read(signal, known) for signal in node.inputs]
    read = [part for part in parts if part is not None]
    if len(read) < len(parts):
        return None
    if isinstance(node, Sum):
        second = dataclasses.replace(read[1], values=node.sign * read[1].values)
        return _added([read[0], second], size)
    if isinstance(node, Joint):
        if not node.linear or len(node.where) != len(read):
            return None
        filled = [
            dataclasses.replace(part, rows=where.ravel()[part.rows])
            for part, where in zip(read, node.where, strict=True)
        ]
        return _added(filled, size)
    (part,) = read
    if isinstance(node, Scaled):
        if not is_known(node.by):
            return None
        by = np.asarray(node.by)
        if not np.all(np.isfinite(by) & ((by == 0) | (np.abs(by) > _KEPT))):
            return None
        factors = np.broadcast_to(by.astype(np.float64), node.shape).ravel()[part.rows]
        lost = part.lost + 8 * float(np.finfo(by.dtype).eps)  # of a reciprocal
        values, sizes = part.values * factors, part.sizes * np.abs(factors)
        return _checked(dataclasses.replace(part, values=values, sizes=sizes, lost=lost))
    return part


def combined(nodes: Sequence[Node], outputs: Sequence[Signal]) -> dict[int, tuple[Node, float]]:
    """For nodes that are matrices of others, by their identity: these others, and bounds of the norms.

    Only for nodes that something else reads than further such matrices.
    """
    known: dict[int, Matrix] = {}
    for node in nodes:
        matrix = _matrix(node, known)
        if matrix is not None:
            known[id(node)] = matrix
    asked = {id(signal.node) for node in nodes if id(node) not in known for signal in node.inputs}
    asked |= {id(signal.node) for signal in outputs}
    found = {}
    for one in asked & {key for key, matrix in known.items() if matrix.mixed}:
        norm = known[one].norm()
        if norm is not None:
            found[one] = known[one].base, norm
    return found
