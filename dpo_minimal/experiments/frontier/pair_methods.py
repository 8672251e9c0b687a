"""Losses of comparisons on a table of log pi, each with where it must end if that is known.

What a loss is stands in its record (zoo.LOSSES); here is how the frontier runs it. The end is computed from
the same comparisons by another way than gradient steps: Newton's method, a linear system, or a formula.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from ...bandit import mean_on_table
from ...preferences import Rankings
from ...validation import InputError
from ...zoo import LOSSES
from .worlds import World

Objective = Callable[[Tensor, Tensor, Rankings], Tensor]  # (logps, ref_logps, rankings) -> loss
TABLE_RATE = 0.05  # Adam's, in nats of reward a step; DPO's logits move by 1 / beta times as much
RATES = {"ipo": 0.02}  # of losses that need another one


class PairMethod(NamedTuple):
    """A loss of comparisons."""

    family: str  # "cDPO"
    setting: str  # "β 0.1, ε 0.1"
    objective: Callable[[World], Objective]  # the mean loss of the comparisons, by their weights
    optimum: Callable[[World, Rankings], Tensor | None]  # (X, Y) log pi; InputError where none exists
    rate: float  # Adam's for a table, in nats of log pi a step: larger where the optimum is further away


def pair_method(name: str, **options: float) -> PairMethod:
    """The method of the loss of that name; options that are not given are the loss's defaults."""
    loss = LOSSES[name]
    options = {option.name: options.get(option.name, option.default) for option in loss.options}
    setting = ", ".join(f"{o.symbol} {options[o.name]:g}" for o in loss.options if o.symbol)

    def objective(world: World) -> Objective:
        def mean(logps: Tensor, ref_logps: Tensor, rankings: Rankings) -> Tensor:
            lengths = world.lengths.to(logps.dtype)
            return mean_on_table(loss, logps, ref_logps, rankings, lengths=lengths, **options)[0]

        return mean

    def optimum(world: World, rankings: Rankings) -> Tensor | None:
        if loss.optimum == "none":
            raise InputError(f"the loss of {loss.title} falls for ever.")
        if isinstance(loss.optimum, str):
            return None
        lengths = {"lengths": world.lengths} if "lengths" in loss.reads else {}
        return loss.optimum(rankings, world.ref_logps, **lengths, **options)

    rate = RATES.get(name, TABLE_RATE)
    if "reference" in loss.reads and loss.optimum != "none":  # its optimum is 1 / beta as far
        rate /= options.get("beta", 1.0)
    return PairMethod(loss.title, setting, objective, optimum, rate)


def preferred_ft() -> PairMethod:
    """The likelihood of the chosen: Unlikelihood with alpha = 0, which ends at the shares of wins [D10.4]."""
    return pair_method("unlikelihood", alpha=0.0)._replace(family="Preferred-FT", setting="")


def others(beta: float, noise: float, alphas: tuple[float, ...]) -> list[PairMethod]:
    """Every charted loss of pairs beside DPO, at the frontier's settings, or else at its defaults.

    Averaged IPO is left out: it differs from IPO only by the completions' lengths.
    """
    settings: dict[str, list[dict[str, float]]] = {
        "dpo": [],
        "averaged_ipo": [],
        "ipo": [{"beta": 0.1}, {"beta": 1.0}],
        "cdpo": [{"beta": beta, "label_smoothing": noise}],
        "robust": [{"beta": beta, "flip_probability": noise}],
        "kto": [{"beta": beta}],
        "orpo": [{"lam": 1.0}],
        "simpo": [{"beta": 2.0, "gamma": 0.5}],
        "unweighted_dpo": [{"beta": beta}],
        "unlikelihood": [{"alpha": alpha} for alpha in alphas],
    }
    for name, loss in LOSSES.items():
        given = all(option.default is not None for option in loss.options)
        if loss.charted and loss.rows == "preferences" and given:
            settings.setdefault(name, [{}])
    return [pair_method(name, **options) for name, several in settings.items() for options in several]
