"""Flax NNX: layers that know how much they can stretch, and may be held to it."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from fantastic4.wrapping import Wrapping, spec_of


@nnx.register_variable_name("spectral_stats")
class SpectralStats(nnx.Variable):
    """State of a `SpectralBound`: vectors of its power iteration, and its last value."""


class SpectralBound(nnx.Module):
    """A layer with the bound of its norm, as a penalty or held to a maximum; called as ``nnx.SpectralNorm`` is.

    Around ``nnx.Conv``, ``nnx.ConvTranspose`` or ``nnx.Linear``; strides, padding, groups and mask are read from it.
    Its state is in Variables of type `SpectralStats`. The stored kernel is never touched: a layer that is held to a
    maximum computes with a copy.

    * ``mode="penalty"``: `penalty` adds up the bounds that the last calls found.
    * ``mode="soft"`` has the layer use kernel · min(1, maximum / bound), as SNGP does.
    * ``mode="hard"`` has it use kernel · maximum / bound, as Miyato et al. (2018) with their heuristic.

    **Of estimates**: the bound in training is that of warm-started power iteration, from below, as in
    `fantastic4.step`; certify a trained model with `fantastic4.lipschitz.bound`, which sees what the layer computes
    with. `fantastic4.network.report` and ``fantastic4 audit`` see the stored kernel: in ``"soft"`` and ``"hard"`` mode
    it is another.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from fantastic4 import nnx as f4nnx
      >>> rngs = nnx.Rngs(0)
      >>> layer = f4nnx.SpectralBound(nnx.Conv(2, 4, (3, 3), rngs=rngs), rngs=rngs, mode="soft")
      >>> layer(jnp.ones((1, 8, 8, 2)), update_stats=True).shape
      (1, 8, 8, 4)
    """

    def __init__(
        self,
        layer_instance: Any,
        *,
        mode: str = "penalty",
        maximum: float = 1.0,
        method: str = "four",
        points: int | None = None,
        iterations: int = 1,
        warmup: int = 20,
        update_stats: bool = True,
        rngs: nnx.Rngs,
    ):
        """Wrap a layer.

        Args:
          layer_instance: the layer.
          mode: ``"penalty"``, ``"soft"`` or ``"hard"``.
          maximum: c > 0, of ``"soft"`` and ``"hard"``.
          method: ``"four"``, ``"weighted"`` or ``"grid"``, of `fantastic4.ladder`.
          points: of ``"grid"``.
          iterations: power iterations a call.
          warmup: power iterations now.
          update_stats: whether calls that do not say keep the new state; ``nnx.view`` and ``set_view`` change it. After
            ``model.eval()`` they do not, as in ``nnx.BatchNorm``, until ``model.train()``.
          rngs: its ``params`` stream starts the vectors.

        Raises:
          ValueError: a layer of another kind, one that computes with another operation or kernel than its fields and
            Params say, or an unknown option.
        """
        spec = spec_of(layer_instance, type(layer_instance).__name__, (nnx.Conv, nnx.ConvTranspose), nnx.Linear)
        if layer_instance.kernel.get_metadata().get("on_get_value") is not None:
            raise ValueError(
                f"the kernel of {type(layer_instance).__name__} has an on_get_value hook, which a copy of it would go "
                "through twice: store what it computes"
            )
        self.layer_instance = layer_instance
        self.how = Wrapping(spec, mode, maximum, method, points, iterations, warmup)
        self.update_stats = update_stats
        self.use_running_average = False  # what train() and eval() set
        if not isinstance(rngs, nnx.Rngs):
            raise ValueError(f"rngs must be an nnx.Rngs, as nnx.Rngs(0), got {type(rngs).__name__}")
        kernel = self._kernel()
        start = self.how.start(kernel, rngs.params())
        value, _ = self.how.estimate(kernel, start)
        self.state = nnx.data({name: SpectralStats(array) for name, array in start.items()})
        self.bound = SpectralStats(value)

    def _kernel(self) -> Array:
        """The kernel that the layer would use."""
        layer: Any = self.layer_instance
        mask = getattr(layer, "mask", None)
        return layer.kernel[...] if mask is None else layer.kernel[...] * mask

    def __call__(self, *args: Any, update_stats: bool | None = None, **kwargs: Any) -> Any:
        """Call the layer.

        Args:
          *args: of the layer.
          update_stats: whether to keep the new state, and the bound for `penalty`. With False nothing changes and
            equal calls give equal results.
          **kwargs: of the layer.

        Returns:
          What the layer returns.
        """
        layer: Any = self.layer_instance
        if update_stats is None:
            update_stats = self.update_stats and not self.use_running_average
        if not update_stats and self.how.mode == "penalty":
            return layer(*args, **kwargs)
        value, new = self.how.estimate(self._kernel(), {name: v[...] for name, v in self.state.items()})
        if update_stats:
            for name, array in new.items():
                self.state[name][...] = array
            self.bound[...] = value
        if self.how.mode == "penalty":
            return layer(*args, **kwargs)
        graph, state = nnx.split(layer)
        variable: Any = state["kernel"]
        state["kernel"] = variable.replace(self.how.normalise(layer.kernel[...], value))
        copy: Any = nnx.merge(graph, state)
        return copy(*args, **kwargs)

    def set_view(self, update_stats: bool | None = None, use_running_average: bool | None = None) -> None:
        """Used by ``nnx.view``.

        Args:
          update_stats: whether calls that do not say keep the new state.
          use_running_average: whether they do not after all, as in ``nnx.BatchNorm``.
        """
        if update_stats is not None:
            self.update_stats = update_stats
        if use_running_average is not None:
            self.use_running_average = use_running_average


def penalty(model: nnx.Module) -> Array:
    """Sum of the bounds of the layers in ``"penalty"`` mode.

    Of each, the bound of its last call that kept its state: call it in the loss function, after the model, then its
    gradient reaches the kernels. Of layers that keep no state, as after ``model.eval()``, it is computed here, from the
    state as it stands. Calls with ``update_stats=False`` alone have left the bound that was there, a constant.

    Args:
      model: any module.

    Returns:
      A scalar; 0 where there is no such layer.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from fantastic4 import nnx as f4nnx
      >>> rngs = nnx.Rngs(0)
      >>> model = f4nnx.SpectralBound(nnx.Linear(2, 4, rngs=rngs), rngs=rngs)
      >>> def loss(model):
      ...     return jnp.sum(model(jnp.ones((1, 2)), update_stats=True)) + f4nnx.penalty(model)
      >>> value, gradient = nnx.value_and_grad(loss)(model)
      >>> gradient["layer_instance"]["kernel"].shape
      (2, 4)
    """
    total = jnp.zeros(())
    for _, module in nnx.iter_modules(model):
        if isinstance(module, SpectralBound) and module.how.mode == "penalty":
            value = module.bound[...]
            if module.use_running_average or not module.update_stats:
                bound = lambda kernel, state, how=module.how: how.estimate(kernel, state)[0]  # noqa: E731
                for _ in range(value.ndim):  # of stacked layers, as nnx.vmap makes them
                    bound = jax.vmap(bound)
                value = bound(module._kernel(), {name: v[...] for name, v in module.state.items()})
            total = total + jnp.sum(value)
    return total
