r"""Rules of complex numbers: Fourier transforms, and what is linear between them, as in a Fourier neural operator.

A complex entry counts by its size. Of N numbers the transform has the norm √N, its inverse 1/√N. Of real numbers only
one half of the frequencies is kept: √N for that half, and √(2/N) for what makes real numbers of it, since all but the
ends stand for two. Scalar functions of complex numbers are not known, but for their size.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax.numpy as jnp
from jax import Array
from jax.extend import core

from fantastic4.linalg import widened
from fantastic4.lipschitz.fixed import Fixed
from fantastic4.lipschitz.graph import Signal, whole
from fantastic4.lipschitz.nodes import Joint, Linear
from fantastic4.lipschitz.operands import at_once, is_constant
from fantastic4.lipschitz.scalars import JUMPS, aligned
from fantastic4.lipschitz.trace import RULES, Walk, of_complex, out_shape


def _size(constant: Any) -> Array:
    """The largest size of a constant, rounded up: a root of two squares is, and they may vanish."""
    with at_once(constant):
        x = jnp.asarray(constant)
        parts = [widened(jnp.abs(part)) for part in (jnp.real(x), jnp.imag(x))]
        # |a + ib| ≤ √2 max(|a|, |b|) and ≤ |a| + |b|: the second where one is small.
        largest, smallest = jnp.maximum(*parts), jnp.minimum(*parts)
        ratio = smallest / jnp.where(largest > 0, largest, 1)
        sizes = largest * jnp.sqrt(1 + ratio * ratio) * (1 + 8 * float(jnp.finfo(largest.dtype).eps))
        top = jnp.max(sizes, initial=0)
        return jnp.where(jnp.any(jnp.isnan(sizes)), jnp.nan, jnp.maximum(top, float(jnp.finfo(sizes.dtype).tiny)))


@of_complex("fft")
def _fft(walk: Walk, eqn: core.JaxprEqn, operands: list[Any]) -> Any:
    kind, count = eqn.params["fft_type"].name, math.prod(eqn.params["fft_lengths"])
    if not count:
        return walk.refuse(eqn, "transforms nothing")
    squared = {"FFT": count, "RFFT": count, "IFFT": 1 / count, "IRFFT": 2 / count}[kind.removeprefix("FftType.")]
    return whole(Fixed(walk.label(eqn), out_shape(eqn), tuple(operands), math.sqrt(squared) * (1 + 1e-15), linear=True))


@of_complex("real", "imag", "conj", "abs", "convert_element_type")
def _part(walk: Walk, eqn: core.JaxprEqn, operands: list[Any]) -> Any:
    (signal,) = operands
    name = eqn.primitive.name
    if name == "convert_element_type":
        kind = eqn.params["new_dtype"]
        if jnp.issubdtype(kind, jnp.complexfloating):
            return signal  # real numbers are complex ones
        if not jnp.issubdtype(kind, jnp.floating):
            return walk.refuse(eqn, JUMPS)
    least = 0.0 if name == "abs" else -math.inf
    return whole(Fixed(walk.label(eqn), out_shape(eqn), (signal,), linear=name != "abs", least=least))


@of_complex("select_n")
def _chosen(walk: Walk, eqn: core.JaxprEqn, operands: list[Any]) -> Any:
    if not is_constant(operands[0]):
        return walk.refuse(eqn, "chooses complex numbers by the input: it may jump")
    return RULES["select_n"](walk, eqn, operands)


@of_complex("complex")
def _both(walk: Walk, eqn: core.JaxprEqn, operands: list[Any]) -> Signal:
    signals = tuple(operand for operand in operands if isinstance(operand, Signal))
    return whole(Joint(walk.label(eqn), out_shape(eqn), signals))


@of_complex("mul", "div")
def _scaled(walk: Walk, eqn: core.JaxprEqn, operands: list[Any]) -> Any:
    a, b = aligned(operands, out_shape(eqn))
    if isinstance(b, Signal) and (isinstance(a, Signal) or eqn.primitive.name == "div"):
        return walk.refuse(eqn, "of complex numbers that both depend on the input has no Lipschitz constant")
    signal, by = (a, b) if isinstance(a, Signal) else (b, a)
    if eqn.primitive.name == "div":
        with at_once(by):
            by = 1 / jnp.asarray(by)
    label = dataclasses.replace(walk.label(eqn), operation="scale")
    return whole(Fixed(label, out_shape(eqn), (signal,), _size(by), linear=True))


@of_complex("dot_general")
def _dot(walk: Walk, eqn: core.JaxprEqn, operands: list[Any]) -> Any:
    if not any(map(is_constant, operands)):
        return walk.refuse(eqn, "multiplies two signals that both depend on the input")
    own = int(isinstance(operands[0], Signal))  # which of both is the matrix
    signal, matrix = operands[1 - own], jnp.asarray(operands[own])
    contract, batch = (pair[own] for pair in eqn.params["dimension_numbers"])
    free = tuple(a for a in range(matrix.ndim) if a not in (*contract, *batch))
    with at_once(matrix):
        rows, columns = (math.prod(matrix.shape[a] for a in axes) for axes in (contract, free))
        flat = jnp.transpose(matrix, (*batch, *contract, *free)).reshape(-1, rows, columns)
        real, imag = (widened(part) for part in (jnp.real(flat), jnp.imag(flat)))
        # [[A, B], [-B, A]] has the singular values of A + iB, each twice.
        both = jnp.concatenate([jnp.concatenate([real, imag], 2), jnp.concatenate([-imag, real], 2)], 1)
    return whole(Linear(walk.label(eqn, "dense"), out_shape(eqn), (signal,), kernel=both))
