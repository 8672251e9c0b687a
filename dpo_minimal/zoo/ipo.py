"""Identity Preference Optimization, a square in place of the logarithm; it and DPO of averaged tokens."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ..bandit import mean_on_table
from ..certificates import Names, laplacian_inverse, maximum_likelihood, require_estimate
from ..losses import BETA, DPO, Loss
from ..preferences import Rankings, by_size, win_counts
from ..validation import check_positive
from .inputs import bisection, of_averages, of_margin


@of_margin
def ipo_loss(h: Tensor, *, beta: float) -> tuple[Tensor, Tensor]:
    """Identity Preference Optimization: (h - 1/(2 beta))^2 with h the difference of log-ratios [D12.1].

    A least-squares target instead of a logistic one, so it has a finite optimum on any data whose
    comparisons connect all completions, unanimous ones included. Log-probabilities are summed over
    tokens, as in the paper, where beta is called tau. The gradient weight is 1/beta - 2h: negative once
    the target is overshot.

    Args, Returns, Raises: as `dpo_loss`.
    Source: Azar et al. (2023), "A General Theoretical Paradigm to Understand Learning from Human
        Preferences".
    """
    return (h - 1 / (2 * beta)) ** 2, 1 / beta - 2 * h


@of_averages
def averaged_ipo_loss(h: Tensor, *, beta: float) -> tuple[Tensor, Tensor]:
    """IPO on log-ratios averaged over tokens: (h - 1/(2 beta))^2, h = g_w / |y_w| - g_l / |y_l| [D12.1].

    TRL's convention, under a name of its own because its optimum is another one: each log-ratio is what
    `ipo_loss` would give it, times its length, plus a multiple of its length. With equal lengths L it is
    `ipo_loss` at beta / L, over L^2. Rewards are beta times the averages. The pulls are (1/beta - 2h) / |y_w|
    and (1/beta - 2h) / |y_l|.

    Args: as `dpo_loss`; chosen_lengths, rejected_lengths (B,) counts of scored tokens, end-of-text included.
    Returns, Raises: as `dpo_loss`; InputError also where a length is below 1.
    """
    return (h - 1 / (2 * beta)) ** 2, 1 / beta - 2 * h


def ipo_estimate(rankings: Rankings, exists: Tensor, names: Names | None = None, *, beta: float) -> Tensor:
    """The minimiser of the IPO loss on comparisons: log-ratios g with L g = (wins - losses) / (2 beta),
    L the Laplacian of the comparison counts [D12.1].

    Returns: (X, Y) log-ratios, mean zero for each prompt. Raises InputError where the comparisons do not
    connect a prompt's completions.
    """
    check_positive("beta", beta)
    require_estimate(rankings, exists, names, loss="ipo")
    estimate = torch.zeros(exists.shape, dtype=torch.float64, device=exists.device)
    for rows, width, own in by_size(rankings, exists):
        wins = win_counts(own, len(rows), width)
        games = wins + wins.mT
        inverse = laplacian_inverse(torch.diag_embed(games.sum(-1)) - games, exists[rows, :width])
        estimate[rows, :width] = (inverse @ (wins - wins.mT).sum(-1, keepdim=True)).squeeze(-1) / (2 * beta)
    return estimate


def ipo_optimum(rankings: Rankings, ref_logps: Tensor, *, beta: float) -> Tensor:
    """Where IPO ends: pi_ref times e^g, normalised, g of `ipo_estimate` [D12.1].

    Args: comparisons; ref_logps (X, Y). Returns (X, Y) log-probabilities. Raises as `ipo_estimate`.
    """
    return (ref_logps + ipo_estimate(rankings, ref_logps > -math.inf, beta=beta)).log_softmax(-1)


def averaged_ipo_optimum(rankings: Rankings, ref_logps: Tensor, *, beta: float, lengths: Tensor) -> Tensor:
    """Where averaged IPO ends: log pi = log pi_ref + |y| (g + c), g of `ipo_estimate`, and the one c for each
    prompt with which it sums to one [D12.1].

    Args: as `ipo_optimum`; lengths (X, Y) tokens. Returns (X, Y). Raises as `ipo_estimate`.
    """
    return with_lengths(ref_logps, ipo_estimate(rankings, ref_logps > -math.inf, beta=beta), lengths)


def with_lengths(ref_logps: Tensor, g: Tensor, lengths: Tensor) -> Tensor:
    """log pi_ref + |y| (g + c), for each prompt with the one c for which it sums to one [D12.1, D12.12].

    Args: ref_logps, g and lengths (X, Y). Returns (X, Y) log-probabilities.
    """
    low, high = -g.amax(-1, keepdim=True), -g.amin(-1, keepdim=True)  # nothing is likelier; nothing is rarer
    _, c = bisection(lambda c: (ref_logps + lengths * (g + c)).logsumexp(-1, keepdim=True) > 0, low, high)
    return (ref_logps + lengths * (g + c)).log_softmax(-1)


def ipo_objective(logps: Tensor, ref_logps: Tensor, rankings: Rankings, *, beta: float):
    """The expected IPO loss, as `dpo_objective` [D12.1]."""
    return mean_on_table(ipo_loss, logps, ref_logps, rankings, beta=beta)


IPO = Loss(
    "ipo", "IPO", ipo_loss,
    "a square around the log-ratio margin 1 / (2 beta); TRL's ipo is averaged_ipo", (BETA,),
    start=lambda K, beta: 1 / (4 * beta**2), optimum=ipo_optimum, proof="D12.1", source="Azar et al. (2023)",
)  # fmt: skip
AVERAGED_IPO = Loss(
    "averaged_ipo", "averaged IPO", averaged_ipo_loss, "ipo of averages over tokens", (BETA,),
    start=IPO.start, optimum=averaged_ipo_optimum, proof="D12.1", source="TRL's `ipo`",
)  # fmt: skip


@of_averages
def averaged_dpo_loss(h: Tensor, *, beta: float) -> tuple[Tensor, Tensor]:
    """DPO on log-ratios averaged over tokens: -log sigmoid(u), u = beta (g_w / |y_w| - g_l / |y_l|) [D12.12].

    Rewards are beta times the averages, and the pulls beta sigmoid(-u) over the length. With equal lengths L
    it is `dpo_loss` at beta / L; its optimum moves the longer completions further.

    Args, Returns, Raises: as `averaged_ipo_loss`.
    """
    u = beta * h
    return -F.logsigmoid(u), beta * torch.sigmoid(-u)


def averaged_dpo_optimum(rankings: Rankings, ref_logps: Tensor, *, beta: float, lengths: Tensor) -> Tensor:
    """Where averaged DPO ends: log pi = log pi_ref + |y| (r / beta + c), r the maximum-likelihood rewards and
    c one number for each prompt [D12.12].

    Args: as `dpo_optimum`; lengths (X, Y) tokens. Returns (X, Y). Raises as `dpo_optimum`.
    """
    return with_lengths(ref_logps, maximum_likelihood(rankings, ref_logps > -math.inf) / beta, lengths)


AVERAGED_DPO = Loss(
    "averaged_dpo", "averaged DPO", averaged_dpo_loss, "dpo of averages over tokens", (BETA,),
    start=DPO.start, optimum=averaged_dpo_optimum, proof="D12.12", source="TRL's `sigmoid_norm`",
    charted=False,
)  # fmt: skip
