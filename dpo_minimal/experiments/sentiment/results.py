"""What the trainings of the sentiment experiment left, averaged over prompts and seeds, as rows of tables.

But: no printing (command.py), no figures (figure.py).

Shapes: S seeds, P held-out prompts, L measurements, m draws of a prompt.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ...closed_form import reward_kl_frontier
from ...rivals.baselines import best_of_n_kl_bound, best_of_n_reward
from ...rivals.evaluate import Interval, crossed_interval, win_interval
from ..study import Arrays
from .methods import OTHER_TEMPERATURES, TEMPERATURES, Run, budget_of
from .world import Plan

Row = dict[str, Any]
# Divergences of the comparison; the first is what best of 16 has at most.
WITHIN = {nats: f"reward_within_{nats:g}_nats" for nats in (1.84, 2.5, 8.0)}
# Of the samples at the end, and of the held-out pairs.
CHARACTER = ("lengths", "ended", "repeated", "reference_token_logps", "accuracies")
MOST_OF_N = (1, 4, 16, 64, 128)
FRONTIER_END = 3.6  # nats, to which 384 draws tell the frontier: their largest KL is log 384 = 5.9


class Group(NamedTuple):
    """The trainings of one method with one setting, which differ in their seed."""

    method: str
    setting: str
    steps: list[int]  # (L,) at each measurement
    rewards: Tensor  # (S, L, P) of the samples, and so are the log-ratios, nats
    log_ratios: Tensor
    last: dict[str, Any]  # further arrays (S, ...) of the end, see `methods.measure`
    seconds: float  # a training, on average, without the measurements

    @property
    def label(self) -> str:
        """Method and setting."""
        return f"{self.method} {self.setting}".strip()

    @property
    def path(self) -> list[tuple[float, float]]:
        """(KL, reward) at each measurement, means over seeds and prompts."""
        return list(zip(self.log_ratios.mean((0, 2)).tolist(), self.rewards.mean((0, 2)).tolist()))


def groups_of(found: dict[str, Arrays], runs: Sequence[Run]) -> list[Group]:
    """The trainings' arrays, by their names, put together by method and setting, in the order of the runs."""
    together: dict[tuple[str, str], list[Arrays]] = {}
    for run in runs:
        together.setdefault((run.method, run.setting), []).append(found[run.name])
    groups = []
    for names, files in together.items():
        last: dict[str, Any] = {"texts": [file["texts"].tolist() for file in files]}
        for key in files[0].keys() - {"texts", "steps"}:
            last[key] = torch.from_numpy(np.stack([file[key] for file in files])).double()
        rewards, log_ratios, seconds = (last.pop(key) for key in ("rewards", "log_ratios", "seconds"))
        steps = files[0]["steps"].tolist()
        groups.append(Group(*names, steps, rewards, log_ratios, last, seconds.mean().item()))
    return groups


def reward_within(group: Group, start: Tensor, nats: float) -> Interval:
    """The most reward along a training's path within so many nats.

    The path goes from the SFT model in straight lines between measurements, means over seeds; where it
    crosses the limit it is cut. Being the best of several, the number is a little high for every method.

    Args: start (P,): the reward of the SFT model.
    """
    kls = [0.0, *group.log_ratios.mean((0, 2)).tolist()]
    tables = [start.expand_as(group.rewards[:, 0]), *group.rewards.unbind(1)]  # (S, P) each
    inside = [table for kl, table in zip(kls, tables) if kl <= nats]
    for (before, first), (after, second) in pairwise(zip(kls, tables)):
        if (before - nats) * (after - nats) < 0:
            share = (nats - before) / (after - before)
            inside.append((1 - share) * first + share * second)
    return crossed_interval(max(inside, key=lambda table: table.mean().item()))


def order_weights(n: int, m: int) -> Tensor:
    """(m,) the chance that the best of n out of m draws is the draw in each place, worst first.

    >>> order_weights(2, 3)     # of the three pairs the best draw is in two, the second in one
    tensor([0.0000, 0.3333, 0.6667], dtype=torch.float64)
    """
    at_least = best_of_n_reward(torch.ones(m, m, dtype=torch.float64).triu(), n=n)  # this place or a better
    return at_least - torch.cat([at_least[1:], at_least.new_zeros(1)])


def best_of(true: Tensor, chosen_by: Tensor, opponents: Tensor) -> dict[int, Row]:
    """For every N its true reward and win rate with intervals over prompts, and the bound of its KL, nats.

    Args: true (P', m), chosen_by (S, P', m): the true reward of all draws, and the one that chooses, of each
        training; opponents (P',).
    """
    order = chosen_by.argsort(dim=-1, stable=True)
    rewards = true.double().expand_as(order).gather(-1, order)
    wins = (1 + (rewards - opponents.double().unsqueeze(-1)).sign()) / 2
    found = {}
    for n in MOST_OF_N:
        weights = order_weights(n, true.shape[-1])
        found[n] = _spread("reward", crossed_interval(rewards @ weights))
        found[n] |= _spread("kl", [best_of_n_kl_bound(n)] * 3)
        found[n] |= _spread("win_rate", crossed_interval(wins @ weights, within=(0.0, 1.0)))
    return found


def estimated_frontier(true: Tensor) -> list[tuple[float, float]]:
    """(KL, reward) of pi_ref exp(r / beta) / Z for many beta: the most reward at each divergence (Eq. 4).

    Each prompt's draws, equally likely, stand for pi_ref. With 384 of them that holds up to about 3.6 nats,
    where it is cut, as 10 of them then still share most of the weight; beyond, the true frontier is higher.
    """
    uniform = torch.full(true.shape, -math.log(true.shape[-1]), dtype=torch.float64)
    betas = torch.logspace(2, -1.5, 200, dtype=torch.float64)
    kl, reward = (table.mean(-1).tolist() for table in reward_kl_frontier(uniform, true.double(), betas))
    return [point for point in zip(kl, reward) if point[0] <= FRONTIER_END]


