"""Data sets by the thousand, and what theory says of their estimates: the simulation behind `statistics`.

Everything is about one prompt. Replicates are the prompts of one `Rankings`, so all are estimated at once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ...bandit import Bandit, random_bandit
from ...certificates import connected, curvature, largest_resistance, maximum_likelihood
from ...closed_form import kl_divergence, optimal_logps
from ...laws import sampling_laws
from ...preferences import Rankings, Slate, all_sets, expected_pairs, win_counts

LEVELS = (90, 95, 99)  # per cent
KEYS = ("kl", "reverse_kl", "excess_risk", "squared_error", "wald", "likelihood_ratio")  # of an estimate
CELLS_AT_ONCE = 1_000_000  # counts (data set, outcome) in memory at a time: some 300 MB in Newton's method


@dataclass(frozen=True)
class Settings:
    """The checked options."""

    completions: int
    beta: float
    pairs: tuple[int, ...]
    replicates: int
    seed: int


class Truth(NamedTuple):
    """What the data are drawn from: a world with one prompt and mean-zero rewards, the population of its
    comparisons, beta, log pi* (1, K), I^+ (1, K, K) with I the Fisher information, and rho^2."""

    world: Bandit
    population: Rankings
    beta: float
    optimal: Tensor
    inverse: Tensor
    resistance: float

    @property
    def degrees(self) -> int:
        """K - 1: the mean of the rewards is not determined."""
        return self.optimal.shape[-1] - 1


class Law(NamedTuple):
    """A measurement with its Monte-Carlo standard error beside what theory predicts, to within `slack`.

    `judged` is False where N is too small for the prediction, or too few data sets have an estimate.
    """

    key: str
    label: str
    measured: float
    error: float
    theory: float
    slack: float
    judged: bool

    @property
    def outside(self) -> bool:
        """Is it further from the prediction than chance explains? Correct code says so in some one of 10^4
        simulated checks; 4 errors of a normal law would be 6 in 10^5, but not all these laws are normal."""
        return self.judged and not abs(self.measured - self.theory) <= 4 * self.error + self.slack


class Size(NamedTuple):
    """One number of pairs: each data set's statistics (R,), NaN where it has no estimate, and the laws."""

    pairs: int
    sample: dict[str, Tensor]
    laws: list[Law]
    missing: int
    bound: float

    @property
    def few_estimates(self) -> bool:
        """Do fewer than 90 % have an estimate? Then means over those say little about the laws."""
        return self.missing > 0.1 * len(self.sample["score"])

    @property
    def too_many_missing(self) -> bool:
        """Do more data sets lack an estimate than the union bound allows, as surprising as 4 errors?"""
        if self.bound >= 1 or self.missing == 0:  # a bound of one and more says nothing
            return False
        numbers = self.missing, self.bound * len(self.sample["score"])
        return torch.special.gammainc(*torch.tensor(numbers, dtype=torch.float64)) < 6e-5  # Poisson's tail


def make_truth(settings: Settings, slate: Slate | None = None) -> Truth:
    """A random world, and the pairs that are shown: all equally often, if not told otherwise."""
    world = random_bandit(1, settings.completions, generator=torch.Generator().manual_seed(settings.seed))
    # Subtracting the mean changes neither comparisons nor pi*.
    world = replace(world, rewards=world.rewards - world.rewards.mean())
    population = expected_pairs(world.rewards, slate or all_sets(world.exists))
    state = curvature(world.rewards, population)
    optimal = optimal_logps(world.ref_logps, world.rewards, beta=settings.beta)
    return Truth(world, population, settings.beta, optimal, state.inverse, largest_resistance(state).item())


