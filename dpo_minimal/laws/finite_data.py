"""What finite data determine: the estimate, when it exists, and its standard errors.

Scores are (X, Y) tables of rewards in nats, one row a prompt, as in certificates.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..certificates import curvature, laplacian_inverse
from ..preferences import Rankings, all_sets, tally, win_counts
from ..validation import check_positive


def add_prior(rankings: Rankings, exists: Tensor, strength: float) -> Rankings:
    """Comparisons plus `strength` imaginary wins each way between any two completions of a prompt.

    Every win graph becomes complete, so the estimate exists; rewards shrink towards equality [D11.1].
    """
    check_positive("strength", strength)
    pairs = all_sets(exists)
    prompt = torch.cat([rankings.prompt, pairs.prompt, pairs.prompt])
    order = torch.cat([rankings.order, pairs.items, pairs.items.flip(-1)])
    imaginary = torch.full((2 * len(pairs.prompt),), float(strength), dtype=torch.float64)
    return tally(prompt, order, torch.cat([rankings.weight, imaginary]))


def standard_errors(scores: Tensor, rankings: Rankings) -> Tensor:
    """Of mean-zero maximum-likelihood rewards: sqrt of the diagonal of (N I)^+ (X, Y), the Fisher
    information I taken at the estimate [D11.3]."""
    state = curvature(scores, rankings)
    variance = state.inverse.diagonal(dim1=-2, dim2=-1) / state.total.unsqueeze(-1)
    return torch.where(state.compared, variance.clamp(min=0).sqrt(), 0)


def ipo_standard_errors(logratios: Tensor, rankings: Rankings, exists: Tensor, *, beta: float) -> Tensor:
    """Of mean-zero IPO log-ratios (X, Y): the sandwich L^+ V L^+, V the variance of the score under the
    observed win rates, each with half a win added either way [D12.1]."""
    wins = win_counts(rankings, *exists.shape)
    games = wins + wins.mT
    laplacian = torch.diag_embed(games.sum(-1)) - games
    inverse = laplacian_inverse(laplacian, exists)
    # An outcome of a pair moves the score by 1/(2 beta) - h (won) or -1/(2 beta) - h (lost). Win rates are
    # drawn half a win towards one half, or a unanimous pair would claim to be known exactly.
    gap = logratios.unsqueeze(-1) - logratios.unsqueeze(-2)
    rate = (wins + 0.5) / (games + 1)
    squared = games * (rate * (1 / (2 * beta) - gap) ** 2 + (1 - rate) * (1 / (2 * beta) + gap) ** 2)
    noise = torch.diag_embed(squared.sum(-1)) - squared
    variance = (inverse @ noise @ inverse).diagonal(dim1=-2, dim2=-1)
    return torch.where(exists, variance.clamp(min=0).sqrt(), 0)
