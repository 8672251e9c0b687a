"""What finite data determine: the estimate, when it exists, and its standard errors.

Scores are (X, Y) tables of rewards in nats, one row a prompt, as in certificates.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..certificates import connected, curvature, laplacian_inverse
from ..preferences import Rankings, all_sets, tally, win_counts
from ..validation import InputError, check_positive

Names = tuple[tuple[str, ...], tuple[tuple[str, ...], ...]]  # of the prompts, of each one's completions


def groups_at_fault(wins: Tensor) -> list[tuple[list[int], str]]:
    """Why one prompt's maximum-likelihood estimate does not exist [D11.1].

    Ford (1957): it exists and is unique exactly when the win graph is strongly connected, i.e. no group
    of completions won, or lost, or did not play, all its games against the others.

    Args: wins (Y, Y), entry [i, j] how often i was ranked above j.
    Returns: [(completion numbers, fault)], empty where the estimate exists.
    """
    reach = connected(wins.unsqueeze(0))[0]
    groups = sorted({tuple(row.nonzero().flatten().tolist()) for row in reach & reach.T})
    faults = []
    for group in groups if len(groups) > 1 else []:
        inside = torch.zeros(len(wins), dtype=torch.bool)
        inside[list(group)] = True
        won, lost = wins[inside][:, ~inside].sum() > 0, wins[~inside][:, inside].sum() > 0
        if not (won and lost):
            fault = "never lost to" if won else "never beat" if lost else "never met"
            faults.append((list(group), f"{fault} the others"))
    return faults


def require_estimate(wins: Tensor, exists: Tensor, names: Names | None = None, *, loss: str = "dpo") -> None:
    """Raise InputError, naming prompts and completions at fault, unless the estimate exists [D11.1, D12.1].

    Args:
        wins: (X, Y, Y) how often the row's completion was ranked above the column's.
        exists: (X, Y) True where the prompt has that completion.
        names: for the message.
        loss: "dpo" needs every win graph strongly connected; "ipo" only connected.
    """
    if loss == "ipo":
        wins = wins + wins.mT
    missing = ~connected(wins) & exists.unsqueeze(-1) & exists.unsqueeze(-2)
    faults = []
    for x in missing.flatten(1).any(-1).nonzero().flatten().tolist():
        members = exists[x].nonzero().flatten().tolist()
        labels = names[1][x] if names else [f"y{y}" for y in range(exists.shape[1])]
        found = groups_at_fault(wins[x][members][:, members].cpu())
        few = [(group, fault) for group, fault in found if 2 * len(group) <= len(members)]
        for group, fault in few or found:  # what a few did wrong tells more than what all the others did
            listed = ", ".join(labels[members[y]] for y in group[:6]) + (", ..." if len(group) > 6 else "")
            faults.append(f"prompt {names[0][x] if names else f'x{x}'}: {listed} {fault}")
    if faults:
        shown = "; ".join(faults[:5]) + (f"; and {len(faults) - 5} more" if len(faults) > 5 else "")
        remedy = "add comparisons or a prior" + ("" if loss == "ipo" else ", or use IPO")
        raise InputError(f"the {loss.upper()} estimate does not exist ({shown}); {remedy}.")


def maximum_likelihood(rankings: Rankings, exists: Tensor, names: Names | None = None) -> Tensor:
    """The Bradley-Terry or Plackett-Luce maximum-likelihood rewards of a data set, by Newton [D11.1].

    Args:
        rankings: the data.
        exists: (X, Y) True where the prompt has that completion.
        names: for the error message.
    Returns:
        (X, Y) float64 rewards with mean zero for each prompt, 0 where there is no completion.
    Raises:
        InputError: the estimate does not exist, or lies so far out that float64 cannot reach it.
    """
    require_estimate(win_counts(rankings, *exists.shape), exists, names)
    scores = torch.zeros(exists.shape, dtype=torch.float64, device=exists.device)
    for _ in range(200):
        state = curvature(scores, rankings)
        step = torch.where(exists, -(state.inverse @ state.gradient.unsqueeze(-1)).squeeze(-1), 0)
        if not torch.isfinite(step).all():
            break
        # The loss's third derivative is at most `reach` times its second, so this length always descends;
        # near the optimum it tends to one and each step squares the error.
        reach = step.amax(-1, keepdim=True) - step.amin(-1, keepdim=True)
        scores = scores + step * torch.where(reach > 1e-8, torch.log1p(reach) / reach, 1)
        if reach.max() < 1e-8:
            return scores  # of mean zero, because every step was
    raise InputError(
        "the maximum-likelihood estimate exists but is out of numerical reach: some completion wins almost "
        "always; add comparisons or a prior."
    )


def ipo_estimate(rankings: Rankings, exists: Tensor, names: Names | None = None, *, beta: float) -> Tensor:
    """The minimiser of the IPO loss on comparisons: log-ratios g with L g = (wins - losses) / (2 beta),
    L the Laplacian of the comparison counts [D12.1].

    Returns: (X, Y) log-ratios, mean zero for each prompt. Raises InputError where the comparisons do not
    connect a prompt's completions.
    """
    check_positive("beta", beta)
    wins = win_counts(rankings, *exists.shape)
    require_estimate(wins, exists, names, loss="ipo")
    games = wins + wins.mT
    surplus = wins.sum(-1) - wins.sum(-2)
    laplacian = torch.diag_embed(games.sum(-1)) - games
    return (laplacian_inverse(laplacian, exists) @ surplus.unsqueeze(-1)).squeeze(-1) / (2 * beta)


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
