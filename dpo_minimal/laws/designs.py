"""Who draws the pairs: samplers of comparisons, what each makes the gap to pi* cost, and the best of all.

A *design* is the distribution mu of the pairs that people are asked about. The optimum of endless data does
not depend on it, the error of finite data does. Tables are (X, Y); each prompt has a design of its own.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..certificates import laplacian_inverse, maximum_likelihood
from ..closed_form import optimal_logps
from ..preferences import Rankings, Slate, all_sets, expected_pairs, reference_pairs, win_counts
from ..validation import InputError, check_count, check_log_distribution, check_positive, check_same_shape

SAMPLERS = ("uniform", "reference", "policy", "mixed", "tempered", "best")


def sampler_pairs(sampler: str, policy: Tensor, ref_logps: Tensor, *, beta: float) -> Slate:
    """The pairs that a sampler draws: two independent completions from q, drawn again while they are equal,
    so that mu_ij = 2 q_i q_j / (1 - sum_y q_y^2) [D11.19].

    Args:
        sampler: "uniform", "reference" and "policy" say what q is; "mixed" is half of either of these two,
            "tempered" the policy at temperature 2, its square root; "best" is `best_design`, without a q.
        policy, ref_logps: (X, Y) log-probabilities; beta > 0.
    Raises: InputError: an unknown sampler; tables of another shape or no distributions; beta <= 0.
    """
    _check(policy, ref_logps, beta)
    if sampler not in SAMPLERS:
        raise InputError(f"sampler must be one of {', '.join(SAMPLERS)}, got {sampler!r}.")
    if sampler == "best":
        return best_design(policy, ref_logps, beta=beta)[0]
    q = {
        "uniform": torch.where(ref_logps > -math.inf, 0, ref_logps), "reference": ref_logps,
        "policy": policy, "mixed": torch.logaddexp(policy, ref_logps), "tempered": policy / 2,
    }[sampler]  # fmt: skip
    return reference_pairs(q.double().log_softmax(-1))


def design_law(slate: Slate, optimal: Tensor, ref_logps: Tensor, *, beta: float) -> Tensor:
    """(X,) nats: what N E KL(pi_hat || pi*) tends to for N pairs of a design, the mean of `kl_law`; NaN where
    they connect the completions too weakly for float64 to tell [D11.19]. Raises: as `sampler_pairs`."""
    _check(optimal, ref_logps, beta)
    return _law_and_slope(_table(slate, ref_logps), optimal, ref_logps, beta)[0]


def best_design(
    optimal: Tensor, ref_logps: Tensor, *, beta: float, tolerance: float = 0.01
) -> tuple[Slate, Tensor]:
    """The design with the least `design_law`, by multiplicative steps, with a certificate [D11.21].

    A step is mu <- mu sqrt(g), rescaled to sum to one, where g_ij = -df/dmu_ij for the law f. The mean of g
    under mu is f, and no design has a law below f^2 / max g.

    Args: optimal (X, Y) log pi*, which nobody knows before the labels; tolerance: the steps end once all gaps
        are below it, and a tenth of it goes to all pairs alike, which keeps the design connected.
    Returns: the design; (X,) the gap 1 - f / max g, a bound on the share of f that is too much; inf where
        float64 cannot tell. Raises: InputError: as `sampler_pairs`; tolerance <= 0.
    """
    _check(optimal, ref_logps, beta)
    check_positive("tolerance", tolerance)
    pairs = all_sets(ref_logps > -math.inf)
    even = mu = _table(pairs, ref_logps)
    for _ in range(3000):  # a hundred are usual, 500 for a tolerance of 1e-5
        law, slope = _law_and_slope(mu, optimal, ref_logps, beta)
        gap = 1 - law / slope.amax((-2, -1))
        if not (gap > tolerance).any():
            break
        step = torch.where(gap.isnan()[:, None, None], mu, mu * slope.sqrt())
        mu = (1 - tolerance / 10) * 2 * step / step.sum((-2, -1), keepdim=True) + tolerance / 10 * even
    return pairs._replace(weight=mu[pairs.prompt, *pairs.items.T] / len(mu)), gap.nan_to_num(math.inf)


def _law_and_slope(mu: Tensor, optimal: Tensor, ref_logps: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """(X,) f = tr(Sigma I^+) / (2 beta^2), and (X, Y, Y) g_ij = -df/dmu_ij, of symmetric mu."""
    exists, optimal, ref_logps = ref_logps > -math.inf, optimal.double(), ref_logps.double()
    rewards = torch.where(exists, beta * (optimal - ref_logps), 0)
    margin = rewards.unsqueeze(-1) - rewards.unsqueeze(-2)
    doubt = margin.sigmoid() * (-margin).sigmoid() * (exists.unsqueeze(-1) & exists.unsqueeze(-2))
    information = torch.diag_embed((mu * doubt).sum(-1)) - mu * doubt
    inverse = laplacian_inverse(information, exists)
    known = inverse.norm(dim=(-2, -1)) * information.norm(dim=(-2, -1)) <= 1e8  # as in `certify`; not if NaN
    p = optimal.exp()
    # With d = e_i - e_j the derivative of I^+ in mu_ij is -doubt_ij I^+ d d' I^+.
    moved = inverse @ (torch.diag_embed(p) - p.unsqueeze(-1) * p.unsqueeze(-2)) @ inverse
    own = moved.diagonal(dim1=-2, dim2=-1)
    slope = doubt * (own.unsqueeze(-1) + own.unsqueeze(-2) - 2 * moved).clamp(min=0) / (2 * beta**2)
    slope = torch.where(known[:, None, None], slope, math.nan)
    return (mu * slope).sum((-2, -1)) / 2, slope


def average_design(
    sampler: str, start: Tensor, optimal: Tensor, ref_logps: Tensor, *, beta: float, rounds: int
) -> Slate:
    """The pairs of all rounds of `label_in_rounds`, once labels are many: one for the policy `start`, the
    others for pi* [D11.22]. Args, Raises: as there."""
    first, later = (sampler_pairs(sampler, policy, ref_logps, beta=beta) for policy in (start, optimal))
    return later._replace(weight=first.weight / rounds + later.weight * (1 - 1 / rounds))


def label_in_rounds(
    sampler: str, start: Tensor, rewards: Tensor, ref_logps: Tensor, num_pairs: int, *, beta: float,
    rounds: int, generator,
) -> Tensor:  # fmt: skip
    """Bradley-Terry labels of pairs that a sampler draws for the policy trained so far [D11.22].

    The first of equal rounds is for the policy `start`; before each other, all labels so far train one to the
    end, with the same reference and half a win and half a loss of each completion imagined [D11.1].
    Args: num_pairs of each prompt; rounds >= 1; generator of numpy; the rest, Raises: as `sampler_pairs`.
    Returns: (X, Y, Y) how often the row's completion beat the column's.
    """
    check_count("num_pairs", num_pairs)
    check_count("rounds", rounds)
    exists = ref_logps > -math.inf
    half_a_win = exists.sum(-1)[:, None, None] / 4 * _table(all_sets(exists), ref_logps)
    policy, wins = start, torch.zeros_like(half_a_win)
    for k in range(rounds):
        if k > 0:
            estimate = maximum_likelihood(as_rankings(wins + half_a_win), exists)
            policy = optimal_logps(ref_logps, estimate, beta=beta)
        slate = sampler_pairs(sampler, policy, ref_logps, beta=beta)
        chance = win_counts(expected_pairs(rewards, slate), *rewards.shape).flatten(1)
        count = num_pairs * (k + 1) // rounds - num_pairs * k // rounds
        drawn = generator.multinomial(count, (chance / chance.sum(-1, keepdim=True)).numpy())
        wins += torch.from_numpy(drawn).view_as(wins)
    return wins


def as_rankings(wins: Tensor) -> Rankings:
    """The comparisons that `win_counts` counts as (X, Y, Y) [D11.8]."""
    prompt, first, second = wins.nonzero(as_tuple=True)
    return Rankings(prompt, torch.stack([first, second], -1), wins[prompt, first, second])


def _table(slate: Slate, ref_logps: Tensor) -> Tensor:
    """(X, Y, Y) the pairs' distribution for each prompt, [i, j] and [j, i] both that of the pair."""
    mu = win_counts(Rankings(slate.prompt, slate.items, slate.weight), *ref_logps.shape)
    return 2 * (mu + mu.mT) / (mu + mu.mT).sum((-2, -1), keepdim=True)


def _check(policy: Tensor, ref_logps: Tensor, beta: float) -> None:
    check_same_shape(policy=policy, ref_logps=ref_logps)
    check_log_distribution(policy=policy, ref_logps=ref_logps)
    check_positive("beta", beta)
