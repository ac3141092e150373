"""States that Flax's msgpack can keep: ``flax.serialization`` knows dicts and named tuples, not JAX's dataclasses."""

from __future__ import annotations

import sys
from typing import Any, TypeVar

import jax

T = TypeVar("T")

_STATES: list[type] = []


def state(kind: type[T]) -> type[T]:
    """A class decorator, for a pytree: `register` tells Flax about it."""
    _STATES.append(kind)
    return kind


def register() -> None:
    """Tell Flax about the states, where it has been loaded; this package does not load it."""
    serialization = sys.modules.get("flax.serialization")
    if serialization is not None:
        for kind in _STATES:
            serialization.register_serialization_state(kind, _to_dict, _from_dict, override=True)


def _to_dict(value: Any) -> dict[str, Any]:
    return {str(i): leaf for i, leaf in enumerate(jax.tree.leaves(value))}


def _from_dict(value: Any, kept: dict[str, Any]) -> Any:
    leaves, tree = jax.tree.flatten(value)
    if len(kept) != len(leaves):
        raise ValueError(f"{type(value).__name__} has {len(leaves)} arrays, what was kept has {len(kept)}")
    return jax.tree.unflatten(tree, [kept[str(i)] for i in range(len(leaves))])
