"""How close we provably are: from the gradient at one point to a bound on |log pi - log pi*|.

Everything here works on *scores* s = beta (log pi - log pi_ref), an (X, Y) table that any policy has, a
table of logits or a network alike. In s the DPO loss is Bradley-Terry (or Plackett-Luce) regression: it is
convex, and its third derivative is bounded by its second, which turns the gradient at *one* point into a
bound on the distance to the minimiser [D11.2]. Prompts do not interact, so each is judged by itself with
its weights normalised to one.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .preferences import Rankings, by_size, win_counts
from .validation import InputError, check_finite, check_log_distribution, check_positive, check_same_shape

EPS = torch.finfo(torch.float64).eps
Names = tuple[tuple[str, ...], tuple[tuple[str, ...], ...]]  # of the prompts, of each one's completions


class Curvature(NamedTuple):
    """First and second derivative of the loss in the scores, one prompt a row [D5.2].

    Fields:
        gradient: (X, Y).
        hessian: (X, Y, Y) positive semi-definite, zero in the direction that adds a constant.
        inverse: (X, Y, Y) its pseudo-inverse on the compared completions; meaningless for prompts where
            the comparisons do not connect these.
        compared: (X, Y) True where the completion appears in some ranking.
        total: (X,) total weight of the prompt's rankings, by which gradient and hessian were divided.
    """

    gradient: Tensor
    hessian: Tensor
    inverse: Tensor
    compared: Tensor
    total: Tensor


def curvature(scores: Tensor, rankings: Rankings) -> Curvature:
    """Gradient and Hessian of the mean negative log-likelihood, closed form and float64 [D5.2, D8.4].

    Args:
        scores: (X, Y) implicit or explicit rewards, nats; only compared completions are read.
        rankings: comparisons or rankings with their weights.
    Raises:
        InputError: a score that is compared is not finite.
    """
    X, Y = scores.shape
    E, K = rankings.order.shape
    ranked, weight = rankings.gather(scores.detach()).double(), rankings.weight.double()  # (E, K), (E,)
    if E > 0:
        check_finite(scores=ranked)
    total = ranked.new_zeros(X).index_add(0, rankings.prompt, weight)
    weight = (weight / total[rankings.prompt]).unsqueeze(-1)  # (E, 1)

    gradient = ranked.new_zeros(X, Y)
    hessian = ranked.new_zeros(X, Y, Y)
    rows = rankings.prompt.unsqueeze(-1).expand(E, K)
    for place in range(K - 1):  # who takes this place, among those still there?
        chance = ranked[:, place:].softmax(-1)  # (E, K - place)
        here, row = rankings.order[:, place:], rows[:, place:]
        surprise = torch.cat([chance[:, :1] - 1, chance[:, 1:]], -1)
        if K == 2:  # 1 - sigmoid(u) loses digits; the loser's chance is that number exactly
            surprise = torch.cat([-chance[:, 1:], chance[:, 1:]], -1)
        gradient.index_put_((row, here), weight * surprise, accumulate=True)
        # Off the diagonal first: 1 - p_i on it would lose the digits of a nearly sure choice.
        product = weight.unsqueeze(-1) * chance.unsqueeze(-1) * chance.unsqueeze(-2)
        product = product - torch.diag_embed(product.diagonal(dim1=-2, dim2=-1))
        covariance = torch.diag_embed(product.sum(-1)) - product
        index = row.unsqueeze(-1), here.unsqueeze(-1), here.unsqueeze(-2)
        hessian.index_put_(index, covariance, accumulate=True)

    compared = torch.zeros(X, Y, dtype=torch.bool, device=scores.device)
    compared[rows, rankings.order] = True
    return Curvature(gradient, hessian, laplacian_inverse(hessian, compared), compared, total)


def laplacian_inverse(hessian: Tensor, compared: Tensor) -> Tensor:
    """Pseudo-inverse of weighted Laplacians (X, Y, Y) on the completions marked in `compared` (X, Y) [D11.2].

    Make the constant direction and the other completions invertible, invert, and take them out again.
    No eigenvalue cut-off: one would hide a nearly flat direction, i.e. nearly separable data [D11.2].
    """
    member = compared.to(hessian.dtype)
    count = member.sum(-1).clamp(min=1)
    scale = hessian.diagonal(dim1=-2, dim2=-1).sum(-1) / count
    scale = torch.where(scale > 0, scale, 1)[:, None, None]
    constant = member.unsqueeze(-1) * member.unsqueeze(-2) / count[:, None, None]
    outside = torch.diag_embed(1 - member)
    # Cholesky: torch's batched LU raises or is wrong for large tables on two threads (pytorch issue 142815).
    factor, failed = torch.linalg.cholesky_ex(hessian / scale + constant + outside)
    factor = factor.masked_fill((failed != 0)[:, None, None], math.nan)
    return (torch.cholesky_inverse(factor) - constant - outside) / scale


class Certificate(NamedTuple):
    """What `certify` returns, one entry a prompt (X,) [D11.2].

    Fields:
        logp_bound: bound on max_y |log pi(y|x) - log pi*(y|x)| in nats; inf where nothing can be said.
        loss_gap: bound on the mean loss above its minimum, nats; inf likewise.
        x: resistance times Newton decrement; the bound is issued for x <= 1/2. inf where the comparisons do
            not connect the completions, or the Hessian is too nearly flat for float64 to tell.
    """

    logp_bound: Tensor
    loss_gap: Tensor
    x: Tensor


def certify(logps: Tensor, ref_logps: Tensor, rankings: Rankings, *, beta: float) -> Certificate:
    """Bound the distance of a policy to the minimiser of its own objective, from one gradient [D11.2].

    With g, H the gradient and Hessian in the scores, nu^2 = g' H^+ g the Newton decrement and rho^2 the
    largest effective resistance, let x = rho nu. For x < 1 the minimiser exists and every difference of
    scores is within D = min{-log(1 - x), range(H^+ g) + x/(1 - x) + log(1 - x)} of its own; then
    |log pi - log pi*| <= D / beta for every completion. The first bound needs only x, the second adds that
    a Newton step lands within second order. Rounding of g and of the tables is added on top.

    Args:
        logps, ref_logps: (X, Y) tables of the policy and the reference.
        rankings: what the policy was trained on, DPO or Plackett-Luce; beta > 0. The minimiser is pi* for a
            population, and for data the policy of the maximum-likelihood estimate.
    Returns:
        Certificate; inf where x > 1/2 (separable data keep x > 1 for ever), or where x is inf.
    Raises:
        InputError: shapes differ, a table is no distribution, beta <= 0, a compared log-probability is -inf.
    """
    check_positive("beta", beta)
    check_same_shape(logps=logps, ref_logps=ref_logps)
    check_log_distribution(logps=logps, ref_logps=ref_logps)
    logps, ref_logps = logps.detach().double(), ref_logps.detach().double()
    bound = certify_scores(beta * (logps - ref_logps), ref_logps > -math.inf, rankings)
    size = torch.where(ref_logps > -math.inf, torch.maximum(logps.abs(), ref_logps.abs()), 0).amax(-1)
    excess = logps.logsumexp(-1).abs()  # scores do not see how far the table is from summing to one
    return bound._replace(logp_bound=bound.logp_bound / beta + 8 * EPS * size + excess)


def certify_scores(scores: Tensor, exists: Tensor, rankings: Rankings) -> Certificate:
    """`certify` before it returns to policies: `logp_bound` is D, a bound on how much a difference of scores
    differs from the minimiser's [D11.2]. Args: scores, exists (X, Y); scores are read where compared."""
    if len(blocks := [*by_size(rankings, exists)]) > 1:
        parts = [certify_scores(scores[x, :Y], exists[x, :Y], own) for x, Y, own in blocks]
        back = torch.cat([x for x, *_ in blocks]).argsort()
        return Certificate(*(torch.cat(field)[back] for field in zip(*parts)))
    state = curvature(scores, rankings)
    wins = win_counts(rankings, *scores.shape)
    whole = (connected(wins + wins.mT) | ~_outer(exists)).flatten(1).all(-1)
    rho = largest_resistance(state).sqrt()
    step = (state.inverse @ state.gradient.unsqueeze(-1)).squeeze(-1)  # H^+ g
    decrement = (step * state.gradient).sum(-1).clamp(min=0).sqrt()
    # Each entry of g sums terms no larger than the weights of the rankings it is in, a few roundings each.
    degree = (wins + wins.mT).sum(-1) / state.total.clamp(min=1e-300).unsqueeze(-1)
    trace = torch.einsum("xyy->x", state.inverse).clamp(min=0)
    rounding = 4 * EPS * degree.norm(dim=-1) * trace.sqrt()
    mean_curvature = torch.einsum("xyy->x", state.hessian) / state.compared.sum(-1)
    condition = state.inverse.norm(dim=(-2, -1)) * mean_curvature
    slack = 1 + 8 * EPS * scores.shape[-1] * condition  # relative error of the inverse
    x = slack * rho * (decrement + rounding)
    step_range = step.amax(-1) - step.amin(-1)  # of mean zero, and zero where not compared
    newton = slack * (step_range + rho * rounding) + x / (1 - x) + torch.log1p(-x)
    # Beyond a condition number of 1e8 the estimate of that error is no longer to be trusted: no bound then.
    tellable = whole & (condition <= 1e8) & (state.total > 0)  # not so where the inverse is NaN
    valid = tellable & (x <= 0.5)
    return Certificate(
        logp_bound=torch.where(valid, torch.minimum(-torch.log1p(-x), newton), math.inf),
        loss_gap=torch.where(valid, (x + (1 - x) * torch.log1p(-x)) / rho**2, math.inf),
        x=torch.where(tellable, x, math.inf),
    )


