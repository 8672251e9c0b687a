"""How far the estimate of finite data is from the truth: laws of chance, exact or for many comparisons.

Scores are (X, Y) tables of rewards in nats, one row a prompt, as in certificates.py. A *population* carries
the exact probability of every outcome as its weights, data carry counts.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..certificates import Curvature, connected, curvature, largest_resistance
from ..preferences import Rankings, win_counts
from ..validation import InputError, check_count, check_positive


class FiniteDataLaw(NamedTuple):
    """How far the estimate may be from the truth at a stated false-alarm rate, for many rankings [D11.4].

    The limits are those of the normal law, which the estimate follows for many rankings; where `plenty` is
    below some 8 they are rough, and only the score statistic, whose mean is exact, should be judged.
    """

    score: float  # the score statistic sum_x N_x g' H^+ g at the truth; its mean is exactly `degrees`
    degrees: int  # its degrees of freedom
    score_limit: float  # its upper quantile at the false-alarm rate
    logp_deviation: Tensor  # (X, Y) standard deviation of log pi_hat(y|x) around log pi*(y|x)
    # (X, Y) it times the normal quantile that all entries together exceed with at most the false-alarm rate
    logp_limit: Tensor
    plenty: float  # the least number of rankings of a prompt over its largest resistance rho^2


def finite_data_law(
    optimal: Tensor, ref_logps: Tensor, rankings: Rankings, *, beta: float, false_alarm: float = 1e-6
) -> FiniteDataLaw:
    """The law of the estimate under the design of `rankings`, from the Fisher information at the truth
    [D11.3, D11.4].

    Args:
        optimal: (X, Y) log pi*, the truth the data were drawn from; ref_logps (X, Y); beta > 0.
        rankings: the data, weights as counts.
        false_alarm: probability with which correct code may exceed the limits.
    Raises: InputError: beta <= 0; a prompt's comparisons fall apart, so that rewards cannot be told.
    """
    check_positive("beta", beta)
    optimal, ref_logps = optimal.double(), ref_logps.double()
    state = _curvature(beta * (optimal - ref_logps), rankings)
    g = state.gradient.unsqueeze(-1)
    score = (state.total * (g.mT @ state.inverse @ g).flatten()).sum().item()
    degrees = int(state.compared.sum() - (state.total > 0).sum())
    # To first order log pi(y) moves by (e_y - pi*)' ds / beta, so its variance is a quadratic form in I^+.
    probability = optimal.exp().unsqueeze(-1)
    mean = state.inverse @ probability  # (X, Y, 1)
    own = state.inverse.diagonal(dim1=-2, dim2=-1)
    variance = own - 2 * mean.squeeze(-1) + (probability.mT @ mean).squeeze(-1)
    deviation = (variance.clamp(min=0) / state.total.unsqueeze(-1)).sqrt() / beta
    deviation = torch.where(state.compared, deviation, 0)
    quantile = normal_quantile(1 - false_alarm / (2 * int(state.compared.sum())))
    plenty = (state.total / largest_resistance(state))[state.total > 0].min().item()
    limit = chi_square_quantile(1 - false_alarm, degrees)
    return FiniteDataLaw(score, degrees, limit, deviation, quantile * deviation, plenty)


def kl_law(optimal: Tensor, ref_logps: Tensor, population: Rankings, *, beta: float) -> tuple[Tensor, Tensor]:
    """The limiting law of N KL(pi_hat || pi*), and of N KL(pi* || pi_hat), for many comparisons N [D11.5].

    For small errors ds of the rewards KL = ds' Sigma ds / (2 beta^2), Sigma = diag(pi*) - pi* pi*', and ds
    has covariance I^+ / N. So N KL tends to sum_k lambda_k z_k^2 / 2, with independent standard normal z_k
    and lambda the eigenvalues of Sigma I^+ / beta^2. It is ds / beta that must be small: a small beta needs
    more comparisons. In simulations the mean was off by at most (1 + 1 / beta^2) rho^2 / N of itself, once
    that is below 1/4.

    Args: optimal, ref_logps, beta as `finite_data_law`; population with exact probabilities as weights.
    Returns: (X,) the mean tr(Sigma I^+) / (2 beta^2) in nats, and the eigenvalues (X, Y).
    Raises: InputError: beta <= 0; a prompt's comparisons fall apart.
    """
    check_positive("beta", beta)
    optimal, ref_logps = optimal.double(), ref_logps.double()
    state = _curvature(beta * (optimal - ref_logps), population)
    probability, root = optimal.exp(), (optimal / 2).exp()
    factor = torch.diag_embed(root) - probability.unsqueeze(-1) * root.unsqueeze(-2)  # factor factor' = Sigma
    eigenvalues = torch.linalg.eigvalsh(factor.mT @ state.inverse @ factor).clamp(min=0) / beta**2
    return eigenvalues.sum(-1) / 2, eigenvalues


def score_gradients(scores: Tensor, rankings: Rankings) -> Tensor:
    """Each ranking's own gradient (E, Y) in the scores of its prompt; at the truth it has mean zero and
    covariance I [D11.3]. A data set's gradient g is their mean."""
    number = torch.arange(len(rankings.prompt), device=rankings.prompt.device)
    single = Rankings(number, rankings.order, torch.ones_like(rankings.weight))
    return curvature(scores[rankings.prompt], single).gradient


