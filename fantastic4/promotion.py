"""JAX's usual rules of promotion inside the library, whatever the user's own code is held to."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import jax

P = ParamSpec("P")
R = TypeVar("R")


def usual_promotion(function: Callable[P, R]) -> Callable[P, R]:
    """``function``, traced as if ``jax_numpy_rank_promotion`` and ``jax_numpy_dtype_promotion`` were not set.

    ``"raise"`` and ``"strict"`` find mistakes in the code that is being written, not in a library that it calls.
    """

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
            return function(*args, **kwargs)

    return call
