"""What a public function does before it is compiled: look at its arguments, so that errors name the fix."""

from __future__ import annotations

import functools
import inspect
import operator
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from fantastic4.devices import on_any_mesh
from fantastic4.linalg import check_dtype
from fantastic4.promotion import usual_promotion
from fantastic4.threads import one_for_each_matrix

P = ParamSpec("P")
R = TypeVar("R")


def count(least: int) -> Callable[[str, Any], int]:
    """A converter for `entry`: an int that is at least ``least``."""

    def convert(name: str, value: Any) -> int:
        try:
            number = operator.index(value)
        except TypeError:
            traced = isinstance(value, jax.core.Tracer)
            fix = f": it cannot be traced; optax.inject_hyperparams keeps it out with static_args={name!r}"
            raise ValueError(f"{name} must be an int, got {value!r}{fix if traced else ''}") from None
        if number < least:
            raise ValueError(f"{name} must be at least {least}, got {number}")
        return number

    return convert


def optional(convert: Callable[[str, Any], Any]) -> Callable[[str, Any], Any]:
    """A converter for `entry`: None, or what ``convert`` takes."""
    return lambda name, value: None if value is None else convert(name, value)


def choice(*options: str) -> Callable[[str, Any], str]:
    """A converter for `entry`: one of these words."""

    def convert(name: str, value: Any) -> str:
        if not isinstance(value, str) or value not in options:
            raise ValueError(f"unknown {name} {value!r}: choose one of {', '.join(options)}")
        return value

    return convert


def flag(name: str, value: Any) -> bool:
    """A converter for `entry`: True or False."""
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be True or False, got {value!r}")
    return value


def sizes(name: str, value: Any) -> tuple[int, ...]:
    """A converter for `entry`: one int a spatial axis; a single int is one axis."""
    try:
        value = value.tolist() if isinstance(value, np.ndarray) else value
        entries = value if isinstance(value, tuple | list) else (value,)
        if any(isinstance(n, bool) for n in entries):
            raise TypeError
        return tuple(operator.index(n) for n in entries)
    except TypeError:
        raise ValueError(
            f"{name} must be a tuple of ints, got {value!r}: the spatial size, without batch and channels"
        ) from None


def mesh(name: str, value: Any) -> Mesh | None:
    """A converter for `entry`: None, or a mesh of devices."""
    if value is not None and not isinstance(value, Mesh):
        raise ValueError(f"{name} must be a jax.sharding.Mesh, as jax.make_mesh returns it, got {type(value).__name__}")
    return value


def number(name: str, value: Any) -> Any:
    """A converter for `entry`: a scalar, which may be traced or a plain Python number; it stays dynamic."""
    if isinstance(value, bool) or not (isinstance(value, int | float) or getattr(value, "shape", None) == ()):
        fix = ": for a schedule, optax.inject_hyperparams takes one" if callable(value) else ""
        raise ValueError(f"{name} must be a number or a scalar array, got {value!r}{fix}")
    return value


def positive(name: str, value: Any) -> Any:
    """A converter for `entry`: a `number` above 0, as far as it is known."""
    # By NumPy: what JAX computes while it traces something else is not known, even of a number that is.
    if not isinstance(number(name, value), jax.core.Tracer) and not np.asarray(value) > 0:
        raise ValueError(f"{name} must be a positive number, got {value!r}")
    return value


def not_negative(name: str, value: Any) -> Any:
    """An array, or a number, without an entry that is known to be negative."""
    if not isinstance(value, jax.core.Tracer) and (np.asarray(value) < 0).any():
        raise ValueError(f"{name} must not be negative")
    return value


def key(value: Any) -> None:
    """Refuse what is no key of ``jax.random``."""
    # Not whatever has a dtype: an nnx.Rngs has every attribute.
    dtype = value.dtype if isinstance(value, jax.Array | np.ndarray) else type(value).__name__
    if isinstance(dtype, str) or not (jnp.issubdtype(dtype, jax.dtypes.prng_key) or dtype == jnp.uint32):
        raise ValueError(f"key must be a key, as jax.random.key makes it, got {dtype}")


def _arrays(name: str, value: Any) -> None:
    """Refuse a tree with leaves that JAX cannot take."""
    for leaf in jax.tree.leaves(value):
        if not hasattr(leaf, "dtype") or not hasattr(leaf, "shape"):  # a Flax layer has a dtype too
            known = {
                "spec": "a ConvSpec (of a layer, ConvSpec.from_layer(layer))",
                "state": "what init, or the step before, returned",
            }
            wanted = known.get(name, "an array (or a tree of arrays): jnp.asarray makes one")
            kind = type(leaf).__name__
            came = kind if leaf is value else f"a {type(value).__name__} with {kind}"
            raise ValueError(f"{name} must be {wanted}, got {came}")
        check_dtype(name, leaf)


def entry(
    *, compiled: bool = True, lapack: bool = False, **static: Callable[[str, Any], Any]
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Compile a public function with ``jax.jit`` and check what it is given, in words, before JAX does.

    With ``compiled=False`` it is only checked: for a function that is made of several compiled ones. With ``lapack`` it
    decomposes a batch of matrices that its first argument, a kernel, makes.

    Every keyword names a static argument, or a dynamic `number` or `positive` one, and the converter that checks it.
    All other arguments must be arrays, trees of arrays, or static objects such as a `ConvSpec`.

    Returns:
      A decorator. The function raises ValueError for an argument that JAX cannot take.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        signature = inspect.signature(function)
        names = tuple(n for n, c in static.items() if c not in (number, positive))
        call = usual_promotion(on_any_mesh(jax.jit(function, static_argnames=names) if compiled else function))

        call = one_for_each_matrix(call) if lapack else call

        @functools.wraps(function)
        def checked(*args: P.args, **kwargs: P.kwargs) -> R:
            try:
                given = signature.bind(*args, **kwargs)
            except TypeError as error:
                raise TypeError(f"{function.__name__}: {error}") from None
            for name, value in given.arguments.items():
                if name in static:
                    given.arguments[name] = static[name](name, value)
                    continue
                try:
                    key(value) if name == "key" else _arrays(name, value)
                except ValueError as error:
                    raise ValueError(f"{error} in {function.__name__}") from None
            return call(*given.args, **given.kwargs)

        return checked

    return decorate


def same_kind(name: str, value: Any, kind: type, source: str) -> None:
    """Refuse a state of another kind: ``source`` is the call that makes the right one."""
    if not isinstance(value, kind):
        raise ValueError(f"{name} must be a {kind.__name__} from {source}, got {type(value).__name__}")
