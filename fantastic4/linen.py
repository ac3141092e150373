"""Flax linen: layers that know how much they can stretch, and may be held to it."""

from __future__ import annotations

import dataclasses
from typing import Any

from flax import linen as nn
from flax.core import meta
from jax import Array

from fantastic4.wrapping import Wrapping, spec_of

COLLECTION = "spectral_stats"
LOSSES = "losses"


def _call(module: Any, layer: nn.Module, args: Any, kwargs: Any, update_stats: bool | None) -> Any:
    """Call ``layer`` as ``module`` says, whose scope holds the state."""
    path = "/".join((*module.path, getattr(layer, "name", None) or type(layer).__name__))
    if type(layer).__module__.startswith("flax.nnx"):
        raise ValueError(f"{path} is a layer of NNX: fantastic4.nnx.SpectralBound is for those")
    spec = spec_of(layer, path, (nn.Conv, nn.ConvTranspose, nn.ConvLocal), nn.Dense)
    how = Wrapping(spec, module.mode, module.maximum, module.method, module.points, module.iterations, module.warmup)
    if module.is_initializing():
        layer(*args, **kwargs)  # makes the params
    elif not module.has_variable(COLLECTION, "state") and not module.is_mutable_collection(COLLECTION):
        raise ValueError(
            f"{path}: no {COLLECTION} in the variables: pass what init returned, "
            f"model.apply({{'params': params, '{COLLECTION}': stats}}, …), or make them for params from elsewhere: "
            f"model.apply({{'params': params}}, …, mutable=['{COLLECTION}'], rngs={{'params': key}})"
        )
    if update_stats is None:
        update_stats = module.is_mutable_collection(COLLECTION)
    update_stats = update_stats or not module.has_variable(COLLECTION, "state")  # one that is made now is kept
    found: dict[str, Any] = {}

    def change(variables: Any) -> Any:
        params = dict(variables.get("params", {}))
        if "kernel" not in params:
            raise ValueError(
                f"{path}: no kernel among its params, {sorted(params)}: those of a layer that is made in setup() are "
                "in 'layer_instance', below the name of its wrapper"
            )
        stored, mask = params["kernel"], getattr(layer, "mask", None)
        kernel = meta.unbox(stored)  # nn.with_partitioning puts it into a box
        used = kernel if mask is None else kernel * mask
        if module.has_variable(COLLECTION, "state"):
            value, new = how.estimate(used, module.get_variable(COLLECTION, "state"))
        else:
            new = how.start(used, module.make_rng("params"))
            value, _ = how.estimate(used, new)
        found.update(value=value, state=new)
        normalised = meta.replace_boxed(stored, how.normalise(kernel, value))
        return {**variables, "params": params | {"kernel": normalised}}

    # Read-only: what the layer sees is not written back to the params, not even by init.

    def call(layer: nn.Module) -> Any:  # by name, for it is part of what errors and profiles show
        return layer(*args, **kwargs)

    out = nn.map_variables(call, trans_in_fn=change)(layer)
    if update_stats:
        module.put_variable(COLLECTION, "state", found["state"])
        module.put_variable(COLLECTION, "bound", found["value"])
    if module.mode == "penalty" and not module.is_initializing():
        # The last value alone: a layer that is called twice has one kernel, and losses may come back with variables.
        module.sow(LOSSES, "spectral", found["value"], reduce_fn=lambda _, new: new, init_fn=lambda: None)
    return out


