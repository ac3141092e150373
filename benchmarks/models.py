"""The residual networks of the benchmarks, in Flax linen (He et al. 2016, CIFAR-10 and ImageNet); a train step."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn


class ResNet(nn.Module):
    """Residual network with post-activation and batch normalisation.

    Attributes:
      stages: blocks in each stage; every stage but the first halves the image and doubles the width.
      width: channels of the first stage.
      classes: number of logits.
      bottleneck: 1×1, 3×3, 1×1 with four times the width, instead of two 3×3.
      small_images: a 3×3 stem, as for CIFAR-10, instead of 7×7 with stride 2 and max pooling.
      pad_shortcut: a shortcut that changes the shape drops pixels and adds zero channels (option A), instead of a 1×1
        convolution.
      conv: what makes a convolution, as ``nn.Conv``.
    """

    stages: tuple[int, ...]
    width: int
    classes: int
    bottleneck: bool = False
    small_images: bool = False
    pad_shortcut: bool = False
    conv: Callable[..., Any] = partial(nn.Conv, use_bias=False)

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Logits ``(batch, classes)`` of images ``(batch, height, width, 3)``."""
        norm = partial(nn.BatchNorm, use_running_average=not train, momentum=0.9)
        if self.small_images:
            x = nn.relu(norm()(self.conv(self.width, (3, 3))(x)))
        else:
            x = nn.relu(norm()(self.conv(self.width, (7, 7), strides=2, padding=3)(x)))
            x = nn.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))
        for stage, blocks in enumerate(self.stages):
            for block in range(blocks):
                width, stride = self.width * 2**stage, 2 if stage and not block else 1
                y = x
                if self.bottleneck:
                    y = nn.relu(norm()(self.conv(width, (1, 1))(y)))
                    y = nn.relu(norm()(self.conv(width, (3, 3), strides=stride)(y)))
                    y = norm()(self.conv(4 * width, (1, 1))(y))
                else:
                    y = nn.relu(norm()(self.conv(width, (3, 3), strides=stride)(y)))
                    y = norm()(self.conv(width, (3, 3))(y))
                if x.shape != y.shape and self.pad_shortcut:
                    more = y.shape[-1] - x.shape[-1]
                    x = jnp.pad(x[:, ::stride, ::stride], ((0, 0), (0, 0), (0, 0), (more // 2, more - more // 2)))
                elif x.shape != y.shape:
                    x = norm()(self.conv(y.shape[-1], (1, 1), strides=stride)(x))
                x = nn.relu(x + y)
        return nn.Dense(self.classes)(x.mean((1, 2)))


resnet32 = partial(ResNet, (5, 5, 5), 16, 10, small_images=True, pad_shortcut=True)  # the paper's, for CIFAR-10
resnet18_cifar = partial(ResNet, (2, 2, 2, 2), 64, 10, small_images=True)
resnet18 = partial(ResNet, (2, 2, 2, 2), 64, 1000)
resnet50 = partial(ResNet, (3, 4, 6, 3), 64, 1000, bottleneck=True)


class KerasResNet50(nn.Module):
    """ResNet-50 as Keras has it, whose ImageNet weights `keras_resnet50` loads: the stride is in the first 1×1."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Logits ``(batch, 1000)`` of images ``(batch, height, width, 3)``, BGR less their mean."""

        def unit(
            x: jax.Array, width: int, size: int, name: tuple[str, str], stride: int = 1, padding: Any = "VALID"
        ) -> jax.Array:
            kernel = (size, size)
            x = nn.Conv(width, kernel, strides=stride, padding=padding, name=f"{name[0]}{name[1]}")(x)
            normed = name[0].replace("res", "bn") if name[0] != "conv1" else "bn_conv1"
            return nn.BatchNorm(use_running_average=True, epsilon=1e-3, name=f"{normed}{name[1]}")(x)

        x = nn.relu(unit(x, 64, 7, ("conv1", ""), 2, 3))
        x = nn.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))
        for stage, blocks in enumerate(["abc", "abcd", "abcdef", "abc"], 2):
            width = 64 * 2 ** (stage - 2)
            for block in blocks:
                stride = 2 if stage > 2 and block == "a" else 1
                name = f"res{stage}{block}"
                y = nn.relu(unit(x, width, 1, (name, "_branch2a"), stride))
                y = nn.relu(unit(y, width, 3, (name, "_branch2b"), padding="SAME"))
                y = unit(y, 4 * width, 1, (name, "_branch2c"))
                if block == "a":
                    x = unit(x, 4 * width, 1, (name, "_branch1"), stride)
                x = nn.relu(x + y)
        return nn.Dense(1000, name="fc1000")(jnp.mean(x, axis=(1, 2)))


def keras_resnet50(weights: dict[str, Any]) -> dict[str, Any]:
    """Flax variables of `KerasResNet50` from the weights of `benchmarks.data.resnet50`."""
    places = {
        "kernel": ("params", "kernel"), "bias": ("params", "bias"),
        "gamma": ("params", "scale"), "beta": ("params", "bias"),
        "moving_mean": ("batch_stats", "mean"), "moving_variance": ("batch_stats", "var"),
    }  # fmt: skip
    variables: dict[str, Any] = {"params": {}, "batch_stats": {}}
    for path, value in weights.items():
        layer, field = path.split("/")
        collection, name = places[field]
        variables[collection].setdefault(layer, {})[name] = jnp.asarray(value)
    return variables


def train_step(model: ResNet, tx: optax.GradientTransformation) -> Callable[..., Any]:
    """A plain Flax train step: cross-entropy, batch statistics, an optax update."""

    def step(variables: Any, opt_state: Any, images: jax.Array, labels: jax.Array) -> Any:
        def loss_fn(params: Any) -> tuple[jax.Array, Any]:
            everything = {**variables, "params": params}
            logits, new = model.apply(everything, images, train=True, mutable=["batch_stats"])
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), new

        (loss, new), gradients = jax.value_and_grad(loss_fn, has_aux=True)(variables["params"])
        updates, opt_state = tx.update(gradients, opt_state, variables["params"])
        return {"params": optax.apply_updates(variables["params"], updates), **new}, opt_state, loss

    return step


def is_convolution(path: str, leaf: Any) -> bool:
    """For ``select``: leaves of four axes."""
    return leaf.ndim == 4


def convolutions(model: ResNet, size: int) -> dict[str, tuple[dict[str, Any], tuple[int, ...]]]:
    """Every convolution by the path of its kernel: its fields for ``nn.Conv``, the shape of one input."""
    found: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {}

    def note(next_call: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
        layer = context.module
        if isinstance(layer, nn.Conv) and context.method_name == "__call__":
            fields = {name: getattr(layer, name) for name in ("features", "kernel_size", "strides", "use_bias")}
            found["/".join((*layer.path, "kernel"))] = fields, args[0].shape[1:]
        return next_call(*args, **kwargs)

    with nn.intercept_methods(note):
        jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, size, size, 3)))
    return found
