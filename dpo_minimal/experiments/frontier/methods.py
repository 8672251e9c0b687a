"""Every method of the frontier, run on a world: its path from the reference to its end.

A method is trained by gradient steps on comparisons (its loss is one of pair_methods.py), or climbs rewards
by PPO, or is a closed form.
"""

from __future__ import annotations

import copy
import itertools
import math
import time
from collections.abc import Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ... import losses
from ...closed_form import FrontierGap, best_of_n_logps, kl_divergence, optimal_logps
from ...policy import tree_states, whole_completions
from ...preferences import Rankings
from ...rivals.baselines import AdaptiveKL, ppo
from ...rivals.reward_model import RewardModel
from ...train import train
from ...validation import InputError
from ..bandit.fit import float64_table
from .pair_methods import PairMethod
from .worlds import World

GPT_RATE = 4e-3  # Adam's, for the GPT's weights
LOOKS = 20  # measurements along a path
CLOSED_FORMS = ("best of N", "best of N, learned reward", "reward model + closed form")  # no training


class Effort(NamedTuple):
    """How long the methods of a world are trained: the same for all of them.

    Fields: steps on comparisons; iterations of PPO, samples of each prompt in an iteration, epochs on them.
    """

    steps: int
    iterations: int
    samples: int
    epochs: int


