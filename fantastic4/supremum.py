r"""σ∞, the norm of a plain convolution on the infinite grid, enclosed to any tolerance.

σ∞ = max over ω of ‖F(ω)‖. Two steps: *climb* to a high value, a sound lower end; then *certify* that no
frequency has more than (1 + rtol) times it, by branch and bound over ever finer grids.

**What a grid point says about its neighbourhood.** Let σ∞ be attained at ω* with unit vectors x, y, and let
ω* + t be the grid point nearest to it, |t_a| ≤ π/N_a. Along the straight line s ↦ ω* + s t, the function
Re(e^{iφ} yᴴF x), with centred taps, is of exponential type Σ_a |t_a|(k_a - 1)/2, stays within ±σ∞ and attains
σ∞ at s = 0. By Bernstein and Szegő it is at s = 1 at least σ∞ cos(Σ_a θ_a), θ_a = π(k_a - 1)/(2N_a). So if
‖F‖ ≤ τ cos(Σθ) at a grid point, σ∞ > τ cannot be attained in its cell. (The product Π cos θ_a, larger, is
right for the maximum over a whole grid, not for the nearest point: cos(ω_1 + ω_2) has ‖F‖ = cos(θ_1 + θ_2) there.)

A second such threshold uses the kernel itself: xᴴG(ω* + s t)x has derivative 0 at s = 0 and a second
derivative of at most Σ_d (d·t)² ‖Q_d‖ over the lags of G = FFᴴ, so G has at the grid point at least
σ∞² - ½ Σ_d (Σ_a |d_a| π/N_a)² ‖Q_d‖. The larger threshold is used.

**Testing a point** is one Cholesky decomposition of τ²I - G: a third to a tenth of an eigenvalue problem.

Everything is float64, whatever the kernel's dtype; the rounding is bounded in `_slack`.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.sharding import Mesh

from fantastic4 import symbol, threads
from fantastic4.devices import size, spread
from fantastic4.linalg import HIGHEST, krylov_top
from fantastic4.rounding import gamma

_STEPS = 12  # of Lanczos


class _Slack(NamedTuple):
    """What rounding can hide, for kernels with Σ_t ‖K[t]‖_F ≤ size.

    Attributes:
      gram: a computed G(ω) is within gram · size² of the exact one, in norm.
      cholesky: if the decomposition of fl(t I - G) succeeds, λ(G) ≤ (1 + cholesky) t.
      rayleigh: a computed xᴴGx / xᴴx is within rayleigh · size² of the exact one of the computed G.
    """

    gram: float
    cholesky: float
    rayleigh: float


def _slack(taps: tuple[int, ...], c_in: int, c_out: int) -> _Slack:
    r"""Worst case in float64 under the model of `fantastic4.rounding`.

    With T taps, L lags of the half space, n ≤ m the channel sides, A = Σ‖K[t]‖_F and sums in any order: phases are off
    by p = (32 + 32 Σk) u, reduced to a turn or not; so F by (√2 γ_{T+2} + p) A; FFᴴ, from one sum of 2m products in
    each entry of [R + I, I - R] [R, I]ᵀ (Frobenius norms √2 A and A), by 2 γ_{2m+4} A² and twice F's error times A; a
    coefficient of G, a weighted mean of those, by twice as much and 2 (γ_{2L+4} + p) A²; G, a sum of 2L terms of ≤
    2A² each, by all of these and 4 L (γ_{2L+2} + p) A².
    Cholesky (Higham 2002, Theorems 10.3 and 10.7, complex: γ_{2n+8} with a factor 3) is off by at most
    3 γ_{2n+8} tr(t I - G) ≤ 3 γ_{2n+8} n t.
    """
    g = partial(gamma, dtype=np.float64)
    count, half = math.prod(taps), len(symbol.lags(taps))
    n, m = sorted((c_in, c_out))
    phase = symbol.phase_error(taps)
    one_f = math.sqrt(2) * g(count + 2) + phase
    one_gram = 2 * g(2 * m + 4) + 2 * one_f
    coefficient = 2 * one_gram + 2 * (g(2 * half + 4) + phase)
    total = 2 * half * coefficient + 4 * half * (g(2 * half + 2) + phase)
    return _Slack(1.01 * total, 1.01 * 3 * g(2 * n + 8) * n, 1.01 * 8 * g(4 * n + 8))


class _Prepared(NamedTuple):
    """What is computed once for a batch of kernels.

    Attributes:
      gram: coefficients of G.
      size: scalar, at least Σ_t ‖K[t]‖_F of every kernel.
      lag_norms: ``(lags,)``, at least ‖Q_d‖ of every kernel, d = 0 first.
    """

    gram: symbol.Gram
    size: Array
    lag_norms: Array


@jax.jit
def _prepare(kernels: Array) -> _Prepared:
    gram = symbol.gram(kernels)
    each_tap = jnp.sqrt(jnp.sum(kernels * kernels, axis=(-2, -1)))
    size = jnp.max(jnp.sum(each_tap.reshape(len(kernels), -1), axis=1)) * (1 + 1e-9)
    whole = jnp.concatenate([gram.even[:, :1], (gram.even + gram.odd)[:, 1:] / 2], axis=1)

    def schatten(q: Array) -> Array:  # ‖QᵀQ‖_F^(1/2) ≥ ‖Q‖, and hardly above it where few values are large
        return jnp.sqrt(jnp.sqrt(jnp.sum(jnp.matmul(q.T, q, precision=HIGHEST) ** 2)))

    norms = lax.map(lambda one: lax.map(schatten, one), whole)
    return _Prepared(gram, size, jnp.max(norms, axis=0) * (1 + 1e-9))


def _below(gram: symbol.Gram, threshold: Array, cosines: Array, sines: Array) -> Array:
    return jnp.all(symbol.below(symbol.evaluate(gram, cosines, sines), threshold), axis=-1)


class _Top(NamedTuple):
    """Rayleigh quotients reached: ``value (points, batch)``, ``vector (points, batch, n)``."""

    value: Array
    vector: Array


def _climb(gram: symbol.Gram, cosines: Array, sines: Array, start: Array) -> _Top:
    """Lanczos with full orthogonalisation from ``start (points, batch, n)``, at every point and group."""
    grams = symbol.evaluate(gram, cosines, sines)
    apply = partial(jnp.einsum, "pbij,pbj->pbi", grams, precision=HIGHEST)
    x = krylov_top(apply, start, min(grams.shape[-1], _STEPS))
    squares = jnp.sum(x.real**2 + x.imag**2, axis=-1)
    value = jnp.sum((x.conj() * apply(x)).real, axis=-1) / jnp.where(squares > 0, squares, 1)
    return _Top(value, x)


@functools.cache
def _compiled(mesh: Mesh | None) -> tuple[Callable[..., Array], Callable[..., _Top]]:
    """`_below` and `_climb`, each device of the mesh with its share of the points."""
    return spread(_below, mesh, 2, 2), spread(_climb, mesh, 1, 3)


@jax.jit
def _profile(gram: symbol.Gram, group: Array, vector: Array) -> tuple[Array, Array]:
    """Xᴴ G(ω) x = Σ_d cos(d·ω) a_d + sin(d·ω) b_d of one vector: a and b, ``(lags,)``."""
    even, odd = gram.even[group], gram.odd[group]
    real, imag = vector.real, vector.imag
    form = partial(jnp.einsum, "i,dij,j->d", precision=HIGHEST)
    return form(real, even, real) + form(imag, even, imag), 2 * form(imag, odd, real)


@jax.jit
def _exact_top(gram: symbol.Gram, cosines: Array, sines: Array, group: Array) -> _Top:
    """The top eigenvector at one point, ``(n,)``, with its Rayleigh quotient."""
    grams = symbol.evaluate(symbol.Gram(gram.even[group][None], gram.odd[group][None]), cosines, sines)[0, 0]
    x = jnp.linalg.eigh(grams)[1][:, -1]
    image = jnp.einsum("ij,j->i", grams, x, precision=HIGHEST)
    return _Top(jnp.sum((x.conj() * image).real) / jnp.sum(x.real**2 + x.imag**2), x)


class Supremum(NamedTuple):
    """An enclosure of the largest ‖F(ω)‖.

    Attributes:
      lower: never above it.
      upper: never below it.
      tests: points that were tested.
    """

    lower: float
    upper: float
    tests: int


class OutputWave(NamedTuple):
    """The outputs e^{iω·o} u that attain ‖F(ω)‖, o the output index.

    Attributes:
      angles: ω, ``(rank,)``.
      vector: u, ``(c_out,)``, complex.
      group: of the kernel.
    """

    angles: np.ndarray
    vector: np.ndarray
    group: int


class Enclosure:
    """Branch and bound for one batch of kernels. Host code around three compiled functions."""

    def __init__(self, kernels: Array, mesh: Mesh | None = None):
        """Kernels ``(batch, *spatial, c_in, c_out)``, float64, finite, entries of at most about 1.

        With a ``mesh`` every batch of frequencies is divided among its devices.
        """
        self.below, self.climb_each = _compiled(mesh)
        batch, *taps, c_in, c_out = kernels.shape
        self.kernels, self.taps = kernels, tuple(taps)
        self.batch, self.n = batch, min(c_in, c_out)
        self.prepared = _prepare(kernels)
        slack = _slack(self.taps, c_in, c_out)
        self.size_squared = float(self.prepared.size) ** 2 * (1 + 1e-12)
        self.gram_slack = slack.gram * self.size_squared
        self.rayleigh_slack = slack.rayleigh * self.size_squared
        self.cholesky_slack = slack.cholesky
        self.lag_norms = np.asarray(self.prepared.lag_norms) + self.gram_slack
        self.triangle = self.lag_norms[0] + 2 * float(self.lag_norms[1:].sum())  # of G's coefficients: λ is below
        self.points_at_once = size(mesh) * symbol.at_once(1024, batch * self.n**2, symbol.CHUNK_ENTRIES)
        # Few: an ascent from one point is by the same program.
        self.climbs_at_once = size(mesh) * symbol.at_once(64, batch * self.n**2, symbol.CHUNK_ENTRIES // 4)
        self.best, self.angles, self.group = 0.0, np.zeros(len(taps)), 0
        self.vector = np.zeros(self.n, complex)
        self.tests = 0

    def _batches(self, sizes: tuple[int, ...], points: np.ndarray, step: int) -> Iterator[tuple[slice, Array, Array]]:
        """Slices of one length, the last one filled up by repetition, so that one program serves all."""
        for begin in range(0, len(points), step):
            rows = np.minimum(np.arange(begin, begin + step), len(points) - 1)
            cosines, sines = symbol.turns(points[rows], sizes, symbol.lags(self.taps))
            yield slice(begin, min(begin + step, len(points))), jnp.asarray(cosines), jnp.asarray(sines)

    def exceeding(self, sizes: tuple[int, ...], points: np.ndarray, threshold: float) -> np.ndarray:
        """Which grid points are not certified to have λ(G) ≤ ``threshold``."""
        test = (threshold - self.gram_slack) / (1 + self.cholesky_slack) * (1 - 1e-12)
        if test <= 0:
            return np.ones(len(points), bool)
        self.tests += len(points)
        with threads.one_each() if self.n <= threads.SMALL else contextlib.nullcontext():
            batches = self._batches(sizes, points, self.points_at_once)
            parts = [(s, self.below(self.prepared.gram, test, c, d)) for s, c, d in batches]
            return ~np.concatenate([np.asarray(ok)[: s.stop - s.start] for s, ok in parts])

    def climb(self, sizes: tuple[int, ...], points: np.ndarray, rounds: int = 1) -> np.ndarray:
        """Raise ``best`` to the largest sound Rayleigh quotient of these grid points; returns them, one a point."""
        angles = points * 2 * math.pi / np.array(sizes)
        values = np.zeros(len(points))
        random = np.random.default_rng(0).standard_normal((2, self.climbs_at_once, self.batch, self.n))
        for s, c, d in self._batches(sizes, points, self.climbs_at_once):
            top = _Top(jnp.zeros(()), jnp.asarray(random[0] + 1j * random[1]))
            for _ in range(rounds):
                top = self.climb_each(self.prepared.gram, c, d, top.vector)
            count = s.stop - s.start
            each = np.asarray(top.value)[:count]
            values[s] = each.max(axis=1)
            point, group = np.unravel_index(each.argmax(), each.shape)
            self._record(each[point, group], angles[s][point], int(group), np.asarray(top.vector[point, group]))
        return values

    def _record(self, value: float, angles: np.ndarray, group: int, vector: np.ndarray) -> bool:
        sound = max(0.0, value - self.gram_slack - self.rayleigh_slack) * (1 - 1e-15)
        if sound <= self.best:
            return False
        self.best, self.angles, self.group, self.vector = sound, angles, group, vector
        return True

    def _free_turns(self, angles: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        turn = angles @ symbol.lags(self.taps).T
        return np.cos(turn), np.sin(turn)

    def ascend(self, spacing: np.ndarray, rounds: int = 6) -> None:
        """From the best point, move the frequency and the vector in turn to a local maximum."""
        stencil = np.array(list(itertools.product((-1, -0.5, 0, 0.5, 1), repeat=len(self.taps))))
        for _ in range(rounds):
            before = self.best
            cosine, sine = map(
                np.asarray, _profile(self.prepared.gram, jnp.asarray(self.group), jnp.asarray(self.vector))
            )
            angles, step = self.angles, spacing
            for _ in range(24):  # of the trigonometric polynomial that this vector sees
                near = angles + stencil * step
                c, s = self._free_turns(near)
                height = c @ cosine + s @ sine
                angles, step = near[height.argmax()], step * 0.6
            start = np.zeros((self.climbs_at_once, self.batch, self.n), complex)
            start[0, self.group] = self.vector
            c, s = self._free_turns(np.tile(angles, (self.climbs_at_once, 1)))
            top = self.climb_each(self.prepared.gram, jnp.asarray(c), jnp.asarray(s), jnp.asarray(start))
            value = float(top.value[0, self.group])
            self._record(value, angles, self.group, np.asarray(top.vector[0, self.group]))
            if self.best <= before * (1 + 1e-6):
                break

    def coarse(self) -> tuple[int, ...]:
        """Sizes of the first grid: Σ_a θ_a = π/4."""
        rank = sum(k > 1 for k in self.taps)
        return tuple(2 * rank * (k - 1) if k > 1 else 1 for k in self.taps)

    def share(self, sizes: tuple[int, ...], top: float) -> float:
        """The λ that the grid point nearest to the maximiser has at least, if the maximum is ``top``."""
        theta = sum(math.pi * (k - 1) / (2 * n) for k, n in zip(self.taps, sizes, strict=True))
        bernstein = math.cos(theta) ** 2 * top if theta < math.pi / 2 else 0.0
        reach = np.abs(symbol.lags(self.taps)) @ (math.pi / np.array(sizes))
        return max(bernstein, top - float(reach**2 @ self.lag_norms)) * (1 - 1e-12)

    def _goal(self, rtol: float) -> float:
        """(1 + rtol)², which the upper end of λ may be times ``best``."""
        least = 2 * self.margin()
        if rtol < least:
            raise ValueError(
                f"rtol {rtol:.3g} is below what float64 can certify for this kernel: the least is {1.06 * least:.2g}"
            )
        return (1 + rtol) ** 2 * (1 - 1e-12)

    def margin(self) -> float:
        """A λ that is this much above ``best``, relative, is seen to be: what rounding can hide."""
        return 8e-12 + 2 * (self.cholesky_slack + (2 * self.gram_slack + self.rayleigh_slack) / self.best)

    def _settle(self, sizes: tuple[int, ...], points: np.ndarray) -> bool:
        """Raise ``best`` where some of ``points`` have more: climb, then decompose the highest. Whether it rose."""
        before = self.best * (1 + 1e-12)
        values = self.climb(sizes, points, rounds=3)
        if self.best <= before * (1 + 1e-9):
            highest = points[int(values.argmax())]
            c, s = map(jnp.asarray, symbol.turns(highest[None], sizes, symbol.lags(self.taps)))
            for group in range(self.batch):
                top = _exact_top(self.prepared.gram, c, s, jnp.asarray(group))
                self._record(float(top.value), highest * 2 * math.pi / np.array(sizes), group, np.asarray(top.vector))
        return self.best > before

    def _lowest_top(self, sizes: tuple[int, ...], points: np.ndarray, top: float, everywhere: bool) -> float:
        """A top that these points allow, not far above the lowest."""
        excess = max(top / self.best - 1, 1e-12)
        while len(points) and top < self.triangle:
            excess *= 4
            top = self.best * (1 + excess)
            points = points[self.exceeding(sizes, points, self.share(sizes, top) if everywhere else top)]
        return min(top, self.triangle)

    def everywhere(self, rtol: float, max_tests: int) -> Supremum:
        """σ∞, to ``rtol`` if ``max_tests`` allow."""
        sizes = self.coarse()
        points = symbol.half_grid(sizes)
        self.climb(sizes, points)
        self.ascend(2 * math.pi / np.array(sizes))
        if self.best == 0:
            return self._result(self.triangle)
        goal = self._goal(rtol)
        if self.triangle <= self.best * goal:
            return self._result(self.triangle)
        while True:
            threshold = self.share(sizes, self.best * goal)
            points = points[self.exceeding(sizes, points, threshold)]
            if not len(points):
                return self._result(self.best * goal)
            if threshold >= self.best * (1 + self.margin()) and self._settle(sizes, points):
                self.ascend(2 * math.pi / np.array(sizes))
                continue
            if self.tests + len(points) > max_tests:
                return self._result(self._lowest_top(sizes, points, self.best * goal, everywhere=True))
            finer, children = self._refine(sizes, points)
            if self.tests + len(children) > max_tests:
                return self._result(self._lowest_top(sizes, points, self.best * goal, everywhere=True))
            sizes, points = finer, children

    def _refine(self, sizes: tuple[int, ...], points: np.ndarray) -> tuple[tuple[int, ...], np.ndarray]:
        """The neighbours of ``points`` on a grid of half the spacing, one of each pair ω, -ω."""
        fine = np.array([2 * n if n > 1 else 1 for n in sizes])
        offsets = np.array(list(itertools.product(*[(-1, 0, 1) if n > 1 else (0,) for n in sizes])))
        near = (points[:, None] * 2 + offsets).reshape(-1, len(sizes)) % fine
        index = np.minimum(np.ravel_multi_index(near.T, fine), np.ravel_multi_index((-near % fine).T, fine))
        return tuple(int(n) for n in fine), np.stack(np.unravel_index(np.unique(index), fine), -1)

    def on_grid(self, sizes: tuple[int, ...], points: np.ndarray, rtol: float) -> Supremum:
        """The maximum over grid ``points``: the norm of a circular convolution."""
        self.climb(sizes, points[np.unique(np.linspace(0, len(points) - 1, self.points_at_once).astype(int))])
        if self.best == 0:
            return self._result(self.triangle)
        goal = self._goal(rtol)
        while True:
            points = points[self.exceeding(sizes, points, self.best * goal)]
            if not len(points):
                return self._result(self.best * goal)
            if not self._settle(sizes, points):
                return self._result(self._lowest_top(sizes, points, self.best * goal, everywhere=False))

    def output_wave(self) -> OutputWave:
        """The wave of the lower end. On the outputs' side, which strides leave alone."""
        kernel = np.asarray(self.kernels[self.group])
        if kernel.shape[-2] > kernel.shape[-1]:  # the Gram matrix was that of the outputs
            return OutputWave(self.angles, self.vector, self.group)
        taps = symbol.places(self.taps)
        symbol_here = np.tensordot(np.exp(1j * (taps @ self.angles)), kernel.reshape(len(taps), *kernel.shape[-2:]), 1)
        return OutputWave(self.angles, symbol_here.T @ self.vector.conj(), self.group)

    def _result(self, top: float) -> Supremum:
        upper = math.sqrt(top) * (1 + 1e-15)
        return Supremum(math.sqrt(self.best) * (1 - 1e-15), upper, self.tests)