def largest_resistance(state: Curvature) -> Tensor:
    """(X,) rho^2 = max over pairs of (e_i - e_j)' H^+ (e_i - e_j), the variance (times N) of the worst
    estimated reward difference [D11.3]."""
    diagonal = state.inverse.diagonal(dim1=-2, dim2=-1)
    resistance = diagonal.unsqueeze(-1) + diagonal.unsqueeze(-2) - 2 * state.inverse
    return resistance.masked_fill(~_outer(state.compared), 0).flatten(1).amax(-1)


def _outer(mask: Tensor) -> Tensor:
    return mask.unsqueeze(-1) & mask.unsqueeze(-2)


def connected(wins: Tensor) -> Tensor:
    """(X, Y, Y) True where a chain of wins leads from the row's completion to the column's [D11.1]."""
    reach = (wins > 0) | torch.eye(wins.shape[-1], dtype=torch.bool, device=wins.device)
    while True:  # squaring doubles the length of the chains, so this ends after log2(Y) rounds at most
        further = (reach.float() @ reach.float()) > 0
        if torch.equal(further, reach):
            return reach
        reach = further


# ------------------------------------------------------------------------- the minimiser itself


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


def missing_links(
    rankings: Rankings, exists: Tensor, names: Names | None = None, *, loss: str = "dpo"
) -> tuple[str, bool]:
    """Which completions the data do not compare as an estimate needs it, "" where it exists, and whether some
    of them never met [D11.1].

    Args: the data; exists (X, Y) True where the prompt has that completion; names for the words; loss "dpo"
        needs every win graph strongly connected, "ipo" only connected.
    """
    graphs, apart = {}, False  # win graphs of the prompts at fault
    for rows, width, own in by_size(rankings, exists):
        wins, there = win_counts(own, len(rows), width), _outer(exists[rows, :width])
        met = wins + wins.mT
        graph = met if loss == "ipo" else wins
        missing = (~connected(graph) & there).flatten(1).any(-1).nonzero().flatten()
        graphs |= {rows[k].item(): graph[k] for k in missing.tolist()}
        apart = apart or bool((~connected(met) & there).any())
    faults = []
    for x in sorted(graphs)[:5]:
        members = exists[x].nonzero().flatten().tolist()
        labels = names[1][x] if names else [f"y{y}" for y in range(exists.shape[1])]
        found = groups_at_fault(graphs[x][members][:, members].cpu())
        few = [(group, fault) for group, fault in found if 2 * len(group) <= len(members)]
        for group, fault in few or found:  # what a few did wrong tells more than what all the others did
            listed = ", ".join(labels[members[y]][:30] for y in group[:6]) + ", ..." * (len(group) > 6)
            faults.append(f"prompt {names[0][x][:30] if names else f'x{x}'}: {listed} {fault}")
    more = f"; and {len(graphs) - 5} more prompts" if len(graphs) > 5 else ""
    return "; ".join(faults) + more, apart