def effort(world: World, *, quick: bool) -> Effort:
    """A few seconds a method. The GPT's steps are dear; samples of an enumerated policy cost nothing."""
    share = 4 if quick else 1
    if world.name == "table":
        return Effort(1200 // share, 450 // share, samples=2048, epochs=4)
    return Effort(450 // share, 500 // share, samples=2048, epochs=2)


class Run(NamedTuple):
    """One method on one world, from the reference to its end.

    Fields:
        family, setting: "DPO", "beta 0.1".
        path: (L, X, Y) tables of log pi along the way, the reference first, the end last.
        steps_at: (L,) steps done at each of them.
        optimum: (X, Y) where it must end, or None where that is not known or does not exist.
        steps, seconds: gradient steps, 0 for a closed form; time in training alone.
        ends: what to print where there is no optimum: "-" not known, "none" none exists.
    """

    family: str
    setting: str
    path: Tensor
    steps_at: list[int]
    optimum: Tensor | None
    steps: int
    seconds: float
    ends: str = "-"

    @property
    def distance(self) -> float:
        """KL(pi || its own optimum), the mean over prompts, nats; NaN where that is not known."""
        if self.optimum is None:
            return math.nan
        return kl_divergence(self.path[-1], self.optimum).mean().item()


class Explored(NamedTuple):
    """A world, what was run on it, and where each run stands along its path."""

    world: World
    runs: list[Run]
    gaps: list[FrontierGap]


# ------------------------------------------------------------------------------------- by comparisons


def train_on_pairs(world: World, method: PairMethod, rankings: Rankings, *, steps: int) -> Run:
    """Adam on the whole of the comparisons, its rate falling linearly to zero."""
    policy = world.policy()
    table = world.name == "table"
    dtype = next(policy.parameters()).dtype
    reference, batch = world.ref_logps.to(dtype), rankings.normalised_by_prompt()
    batch = batch._replace(weight=batch.weight.to(dtype))
    objective = method.objective(world)
    rate = method.rate if table else GPT_RATE
    optimizer, schedule = adam(policy.parameters(), rate, steps)
    stream = train(
        lambda batch: (objective(policy(), reference, batch), {}), optimizer, itertools.repeat(batch, steps),
        scheduler=schedule,
    )  # fmt: skip
    try:
        optimum = method.optimum(world, rankings)
    except InputError:  # mostly because some completion never lost, or never won
        found = follow(method.family, method.setting, policy, stream, steps, None)
        return found._replace(ends="none")
    return follow(method.family, method.setting, policy, stream, steps, optimum)


def adam(parameters: Iterable[Tensor], rate: float, steps: int):
    """The optimizer of all methods and its schedule: a short warm-up, then linearly to zero."""
    # Gradients of a small beta are small; Adam's floor must lie below them.
    optimizer = torch.optim.Adam(parameters, lr=rate, betas=(0.9, 0.95), eps=1e-12, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1, (step + 1) / (0.04 * steps)) * (1 - step / steps)
    )
    return optimizer, schedule


def looks(steps: int) -> set[int]:
    """The steps after which a training is looked at: densely at first, the last one included."""
    return {round(steps * (k / LOOKS) ** 2) for k in range(1, LOOKS + 1)} | {steps}


def follow(
    family: str, setting: str, policy: nn.Module, stream, steps: int, optimum: Tensor | None, each: int = 1
) -> Run:
    """Run a training and note the policy's table along the way, densely at first.

    Args: stream: yields once a step (of `each` gradient steps); steps: how often; optimum: see `Run`.
    """
    marks = looks(steps)
    tables, steps_at, seconds = [float64_table(policy)], [0], 0.0
    started = time.perf_counter()
    for step, _ in enumerate(stream, 1):
        if step in marks:
            seconds += time.perf_counter() - started
            tables.append(float64_table(policy))
            steps_at.append(step * each)
            started = time.perf_counter()
    return Run(family, setting, torch.stack(tables), steps_at, optimum, steps * each, seconds)


# -------------------------------------------------------------------------------------------- by rewards


def climb(
    world: World,
    rewards: Tensor,
    family: str,
    *,
    beta: float,
    target: float | None,
    effort: Effort,
    seed: int,
) -> Run:
    """PPO against rewards, learned or true, with a fixed coefficient or towards a divergence.

    Its own optimum is the closed form of those rewards at the coefficient it ends with.
    """
    policy = world.policy()
    dtype = next(policy.parameters()).dtype
    iterations = effort.iterations
    optimizer, schedule = adam(policy.parameters(), 0.1 if world.name == "table" else GPT_RATE, iterations)
    controller = AdaptiveKL(beta, target)
    stream = ppo(
        policy, world.ref_logps.to(dtype), rewards.to(dtype), optimizer, controller, iterations=iterations,
        samples=effort.samples, epochs=effort.epochs, scheduler=schedule,
        generator=torch.Generator().manual_seed(seed),
    )  # fmt: skip
    setting = f"β {beta:g}" if target is None else f"target KL {target:g}"
    run = follow(family, setting, policy, stream, iterations, None, effort.epochs)
    return run._replace(optimum=optimal_logps(world.ref_logps, rewards, beta=controller.coefficient))


def best_of_n(world: World, rewards: Tensor, family: str, n: int) -> Run:
    """The exact law of the best of n draws: no training."""
    path = torch.stack([world.ref_logps, best_of_n_logps(world.ref_logps, rewards, n=n)])
    return Run(family, f"N {n}", path, [0, 0], path[-1], 0, 0.0)


def closed_form(world: World, rewards: Tensor, family: str, beta: float) -> Run:
    """pi_ref exp(r / beta) / Z of the rewards given: no training."""
    path = torch.stack([world.ref_logps, optimal_logps(world.ref_logps, rewards, beta=beta)])
    return Run(family, f"β {beta:g}", path, [0, 0], path[-1], 0, 0.0)


def gpt_reward_model(world: World, shown: Rankings, held_out: Rankings, *, steps: int, seed: int) -> Tensor:
    """A reward model on a copy of the reference GPT, fitted to comparisons and stopped by held-out ones.

    Returns: (X, Y) rewards of every completion, of mean zero under the reference for each prompt.
    """
    torch.manual_seed(seed)
    model = RewardModel(copy.deepcopy(world.reference))
    tree, ends = whole_completions(world.completions)
    optimizer, schedule = adam(model.parameters(), GPT_RATE, steps)
    shown = shown.normalised_by_prompt()
    weight = shown.weight.to(torch.float32)
    best, lowest = torch.zeros_like(world.rewards), math.inf
    marks = looks(steps)

    def rewards_now() -> Tensor:
        return model.head(tree_states(model.body, world.prompts, tree)[:, ends]).squeeze(-1)

    def objective(comparisons: Rankings) -> tuple[Tensor, dict]:
        ranked = comparisons.gather(rewards_now())
        return weight @ losses.bradley_terry_loss(ranked[:, 0], ranked[:, 1]), {}

    stream = train(objective, optimizer, itertools.repeat(shown, steps), scheduler=schedule)
    for step, _ in enumerate(stream, 1):
        if step in marks:
            with torch.no_grad():
                rewards = rewards_now().double()
            margins = held_out.gather(rewards)
            found = -(held_out.weight @ F.logsigmoid(margins[:, 0] - margins[:, 1])).item()
            if found <= lowest:
                best, lowest = rewards, found
    return best - (world.ref_logps.exp() * best).sum(-1, keepdim=True)
