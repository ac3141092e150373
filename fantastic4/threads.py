"""Threads of LAPACK, which jaxlib calls for one matrix of a batch after the other."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator
from typing import Any, ParamSpec, TypeVar

import jax
import numpy as np

P = ParamSpec("P")
R = TypeVar("R")


class _Limit:
    """One thread for each call while anyone is inside: the number is the whole process's, and callers may overlap."""

    def __init__(self, controller: Any):
        self.controller, self.limiter = controller, None
        self.lock, self.inside = threading.Lock(), 0

    def __enter__(self) -> None:
        with self.lock:
            if not self.inside:
                self.limiter = self.controller.limit(limits=1, user_api="blas")
            self.inside += 1

    def __exit__(self, *error: object) -> None:
        with self.lock:
            self.inside -= 1
            if not self.inside and self.limiter is not None:
                self.limiter.restore_original_limits()


@functools.cache
def _limit() -> contextlib.AbstractContextManager[None]:
    """Of the libraries that are loaded now; none without `threadpoolctl`, an extra."""
    try:
        import threadpoolctl
    except ImportError:
        return contextlib.nullcontext()
    import scipy.linalg  # noqa: F401  (its LAPACK is jaxlib's, which loads it when it first needs it)

    return _Limit(threadpoolctl.ThreadpoolController())


SMALL = 512
"""Rows of a matrix up to which one thread is as fast as several."""


@contextlib.contextmanager
def one_each() -> Iterator[None]:
    """One thread for each matrix within.

    Two are no faster up to some hundred rows; where other programs take the processors they wait for one another at
    every step, ten times as long as the work takes. Without `threadpoolctl` nothing is changed.
    """
    with _limit():
        yield


def one_for_each_matrix(function: Callable[P, R]) -> Callable[P, R]:
    """`one_each` around a function of a kernel, where it is called on numbers on a CPU: inside jit nothing changes."""

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        kernel: Any = args[0]
        traced = any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves((args, kwargs)))
        if traced or jax.default_backend() != "cpu" or min(np.shape(kernel)[-2:], default=0) > SMALL:
            return function(*args, **kwargs)
        with one_each():
            return jax.block_until_ready(function(*args, **kwargs))

    return call