def score_moments(scores: Tensor, population: Rankings, num_rankings: int) -> tuple[float, float]:
    """Exact mean and variance of the score statistic q = N g' I^+ g at the truth, for one prompt [D11.5].

    They are d and 2 d (1 - 1/N) + (E q_1^2 - d^2) / N, with d = Y - 1 degrees of freedom and q_1 the
    statistic of a single ranking; at every N, whether or not the data have an estimate.

    Args: scores (1, Y) the true rewards; population with exact probabilities as weights, of connected pairs.
    Raises: InputError: several prompts; comparisons that fall apart; num_rankings < 1.
    """
    check_count("num_rankings", num_rankings)
    if len(scores) != 1:
        raise InputError(f"scores must be of one prompt, got {len(scores)}; give one row at a time.")
    state, gradient = _curvature(scores, population), score_gradients(scores, population)
    single = (gradient @ state.inverse[0] * gradient).sum(-1)
    degrees = int(state.compared.sum()) - 1
    square = (population.normalised().weight @ single**2).item()
    return float(degrees), 2 * degrees * (1 - 1 / num_rankings) + (square - degrees**2) / num_rankings


def cramer_rao(scores: Tensor, population: Rankings, num_rankings: int) -> Tensor:
    """(X,) tr(I^+) / N, the Cramer-Rao bound: no unbiased estimate of the mean-zero rewards has a smaller
    expected squared error, summed over the completions, in nats^2. Maximum likelihood attains it for
    many rankings; with few it is biased and may fall on either side [D11.3].

    Raises: InputError: a prompt's comparisons fall apart; num_rankings < 1.
    """
    check_count("num_rankings", num_rankings)
    inverse = _curvature(scores, population).inverse
    return inverse.diagonal(dim1=-2, dim2=-1).sum(-1) / num_rankings


def _curvature(scores: Tensor, rankings: Rankings) -> Curvature:
    """The curvature at the scores, where comparisons join all completions of a prompt that were compared."""
    state = curvature(scores, rankings)
    wins = win_counts(rankings, *state.compared.shape)
    apart = ~connected(wins + wins.mT) & state.compared.unsqueeze(-1) & state.compared.unsqueeze(-2)
    if apart.any():
        x, first, second = apart.nonzero()[0].tolist()
        raise InputError(
            f"prompt {x}: no chain of comparisons leads from completion {first} to {second}, so the data do "
            "not tell their rewards apart; add comparisons between them."
        )
    return state


def no_estimate_bound(chances: Tensor, num_pairs: int) -> float:
    """Union bound on the probability that N comparisons have no maximum-likelihood estimate [D11.1].

    None exists exactly if some group never lost to the others, so the bound adds up, over all groups S,
    (1 - P(one outside S beats one in S))^N. It is exact for two completions; it may exceed one.

    Args: chances (Y, Y), entry [i, j] the probability that a comparison is i beating j, all summing to one.
    Raises: InputError: chances no square table of 2 to 20 completions, negative, or not summing to one;
        num_pairs < 1.
    """
    check_count("num_pairs", num_pairs)
    if chances.dim() != 2 or chances.shape[0] != chances.shape[1]:
        raise InputError(f"chances must be a square table (Y, Y), got shape {tuple(chances.shape)}.")
    Y = len(chances)
    if not 2 <= Y <= 20:
        raise InputError(f"chances must be of 2 to 20 completions, all groups are listed; got {Y}.")
    if not (chances >= 0).all() or not abs(chances.sum().item() - 1) <= 1e-6:  # NaN fails as well
        raise InputError("chances must be probabilities that sum to one over the table; divide by their sum.")
    inside = torch.cartesian_prod(*[chances.new_tensor([0, 1])] * Y)[1:-1]  # (2^Y - 2, Y): all groups
    lost = ((1 - inside) @ chances * inside).sum(-1)
    return (num_pairs * torch.log1p(-lost.clamp(max=1))).exp().sum().item()


def normal_quantile(probability: float) -> float:
    """The standard normal quantile [D11.4]. Raises InputError: probability outside (0, 1)."""
    _check_open(probability)
    return torch.special.ndtri(torch.tensor(probability, dtype=torch.float64)).item()


def chi_square_quantile(probability: float, degrees: int) -> float:
    """The chi-square quantile, by bisection of the regularised incomplete gamma function [D11.4].

    Raises: InputError: probability outside (0, 1); degrees < 1.
    """
    check_count("degrees", degrees)
    _check_open(probability)
    half = torch.tensor(degrees / 2, dtype=torch.float64)
    low, high = 0.0, degrees + 1e3 + 10 * math.sqrt(degrees)
    for _ in range(200):
        middle = (low + high) / 2
        upper_tail = torch.special.gammaincc(half, torch.tensor(middle / 2, dtype=torch.float64)).item()
        low, high = (middle, high) if upper_tail > 1 - probability else (low, middle)
    return (low + high) / 2


def _check_open(probability: float) -> None:
    if not 0 < probability < 1:
        raise InputError(f"probability must lie in (0, 1), got {probability}.")
