"""What the wrappers of linen and NNX share: a layer's state, its estimate, the kernel that it then uses."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax import Array, lax

from fantastic4 import ladder
from fantastic4.conv import ConvSpec, as_flax_computes
from fantastic4.entry import choice, count, optional, positive
from fantastic4.frequency import GridState
from fantastic4.power import PowerState

MODES = ("penalty", "soft", "hard")


@dataclasses.dataclass(frozen=True)
class Wrapping:
    """What a wrapper does with its layer, static.

    Attributes:
      spec: of the layer; a matrix counts as a convolution with one tap.
      mode: ``"penalty"``, ``"soft"`` or ``"hard"``.
      maximum: what ``"soft"`` and ``"hard"`` normalise to.
      method: of `fantastic4.ladder`.
      points: of its ``"grid"``.
      iterations: of one call.
      warmup: iterations at the start.
    """

    spec: ConvSpec
    mode: str
    maximum: float
    method: str
    points: int | None
    iterations: int
    warmup: int

    def __post_init__(self):
        choice(*MODES)("mode", self.mode)
        choice(*ladder.TRAINING_METHODS)("method", self.method)
        optional(count(1))("points", self.points)
        count(1)("iterations", self.iterations)
        count(0)("warmup", self.warmup)
        positive("maximum", self.maximum)

    def start(self, kernel: Array, key: Array) -> dict[str, Array]:
        """The first state, plain arrays by name."""
        how: dict[str, Any] = {"method": self.method, "points": self.points, "warmup": self.warmup}
        if kernel.ndim == 2:
            how |= {"method": "four", "points": None}
        return ladder.init(_kernel(kernel), self.spec, key=key, **how).inner._asdict()

    def estimate(self, kernel: Array, state: dict[str, Array]) -> tuple[Array, dict[str, Array]]:
        """The bound's estimate, differentiable, and the next state."""
        dense = kernel.ndim == 2
        method = "four" if dense else self.method
        kind = GridState if method == "grid" else PowerState
        before = ladder.LadderState(kind(**state), method, None if dense else self.points)
        value, after = ladder.step(_kernel(kernel), before, self.spec, iterations=self.iterations)
        return value, after.inner._asdict()

    def normalise(self, kernel: Array, value: Array) -> Array:
        """The kernel that the layer is to use: ``soft`` W · min(1, c / value), ``hard`` W · c / value; 0 stays 0.

        Scaled in float32 and rounded once.
        """
        if self.mode == "penalty":
            return kernel
        positive = value > 0
        scale = self.maximum / jnp.where(positive, value, 1)
        scale = jnp.minimum(1, scale) if self.mode == "soft" else scale
        # Behind a barrier, or XLA computes this scalar again for every entry of the kernel.
        scale = lax.optimization_barrier(jnp.where(positive, scale, 1))
        return (kernel.astype(scale.dtype) * scale).astype(kernel.dtype)


def _kernel(kernel: Array) -> Array:
    return kernel[None] if kernel.ndim == 2 else kernel


def spec_of(layer: Any, path: str, convolutions: tuple[type, ...], dense: type) -> ConvSpec:
    """The spec of a Flax layer; errors name its ``path``.

    Args:
      layer: of linen or NNX.
      path: where it is.
      convolutions: the classes of convolutions.
      dense: the class of matrices, which count as convolutions with one tap.

    Raises:
      ValueError: another kind of layer, a subclass with a call or a param method of its own, or an injected operation.
    """
    if isinstance(layer, type):
        raise ValueError(f"{path}: {layer.__name__} is a class: wrap a layer, as {layer.__name__}(…)")
    name = type(layer).__name__
    kind: Any = next((kind for kind in (*convolutions, dense) if isinstance(layer, kind)), None)
    if kind is None:
        if name == "SpectralBound":
            raise ValueError(f"{path}: this layer is wrapped already")
        known = ", ".join(k.__name__ for k in (*convolutions, dense) if k.__name__ != "ConvLocal")  # refused as well
        raise ValueError(
            f"{path}: {name} is not a {known}: wrap the layers in it, or use fantastic4.network on the params"
        )
    try:
        as_flax_computes(layer, kind)
        if kind is not dense:
            return ConvSpec.from_layer(layer)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    for field in ("dot_general", "dot_general_cls"):
        if getattr(layer, field, None) not in (None, lax.dot_general):
            raise ValueError(f"{path}: {name} has its own {field}: what it computes is not known; bound what it calls")
    return ConvSpec()
