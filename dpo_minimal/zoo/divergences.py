"""Divergences other than the reverse KL: the optimum under each, and the loss that learns it.

D(pi || pi_ref) = sum_y pi_ref(y) f(u) with u = pi(y) / pi_ref(y) and a convex f [D11.11]. Only f' is used, in
x = log u, and f(1) = f'(1) = 0 (a multiple of u - 1 in f changes nothing):

    reverse_kl  f' = log u            alpha           f' = (1 - u^-alpha) / alpha, 0 <= alpha <= 1
    forward_kl  f' = 1 - 1 / u        jensen_shannon  f' = log(2 u / (1 + u))
    chi2_kl     f' = u - 1 + log u

alpha = 0 is the reverse KL, KL(pi || pi_ref), and alpha = 1 the forward one, KL(pi_ref || pi).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..certificates import maximum_likelihood
from ..closed_form import _tilt
from ..losses import BETA, DPO, Loss, Option
from ..validation import InputError, check_share
from .inputs import bisection, of_logratios


class Divergence(NamedTuple):
    """What is used of an f, as functions of log-ratios x = log u [D11.11].

    Fields:
        score: f'(u); beta times it is the implicit reward.
        slope: u f''(u), its derivative in x.
        below: (x, d) -> the log-ratio whose score is d less than that of x; NaN where there is none.
        span: from where to where the loss reads x; beyond, scores of e^44 and more could overflow float32.
    """

    score: Callable[[Tensor], Tensor]
    slope: Callable[[Tensor], Tensor]
    below: Callable[[Tensor, Tensor], Tensor]
    span: tuple[float, float] = (-math.inf, math.inf)


def _power(alpha: float) -> Divergence:
    if alpha < 1e-20:  # no further than rounding from log u
        return Divergence(lambda x: x, torch.ones_like, lambda x, d: x - d)
    return Divergence(
        score=lambda x: -torch.expm1(-alpha * x) / alpha,
        slope=lambda x: torch.exp(-alpha * x),
        below=lambda x, d: -_log_add(-alpha * x, alpha * d) / alpha,
        span=(-44 / alpha, math.inf),
    )


def _log_add(a: Tensor, c: Tensor) -> Tensor:
    """log(e^a + c), also where e^a overflows; NaN where e^a + c < 0."""
    more = torch.logaddexp(a, c.clamp(min=0).log())
    return torch.where(c < 0, a + torch.log1p(c * torch.exp(-a)), more)


def _log_omega(y: Tensor) -> Tensor:
    """The x with x + e^x = y, by Newton's method from above, where a convex function only falls."""
    x = torch.where(y > 1, y.clamp(min=1).log(), y)
    for _ in range(6):
        x = x - (x + x.exp() - y) / (1 + x.exp())
    return x


DIVERGENCES = {
    "reverse_kl": _power(0.0),
    "forward_kl": _power(1.0),
    "jensen_shannon": Divergence(
        score=lambda x: math.log(2) + F.logsigmoid(x),
        slope=lambda x: torch.sigmoid(-x),
        below=lambda x, d: -d - _log_add(-x, -torch.expm1(-d)),
    ),
    "alpha": _power,
    "chi2_kl": Divergence(
        score=lambda x: torch.expm1(x) + x,
        slope=lambda x: 1 + x.exp(),
        below=lambda x, d: _log_omega(x + x.clamp(max=700).exp() - d),  # e^700 is nearly the largest float64
        span=(-math.inf, 44.0),
    ),
}


def divergence_of(divergence: str, alpha: float | None = None) -> Divergence:
    """That of the name, with alpha in [0, 1] for "alpha" and for no other [D11.11]. Raises InputError."""
    if divergence not in tuple(DIVERGENCES):
        raise InputError(f"divergence must be one of {', '.join(DIVERGENCES)}, got {divergence!r}.")
    if (divergence == "alpha") != (alpha is not None):
        fault = "does not use alpha; leave it out" if divergence != "alpha" else "needs alpha, in [0, 1]"
        raise InputError(f"divergence {divergence} {fault}.")
    if alpha is None:
        return DIVERGENCES[divergence]
    check_share("alpha", alpha)
    return _power(float(alpha))