class SpectralBound(nn.Module):
    """A layer with the bound of its norm, as a penalty or held to a maximum; called as ``nn.SpectralNorm`` is.

    Around ``nn.Conv``, ``nn.ConvTranspose`` or ``nn.Dense``; strides, padding, groups and mask are read from it. Its
    state is in the collection ``"spectral_stats"``: ``state``, and ``bound``, the last value, to log. The stored
    params are never touched, and stay where they are without the wrapper; of a layer that is made in ``setup()`` they
    are in ``"layer_instance"``, below the wrapper's name. For params from elsewhere, a call with
    ``mutable=["spectral_stats"]`` and ``rngs={"params": key}`` makes the state. Inside ``nn.scan`` and ``nn.vmap``
    both collections need an axis, or Flax drops the penalty without a word:
    ``variable_axes={"params": 0, "spectral_stats": 0, "losses": 0}``.

    * ``mode="penalty"`` sows the bound into the collection ``"losses"``, for whoever makes ``"losses"`` mutable: once
      for a layer, however often it is called.
    * ``mode="soft"`` has the layer use kernel · min(1, maximum / bound), as SNGP does.
    * ``mode="hard"`` has it use kernel · maximum / bound, as Miyato et al. (2018) with their heuristic.

    **Of estimates**: the bound in training is that of warm-started power iteration, from below, as in
    `fantastic4.step`; certify a trained model with `fantastic4.lipschitz.bound`, which sees what the layer computes
    with. `fantastic4.network.report` and ``fantastic4 audit`` see the stored kernel: in ``"soft"`` and ``"hard"`` mode
    it is another.

    Attributes:
      layer_instance: the layer.
      mode: one of these.
      maximum: c > 0, of ``"soft"`` and ``"hard"``.
      method: ``"four"``, ``"weighted"`` or ``"grid"``, of `fantastic4.ladder`.
      points: of ``"grid"``.
      iterations: power iterations a call.
      warmup: power iterations at ``init``.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from flax import linen as nn
      >>> from fantastic4 import linen
      >>> model = linen.SpectralBound(nn.Conv(4, (3, 3)))
      >>> variables = model.init(jax.random.key(0), jnp.ones((1, 8, 8, 2)))
      >>> y, new = model.apply(variables, jnp.ones((1, 8, 8, 2)), mutable=["spectral_stats", "losses"])
      >>> y.shape, bool(new["losses"]["spectral"] > 0)
      ((1, 8, 8, 4), True)
    """

    layer_instance: nn.Module
    mode: str = "penalty"
    maximum: float = 1.0
    method: str = "four"
    points: int | None = None
    iterations: int = 1
    warmup: int = 20

    @nn.compact
    def __call__(self, *args: Any, update_stats: bool | None = None, **kwargs: Any) -> Any:
        """Call the layer.

        Args:
          *args: of the layer.
          update_stats: whether to keep the new state; None: where ``"spectral_stats"`` is mutable. With False
            nothing changes and equal calls give equal results.
          **kwargs: of the layer.

        Returns:
          What the layer returns.

        Raises:
          ValueError: a layer of another kind, one that computes with another operation or kernel than its fields and
            params say, or no ``"spectral_stats"``.
        """
        return _call(self, self.layer_instance, args, kwargs, update_stats)


class Conv(nn.Conv):
    """``nn.Conv`` with the bound of its norm: the fields of both, the params of ``nn.Conv``, where it has them.

    See `SpectralBound` for what the further fields mean.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from fantastic4 import linen
      >>> conv = linen.Conv(4, (3, 3), mode="soft", maximum=1.0)
      >>> variables = conv.init(jax.random.key(0), jnp.ones((1, 8, 8, 2)))
      >>> sorted(variables["params"]), conv.apply(variables, jnp.ones((1, 8, 8, 2))).shape
      (['bias', 'kernel'], (1, 8, 8, 4))
    """

    mode: str = "penalty"
    maximum: float = 1.0
    method: str = "four"
    points: int | None = None
    iterations: int = 1
    warmup: int = 20

    @nn.compact
    def __call__(self, inputs: Array, update_stats: bool | None = None) -> Array:
        """Convolve; ``update_stats`` as in `SpectralBound`."""
        if type(self).param is not nn.Conv.param:  # the layer inside would never ask it
            raise ValueError(f"{type(self).__name__} has a param method of its own: bound what it computes with")
        names = {field.name for field in dataclasses.fields(nn.Conv) if field.init} - {"parent", "name"}
        # A name that is nobody's: in a scope that a parent shares, that of its first nn.Conv is taken.
        layer = nn.Conv(**{name: getattr(self, name) for name in names}, name="_convolution")
        nn.share_scope(self, layer)
        return _call(self, layer, (inputs,), {}, update_stats)
