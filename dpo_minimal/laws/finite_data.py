"""What finite data determine: the estimate, when it exists, and its standard errors.

Scores are (X, Y) tables of rewards in nats, one row a prompt, as in certificates.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..certificates import curvature, laplacian_inverse
from ..preferences import Rankings, all_sets, by_size, tally, win_counts
from ..validation import check_positive


def add_prior(rankings: Rankings, exists: Tensor, strength: float) -> Rankings:
    """Comparisons plus `strength` imaginary wins and as many losses of each completion, spread evenly over
    the others of its prompt.

    Every win graph becomes complete, so the estimate exists; rewards shrink towards equality [D11.1]. How
    much they do so, does not depend on the number of completions [D11.10].
    """
    check_positive("strength", strength)
    pairs = all_sets(exists)
    prompt = torch.cat([rankings.prompt, pairs.prompt, pairs.prompt])
    order = torch.cat([rankings.order, pairs.items, pairs.items.flip(-1)])
    imaginary = (strength / (exists.sum(-1) - 1).double())[pairs.prompt]
    return tally(prompt, order, torch.cat([rankings.weight, imaginary, imaginary]))


def standard_errors(scores: Tensor, rankings: Rankings) -> Tensor:
    """Of mean-zero maximum-likelihood rewards: sqrt of the diagonal of (N I)^+ (X, Y), the Fisher
    information I taken at the estimate [D11.3]; with `add_prior`'s comparisons those of the posterior
    [D11.10]."""
    errors = torch.zeros_like(scores)
    for rows, width, own in by_size(rankings, errors > 0):
        state = curvature(scores[rows, :width], own)
        variance = state.inverse.diagonal(dim1=-2, dim2=-1) / state.total.unsqueeze(-1)
        errors[rows, :width] = torch.where(state.compared, variance.clamp(min=0).sqrt(), 0)
    return errors


def ipo_standard_errors(logratios: Tensor, rankings: Rankings, exists: Tensor, *, beta: float) -> Tensor:
    """Of mean-zero IPO log-ratios (X, Y): the sandwich L^+ V L^+, V the variance of the score under the
    observed win rates, each with half a win added either way [D12.1]."""
    errors = torch.zeros_like(logratios)
    for rows, width, own in by_size(rankings, exists):
        there, part = exists[rows, :width], logratios[rows, :width]
        wins = win_counts(own, *part.shape)
        games = wins + wins.mT
        inverse = laplacian_inverse(torch.diag_embed(games.sum(-1)) - games, there)
        # An outcome of a pair moves the score by 1/(2 beta) - h (won) or -1/(2 beta) - h (lost). Win rates
        # are drawn half a win towards one half, or a unanimous pair would claim to be known exactly.
        gap = part.unsqueeze(-1) - part.unsqueeze(-2)
        rate = (wins + 0.5) / (games + 1)
        squared = games * (rate * (1 / (2 * beta) - gap) ** 2 + (1 - rate) * (1 / (2 * beta) + gap) ** 2)
        noise = torch.diag_embed(squared.sum(-1)) - squared
        variance = (inverse @ noise @ inverse).diagonal(dim1=-2, dim2=-1)
        errors[rows, :width] = torch.where(there, variance.clamp(min=0).sqrt(), 0)
    return errors
