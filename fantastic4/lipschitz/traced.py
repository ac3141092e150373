"""A function, traced and walked through."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from fantastic4.expression import X
from fantastic4.lipschitz.entered import where_all
from fantastic4.lipschitz.fixed import Input
from fantastic4.lipschitz.graph import Label, Node, Signal, UnboundedError
from fantastic4.lipschitz.operands import Comparison, Refused
from fantastic4.lipschitz.ranges import held
from fantastic4.lipschitz.trace import Walk


@dataclasses.dataclass(frozen=True)
class Traced:
    """A traced function.

    Attributes:
      outputs: its outputs that depend on the input, as signals.
      dtype: of the constants: float64 if a floating input is, float32 else.
      asked: truth values that are not known while tracing, without which nothing is: scalars.
    """

    outputs: tuple[Signal, ...]
    dtype: Any
    asked: tuple[Array, ...] = ()

    def sure(self, value: Array) -> Array:
        """A bound, or NaN where what it rests on does not hold."""
        return where_all(self.asked, value)


def trace(fn: Callable[..., Any], x: Any) -> Traced:
    """Trace a function and walk through it.

    Raises:
      UnboundedError: an output depends on an operation without a known constant.
      ValueError: the input is not made of real floating arrays.
    """
    leaves, tree = jax.tree.flatten(x)
    for leaf in leaves:
        if not hasattr(leaf, "dtype") or not jnp.issubdtype(leaf.dtype, jnp.floating):
            kind = getattr(leaf, "dtype", type(leaf).__name__)
            raise ValueError(f"x must be an array of a real floating dtype, or a tree of such, got {kind}")
        if jnp.finfo(leaf.dtype).bits < 16:
            raise ValueError(f"x must be of 16 bits a number or more, got {leaf.dtype}: give float32, and cast inside")
    if not leaves:
        raise ValueError("x has no arrays")
    abstract = [jax.ShapeDtypeStruct(leaf.shape, jax.dtypes.canonicalize_dtype(leaf.dtype)) for leaf in leaves]
    try:
        closed = jax.make_jaxpr(lambda *flat: fn(jax.tree.unflatten(tree, flat)))(*abstract)
    except Exception as error:
        # Both of Flax, which need not be there.
        if type(error).__name__ != "TraceContextError" and "different trace level" not in str(error):
            raise
        raise ValueError(
            "an NNX module of this function changes its state when it is called, or runs nnx.scan or nnx.remat, which "
            "a trace does not let it: bound lambda x: nnx.clone(model)(x), of a trained one after model.eval()"
        ) from error
    # One node for all leaves: their distances count together.
    sizes = [math.prod(leaf.shape) for leaf in leaves]
    node: Node = Input(Label("input"), (sum(sizes),), ())
    arguments = []
    for leaf, start in zip(leaves, np.cumsum([0, *sizes[:-1]]), strict=True):
        places = None
        if len(leaves) > 1:
            places = np.arange(start, start + math.prod(leaf.shape)).reshape(leaf.shape)
        arguments.append(Signal(node, leaf.shape, places, X, node.label))
    walk = Walk()
    outputs = walk.closed(closed, arguments)
    if walk.written:
        why = "writes to a mutable array, and what that holds is not followed: return what is to be bounded"
        raise UnboundedError(f"{walk.written} {why}")
    for output in outputs:
        if isinstance(output, Refused):
            raise UnboundedError(output.reason)
        if isinstance(output, Comparison):
            raise UnboundedError(f"{output.of.label} leads to a truth value, which jumps: no Lipschitz constant")
    kinds = [jax.dtypes.canonicalize_dtype(leaf.dtype) for leaf in leaves]
    dtype = functools.reduce(jnp.promote_types, kinds, jnp.dtype("float32"))
    signals = held(walk, [o for o in outputs if isinstance(o, Signal)])
    return Traced(tuple(signals), dtype, tuple(walk.entered.asked))
