"""Many devices: a function of many frequencies, each device its share of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh, PartitionSpec


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
    # What varies over the mesh is seen by in_specs; the loops inside start from constants, which the check refuses.
    return jax.jit(jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=part, check_vma=False))


def size(mesh: Mesh | None) -> int:
    """How many devices."""
    return 1 if mesh is None else mesh.size
