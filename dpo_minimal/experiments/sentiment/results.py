"""What the trainings of the sentiment experiment left, averaged over prompts and seeds, with intervals.

Seeds share the held-out prompts, so a mean over both is uncertain in two ways: other prompts, and other
trainings. An interval counts both, as an analysis of variance of prompts crossed with seeds does; with two or
three seeds its second part is a rough estimate, which Student's t answers for with width.

But: no printing (sentiment_report.py), no figures (sentiment_plots.py).

Shapes: S seeds, P held-out prompts, L looks, m draws of a prompt.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ...closed_form import reward_kl_frontier
from ...rivals.baselines import best_of_n_kl_bound, best_of_n_reward
from ...rivals.evaluate import win_rate
from .methods import Run
from .runs import DRAWS, METHODS_FOLDER, path_of

NATS = (2.5, 8.0)  # divergences at which methods are compared
MOST_OF_N = (1, 4, 16, 64, 128)
FRONTIER_END = 2.5  # nats, to which 128 draws tell the frontier: their largest KL is log 128 = 4.9
# Student's t, 97.5 %: degrees of freedom and quantile; between them linear in 1 / degrees, which is a little
# too wide.
_T = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 7: 2.365, 10: 2.228, 15: 2.131, 30: 2.042,
      60: 2.000, math.inf: 1.960}  # fmt: skip


class Interval(NamedTuple):
    """A mean and its 95 % interval."""

    value: float
    low: float
    high: float

    @property
    def half(self) -> float:
        """Half the width."""
        return (self.high - self.low) / 2


def crossed_interval(values: Tensor) -> Interval:
    """The mean of (S, P) measurements, seeds crossed with prompts, and its 95 % interval.

    With mean squares MS_s of seeds, MS_p of prompts and MS_e of the rest, the variance of the mean is
    (MS_s + MS_p - MS_e) / (S P), taken as no less than either of the first two alone would make it; its
    degrees of freedom are Satterthwaite's. With one seed only the prompts count.
    """
    values = values.double()
    S, P = values.shape
    mean = values.mean().item()
    if P < 2:
        return Interval(mean, -math.inf, math.inf)
    by_prompt = S * values.mean(0).var().item()
    if S == 1:
        variance, degrees = by_prompt / P, P - 1.0
    else:
        by_seed = P * values.mean(1).var().item()
        rest = values - values.mean(0) - values.mean(1, keepdim=True) + mean
        by_rest = (rest**2).sum().item() / ((S - 1) * (P - 1))
        total = max(by_seed + by_prompt - by_rest, by_seed, by_prompt)
        variance = total / (S * P)
        squares = by_seed**2 / (S - 1) + by_prompt**2 / (P - 1) + by_rest**2 / ((S - 1) * (P - 1))
        degrees = max(1.0, total**2 / squares) if squares > 0 else math.inf
    half = student_95(degrees) * math.sqrt(variance)
    return Interval(mean, mean - half, mean + half)


def student_95(degrees: float) -> float:
    """How many standard errors make a 95 % interval.

    >>> student_95(2), round(student_95(1e9), 2)
    (4.303, 1.96)
    """
    places = [1 / d for d in reversed(_T)]
    return float(np.interp(1 / degrees, places, list(reversed(_T.values()))))


def win_interval(rewards: Tensor, opponents: Tensor) -> Interval:
    """How often (S, P) rewards are above the opponents' (P,), a tie counting one half."""
    if len(rewards) == 1:
        rate = win_rate(rewards[0], opponents)
        return Interval(rate.value, rate.low, rate.high)
    mean = crossed_interval((1 + (rewards - opponents).sign()) / 2)
    return Interval(mean.value, max(0.0, mean.low), min(1.0, mean.high))


# ---------------------------------------------------------------------------------------------- trainings


class Group(NamedTuple):
    """The trainings of one method with one setting, which differ in their seed.

    Fields:
        method, setting: names; judged: completions with a true reward behind each.
        steps: (L,) steps at each look.
        rewards, log_ratios: (S, L, P) of the samples.
        last: further arrays, (S, ...): lengths, ended, repeated, reference_token_logps, texts; of some
            methods temperature_rewards (S, M, P) and other_rewards (S, 2, Q).
        seconds: a training, on average, without the looks.
    """

    method: str
    setting: str
    steps: list[int]
    rewards: Tensor
    log_ratios: Tensor
    last: dict[str, Any]
    seconds: float

    @property
    def label(self) -> str:
        """Method and setting."""
        return f"{self.method} {self.setting}".strip()

    @property
    def path(self) -> list[tuple[float, float]]:
        """(KL, reward) at each look, means over seeds and prompts."""
        return list(zip(self.log_ratios.mean((0, 2)).tolist(), self.rewards.mean((0, 2)).tolist()))


