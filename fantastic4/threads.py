"""Threads of LAPACK, which jaxlib calls for one matrix of a batch after the other."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any


@functools.cache
def _controller() -> Any:
    """Of the libraries that are loaded now; None without `threadpoolctl`, an extra."""
    try:
        import threadpoolctl
    except ImportError:
        return None
    import scipy.linalg  # noqa: F401  (its LAPACK is jaxlib's, which loads it when it first needs it)

    return threadpoolctl.ThreadpoolController()


@contextlib.contextmanager
def one_each() -> Iterator[None]:
    """One thread for each matrix within.

    Two are no faster up to some hundred rows; where other programs take the processors they wait for one another at
    every step, ten times as long as the work takes. Without `threadpoolctl` nothing is changed.
    """
    controller = _controller()
    with contextlib.nullcontext() if controller is None else controller.limit(limits=1, user_api="blas"):
        yield
