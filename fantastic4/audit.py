"""The layers of a params tree, each a task of its own: its norm between two floats. A long run can be gone on with."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from fantastic4.conv import ConvSpec
from fantastic4.entry import sizes
from fantastic4.interval import Interval, norm_interval
from fantastic4.kernels import Layer, idle, leaves_at, meant, some


@dataclasses.dataclass(frozen=True)
class Task:
    """A layer whose norm is wanted.

    Attributes:
      name: its path.
      kernel: in Flax's order, in the dtype in which it is kept; of a matrix, with one tap.
      spec: its `ConvSpec`.
      is_dense: whether it is a matrix.
      input_shape: the spatial size of its input; None is every size.
      rtol: wanted upper / lower - 1.
    """

    name: str
    kernel: np.ndarray
    spec: ConvSpec
    is_dense: bool
    input_shape: tuple[int, ...] | None
    rtol: float

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the kernel; of a matrix ``(inputs, outputs)``."""
        return self.kernel.shape[self.is_dense :]

    @property
    def fingerprint(self) -> str:
        """The same for the same numbers and the same question."""
        asked = repr((self.kernel.shape, str(self.kernel.dtype), self.spec, self.input_shape, self.rtol))
        return hashlib.sha256(asked.encode() + np.ascontiguousarray(self.kernel).tobytes()).hexdigest()

    def run(self) -> Interval:
        """The norm between two floats, both sound.

        Raises:
          ValueError: what `fantastic4.norm_interval` refuses, with the layer's name.
        """
        try:
            found = norm_interval(self.kernel, self.spec, self.rtol, input_shape=self.input_shape)
        except ValueError as error:
            raise ValueError(f"{self.name}: {error}") from error
        if found.upper == 0 and self.input_shape is not None and np.any(self.kernel):
            raise ValueError(
                f"{self.name}: nothing comes out of it for an input of {self.input_shape}: its input_shape?"
            )
        return found


def tasks(
    params: Any,
    layers: Sequence[Layer],
    *,
    input_shapes: Mapping[str, tuple[int, ...]] | None = None,
    rtol: float = 1e-3,
) -> list[Task]:
    """A task for each of the layers of a params tree.

    Args:
      params: any pytree of arrays.
      layers: from `fantastic4.network.find`.
      input_shapes: for paths or globs, the spatial size of the layer's input: the norm is that of the layer there.
      rtol: see `fantastic4.norm_interval`.

    Returns:
      The tasks, in the order of the layers.

    Raises:
      ValueError: layers of another tree, or an input shape for a path that does not exist.

    Example:
      >>> import numpy as np
      >>> from fantastic4 import audit, network
      >>> params = {"conv": {"kernel": np.ones((3, 3, 1, 1))}}
      >>> [task] = audit.tasks(params, network.find(params))
      >>> print(task.name, round(task.run().upper, 6))
      conv/kernel 9.0
    """
    shapes = {glob: sizes(f"the input shape of {glob!r}", shape) for glob, shape in (input_shapes or {}).items()}
    names = [layer.path for layer in layers if not layer.is_dense]
    wrong = idle(shapes, names)
    if wrong is not None:
        raise ValueError(f"an input shape for {wrong!r}, but no such path: the convolutions are {some(names, wrong)}")
    leaves = leaves_at(params, layers)
    found = []
    for layer in layers:
        size = None if layer.is_dense else meant(shapes, layer.path)
        for name, kernel in zip(layer.names, _kernels(layer, leaves[layer.path]), strict=True):
            found.append(Task(name, kernel, layer.conv, layer.is_dense, size, rtol))
    return found


def _kernels(layer: Layer, leaf: Any) -> np.ndarray:
    with jax.enable_x64(True):  # or those of float64 were rounded
        return np.asarray(layer.kernels(leaf))
