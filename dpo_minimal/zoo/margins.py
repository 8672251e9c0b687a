"""Other functions of DPO's margin: a hinge, a divergence the other way round, and one that a search found."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ..certificates import require_estimate
from ..closed_form import optimal_logps
from ..losses import BETA, Loss, Option
from ..preferences import Rankings, win_counts
from ..validation import InputError, check_flip_probability, check_positive, check_share
from .inputs import of_margin


@of_margin
def hinge_loss(h: Tensor, *, beta: float) -> tuple[Tensor, Tensor]:
    """The hinge loss: max(0, 1 - u) of the margin u = beta h [D12.9].

    The pull is beta while the margin is below 1, and 0 from there on. Some optimum has whole numbers for
    implicit rewards; of two completions the one that wins more often is 1 ahead, by whatever share it wins.

    Args, Returns, Raises: as `dpo_loss`.
    Source: Zhao et al. (2023), "SLiC-HF"; with a reference Liu et al. (2023).
    """
    wanting = 1 - beta * h
    return F.relu(wanting), beta * (wanting > 0).to(h.dtype)


def hinge_optimum(rankings: Rankings, ref_logps: Tensor, *, beta: float) -> Tensor:
    """Where the hinge loss ends, or one such place: starting from equal rewards, the set of completions is
    raised by 1 whose raising lowers the loss most, until none does [D12.9].

    Args: comparisons of at most 16 completions a prompt; ref_logps (X, Y). Returns (X, Y) log-probabilities.
    Raises: InputError where the comparisons do not connect a prompt's completions, or these are too many.
    """
    require_estimate(rankings, ref_logps > -math.inf, loss="ipo")
    wins = win_counts(rankings, *ref_logps.shape)
    if (Y := wins.shape[-1]) > 16:
        raise InputError(f"hinge_optimum tries all sets of a prompt's completions; {Y} are more than 16.")
    sets = (torch.arange(2**Y)[:, None] >> torch.arange(Y) & 1).to(wins)
    rewards = torch.zeros_like(wins[..., 0])
    while True:
        gap = rewards.unsqueeze(-1) - rewards.unsqueeze(-2)
        rise = wins.mT * (gap.mT <= 1) - wins * (gap < 1)  # of the loss, where i is raised and j is not
        change, best = ((sets @ rise) * (1 - sets)).sum(-1).min(-1)
        falls = change < -1e-12 * wins.sum((-2, -1))  # by more than rounding
        if not falls.any():
            return optimal_logps(ref_logps, rewards, beta=beta)
        rewards = rewards + sets[best] * falls.unsqueeze(-1)


HINGE = Loss(
    "hinge", "hinge", hinge_loss, "a pull that ends where the margin reaches 1", (BETA,),
    start=lambda K, beta: 1.0, optimum=hinge_optimum, proof="D12.9",
    source="Zhao et al. (2023); Liu et al. (2023)", charted=False,
)  # fmt: skip


@of_margin
def exo_loss(h: Tensor, *, beta: float, label_smoothing: float) -> tuple[Tensor, Tensor]:
    """EXO on pairs: the divergence KL((q, 1 - q) | (1 - eps, eps)) with q = sigmoid(u), u = beta h [D12.10].

    cDPO is the other direction of it, up to a constant. With c = log((1 - eps) / eps) the gradient weight is
    beta q (1 - q) (c - u): a bell, so that a pair in hopelessly wrong order is left alone, and negative once
    u exceeds c. A pair that is won with probability p ends at u = (2p - 1) c, linear in p as with IPO.

    Args: as `dpo_loss`; label_smoothing: eps in (0, 1/2).
    Returns, Raises: as `dpo_loss`; InputError also for label_smoothing out of range.
    Source: Ji et al. (2024), "Towards Efficient Exact Optimization of Language Model Alignment".
    """
    check_positive("label_smoothing", label_smoothing)
    check_flip_probability(label_smoothing, "label_smoothing")
    log_label, log_other = math.log1p(-label_smoothing), math.log(label_smoothing)
    u = beta * h
    q, rest = torch.sigmoid(u), torch.sigmoid(-u)
    losses = q * (F.logsigmoid(u) - log_label) + rest * (F.logsigmoid(-u) - log_other)
    return losses, beta * q * rest * (log_label - log_other - u)


EXO = Loss(
    "exo", "EXO", exo_loss, "cdpo's divergence the other way round",
    (BETA, Option("label_smoothing", "(0, 1/2)", 1e-3, "share of labels that may be wrong", "ε")),
    start=lambda K, beta, label_smoothing: -math.log(4 * label_smoothing * (1 - label_smoothing)) / 2,
    proof="D12.10", source="Ji et al. (2024)", charted=False,
)  # fmt: skip


@of_margin
def discopop_loss(h: Tensor, *, beta: float, tau: float) -> tuple[Tensor, Tensor]:
    """DiscoPOP: (1 - m) (-log sigmoid(u)) + m e^-u, with u = beta h and m = sigmoid(u / tau) [D12.11].

    DPO's loss where the order is wrong, the exponential one where it is right. At u = 0 these are log 2 and
    1, and the loss climbs that step: for tau < (1 - log 2) / 3 = 0.102 the gradient weight at the reference
    is negative, and training begins against the labels. It is not convex: a pair may have two minima.

    Args: as `dpo_loss`; tau: in (0, 1], the width of the step; beyond 1 a wrong order costs exponentially.
    Returns, Raises: as `dpo_loss`; InputError also for tau out of range.
    Source: Lu et al. (2024), "Discovering Preference Optimization Algorithms with and for Large Language
        Models", the log-ratio modulated loss.
    """
    check_positive("tau", tau)
    check_share("tau", tau)
    u = beta * h
    modulation, rest = torch.sigmoid(u / tau), torch.sigmoid(-u / tau)
    logistic, exponential = -F.logsigmoid(u), torch.exp(F.logsigmoid(u / tau) - u)
    step = (modulation * logistic - exponential) / tau
    return rest * logistic + exponential, beta * (exponential + rest * (torch.sigmoid(-u) + step))


DISCOPOP = Loss(
    "discopop", "DiscoPOP", discopop_loss, "a blend of two losses, found by a search",
    (BETA, Option("tau", "(0, 1]", 0.05, "width of the step from one loss to the other", "τ")),
    start=lambda K, **_: (math.log(2) + 1) / 2, proof="D12.11", source="Lu et al. (2024)", charted=False,
)  # fmt: skip
