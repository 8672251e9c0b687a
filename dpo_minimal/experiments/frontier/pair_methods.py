"""Losses of comparisons on a table of log pi, each with where it must end if that is known.

The end is computed from the same comparisons by another way than gradient steps: Newton's method, a linear
system, or a formula.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from ... import losses
from ...bandit import kto_on_table, loss_on_table, plackett_luce_objective
from ...closed_form import optimal_logps
from ...laws.finite_data import ipo_estimate, maximum_likelihood
from ...preferences import Rankings, tally
from ...rivals.baselines import preferred_ft_logps, unlikelihood_logps
from ...validation import InputError
from .worlds import World

Objective = Callable[[Tensor, Tensor, Rankings], Tensor]  # (logps, ref_logps, rankings) -> loss
TABLE_RATE = 0.05  # Adam's, in nats of reward a step; DPO's logits move by 1 / beta times as much


class PairMethod(NamedTuple):
    """A loss of comparisons.

    Fields:
        objective: the mean loss of the comparisons, by their weights.
        optimum: (world, rankings) -> (X, Y) log pi, or None; raises InputError where none exists.
        rate: Adam's rate for a table, in nats of log pi a step: as far as the optimum is, so is the walk.
    """

    family: str
    setting: str
    objective: Callable[[World], Objective]
    optimum: Callable[[World, Rankings], Tensor | None]
    rate: float


def dpo(beta: float) -> PairMethod:
    """`dpo_loss`: ends at the closed form of the rewards that the comparisons are likeliest under [D11.7]."""
    return _of(losses.dpo_loss, "DPO", f"β {beta:g}", tilted(beta), TABLE_RATE / beta, beta=beta)


def cdpo(beta: float, noise: float) -> PairMethod:
    """`cdpo_loss`: ends where DPO would on comparisons of which a share `noise` is reversed [D12.2]."""
    optimum = tilted(beta, lambda rankings: _mixed(rankings, 1 - noise, noise))
    setting = f"β {beta:g}, ε {noise:g}"
    return _of(
        losses.cdpo_loss, "cDPO", setting, optimum, TABLE_RATE / beta, beta=beta, label_smoothing=noise
    )


def robust(beta: float, noise: float) -> PairMethod:
    """`robust_dpo_loss`: ends where DPO would with the flips undone, if anywhere [D12.3]."""
    mix = partial(_mixed, right=(1 - noise) / (1 - 2 * noise), wrong=-noise / (1 - 2 * noise))
    setting = f"β {beta:g}, ε {noise:g}"
    return _of(
        losses.robust_dpo_loss, "robust DPO", setting, tilted(beta, mix), TABLE_RATE / beta, beta=beta,
        flip_probability=noise,
    )  # fmt: skip


def ipo(beta: float) -> PairMethod:
    """`ipo_loss`: ends at the log-ratios that solve its linear system [D12.1]."""

    def optimum(world: World, rankings: Rankings) -> Tensor:
        estimate = ipo_estimate(rankings, world.ref_logps > -math.inf, beta=beta)
        return (world.ref_logps + estimate).log_softmax(-1)

    return _of(losses.ipo_loss, "IPO", f"β {beta:g}", optimum, 0.02 / beta, beta=beta)


def unweighted(beta: float) -> PairMethod:
    """`unweighted_dpo_loss`: no end, it falls for ever [D12.7]."""
    return _of(losses.unweighted_dpo_loss, "DPO without weight", "", _none, 0.05, beta=beta)


def simpo(beta: float, gamma: float) -> PairMethod:
    """`simpo_loss`: no formula for its end, which forgets the reference [D12.6]."""
    return _of(losses.simpo_loss, "SimPO", f"β {beta:g}, γ {gamma:g}", _unknown, 0.05, beta=beta, gamma=gamma)


def orpo(lam: float) -> PairMethod:
    """`orpo_loss`: no formula for its end, which forgets the reference [D12.5]."""
    return _of(losses.orpo_loss, "ORPO", f"λ {lam:g}", _unknown, 0.05, lam=lam)


def unlikelihood(alpha: float) -> PairMethod:
    """`unlikelihood_loss`: ends at the shares (w - alpha l) / (1 - alpha), or nowhere [D12.7]."""

    def optimum(world: World, rankings: Rankings) -> Tensor:
        return unlikelihood_logps(rankings, world.ref_logps > -math.inf, alpha=alpha)

    return _of(losses.unlikelihood_loss, "Unlikelihood", f"α {alpha:g}", optimum, 0.05, alpha=alpha)


def preferred_ft() -> PairMethod:
    """The likelihood of the chosen: ends at the shares in which each completion was chosen [D10.4]."""

    def optimum(world: World, rankings: Rankings) -> Tensor:
        return preferred_ft_logps(rankings, world.ref_logps > -math.inf)

    return _of(losses.unlikelihood_loss, "Preferred-FT", "", optimum, 0.05, alpha=0.0)


def plackett_luce(beta: float) -> PairMethod:
    """`plackett_luce_dpo_loss` of rankings of any K: ends as DPO does [D8.3]."""

    def objective(_: World) -> Objective:
        return lambda *arguments: plackett_luce_objective(*arguments, beta=beta)[0]

    return PairMethod("Plackett-Luce DPO", f"β {beta:g}", objective, tilted(beta), TABLE_RATE / beta)


def kto(beta: float) -> PairMethod:
    """`kto_loss`, the chosen desirable, the rejected not: no formula for its end, never pi* [D12.4]."""

    def objective(_: World) -> Objective:
        def loss(logps: Tensor, ref_logps: Tensor, rankings: Rankings) -> Tensor:
            out = kto_on_table(
                logps, ref_logps, rankings, beta=beta, desirable_weight=1.0, undesirable_weight=1.0
            )
            return rankings.weight @ out.losses.mean(-1)

        return loss

    return PairMethod("KTO", f"β {beta:g}", objective, _unknown, TABLE_RATE / beta)


def _of(loss, family: str, setting: str, optimum, rate: float, **options: float) -> PairMethod:
    def objective(world: World) -> Objective:
        def mean(logps: Tensor, ref_logps: Tensor, rankings: Rankings) -> Tensor:
            lengths = world.lengths.to(logps.dtype)
            out = loss_on_table(loss, logps, ref_logps, rankings, lengths=lengths, **options)
            return rankings.weight @ out.losses

        return mean

    return PairMethod(family, setting, objective, optimum, rate)


def tilted(beta: float, change: Callable[[Rankings], Rankings] = lambda rankings: rankings):
    """The closed form of the rewards that the comparisons, so changed, are likeliest under."""

    def optimum(world: World, rankings: Rankings) -> Tensor:
        estimate = maximum_likelihood(change(rankings), world.ref_logps > -math.inf)
        return optimal_logps(world.ref_logps, estimate, beta=beta)

    return optimum


def _unknown(world: World, rankings: Rankings) -> None:
    """No formula is known."""


def _none(world: World, rankings: Rankings) -> None:
    raise InputError("without its weight the loss of DPO falls for ever.")


def _mixed(rankings: Rankings, right: float, wrong: float) -> Rankings:
    """`right` times the comparisons plus `wrong` times the same ones reversed [D12.2, D12.3].

    Raises InputError where a weight would be negative: then it is no likelihood that could be maximised,
    and often the loss falls without limit.
    """
    mixed = tally(
        rankings.prompt.repeat(2),
        torch.cat([rankings.order, rankings.order.flip(-1)]),
        torch.cat([right * rankings.weight, wrong * rankings.weight]),
    )
    if (mixed.weight < 0).any():
        raise InputError("robust DPO may have no optimum: a pair was flipped less often than its ε says.")
    kept = mixed.weight > 0
    return Rankings(*(field[kept] for field in mixed))
