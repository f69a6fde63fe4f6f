"""Learning curves: how a score grows with the number of training items, fitted to a few pilot scores."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import OptimizeWarning, curve_fit

from hf_peft_ext.validation.checks import check, check_count, is_number

Array = NDArray[np.float64]
Scores = Mapping[int, float | Sequence[float]]  # size -> score, or one score for each seed

MIN_POINTS = 3  # the curve has three parameters
EXPONENTS = (0.05, 2.0)
NOISE_FLOOR = 0.005  # of the score's range, where a fit leaves no residuals
DRAWS = 1000
GRID = np.geomspace(*EXPONENTS, 80)


@dataclass(frozen=True)
class LearningCurve:
    """score(x) = a - b (x / x_0)^-c, a power law with an offset, and its bootstrap draws.

    Hestness et al. 2017, "Deep Learning Scaling is Predictable, Empirically" (https://arxiv.org/abs/1712.00409),
    use it for errors.

    Args:
        x_0: the smallest pilot size, items.
        parameters: (a, b, c), the least-squares fit; shape: (3,).
        draws: refitted parameters of the bootstrap; shape: (n_draws, 3).
        noise: standard deviation of one score in each draw; shape: (n_draws,).
        sizes: smallest and largest pilot size, items.
        seed: of the bootstrap.
    """

    x_0: float
    parameters: Array
    draws: Array
    noise: Array
    sizes: tuple[float, float]
    seed: int = 0

    def __call__(self, x: ArrayLike) -> Array:
        """The fitted score at sizes x > 0, with x's shape."""
        return power_law(np.asarray(x, float) / self.x_0, *self.parameters)

    def sample(self, x: float) -> Array:
        """The score of one run at size x in each draw, with the noise of a run; shape: (n_draws,)."""
        rng = np.random.default_rng((self.seed, 1))
        return power_law(x / self.x_0, *self.draws.T) + self.noise * rng.standard_normal(len(self.noise))

    def size_for(self, score: float) -> float:
        """The size where the curve reaches a score: x_0 (b / (a - score))^(1/c); infinite if it never does."""
        a, b, c = self.parameters
        if score >= a:
            return float("inf")
        with np.errstate(over="ignore"):
            return float(self.x_0 * np.float64(b / (a - score)) ** (1 / c))


def power_law(u: ArrayLike, a: ArrayLike, b: ArrayLike, c: ArrayLike) -> Array:
    """a - b u^-c."""
    return np.asarray(a) - np.asarray(b) * np.asarray(u, float) ** -np.asarray(c)


def power_law_jacobian(u: Array, a: float, b: float, c: float) -> Array:
    """Derivatives by a, b and c; shape: (n, 3)."""
    power = u**-c
    return np.stack([np.ones_like(u), -power, b * power * np.log(u)], axis=1)


def fit_curve(
    name: str, scores: Scores, score_range: tuple[float, float], score_sd: float | None = None, seed: int = 0
) -> LearningCurve:
    """Fit a learning curve by least squares, with bounds, and its uncertainty by a parametric bootstrap.

    The bootstrap adds normal noise to the fitted curve and fits again. The standard deviation of the noise is
    `score_sd`; else it is estimated from the residuals with n - 3 degrees of freedom and drawn from its scaled inverse
    chi-squared distribution, so a few points give wide intervals. The bounds are a <= the range's upper end, b >= 0
    and 0.05 <= c <= 2.

    Args:
        name: the field, for errors.
        scores: size -> score, or a list with a score for each seed.
        score_range: lowest and highest possible score.
        score_sd: standard deviation of a score between seeds; None to estimate it.
        seed: of the bootstrap.

    Raises:
        ValueError: fewer than three sizes, a size or a score that is invalid.
    """
    x, y = pilot_points(name, scores, score_range)
    check(name, scores, len(set(x)) >= MIN_POINTS, f"must have at least {MIN_POINTS} sizes to fit a curve")
    u, width = x / x.min(), score_range[1] - score_range[0]
    start = fit_on_grid(u, y[None], score_range)[0]
    lower, upper = parameter_bounds(float(y.mean()), score_range)
    inset = 1e-3 * (upper - lower)
    start = np.clip(start, lower + inset, upper - inset)  # curve_fit starts inside its bounds
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", OptimizeWarning)  # on the covariance, which is not used
        best = curve_fit(power_law, u, y, start, bounds=(lower, upper), jac=power_law_jacobian)[0]
    rng, freedom = np.random.default_rng(seed), max(len(y) - MIN_POINTS, 1)
    if score_sd is None:
        sd = max(float(((power_law(u, *best) - y) ** 2).sum() / freedom) ** 0.5, NOISE_FLOOR * width)
        noise = sd * np.sqrt(freedom / rng.chisquare(freedom, DRAWS))
    else:
        noise = np.full(DRAWS, float(score_sd))
    noise = np.minimum(noise, width)  # a score cannot be farther off than its range
    samples = power_law(u, *best) + noise[:, None] * rng.standard_normal((DRAWS, len(u)))
    draws = fit_on_grid(u, np.clip(samples, *score_range), score_range)
    return LearningCurve(float(x.min()), best, draws, noise, (float(x.min()), float(x.max())), seed)


def pilot_points(name: str, scores: Scores, score_range: tuple[float, float]) -> tuple[Array, Array]:
    """Check the pilot's points; sizes and scores, an element for each seed.

    Raises:
        ValueError: a size that is no positive whole number, or a score outside its range.
    """
    check(name, scores, isinstance(scores, Mapping), "must map sizes to scores")
    sizes, values = [], []
    for size, value in sorted(scores.items()):
        check_count(f"{name} size", size)
        seeds = [value] if isinstance(value, int | float) else list(value)
        check(f"{name}[{size}]", value, len(seeds) > 0, "must have a score")
        for score in seeds:
            inside = is_number(score) and score_range[0] <= score <= score_range[1]
            check(
                f"{name}[{size}]", score, inside, f"must lie in score_range ({score_range[0]:g} to {score_range[1]:g})"
            )
            sizes.append(size)
            values.append(score)
    return np.array(sizes, float), np.array(values, float)


def parameter_bounds(mean: float, score_range: tuple[float, float]) -> tuple[Array, Array]:
    """Lower and upper bounds of (a, b, c). The asymptote a lies above the mean score and in the range."""
    low, high = score_range
    slack = 1e-6 * (high - low)  # curve_fit needs lower < upper
    return np.array([mean - slack, 0, EXPONENTS[0]]), np.array([high + slack, 2 * (high - low), EXPONENTS[1]])


def fit_on_grid(u: Array, y: Array, score_range: tuple[float, float]) -> Array:
    """Least-squares parameters of many curves at once: exponents on a grid, a and b in closed form.

    `curve_fit` takes up to 50 ms for a curve, this a few milliseconds for a thousand.

    Args:
        u: sizes, the smallest is 1; shape: (n,).
        y: scores; shape: (n_curves, n).
        score_range: lowest and highest possible score.

    Returns:
        (a, b, c) of each curve; shape: (n_curves, 3).
    """
    low, high = score_range
    z = u ** -GRID[:, None, None]  # (grid, 1, n)
    mean, z_mean = y.mean(-1), z.mean(-1)  # (n_curves,), (grid, 1)
    slope = ((z - z_mean[..., None]) * (y - mean[:, None])).sum(-1) / ((z - z_mean[..., None]) ** 2).sum(-1)
    b = np.clip(-slope, 0, 2 * (high - low))  # (grid, n_curves)
    a = mean + b * z_mean
    at_top = np.clip((z * (high - y)).sum(-1) / (z**2).sum(-1), 0, 2 * (high - low))  # b where a is at its bound
    a, b = np.minimum(a, high), np.where(a > high, at_top, b)
    error = ((a[..., None] - b[..., None] * z - y) ** 2).sum(-1)  # (grid, n_curves)
    best, curve = error.argmin(0), np.arange(len(y))
    return np.stack([a[best, curve], b[best, curve], GRID[best]], axis=1)
