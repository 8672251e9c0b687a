"""Preferences that no reward explains: the game that they are, its equilibrium, and what finds it.

`preferences` are tables (..., Y, Y): entry [i, j] is the probability that i is preferred to j, so P + P' = 1.
Two policies draw a completion each; the preferred one wins. With a KL penalty for either this game has one
equilibrium, which plays the part of pi* [D11.14]. Inside, the skew P - 1/2 stands for P.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..certificates import EPS
from ..closed_form import kl_divergence
from ..preferences import Rankings
from ..validation import InputError, check_finite, check_log_distribution, check_positive, check_same_shape
from ..zoo.ipo import ipo_objective


def best_response(preferences: Tensor, logps: Tensor, ref_logps: Tensor, *, beta: float) -> Tensor:
    """log of pi_ref exp(P pi / beta) / Z, which wins most often against pi, less its penalty [D11.14].

    Args:
        preferences: (..., Y, Y) probabilities, P + P' = 1.
        logps, ref_logps: (..., Y) log pi of the opponent, log pi_ref; -inf allowed.
        beta: strength of the KL penalty, > 0, in units of win probability per nat.
    Returns: (..., Y) log-probabilities, float64.
    Raises: InputError: shapes differ; preferences are none; a table is no distribution; beta <= 0.
    """
    game, ref_logps = _checked(preferences, ref_logps, beta, logps)
    return (ref_logps + _against(game, logps.double()) / beta).log_softmax(-1)


def duality_gap(preferences: Tensor, logps: Tensor, ref_logps: Tensor, *, beta: float) -> Tensor:
    """What the two players, both pi, could still gain together: 2 beta KL(pi || best response) [D11.14].

    Zero exactly at the equilibrium pi*, and KL(pi || pi*) <= gap / (2 beta).
    Args, Raises: as `best_response`. Returns (...,), in units of win probability, float64.

    Example:
        >>> rock_paper_scissors = torch.tensor([[0.5, 0.0, 1.0], [1.0, 0.5, 0.0], [0.0, 1.0, 0.5]])
        >>> even = torch.full((3,), 1 / 3).log()
        >>> duality_gap(rock_paper_scissors, even, even, beta=0.1).item() < 1e-12
        True
    """
    response = best_response(preferences, logps, ref_logps, beta=beta)
    return 2 * beta * kl_divergence(logps.double(), response)  # as a square: no two large terms cancel


def regularised_equilibrium(preferences: Tensor, ref_logps: Tensor, *, beta: float) -> tuple[Tensor, Tensor]:
    """The one policy that is its own best response, pi* = pi_ref exp(P pi* / beta) / Z, by Newton's method
    [D11.14, D11.15]. For a small beta the way leads over larger ones.

    Args: as `best_response`; beta from some 1e-8.
    Returns:
        (logps, gap): (..., Y) log pi*, and (...,) the duality gap with what rounding may hide, so that
        KL(logps || pi*) <= gap / (2 beta). float64, without gradients.
    Raises: InputError: as `best_response`; a beta too small for float64.
    """
    game, ref = _checked(preferences.detach(), ref_logps.detach(), beta)
    z, level = torch.zeros_like(ref), max(beta, 0.25)
    while level > beta:
        z, level = _newton(game, ref, z, level, within=0.01), max(beta, level / 2)
    logps = (ref + _newton(game, ref, z, beta, within=2 * EPS * (1 + 1 / beta))).log_softmax(-1)
    size = torch.where(ref > -math.inf, logps.abs() + ref.abs(), 0).amax(-1)
    # Of log pi - log best response; beta times its square is a gap.
    rounding = 8 * EPS * (1 + size + 1 / beta)
    gap = (duality_gap(preferences, logps, ref, beta=beta).sqrt() + beta**0.5 * rounding) ** 2
    if not (gap <= 1e-10 * beta).all():
        raise InputError(f"beta = {beta:g} is too small for float64 to find the equilibrium; raise it.")
    return logps, gap


def _newton(game: Tensor, ref: Tensor, z: Tensor, beta: float, *, within: float) -> Tensor:
    """Log-ratios z with z = game pi / beta, pi = pi_ref e^z normalised, each row by itself [D11.15]."""

    def residual(z: Tensor) -> Tensor:
        return z - _against(game, (ref + z).log_softmax(-1)) / beta

    r, one = residual(z), torch.eye(ref.shape[-1], dtype=ref.dtype, device=ref.device)
    for _ in range(200):
        pi = (ref + z).softmax(-1)
        root = pi.sqrt()
        # The Jacobian is 1 - game F F' / beta with F F' = diag(pi) - pi pi'. In u = F' d it is 1 - S with a
        # skew S = F' game F / beta, and (1 - S)^-1 = (1 + S' S)^-1 (1 + S): Cholesky, and never singular.
        outer = root.unsqueeze(-1) * (root * (game @ pi.unsqueeze(-1)).squeeze(-1)).unsqueeze(-2)
        S = (root.unsqueeze(-1) * game * root.unsqueeze(-2) + outer - outer.mT) / beta
        b = -(root * (r - (pi * r).sum(-1, keepdim=True))).unsqueeze(-1)
        u = torch.cholesky_solve(b + S @ b, torch.linalg.cholesky_ex(one + S.mT @ S)[0]).squeeze(-1)
        moved = root * u - pi * (root * u).sum(-1, keepdim=True)  # F u, by which pi changes
        d = (game @ moved.unsqueeze(-1)).squeeze(-1) / beta - r
        t, least = torch.ones_like(z[..., :1]), r.norm(dim=-1, keepdim=True)
        for _ in range(30):
            new, after = z + t * d, residual(z + t * d)
            short = ~(after.norm(dim=-1, keepdim=True) <= (1 - t / 4) * least)
            if not short.any():
                break
            t = torch.where(short, t / 2, t)
        z, r = torch.where(short, z, new), torch.where(short, r, after)
        if short.all() or r.abs().max() <= within:  # what no step lowers any more is rounding
            break
    return z


def von_neumann_winner(preferences: Tensor) -> Tensor:
    """log of the policy that nothing beats in more than half of the games: the equilibrium for beta -> 0; it
    is that of beta = 1e-6 and a uniform reference, which nothing beats by more than 1e-6 log Y [D11.15].
    Args, Raises: preferences as `best_response`. Returns (..., Y)."""
    _checked(preferences)
    uniform = torch.zeros_like(preferences[..., 0], dtype=torch.float64).log_softmax(-1)
    return regularised_equilibrium(preferences, uniform, beta=1e-6)[0]


def nash_md_step(
    preferences: Tensor, logps: Tensor, ref_logps: Tensor, *, beta: float, step: float | None = None
) -> Tensor:
    """One step of mirror descent, pi^(1 - step beta) pi_ref^(step beta) e^(step P pi), normalised [D11.16].

    For step <= 4 beta / (1 + 4 beta^2), the default, KL(pi* || pi) falls to 1 - step beta of it or less.
    The mixtures that Nash-MD plays against take these steps, at its penalty of beta (1 - step beta).

    Args, Returns, Raises: as `best_response`, which a step of 1 / beta is; step in (0, 1 / beta].
    """
    game, ref_logps = _checked(preferences, ref_logps, beta, logps)
    step = 4 * beta / (1 + 4 * beta**2) if step is None else step
    if not 0 < step * beta <= 1:
        raise InputError(f"step must lie in (0, 1 / beta], got {step} with beta = {beta}.")
    logps = logps.double()
    kept = torch.where(logps > -math.inf, (1 - step * beta) * logps, -math.inf)  # 0 * inf would be NaN
    return (kept + step * (beta * ref_logps + _against(game, logps))).log_softmax(-1)


def self_play_objective(
    logps: Tensor, ref_logps: Tensor, preferences: Tensor, *, beta: float, mixture: float = 0.0
) -> Tensor:
    """1/2 - pi' P mu + beta KL(pi || pi_ref) against an opponent mu that is taken for fixed, mean over
    prompts: its gradient is Nash-MD's policy gradient [D11.16].

    mu is pi^(1 - mixture) pi_ref^mixture, normalised, and ends at the equilibrium of beta / (1 - mixture).

    Args: as `best_response`, gradients flow to logps; mixture in [0, 1). Returns a scalar, in logps's dtype.
    """
    game, ref = _checked(preferences, ref_logps, beta, logps)
    if not 0 <= mixture < 1:
        raise InputError(f"mixture must lie in [0, 1), got {mixture}.")
    opponent = ((1 - mixture) * logps.detach().double() + mixture * ref).log_softmax(-1)
    win = (logps.exp() * _against(game, opponent).to(logps.dtype)).sum(-1)
    return (beta * kl_divergence(logps, ref.to(logps.dtype)) - win).mean()


def online_ipo_objective(logps: Tensor, ref_logps: Tensor, preferences: Tensor, *, beta: float) -> Tensor:
    """The IPO loss on the pairs that the policy itself draws now, each with its probability; its gradient is
    2 / beta times that of `self_play_objective` [D11.16]. Args: as there, of X prompts. Returns a scalar."""
    chance = logps.detach().exp()
    pairs = game_pairs(preferences, chance.unsqueeze(-1) * chance.unsqueeze(-2) / len(chance))
    return ipo_objective(logps, ref_logps, pairs, beta=beta)[0]


def game_pairs(preferences: Tensor, chances: Tensor | None = None) -> Rankings:
    """The population of a game's comparisons, i over j with the chance of the pair times P: what DPO, IPO and
    `maximum_likelihood` see of it [D11.17].

    Args: preferences (X, Y, Y); chances (X, Y, Y) of showing i and j, symmetric; None for all pairs alike.
    """
    _checked(preferences)
    X, Y, _ = preferences.shape
    x, i, j = (~torch.eye(Y, dtype=torch.bool, device=preferences.device)).expand(X, Y, Y).nonzero().T
    weight = preferences if chances is None else preferences * chances
    pairs = Rankings(x, torch.stack([i, j], -1), weight[x, i, j])
    return pairs.normalised() if chances is None else pairs


def borda_scores(preferences: Tensor) -> Tensor:
    """(..., Y): how often each is preferred to a uniformly drawn completion, itself included [D11.17]."""
    return _checked(preferences)[0].mean(-1) + 0.5


def copeland_scores(preferences: Tensor) -> Tensor:
    """(..., Y): the share of completions to which a majority prefers each; a tie is one half [D11.17]."""
    return _checked(preferences)[0].sign().mean(-1) / 2 + 0.5


def _against(game: Tensor, logps: Tensor) -> Tensor:
    return (game @ logps.exp().unsqueeze(-1)).squeeze(-1)


def _checked(preferences: Tensor, ref_logps: Tensor | None = None, beta=1.0, logps: Tensor | None = None):
    """P - 1/2, made exactly skew, and the reference; float64."""
    check_positive("beta", beta)
    check_finite(preferences=preferences)
    P = preferences.double()
    if P.shape[-2:-1] != P.shape[-1:] or P.min() < 0 or not ((P + P.mT - 1).abs() <= 1e-4).all():
        raise InputError("preferences must be a table (..., Y, Y) with P + P' = 1, one half on the diagonal.")
    for name, table in (("ref_logps", ref_logps), ("logps", logps)):
        if table is not None:
            check_same_shape(**{"a row of preferences": P[..., 0], name: table})
            check_log_distribution(**{name: table})
    return (P - P.mT) / 2, None if ref_logps is None else ref_logps.double()
