"""Every method of the frontier, run on a world: its path from the reference to its end.

A method is trained by gradient steps on comparisons (its loss is one of pair_methods.py), or maximises
rewards by PPO, or is a closed form.
"""

from __future__ import annotations

import copy
import itertools
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ...closed_form import best_of_n_logps, kl_divergence, optimal_logps
from ...losses import bradley_terry_loss
from ...policy import tree_states, whole_completions
from ...preferences import Rankings
from ...rivals.baselines import AdaptiveKL, FrontierGap, frontier_gap, ppo
from ...rivals.reward_model import RewardModel
from ...train import train
from ...validation import InputError
from ..bandit.fit import float64_table
from .pair_methods import PairMethod
from .worlds import World

GPT_RATE = 4e-3  # Adam's, for the GPT's weights
PPO_TABLE_RATE = 0.1
MEASURED = 20  # policies along a path


class Effort(NamedTuple):
    """How long the methods of a world are trained: the same for all of them."""

    steps: int  # on comparisons
    iterations: int  # of PPO
    samples: int  # of each prompt in an iteration
    epochs: int  # on them


def effort(world: World, *, quick: bool) -> Effort:
    """A few seconds a method. The GPT's steps are slow; samples of an enumerated policy cost nothing."""
    share = 4 if quick else 1
    if world.name == "table":
        return Effort(1200 // share, 450 // share, samples=2048, epochs=4)
    return Effort(450 // share, 500 // share, samples=2048, epochs=2)


@dataclass(frozen=True, eq=False)
class Run:
    """One method on one world, from the reference to its end."""

    world: World
    family: str
    setting: str  # "β 0.1"
    path: Tensor  # (L, X, Y) tables of log pi along the way, the reference first, the end last
    steps_at: list[int]  # (L,) gradient steps done at each of them; 0 for a closed form
    optimum: Tensor | None  # (X, Y) where it must end; None: not known, or does not exist
    seconds: float = 0.0  # in training alone
    ends: str = "-"  # what to print where there is no optimum: "-" not known, "none" none exists

    @property
    def steps(self) -> int:
        """Gradient steps in all."""
        return self.steps_at[-1]

    @property
    def distance(self) -> float:
        """KL(pi || its own optimum), the mean over prompts, nats; NaN where that is not known."""
        if self.optimum is None:
            return math.nan
        return kl_divergence(self.path[-1], self.optimum).mean().item()

    @cached_property
    def gap(self) -> FrontierGap:
        """KL and reward of each policy of the path, and what it falls short of the frontier."""
        return frontier_gap(self.path, self.world.ref_logps, self.world.rewards)


def train_on_pairs(world: World, method: PairMethod, rankings: Rankings, *, steps: int) -> Run:
    """Adam on the whole of the comparisons, its rate falling linearly to zero."""
    policy, objective = world.policy(), method.objective(world)
    reference = world.ref_logps.to(next(policy.parameters()).dtype)
    rate = method.rate if world.name == "table" else GPT_RATE
    stream = descend(policy, rate, rankings, steps, lambda batch: objective(policy(), reference, batch))
    try:
        optimum, ends = method.optimum(world, rankings), "-"
    except InputError:  # mostly because some completion never lost, or never won
        optimum, ends = None, "none"
    path, steps_at, seconds = follow(partial(float64_table, policy), stream, steps)
    return Run(world, method.family, method.setting, path, steps_at, optimum, seconds, ends)


def descend(
    model: nn.Module, rate: float, rankings: Rankings, steps: int, loss: Callable[[Rankings], Tensor]
) -> Iterable:
    """Gradient steps on the loss of all comparisons together, as they are drawn from; see `train`."""
    batch = rankings.normalised_by_prompt()
    batch = batch._replace(weight=batch.weight.to(next(model.parameters()).dtype))
    optimizer, schedule = adam(model.parameters(), rate, steps)
    data = itertools.repeat(batch, steps)
    return train(lambda batch: (loss(batch), {}), optimizer, data, scheduler=schedule)


def adam(parameters: Iterable[Tensor], rate: float, steps: int):
    """The optimizer of all methods and its schedule: a short warm-up, then linearly to zero."""
    # Gradients of a small beta are small; Adam's floor must lie below them.
    optimizer = torch.optim.Adam(parameters, lr=rate, betas=(0.9, 0.95), eps=1e-12, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1, (step + 1) / (0.04 * steps)) * (1 - step / steps)
    )
    return optimizer, schedule


def measured_steps(steps: int) -> set[int]:
    """The steps after which a training is measured: densely at first, the last one included."""
    return {round(steps * (k / MEASURED) ** 2) for k in range(1, MEASURED + 1)} | {steps}


def follow(table: Callable[[], Tensor], stream: Iterable, steps: int) -> tuple[Tensor, list[int], float]:
    """Run a training; what it trains as tables (L, X, Y) along the way, after how many steps, and seconds."""
    measured = measured_steps(steps)
    tables, steps_at, seconds = [table()], [0], 0.0
    started = time.perf_counter()
    for step, _ in enumerate(stream, 1):
        if step in measured:
            seconds += time.perf_counter() - started
            tables.append(table())
            steps_at.append(step)
            started = time.perf_counter()
    return torch.stack(tables), steps_at, seconds


def pairs_loss(rewards: Tensor, pairs: Rankings) -> Tensor:
    """-log sigmoid of the margin of each comparison (Eq. 2), summed by their weights; rewards (X, Y)."""
    return pairs.weight @ bradley_terry_loss(*pairs.gather(rewards).unbind(-1))


def train_by_ppo(
    world: World, rewards: Tensor, family: str, *, beta: float, effort: Effort, seed: int,
    target: float | None = None,
) -> Run:  # fmt: skip
    """PPO against rewards, learned or true, with a fixed coefficient or towards a divergence.

    Its own optimum is the closed form of those rewards at the coefficient it ends with.
    """
    policy = world.policy()
    dtype = next(policy.parameters()).dtype
    rate = PPO_TABLE_RATE if world.name == "table" else GPT_RATE
    optimizer, schedule = adam(policy.parameters(), rate, effort.iterations)
    controller = AdaptiveKL(beta, target)
    stream = ppo(
        policy, world.ref_logps.to(dtype), rewards.to(dtype), optimizer, controller,
        iterations=effort.iterations, samples=effort.samples, epochs=effort.epochs, scheduler=schedule,
        generator=torch.Generator().manual_seed(seed),
    )  # fmt: skip
    path, iterations_at, seconds = follow(partial(float64_table, policy), stream, effort.iterations)
    setting = f"β {beta:g}" if target is None else f"target KL {target:g}"
    steps_at = [effort.epochs * iteration for iteration in iterations_at]
    optimum = optimal_logps(world.ref_logps, rewards, beta=controller.coefficient)
    return Run(world, family, setting, path, steps_at, optimum, seconds)


def best_of_n(world: World, rewards: Tensor, family: str, n: int) -> Run:
    """The exact law of the best of n draws: no training."""
    end = best_of_n_logps(world.ref_logps, rewards, n=n)
    return Run(world, family, f"N {n}", torch.stack([world.ref_logps, end]), [0, 0], end)


def closed_form(world: World, rewards: Tensor, family: str, beta: float) -> Run:
    """pi_ref exp(r / beta) / Z of the rewards given: no training."""
    end = optimal_logps(world.ref_logps, rewards, beta=beta)
    return Run(world, family, f"β {beta:g}", torch.stack([world.ref_logps, end]), [0, 0], end)


def gpt_reward_model(world: World, shown: Rankings, held_out: Rankings, *, steps: int, seed: int) -> Tensor:
    """A reward model on a copy of the reference GPT, fitted to comparisons and stopped by held-out ones.

    Returns: (X, Y) rewards of every completion, of mean zero under the reference for each prompt.
    """
    torch.manual_seed(seed)
    model = RewardModel(copy.deepcopy(world.reference))
    tree, ends = whole_completions(world.completions)

    def rewards() -> Tensor:
        return model.head(tree_states(model.body, world.prompts, tree)[:, ends]).squeeze(-1)

    stream = descend(model, GPT_RATE, shown, steps, lambda batch: pairs_loss(rewards(), batch))
    path, _, _ = follow(torch.no_grad()(lambda: rewards().double()), stream, steps)
    losses = [pairs_loss(each, held_out).item() for each in path[1:]]
    return centred(world, path[1 + losses.index(min(losses))])


def centred(world: World, rewards: Tensor) -> Tensor:
    """Rewards (X, Y) less their mean under the reference, for each prompt [D2.2]."""
    return rewards - (world.ref_logps.exp() * rewards).sum(-1, keepdim=True)
