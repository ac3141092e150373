"""The residual networks that the benchmarks train, in Flax linen: He et al. (2016), for CIFAR-10 and for ImageNet."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
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
resnet50 = partial(ResNet, (3, 4, 6, 3), 64, 1000, bottleneck=True)