class Results(NamedTuple):
    """Everything that tables and figures show."""

    groups: list[Group]  # the trainings, the SFT model itself among them
    full: list[Group]  # those that were measured at all temperatures and on other prompts
    start: Tensor  # (P,) the SFT model's rewards, over its seeds
    rows: list[Row]  # of table.csv, one for each method and setting
    win_rates: list[Row]  # of win_rates.csv
    opponents: Tensor  # (P,) rewards of samples of the SFT model, to win against
    best: dict[str, dict[int, Row]]  # best of N by the "learned", the "true" and DPO's "... implicit" reward
    frontier: list[tuple[float, float]]  # estimated, (KL, reward)
    accuracy: float  # of the reward model, on so many held-out pairs
    pairs: int


def results_of(found: dict[str, Arrays], runs: Sequence[Run], plan: Plan) -> Results:
    """What the files of a finished run, by their names, add up to."""
    own, other = (torch.from_numpy(found["opponents"][key]).double() for key in ("held_out", "other"))
    draws, reward = found["best-of-n"], found["reward-model"]
    true, learned = (torch.from_numpy(draws[key]) for key in ("true", "learned"))
    groups = groups_of(found, runs)
    choosers = {"learned": learned.unsqueeze(0), "true": true.unsqueeze(0)}
    for group in groups:
        if "draw_logps" in group.last:
            choosers[f"{group.label} implicit"] = group.last["draw_logps"] - torch.from_numpy(
                draws["reference"]
            )
    best = {name: best_of(true, by, own[: len(true)]) for name, by in choosers.items()}
    start = next(group for group in groups if group.method == "SFT").rewards[:, -1].mean(0)
    budgets = {(run.method, run.setting): budget_of(run, plan) for run in runs}
    frontier = estimated_frontier(true)
    rows = [_row(g, start, own, frontier) | budgets[g.method, g.setting] for g in groups]
    for method, name in (("Best of N", "learned"), ("Best of N-GT", "true")):
        for n, row in best[name].items():
            if n > 1:
                row = {"method": method, "setting": f"N {n}", "seeds": 1} | row
                rows.append(row | {"seconds": float(draws["seconds"])})
    full = [group for group in groups if "temperature_rewards" in group.last]
    return Results(
        groups, full, start, rows, _win_rates(full, own, other), own, best, frontier,
        float(reward["accuracy"]), int(reward["pairs"]),
    )  # fmt: skip


def share_of_possible(kl: float, reward: float, frontier: Sequence[tuple[float, float]]) -> float | None:
    """A reward over the most that is possible at its divergence.

    None beyond the frontier, and so near the reference that the most possible may be 0.
    """
    return reward / np.interp(kl, *zip(*frontier)).item() if 0.1 < kl <= frontier[-1][0] else None


def _row(group: Group, start: Tensor, opponents: Tensor, frontier: list[tuple[float, float]]) -> Row:
    row = {"method": group.method, "setting": group.setting, "seeds": len(group.rewards)}
    row |= _spread("reward", crossed_interval(group.rewards[:, -1]))
    row |= _spread("kl", crossed_interval(group.log_ratios[:, -1]))
    row |= _spread("win_rate", win_interval(group.rewards[:, -1], opponents))
    for nats, name in WITHIN.items():
        row |= _spread(name, (None,) * 3 if group.method == "SFT" else reward_within(group, start, nats))
    row |= {"possible": share_of_possible(row["kl"], row["reward"], frontier), "seconds": group.seconds}
    last = group.last | {"accuracies": group.last["accuracies"][:, -1]}
    return row | {name: last[name].mean().item() for name in CHARACTER}


def _spread(name: str, interval: Iterable[float | None]) -> Row:
    return dict(zip((name, f"{name}_low", f"{name}_high"), interval))


def _win_rates(groups: Sequence[Group], own: Tensor, other: Tensor) -> list[Row]:
    """Over temperatures, on held-out prompts and on those of another kind."""
    rows = []
    for group in groups:
        for prompts, key, opponents, temperatures in (
            ("held out", "temperature_rewards", own, TEMPERATURES),
            ("other", "other_rewards", other, OTHER_TEMPERATURES),
        ):
            names = {"method": group.method, "setting": group.setting, "prompts": prompts}
            for place, temperature in enumerate(temperatures):
                win = win_interval(group.last[key][:, place], opponents)
                rows.append(names | {"temperature": temperature} | _spread("win_rate", win))
    return rows


def path_rows(results: Results) -> list[Row]:
    """What the figures draw of trainings, for metrics.jsonl: a row for each setting, seed and measurement."""
    rows = []
    for group in results.groups:
        for seed, tables in enumerate(zip(group.rewards, group.log_ratios)):
            for step, r, kl in zip(group.steps, *tables):
                wins = (1 + torch.sign(r - results.opponents)) / 2
                rows.append(
                    {"method": group.method, "setting": group.setting, "seed": seed, "step": step,
                     "reward": r.mean().item(), "reward_error": (r.std() / len(r) ** 0.5).item(),
                     "kl": kl.mean().item(), "kl_error": (kl.std() / len(kl) ** 0.5).item(),
                     "win_rate": wins.mean().item()}
                )  # fmt: skip
    return rows