def divergence_optimal_logps(
    ref_logps: Tensor, rewards: Tensor, *, beta: float, divergence: str, alpha: float | None = None
) -> Tensor:
    """log pi of the one maximiser of E_pi[r] - beta D(pi || pi_ref) [D11.11].

    pi = pi_ref (f')^-1((r - lambda) / beta), lambda the one number for each prompt with which it sums to one.
    The reverse KL gives `optimal_logps`. Reckoned in float64.

    Args:
        ref_logps, rewards: (..., Y), as `optimal_logps`, beta > 0.
        divergence: a key of `DIVERGENCES`; alpha: in [0, 1], for "alpha" only.
    Returns: (..., Y) log-probabilities, nats, -inf where the reference is. Gradients flow.
    Raises: InputError: as `optimal_logps`; an unknown divergence; alpha missing, out of range or not used.
    Source: Wang et al. (2023), "Beyond Reverse KL".

    Example:
        >>> ref, rewards = torch.tensor([0.5, 0.3, 0.2]).log(), torch.tensor([0.0, 1.0, 2.0])
        >>> divergence_optimal_logps(ref, rewards, beta=0.5, divergence="forward_kl").exp()
        tensor([0.1172, 0.1324, 0.7504])
    """
    rule = divergence_of(divergence, alpha)
    _tilt(ref_logps, rewards, beta)  # for its checks
    ref, scaled = ref_logps.double().log_softmax(-1), rewards.double() / beta
    x = _log_ratios(rule, ref.detach(), scaled.detach())
    # One step of Newton's method for lambda, at its root: it moves nothing but the last digits, and its
    # derivatives are those of the implicit function theorem.
    lift = 1 / rule.slope(x).clamp(min=torch.finfo(x.dtype).tiny)  # of a log-ratio, per score
    share = lift * (ref.detach() + x).softmax(-1)
    moved = scaled - scaled.detach()  # zero
    excess = (ref + x).logsumexp(-1, keepdim=True) + (share * moved).sum(-1, keepdim=True)
    return (ref + x + lift * (moved - excess / share.sum(-1, keepdim=True))).to(ref_logps.dtype)


def _log_ratios(rule: Divergence, ref: Tensor, scaled: Tensor) -> Tensor:
    """(..., Y) whose scores differ as `scaled` does and whose policy sums to one, by halving: the log-ratio
    of the best completion is not below 0, as all others are below it, and no probability exceeds one."""
    top, best = scaled.masked_fill(ref == -math.inf, -math.inf).max(-1, keepdim=True)
    down = torch.where(ref > -math.inf, top - scaled, 0)

    def over(x: Tensor) -> Tensor:
        return (ref + rule.below(x, down)).logsumexp(-1, keepdim=True) > 0

    return rule.below(bisection(over, torch.zeros_like(top), -ref.gather(-1, best))[1], down)


@of_logratios
def divergence_dpo_loss(
    chosen: Tensor, rejected: Tensor, *, beta: float, divergence: str, alpha: float | None = None
) -> tuple[Tensor, ...]:
    """DPO under another divergence: -log sigmoid(m), m = beta (f'(u_w) - f'(u_l)), u = pi / pi_ref [D11.12].

    Rewards are beta f'(u). The pulls are two: beta sigmoid(-m) u f''(u), of the chosen u and the rejected.
    The reverse KL gives `dpo_loss`. Where u^-alpha (forward_kl: 1 / u, chi2_kl: u) exceeds e^44 it is held
    there, that it may not overflow: the completion's reward is constant, without gradient and pull.

    Args: as `dpo_loss`; divergence: a key of `DIVERGENCES`; alpha: in [0, 1], for "alpha" only.
    Returns, Raises: as `dpo_loss`; InputError also as `divergence_optimal_logps`.
    Source: Wang et al. (2023); for chi2_kl Huang et al. (2024), who clip the margin, which is not done here.
    """
    rule, logratios = divergence_of(divergence, alpha), (chosen, rejected)
    held = [x.clamp(*rule.span) for x in logratios]
    chosen_reward, rejected_reward = (beta * rule.score(x) for x in held)
    pull = beta * torch.sigmoid(rejected_reward - chosen_reward)
    # where x is held the clamp lets no gradient through
    pulls = [pull * rule.slope(x) * (x == free) for x, free in zip(held, logratios)]
    return -F.logsigmoid(chosen_reward - rejected_reward), *pulls, chosen_reward, rejected_reward


def _record(name: str, title: str, summary: str, divergence: str, *more: Option, source="Wang et al. (2023)"):
    def optimum(rankings, ref_logps: Tensor, **options: float) -> Tensor:
        rewards = maximum_likelihood(rankings, ref_logps > -math.inf)
        return divergence_optimal_logps(ref_logps.double(), rewards, divergence=divergence, **options)

    return Loss(
        name, title, partial(divergence_dpo_loss, divergence=divergence), summary, (BETA, *more),
        start=DPO.start, optimum=optimum, proof="D11.12", source=source, charted=False,
    )  # fmt: skip


FORWARD_KL = _record("forward_kl", "forward-KL DPO", "dpo under the forward KL", "forward_kl")
JENSEN_SHANNON = _record(
    "jensen_shannon", "Jensen-Shannon DPO", "dpo under that divergence", "jensen_shannon"
)
ALPHA = _record(
    "alpha_divergence", "α-DPO", "dpo under a divergence between the two KL", "alpha",
    Option("alpha", "[0, 1]", 0.5, "0 is dpo, 1 is forward_kl", "α"),
)  # fmt: skip
CHI2_KL = _record("chi2_kl", "χPO", "dpo under chi-squared plus KL", "chi2_kl", source="Huang et al. (2024)")
