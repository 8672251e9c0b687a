"""What finite data determine: the estimate, when it exists, and its standard errors.

Scores are (X, Y) tables of rewards in nats, one row a prompt, as in certificates.py.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..certificates import connected, curvature, laplacian_inverse
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


class GoodnessOfFit(NamedTuple):
    """What `goodness_of_fit` finds; rare: the share of pairs with fewer than five wins expected on one side
    [D11.18]."""

    statistic: float
    degrees: int
    p_value: float
    rare: float


def goodness_of_fit(rewards: Tensor, rankings: Rankings) -> GoodnessOfFit:
    """The likelihood ratio of Bradley-Terry against one free probability for each compared pair, which is
    2 sum wins_ij log(wins_ij / (games_ij sigmoid(r_i - r_j))) over both outcomes of each [D11.18].

    It follows a chi-square law for many games *a pair*: degrees of freedom are pairs, less completions, plus
    components. Ties as half a win each way vary less than wins, so with them it rejects less often.
    Args: rewards (X, Y) the maximum-likelihood estimate of the comparisons, without a prior.
    """
    found = torch.zeros(4, dtype=torch.float64)
    for rows, width, own in by_size(rankings, torch.zeros_like(rewards, dtype=torch.bool)):
        wins, scores = win_counts(own, len(rows), width), rewards[rows, :width]
        games = wins + wins.mT
        expected = games * torch.sigmoid(scores.unsqueeze(-1) - scores.unsqueeze(-2))
        gain = (torch.xlogy(wins, wins) - torch.xlogy(wins, expected)).sum()
        met, few = games > 0, (games > 0) & (expected < 5)
        played = met.any(-1)
        components = (played / connected(games).sum(-1)).sum()  # each is counted once by its members
        pairs, rare = met.sum() / 2, (few | few.mT).sum() / 2
        found += torch.stack([2 * gain, pairs - played.sum() + components, pairs, rare]).cpu()
    tail = torch.special.gammaincc((found[1] / 2).round(decimals=1), found[0].clamp(min=0) / 2)
    chance = tail.item() if found[1] > 0.5 else 1.0
    return GoodnessOfFit(found[0].item(), round(found[1].item()), chance, (found[3] / found[2]).item())


def strongest_cycles(wins: Tensor, most: int = 3) -> list[tuple[float, list[int]]]:
    """Circles of majorities, those first whose weakest link is the surest [D11.17].

    Args: wins (Y, Y), entry [i, j] how often i was preferred to j.
    Returns: at most `most` of (standard errors of the weakest link, completions, each of which beats the next
        and the last the first); with a weakest link of its own each, and as short as that allows.
    """
    surplus = (wins - wins.mT) / (wins + wins.mT).clamp(min=1e-300).sqrt()  # standard errors of an even pair
    links = (surplus > 0).nonzero()
    reach, found = torch.eye(len(wins), dtype=torch.bool), []
    beaten: list[list[int]] = [[] for _ in wins]  # by whom, over links surer than the present one
    for i, j in links[surplus[links[:, 0], links[:, 1]].argsort(descending=True, stable=True)].tolist():
        if reach[j, i]:  # then this is the weakest link of a circle
            paths = {j: [j]}  # breadth first
            for path in iter(queue := [[j]]):
                for other in beaten[path[-1]]:
                    if other not in paths:
                        queue.append(paths.setdefault(other, [*path, other]))
            found.append((surplus[i, j].item(), paths[i]))
            if len(found) == most:
                break
        beaten[i].append(j)
        if not reach[i, j]:
            reach |= reach[:, i].unsqueeze(-1) & reach[j]
    return found
