"""Numbers at once, whatever is being traced."""

from __future__ import annotations

import contextlib

import jax
import jax.numpy as jnp


def now() -> contextlib.AbstractContextManager[None]:
    """What is computed of numbers within is numbers at once, under ``jit`` too.

    Outside of a trace it is so without: there `jax.ensure_compile_time_eval` would only make every operation on
    constants in a jitted function a program of its own, each to compile.
    """
    traced = isinstance(jnp.zeros(()), jax.core.Tracer)
    return jax.ensure_compile_time_eval() if traced else contextlib.nullcontext()
