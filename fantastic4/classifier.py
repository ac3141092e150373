"""A classifier is a function of a batch: what its logits must be, and how they are computed."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

Logits = Callable[[Array], Array]


def logits(fn: Logits, x: Array) -> Array:
    """``fn(x)``, unless they are no logits ``(batch, classes)``, or ``x`` is no batch."""
    if not hasattr(x, "dtype") or not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError("x must be a batch of examples, an array of a real floating dtype")
    found = jax.eval_shape(fn, x)
    shape = tuple(getattr(found, "shape", ()))
    if len(shape) != 2 or shape[0] != x.shape[0] or shape[1] < 2:
        raise ValueError(
            f"fn must return logits (batch, classes) with at least 2 classes for x of shape {x.shape}, got {shape}"
        )
    if not jnp.issubdtype(found.dtype, jnp.floating):
        raise ValueError(f"fn must return logits of a real floating dtype, got {found.dtype}")
    return fn(x)


def precise(fn: Logits) -> Logits:
    """The function in full precision, under a new identity: what an object computes may change between calls."""

    def logits(x: Array) -> Array:
        with jax.default_matmul_precision("highest"):
            return fn(x)

    return logits


def of_class(logits: Array, classes: Array) -> Array:
    """Of every example the logit of one class: ``(batch,)``."""
    return jnp.take_along_axis(logits, classes[:, None], axis=1)[:, 0]