def require_estimate(rankings: Rankings, exists: Tensor, names: Names | None = None, *, loss="dpo") -> None:
    """Raise InputError, naming prompts and completions at fault and a way out, unless the estimate exists
    [D11.1, D12.1]. Args: as `missing_links`."""
    faults, apart = missing_links(rankings, exists, names, loss=loss)
    if faults:
        remedy = "between these groups, or a prior" if apart else "or a prior, or use IPO"
        raise InputError(f"the {loss.upper()} estimate does not exist ({faults}); add comparisons {remedy}.")


def maximum_likelihood(rankings: Rankings, exists: Tensor, names: Names | None = None) -> Tensor:
    """The Bradley-Terry or Plackett-Luce maximum-likelihood rewards of a data set, by Newton [D11.1].

    Args: rankings; exists (X, Y) True where the prompt has that completion; names, for the error message.
    Returns: (X, Y) float64 rewards with mean zero for each prompt, 0 where there is no completion.
    Raises: InputError: the estimate does not exist, or lies so far out that float64 cannot reach it.
    """
    require_estimate(rankings, exists, names)
    scores = torch.zeros(exists.shape, dtype=torch.float64, device=exists.device)
    if len(blocks := [*by_size(rankings, exists)]) > 1:
        for rows, width, own in blocks:
            scores[rows, :width] = maximum_likelihood(own, exists[rows, :width])
        return scores
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
        "always; add comparisons or a prior, or use IPO."
    )
