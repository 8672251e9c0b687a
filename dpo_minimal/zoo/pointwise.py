"""Losses that judge each completion of a pair by itself, against the reference: NCA, SPPO, APO's two."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ..losses import BETA, Loss
from ..preferences import Rankings, win_counts
from ..validation import InputError, check_positive
from .inputs import bisection, of_logratios


@of_logratios
def nca_loss(chosen: Tensor, rejected: Tensor, *, beta: float) -> tuple[Tensor, Tensor, Tensor]:
    """Noise Contrastive Alignment: -log s(r_w) - log s(-r_w) / 2 - log s(-r_l) / 2, s the sigmoid and
    r = beta log pi/pi_ref [D12.15].

    Odds of e^r that a completion is one of the chosen and not one of all. At beta = 1, for pairs drawn from
    the reference, the optimum is the distribution of the chosen completions. The pulls are
    beta (s(-r_w) - s(r_w) / 2), negative for r_w > log 2, and beta s(r_l) / 2.

    Args, Returns, Raises: as `dpo_loss`.
    Source: Chen et al. (2024), "Noise Contrastive Alignment of Language Models with Explicit Rewards".
    """
    r_w, r_l = beta * chosen, beta * rejected
    losses = -F.logsigmoid(r_w) - (F.logsigmoid(-r_w) + F.logsigmoid(-r_l)) / 2
    return losses, beta * (torch.sigmoid(-r_w) - torch.sigmoid(r_w) / 2), beta * torch.sigmoid(r_l) / 2


@of_logratios
def sppo_loss(chosen: Tensor, rejected: Tensor, *, beta: float) -> tuple[Tensor, Tensor, Tensor]:
    """Self-Play Preference Optimization, hard labels: (a_w - 1/(2 beta))^2 + (a_l + 1/(2 beta))^2 with the
    log-ratios a = log pi/pi_ref [D12.16].

    Least squares towards log-ratios (p - 1/2) / beta, p the share of its comparisons that a completion wins,
    which IPO would reach after normalising; here each gives way in proportion to its probability. The pulls
    are 1/beta - 2 a_w and 1/beta + 2 a_l.

    Args, Returns, Raises: as `dpo_loss`. (In the paper 1/beta is called eta.)
    Source: Wu et al. (2024), "Self-Play Preference Optimization for Language Model Alignment".
    """
    target = 1 / (2 * beta)
    above, below = chosen - target, rejected + target
    return above**2 + below**2, -2 * above, 2 * below


@of_logratios
def apo_zero_loss(chosen: Tensor, rejected: Tensor, *, beta: float) -> tuple[Tensor, Tensor, Tensor]:
    """Anchored Preference Optimization, of chosen completions better than the policy's own:
    1 - s(r_w) + s(r_l), s the sigmoid, r = beta log pi/pi_ref [D12.17].

    Twice KTO at z0 = 0 with weights of one. Descent ends where what is rejected more often than chosen has
    probability zero, which no softmax reaches. The pulls are beta s'(r_w) and beta s'(r_l).

    Args, Returns, Raises: as `dpo_loss`.
    Source: D'Oosterlinck et al. (2024), "Anchored Preference Optimization and Contrastive Revisions".
    """
    r_w, r_l = beta * chosen, beta * rejected
    return torch.sigmoid(-r_w) + torch.sigmoid(r_l), beta * _bell(r_w), beta * _bell(r_l)


@of_logratios
def apo_down_loss(chosen: Tensor, rejected: Tensor, *, beta: float) -> tuple[Tensor, Tensor, Tensor]:
    """Anchored Preference Optimization, of chosen completions worse than the policy's own:
    s(r_w) + 1 - s(r_w - r_l), s the sigmoid, r = beta log pi/pi_ref [D12.17].

    It lowers both, the rejected one more. For beta < 1 descent ends at a single completion, at whichever it
    comes near. The pulls are beta (s'(r_w - r_l) - s'(r_w)) and beta s'(r_w - r_l).

    Args, Returns, Raises, Source: as `apo_zero_loss`.
    """
    r_w, u = beta * chosen, beta * (chosen - rejected)
    return torch.sigmoid(r_w) + torch.sigmoid(-u), beta * (_bell(u) - _bell(r_w)), beta * _bell(u)


def _bell(x: Tensor) -> Tensor:
    """The derivative of the sigmoid."""
    return torch.sigmoid(x) * torch.sigmoid(-x)


# ------------------------------------------------------------------------------------------ where they end


def nca_optimum(rankings: Rankings, ref_logps: Tensor, *, beta: float) -> Tensor:
    """Where NCA ends: each r = log(w / m), w how often y was chosen and m half as often as it was shown, or
    below it, until probabilities sum to one [D12.15].

    Args: comparisons; ref_logps (X, Y). Returns (X, Y) log-probabilities, float64.
    Raises: InputError: a completion was never compared or never chosen; or those r sum to less than one
        probability, where the loss is not convex (not for beta <= 1 and pairs drawn from pi_ref).
    """
    check_positive("beta", beta)
    chosen, shown = _shares(rankings, ref_logps)
    if (chosen == 0).any():
        raise InputError("NCA has no optimum where a completion was never chosen; leave it out.")
    best = (chosen / shown).log() / beta
    return _least(lambda a: (chosen + shown) * torch.sigmoid(beta * a) - chosen, best, ref_logps)


def sppo_optimum(rankings: Rankings, ref_logps: Tensor, *, beta: float) -> Tensor:
    """Where SPPO ends: each log-ratio (w / m - 1) / (2 beta), w and m as in `nca_optimum`, or below it, until
    probabilities sum to one [D12.16].

    Args, Returns: as `nca_optimum`. Raises: the same, but a completion may lose always.
    """
    check_positive("beta", beta)
    chosen, shown = _shares(rankings, ref_logps)
    best = (chosen / shown - 1) / (2 * beta)
    return _least(lambda a: shown * (a - best), best, ref_logps)


def _shares(rankings: Rankings, ref_logps: Tensor) -> tuple[Tensor, Tensor]:
    """(X, Y) weights with which each completion was chosen, and half of those with which it was shown; 1 and
    1 where there is none."""
    wins = win_counts(rankings, *ref_logps.shape)
    chosen, shown, none = wins.sum(-1), (wins.sum(-1) + wins.sum(-2)) / 2, ref_logps == -math.inf
    if (shown.masked_fill(none, 1) == 0).any():
        raise InputError("there is no optimum where a completion was never compared; leave it out.")
    return chosen.masked_fill(none, 1), shown.masked_fill(none, 1)


def _least(slope: Callable[[Tensor], Tensor], best: Tensor, ref_logps: Tensor) -> Tensor:
    """The policy of the least sum of convex functions of its log-ratios a, one a completion [D12.15].

    There slope(a) = -k pi with one k >= 0 a prompt. Either side is monotone, so that bisection finds a from k
    and k from the sum of probabilities; 17 values of k at once, of which two next to each other are kept.

    Args: slope (..., X, Y) -> their derivatives, up to a factor; best (X, Y), where these vanish.
    """
    ref = ref_logps.double().exp()
    if ((ref * best.exp()).sum(-1) < 1 - 1e-12).any():  # rounding
        raise InputError("the optimum is not known where targets sum to less than one; compare other pairs.")

    def logratios(k: Tensor) -> Tensor:
        ends = best - 1e3 + 0 * k, best + 0 * k
        return bisection(lambda a: slope(a) + k * ref * a.exp() > 0, *ends)[1]

    high = (-slope(torch.zeros_like(best)) / ref).nan_to_num(0).amax(-1, keepdim=True).clamp(min=0)
    low, grid = torch.zeros_like(high), torch.linspace(0, 1, 17).to(high).view(-1, 1, 1)
    for _ in range(14):
        k = low + (high - low) * grid  # (17, X, 1)
        place = ((ref * logratios(k).exp()).sum(-1, keepdim=True) >= 1).sum(0, keepdim=True) - 1
        low, high = (k.gather(0, place.clamp(0, 15) + side)[0] for side in (0, 1))
    return (ref_logps + logratios(low)).log_softmax(-1)


NCA = Loss(
    "nca", "NCA", nca_loss, "a classifier of the chosen among all", (BETA,), optimum=nca_optimum,
    start=lambda K, beta: 2 * math.log(2), proof="D12.15", source="Chen et al. (2024)", charted=False,
)  # fmt: skip
SPPO = Loss(
    "sppo", "SPPO", sppo_loss, "squares around log-ratios of +-1 / (2 beta)", (BETA,),
    start=lambda K, beta: 1 / (2 * beta**2), optimum=sppo_optimum, proof="D12.16", charted=False,
    source="Wu et al. (2024)",
)  # fmt: skip
APO_ZERO = Loss(
    "apo_zero", "APO-zero", apo_zero_loss, "a bounded pull up, a bounded pull down", (BETA,), charted=False,
    start=lambda K, beta: 1, optimum="none", proof="D12.17", source="D'Oosterlinck et al. (2024)",
)  # fmt: skip
APO_DOWN = Loss(
    "apo_down", "APO-down", apo_down_loss, "a pull down of both, of the rejected more", (BETA,),
    start=lambda K, beta: 1.0, proof="D12.17", charted=False, source="D'Oosterlinck et al. (2024)",
)  # fmt: skip
