"""Whether two settings differ: standard errors and tests. numpy only. Shapes: N images, S seeds.

The difference in accuracy of two settings varies with the images that happened to be tested and with the seeds that
happened to be drawn, and the same images are used for every seed. So its standard error is clustered two ways, over
images and over seeds (Cameron, Gelbach & Miller, "Robust inference with multiway clustering", J. Business & Economic
Statistics 29, 2011): with d_si the difference of seed s on image i, means d_s., d_.i and D over all,

    var(D) = var_images + var_seeds - var_both
    var_images = sum_i (d_.i - D)^2 / (N (N - 1))
    var_seeds  = sum_s (d_s. - D)^2 / (S (S - 1))
    var_both   = sum_si (d_si - d_s. - d_.i + D)^2 / (N S (N - 1) (S - 1))

The last term is what the first two both hold, here as the residual of the two-way layout, which makes the whole
unbiased under crossed random effects also for few seeds. var_seeds - var_both, the part of the seeds alone, is not let
below 0. With few seeds a normal quantile would be too small; Student's t is used, with Satterthwaite's degrees of
freedom ("An approximate distribution of estimates of variance components", Biometrics Bulletin 2, 1946)."""

from dataclasses import dataclass
from math import atan, exp, inf, isinf, lgamma, pi, sqrt

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
LEVEL = 0.05
_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(64)


def two_sided_p(t: float, df: float) -> float:
    """P(|T| >= |t|) of Student's t with df >= 1 degrees of freedom, which need not be whole: with t = sqrt(df) tan x
    the density is cos(x)^(df - 1) up to a constant, integrated by Gauss-Legendre (to 1e-6)."""
    if isinf(t):
        return 0.0
    start = atan(abs(t) / sqrt(df))
    end = min(pi / 2, start + 14 / sqrt(df))  # beyond it less than 1e-12 is left
    x = start + (end - start) * (_NODES + 1) / 2
    integral = float(_WEIGHTS @ np.cos(x) ** (df - 1)) * (end - start) / 2
    return min(1.0, 2 * exp(lgamma((df + 1) / 2) - lgamma(df / 2)) / sqrt(pi) * integral)


@dataclass(frozen=True)
class OverSeeds:
    """How one sample of seeds moves the mean: var_seeds and var_both of the formula above."""

    seeds: int
    of_seeds: float
    of_both: float

    @property
    def variance(self) -> float:
        """By the seeds alone."""
        return max(self.of_seeds - self.of_both, 0.0)


@dataclass(frozen=True)
class TwoWay:
    """A difference and what makes it vary. images (N,): its mean over seeds on each image."""

    difference: float
    images: Floats
    seeds: tuple[OverSeeds, ...]
    df: float

    @property
    def variance(self) -> float:
        return _variance_of_mean(self.images) + sum(each.variance for each in self.seeds)

    @property
    def p_value(self) -> float:
        """Two-sided, of a difference of 0."""
        if self.difference == 0:
            return 1.0
        return two_sided_p(self.difference / sqrt(self.variance), self.df) if self.variance > 0 else 0.0


def paired(a: Floats, b: Floats) -> TwoWay:
    """a and b (S, N): whether each image was classified right, in the same order of seeds; b's or a's S may be 1 where
    it has no seed. With S = 1 both, only the images vary."""
    return _two_way((a - b,), (1,))


def unpaired(a: Floats, b: Floats) -> TwoWay:
    """a (S_a, N) and b (S_b, N), whose seeds have nothing in common: the images are still the same."""
    return _two_way((a, b), (1, -1))


def _two_way(samples: tuple[Floats, ...], signs: tuple[int, ...]) -> TwoWay:
    images = sum(sign * sample.mean(0) for sign, sample in zip(signs, samples, strict=True))
    assert isinstance(images, np.ndarray)
    n = len(images)
    of_images = _variance_of_mean(images)
    parts = [(of_images, n - 1.0)]  # (signed variance, its degrees of freedom), for Satterthwaite
    seeds = []
    for sample in samples:
        s = len(sample)
        if s < 2:
            continue
        deviations = sample.mean(1) - sample.mean()
        residuals = sample - sample.mean(0) - deviations[:, None]
        of_seeds = float(deviations @ deviations) / (s * (s - 1))
        of_both = float(np.vdot(residuals, residuals)) / (n * s * max(n - 1, 1) * (s - 1))
        seeds.append(OverSeeds(s, of_seeds, of_both))
        if of_seeds > of_both:
            parts += [(of_seeds, s - 1.0), (-of_both, (n - 1.0) * (s - 1))]
    total = sum(variance for variance, _ in parts)
    spread = sum(variance**2 / df for variance, df in parts if df > 0)
    df = total**2 / spread if spread > 0 else inf
    return TwoWay(float(images.mean()), images, tuple(seeds), float(np.clip(df, 1.0, 1e6)))


def _variance_of_mean(values: Floats) -> float:
    return float(values.var(ddof=1)) / len(values) if len(values) > 1 else 0.0


def t_test(differences: Floats) -> float:
    """Two-sided p-value of a mean of 0; (S,) with S >= 2."""
    mean, variance = float(differences.mean()), _variance_of_mean(differences)
    return _p(mean, variance, len(differences) - 1.0)


def welch_test(a: Floats, b: Floats) -> float:
    """Two-sided p-value of equal means; at least 2 values each (Welch, Biometrika 34, 1947)."""
    of_a, of_b = _variance_of_mean(a), _variance_of_mean(b)
    spread = of_a**2 / (len(a) - 1) + of_b**2 / (len(b) - 1)
    return _p(float(a.mean() - b.mean()), of_a + of_b, (of_a + of_b) ** 2 / spread if spread > 0 else 1.0)


def _p(difference: float, variance: float, df: float) -> float:
    if abs(difference) < 1e-12:
        return 1.0
    return two_sided_p(difference / sqrt(variance), df) if variance > 0 else 0.0