def load_groups(folder: Path, runs: Sequence[Run]) -> list[Group]:
    """The trainings' files, put together by method and setting, in the order of the runs."""
    together: dict[tuple[str, str], list[dict[str, np.ndarray]]] = {}
    for run in runs:
        with np.load(path_of(folder, run), allow_pickle=False) as file:
            together.setdefault((run.method, run.setting), []).append(dict(file))
    groups = []
    for (method, setting), files in together.items():
        stacked = {key: np.stack([file[key] for file in files]) for key in files[0] if key != "texts"}
        rewards, log_ratios = (
            torch.from_numpy(stacked.pop(key)).double() for key in ("rewards", "log_ratios")
        )
        steps, seconds = stacked.pop("steps")[0].tolist(), float(stacked.pop("seconds").mean())
        last = {key: torch.from_numpy(table).double() for key, table in stacked.items()}
        last["texts"] = [file["texts"].tolist() for file in files]
        groups.append(Group(method, setting, steps, rewards, log_ratios, last, seconds))
    return groups


def reward_within(group: Group, start: Tensor, nats: float) -> Interval:
    """The most reward that a training had on its way within so many nats.

    The way goes from the SFT model in straight lines between looks, all of them means over seeds; where it
    crosses the limit it is cut. Being the best of some looks, the number is a little high for every method.

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


# ------------------------------------------------------------------------------------------- best of n


class BestOf(NamedTuple):
    """Best of N by one reward.

    Fields: n; kl: the bound, nats; reward, win: true ones, with intervals over prompts.
    """

    n: int
    kl: float
    reward: Interval
    win: Interval


def order_weights(n: int, m: int) -> Tensor:
    """(m,) the chance that the best of n out of m draws is the draw in each place, worst first.

    >>> order_weights(2, 3)     # of the three pairs the best draw is in two, the second in one
    tensor([0.0000, 0.3333, 0.6667], dtype=torch.float64)
    """
    at_least = best_of_n_reward(torch.ones(m, m, dtype=torch.float64).triu(), n=n)  # this place or a better
    return at_least - torch.cat([at_least[1:], at_least.new_zeros(1)])


def best_of(true: Tensor, chosen_by: Tensor, opponents: Tensor) -> list[BestOf]:
    """Best of N for every N, from one set of draws.

    Args: true, chosen_by (P', m): the true reward, and the one that chooses; opponents (P',).
    """
    order = chosen_by.argsort(dim=-1, stable=True)
    rewards = true.double().gather(-1, order)
    wins = (1 + (rewards - opponents.double().unsqueeze(-1)).sign()) / 2
    found = []
    for n in MOST_OF_N:
        weights = order_weights(n, true.shape[-1])
        reward, win = (crossed_interval((table @ weights).unsqueeze(0)) for table in (rewards, wins))
        win = Interval(win.value, max(0.0, win.low), min(1.0, win.high))
        found.append(BestOf(n, best_of_n_kl_bound(n), reward, win))
    return found


def estimated_frontier(true: Tensor) -> list[tuple[float, float]]:
    """(KL, reward) of pi_ref exp(r / beta) / Z for many beta: the most reward at each divergence (Eq. 4).

    Each prompt's draws, equally likely, stand for pi_ref. With 128 of them that holds up to about 2.5 nats,
    where it is cut; beyond, the true frontier is higher.
    """
    uniform = torch.full(true.shape, -math.log(true.shape[-1]), dtype=torch.float64)
    betas = torch.logspace(2, -1.5, 200, dtype=torch.float64)
    kl, reward = (table.mean(-1).tolist() for table in reward_kl_frontier(uniform, true.double(), betas))
    return [point for point in zip(kl, reward) if point[0] <= FRONTIER_END]


class Results(NamedTuple):
    """Everything that tables and figures show.

    Fields:
        groups: the trainings; sft: the reference among them.
        opponents, other_opponents: (P,), (Q,) rewards of the SFT model's samples that others are held to.
        learned_best, true_best: best of N by the learned and by the true reward.
        frontier: estimated, (KL, reward).
        accuracy, accuracy_pairs: of the reward model, on so many held-out pairs.
    """

    groups: list[Group]
    opponents: Tensor
    other_opponents: Tensor
    learned_best: list[BestOf]
    true_best: list[BestOf]
    frontier: list[tuple[float, float]]
    accuracy: float
    accuracy_pairs: int
    best_seconds: float

    @property
    def sft(self) -> Group:
        """The reference itself."""
        return next(group for group in self.groups if group.method == "SFT")

    @property
    def start(self) -> Tensor:
        """(P,) the SFT model's rewards, over its seeds."""
        return self.sft.rewards[:, -1].mean(0)


def load_results(folder: Path, runs: Sequence[Run]) -> Results:
    """All files of a finished run."""

    def tensors(name: str) -> dict[str, Tensor]:
        with np.load(folder / METHODS_FOLDER / f"{name}.npz", allow_pickle=False) as file:
            return {key: torch.from_numpy(np.array(table)) for key, table in file.items()}

    opponents, draws, reward = tensors("opponents"), tensors("best-of-n"), tensors("reward-model")
    assert draws["true"].shape[-1] == DRAWS
    some = opponents["held_out"][: len(draws["true"])]
    return Results(
        load_groups(folder, runs), opponents["held_out"].double(), opponents["other"].double(),
        best_of(draws["true"], draws["learned"], some), best_of(draws["true"], draws["true"], some),
        estimated_frontier(draws["true"]), float(reward["accuracy"]), int(reward["pairs"]),
        float(draws["seconds"]),
    )  # fmt: skip
