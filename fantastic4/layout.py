"""Kernels of other libraries, in the layout that Flax keeps."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from fantastic4.entry import count


def from_torch(weight: ArrayLike, *, transposed: bool = False, groups: int = 1) -> Array:
    """A PyTorch convolution weight in Flax's layout.

    Args:
      weight: ``(c_out, c_in // groups, *spatial)`` of ``Conv1d`` to ``Conv3d``; with ``transposed`` the
        ``(c_in, c_out // groups, *spatial)`` of ``ConvTranspose1d`` to ``3d``, which PyTorch keeps flipped.
        A tensor must be on the CPU and detached; JAX arrays may be traced.
      transposed: the weight of a transposed convolution, for ``ConvSpec(transposed=True)``.
      groups: of a transposed convolution, its groups; a weight that is not transposed has them in its shape.

    Returns:
      ``(*spatial, c_in // groups, c_out)``.

    Raises:
      ValueError: not real floats, not 3 to 5 axes, or groups that do not divide the first.

    Example:
      >>> import numpy as np
      >>> import fantastic4 as f4
      >>> f4.from_torch(np.zeros((64, 3, 7, 5), np.float32)).shape
      (7, 5, 3, 64)
    """
    weight = weight if isinstance(weight, jax.Array) else np.asarray(weight)
    if weight.dtype == object or not jnp.issubdtype(weight.dtype, jnp.floating):
        raise ValueError(f"weight must be an array of real floats, got dtype {weight.dtype}: a CPU tensor, detached")
    array = jnp.asarray(weight)
    if not 3 <= array.ndim <= 5:
        raise ValueError(f"a PyTorch convolution weight has 3 to 5 axes, (c_out, c_in, *spatial), got {array.shape}")
    spatial = tuple(range(2, array.ndim))
    if not transposed:
        return jnp.transpose(array, (*spatial, 1, 0))
    groups = count(1)("groups", groups)
    if array.shape[0] % groups:
        raise ValueError(f"groups {groups} must divide the first axis of a transposed weight {array.shape}")
    array = jnp.flip(array, spatial).reshape(groups, array.shape[0] // groups, *array.shape[1:])
    array = jnp.moveaxis(array, 0, -1)  # (c_in / groups, c_out / groups, *spatial, groups)
    array = jnp.transpose(array, (*(a for a in spatial), 0, array.ndim - 1, 1))
    return array.reshape(*array.shape[:-2], -1)
