"""Sums over windows, and what they are divided by: a matrix for every axis."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from fantastic4.lipschitz.fixed import Fixed
from fantastic4.lipschitz.graph import Label
from fantastic4.lipschitz.operands import is_known
from fantastic4.lipschitz.sparse import norm_above, sizes_of

Pairs = tuple[np.ndarray, np.ndarray]
"""Of every entry of a window on one axis the window and the entry."""


def window_pairs(p: dict[str, Any], shape: Sequence[int]) -> list[tuple[Pairs, int]]:
    """On every axis the pairs of windows and entries that meet, and the number of windows.

    Args:
      p: the params of a ``reduce_window`` primitive.
      shape: of what it reduces.
    """
    found = []
    for axis, n in enumerate(shape):
        size, stride = p["window_dimensions"][axis], p["window_strides"][axis]
        spread, base = p["window_dilation"][axis], p["base_dilation"][axis]
        low, high = p["padding"][axis]
        length = (n - 1) * base + 1 if n else 0
        count = (length + low + high - ((size - 1) * spread + 1)) // stride + 1
        taken = np.arange(count)[:, None] * stride + np.arange(size) * spread - low
        entry, odd = np.divmod(taken, base)
        real = (odd == 0) & (taken >= 0) & (entry < n)
        found.append(((np.nonzero(real)[0], entry[real].astype(int)), count))
    return found


@dataclasses.dataclass(eq=False)
class Pool(Fixed):
    """Sums over windows.

    Attributes:
      axes: the pairs of every axis.
    """

    axes: tuple[Pairs, ...] = ()

    def scaled(self, by: Any, label: Label) -> Fixed | None:
        """Times constants, as of averages that do not count the padding; None where they are not known.

        Constants b₁ ⊗ b₂ ⊗ … scale the matrix of each axis; of others the smallest such ones above them.
        """
        if not is_known(by):
            return None
        sizes = sizes_of(by, self.shape)
        if not np.all(np.isfinite(sizes)) or not np.any(sizes):
            return None
        top = np.unravel_index(np.argmax(sizes), sizes.shape)
        through = [np.moveaxis(sizes, a, -1)[tuple(np.delete(top, a))] for a in range(sizes.ndim)]
        lines = [line / sizes[top] for line in through]
        product = np.ones(())
        for line in lines:
            product = np.multiply.outer(product, line)
        factor = self.factor * float(sizes[top]) * (1 + 1e-14)
        if np.all(product[sizes > 0] > 1e-100):
            above = float(np.max(sizes / np.where(product > 0, product, 1)))
            norms = [norm_above(*pairs, line[pairs[0]]) for pairs, line in zip(self.axes, lines, strict=True)]
            factor = min(factor, above * math.prod(norms) * (1 + 1e-14 * (len(norms) + 2)))
        apply, times = self.apply, None
        if apply is not None and not np.any(np.asarray(by) < 0):
            times = lambda x: apply(x) * by.astype(x.dtype)  # noqa: E731
        return Fixed(label, self.shape, self.inputs, factor, linear=True, apply=times)