def simulate(truth: Truth, num_pairs: int, settings: Settings) -> Size:
    """Draw and measure all data sets of one size. Each size has its own stream of random numbers: which
    other sizes are asked for changes nothing."""
    generator = np.random.default_rng([settings.seed, num_pairs])
    at_once = max(1, CELLS_AT_ONCE // len(truth.population.weight))
    parts = []
    for start in range(0, settings.replicates, at_once):
        count = min(at_once, settings.replicates - start)
        parts.append(measure(truth, draw(truth, num_pairs, count, generator)))
    sample = {key: torch.cat([part[key] for part in parts]) for key in parts[0]}
    bound = sampling_laws.no_estimate_bound(win_counts(truth.population, 1, truth.degrees + 1)[0], num_pairs)
    missing = int(sample["kl"].isnan().sum())
    return Size(num_pairs, sample, laws(truth, num_pairs, sample), missing, bound)


def draw(truth: Truth, num_pairs: int, count: int, generator: np.random.Generator) -> Tensor:
    """`count` data sets (R, E): how often each of the population's E outcomes came in `num_pairs` draws.

    Counts of independent draws are multinomial, so these are data sets as `sample_pairs` draws them.
    """
    return torch.from_numpy(generator.multinomial(num_pairs, truth.population.weight.numpy(), size=count))


def measure(truth: Truth, counts: Tensor) -> dict[str, Tensor]:
    """The statistics of each data set (R,), those that shrink as 1 / N times N.

    Returns:
        score: N g' I^+ g at the truth; needs no estimate. The others, NaN where there is none:
        kl, reverse_kl, excess_risk: N KL(pi_hat || pi*), N KL(pi* || pi_hat), N (L(pi_hat) - L(pi*)), nats.
        squared_error: N |r_hat - r|^2 of the mean-zero rewards, nats^2.
        wald, likelihood_ratio: what a confidence region compares with chi-square.
    """
    counts = counts.double()
    number = counts.sum(-1)
    single = sampling_laws.score_gradients(truth.world.rewards, truth.population)
    gradient = counts @ single / number.unsqueeze(-1)
    sample = {"score": number * (gradient @ truth.inverse[0] * gradient).sum(-1)}
    sample |= {key: torch.full_like(number, math.nan) for key in KEYS}
    wins = win_counts(_as_prompts(truth, counts), len(counts), truth.degrees + 1)
    estimable = connected(wins).flatten(1).all(-1)
    if estimable.any():
        for key, values in _measure_estimates(truth, counts[estimable]).items():
            sample[key][estimable] = values
    return sample


def _as_prompts(truth: Truth, counts: Tensor) -> Rankings:
    """Counts (R, E) as comparisons on R prompts, one a data set."""
    replicate, outcome = counts.nonzero(as_tuple=True)
    return Rankings(replicate, truth.population.order[outcome], counts[replicate, outcome])


def _measure_estimates(truth: Truth, counts: Tensor) -> dict[str, Tensor]:
    shape, number, data = (len(counts), truth.degrees + 1), counts.sum(-1), _as_prompts(truth, counts)
    estimate = maximum_likelihood(data, torch.ones(shape, dtype=torch.bool))
    error = estimate - truth.world.rewards
    # What whoever has only the data would use: their own pairs, and the information at their estimate.
    information = curvature(estimate, data).hessian
    fitted = optimal_logps(truth.world.ref_logps.expand(shape), estimate, beta=truth.beta)
    optimal = truth.optimal.expand(shape)
    chosen, rejected = truth.population.order.T
    true_loss, loss = (
        -F.logsigmoid(scores[:, chosen] - scores[:, rejected]) for scores in (truth.world.rewards, estimate)
    )  # (1, E) and (R, E): of each outcome
    excess = loss - true_loss
    return {
        "kl": number * kl_divergence(fitted, optimal),
        "reverse_kl": number * kl_divergence(optimal, fitted),
        "excess_risk": number * (excess @ truth.population.weight),
        "squared_error": number * (error**2).sum(-1),
        "wald": number * (error.unsqueeze(1) @ information @ error.unsqueeze(2)).flatten(),
        "likelihood_ratio": -2 * (counts * excess).sum(-1),
    }


def laws(truth: Truth, num_pairs: int, sample: dict[str, Tensor]) -> list[Law]:
    """Every measurement beside its prediction [D11.3, D11.5].

    The score statistic's moments are exact at every N; its variance is judged from N = 8 rho^2 on, because
    squared deviations have heavy tails below. The others are limits, judged where 99 % of the data sets have
    an estimate and N >= 16 rho^2, and granted a second-order slack: 2 rho^2 / N of the prediction (squared
    error, risk), 0.2 rho^2 / N of it (loss on the own data), (1 + 1 / beta^2) rho^2 / N of it (KL, judged
    where that is at most 1/4), and 0.2 rho^2 / N of coverage, but never more than half of what the region
    leaves out. Simulations of many worlds stayed inside; the slacks are not derived.
    """
    d, relative, number = truth.degrees, truth.resistance / num_pairs, len(sample["score"])
    rewards, population = truth.world.rewards, truth.population
    kl = sampling_laws.kl_law(truth.optimal, truth.world.ref_logps, population, beta=truth.beta)[0].item()
    score_mean, score_variance = sampling_laws.score_moments(rewards, population, num_pairs)
    # Squared errors are times N too.
    bound = sampling_laws.cramer_rao(rewards, population, num_pairs).item() * num_pairs
    kept = {key: values[~values.isnan()] for key, values in sample.items()}
    many = relative <= 1 / 16 and len(kept["kl"]) >= 0.99 * number
    kl_slack = (1 + 1 / truth.beta**2) * relative
    close = many and kl_slack <= 1 / 4

    def coverage(key: str, region: str, level: int) -> Law:
        share = level / 100
        inside = (kept[key] <= sampling_laws.chi_square_quantile(share, d)).double()
        # The error is the law's: the sample's own is 0 where all are inside.
        error = math.sqrt(share * (1 - share) / len(inside)) if len(inside) > 1 else math.nan
        # With two completions coverage jumps by the chance of one count of wins, of order 1 / sqrt(N).
        slack = 0.2 * (relative if d > 1 else math.sqrt(relative))
        return _mean(f"{key}/{level}", f"{level} % {region} region covers", inside, share,
                     min(slack, (1 - share) / 2), many and (d > 1 or slack < 0.02), error)  # fmt: skip

    spread = (kept["score"] - score_mean) ** 2 / score_variance
    # The squares' own standard error is far too small where a sample lacks the rare large ones; that of the
    # limit, chi-square, knows them. The larger of the two, 4 times, was never exceeded in 76000 samples.
    rough = max(_mean("", "", spread, 1.0, 0.0, False).error, math.sqrt((2 + 12 / d) / number))
    return [
        _mean("kl", "N KL(pi_hat || pi*), nats", kept["kl"], kl, kl_slack * kl, close),
        _mean("reverse_kl", "N KL(pi* || pi_hat), nats", kept["reverse_kl"], kl, kl_slack * kl, close),
        _mean("efficiency", "squared error / Cramer-Rao bound", kept["squared_error"] / bound, 1.0,
              2 * relative, many),
        *(coverage("wald", "Wald", level) for level in LEVELS),
        *(coverage("likelihood_ratio", "likelihood-ratio", level) for level in LEVELS),
        _mean("score/mean", "score statistic, mean", kept["score"], score_mean, 0.0, True,
              math.sqrt(score_variance / number)),
        _mean("score/variance", "score statistic, variance / exact", spread, 1.0, 0.0, relative <= 1 / 8,
              rough),
        _mean("excess_risk", "N excess loss, nats", kept["excess_risk"], d / 2, d * relative, many),
        _mean("excess_fit", "N excess loss on its own data, nats", -kept["likelihood_ratio"] / 2, -d / 2,
              0.1 * d * relative, many),
    ]  # fmt: skip


def _mean(
    key: str, label: str, values: Tensor, theory: float, slack: float, judged: bool,
    error: float | None = None,
) -> Law:  # fmt: skip
    """The mean, with the sample's standard error unless a better one is given. Values that are all equal,
    up to rounding, have none and are not judged."""
    measured = values.mean().item()
    if error is None:
        error = values.std().item() / math.sqrt(len(values)) if len(values) > 1 else math.nan
    if error < 1e-12 * abs(measured):
        error, judged = 0.0, False
    return Law(key, label, measured, error, theory, slack, judged)
