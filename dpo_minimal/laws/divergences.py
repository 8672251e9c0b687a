"""What is true under a divergence other than the reverse KL: its value, the objective, the frontier, and how
close to the optimum a policy provably is. The divergences are those of zoo/divergences.py."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from ..certificates import EPS, Certificate, certify_scores
from ..closed_form import _check_world, kl_divergence
from ..preferences import Rankings
from ..validation import InputError, check_log_distribution, check_positive, check_same_shape
from ..zoo.divergences import divergence_of, divergence_optimal_logps


def divergence_value(logps: Tensor, ref_logps: Tensor, *, divergence: str, alpha=None) -> Tensor:
    """D(pi || pi_ref) = sum_y pi_ref(y) f(pi(y) / pi_ref(y)), +inf where f says so [D11.11].

    Args: logps, ref_logps (..., Y), -inf allowed. Returns (...,) nats; of alpha between 0 and 1 a difference
    from one over alpha (1 - alpha), and so is its rounding. Raises: as `kl_divergence` and `divergence_of`.
    """
    divergence_of(divergence, alpha)
    check_same_shape(logps=logps, ref_logps=ref_logps)
    check_log_distribution(logps=logps, ref_logps=ref_logps)
    if divergence == "jensen_shannon":
        both, absent = torch.stack([logps, ref_logps]), (logps == -math.inf) & (ref_logps == -math.inf)
        total = both.masked_fill(absent, 0).logsumexp(0)  # of -inf alone it would have no gradient
        mean = (total - math.log(2)).masked_fill(absent, -math.inf)
        return kl_divergence(logps, mean) + kl_divergence(ref_logps, mean)
    if divergence == "forward_kl" or alpha == 1:
        return kl_divergence(ref_logps, logps)
    if alpha:
        overlap = ((1 - alpha) * logps + alpha * ref_logps).exp().sum(-1)
        return (1 - overlap).clamp(min=0) / (alpha * (1 - alpha))
    value = kl_divergence(logps, ref_logps)
    if divergence == "chi2_kl":
        x = torch.where(logps == ref_logps, 0, logps - ref_logps)
        value = value + ((logps.exp() - ref_logps.exp()) * torch.expm1(x)).sum(-1) / 2
    return value


def divergence_objective(logps: Tensor, ref_logps: Tensor, rewards: Tensor, *, beta: float, **rule) -> Tensor:
    """E_pi[r] - beta D(pi || pi_ref), (...,), units of reward [D11.11]. Args, Raises: as `rlhf_objective`,
    and divergence, alpha as `divergence_value`."""
    _check_world(ref_logps, rewards)
    check_positive("beta", beta)
    return (logps.exp() * rewards).sum(-1) - beta * divergence_value(logps, ref_logps, **rule)


def divergence_frontier(
    ref_logps: Tensor, rewards: Tensor, betas: Iterable[float] | Tensor, **rule
) -> tuple[Tensor, Tensor]:
    """The best reachable trade-off: (D, E[r]) at the optimum for each beta, (len(betas), ...) each [D11.11].
    Args, Raises: as `reward_kl_frontier`, and divergence, alpha as `divergence_value`."""
    best = [divergence_optimal_logps(ref_logps, rewards, beta=beta, **rule) for beta in betas]
    if not best:
        raise InputError("betas must hold at least one number.")
    logps = torch.stack(best)
    return divergence_value(logps, ref_logps.expand_as(logps), **rule), (logps.exp() * rewards).sum(-1)


def certify_divergence(
    logps: Tensor, ref_logps: Tensor, rankings: Rankings, *, beta: float, **rule
) -> Certificate:
    """`certify` for `divergence_dpo_loss`: the distance to the minimiser of its own objective [D11.13].

    Where differences of the scores beta f'(u) are within D of the minimiser's, |log pi - log pi*| is at most
    what log u moves by as f'(u) moves by D / beta, either way; inf where f' has no such value. Rounding is
    added on top. Args, Returns, Raises: as `certify` and `divergence_of`.
    """
    of_f = divergence_of(**rule)
    check_positive("beta", beta)
    check_same_shape(logps=logps, ref_logps=ref_logps)
    check_log_distribution(logps=logps, ref_logps=ref_logps)
    logps, ref_logps = logps.detach().double(), ref_logps.detach().double()
    exists = ref_logps > -math.inf
    x = torch.where(exists, logps.log_softmax(-1) - ref_logps.log_softmax(-1), 0)
    bound = certify_scores(beta * of_f.score(x), exists, rankings)
    size = torch.where(exists, torch.maximum(logps.abs(), ref_logps.abs()), 0).amax(-1)
    rounding = 8 * EPS * (1 + size)  # of log pi; of a score slope times it, of a difference twice that
    moved = bound.logp_bound / beta * (1 + rounding) + 2 * rounding * of_f.slope(x).amax(-1)
    down, up = (x - of_f.below(x, sign * moved.unsqueeze(-1)) for sign in (1, -1))
    reach = torch.where(exists, torch.maximum(down, -up), 0).amax(-1)
    reach = torch.where(reach.isnan() | moved.isinf(), math.inf, reach)
    return bound._replace(logp_bound=reach + rounding + logps.logsumexp(-1).abs())
