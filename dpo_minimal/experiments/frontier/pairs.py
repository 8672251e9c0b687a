"""`python -m dpo_minimal frontier --pairs`: how many pairs is a reward function worth?

The gap to pi* in nats, KL(pi || pi*): what a policy falls short of in the objective of Eq. 3, over beta, as
the number N of comparisons grows. Four things can keep a policy away from pi*:

  finite data   the labels of N comparisons leave rewards uncertain; for many, by tr(Sigma I^+) / (2 beta^2 N)
  coverage      completions that no comparison ever showed keep the reference's odds, whatever their reward
  optimisation  training has not arrived
  capacity      the policy's weights cannot express pi*

DPO on a table meets only the first two; PPO with the true reward, which it asks for every completion that it
draws, meets neither.
"""

from __future__ import annotations

import argparse
import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...certificates import connected
from ...closed_form import kl_divergence, optimal_logps
from ...laws.designs import average_design, design_law, label_in_rounds
from ...laws.sampling_laws import kl_law
from ...preferences import Rankings, expected_pairs, reference_pairs, sample_pairs, win_counts
from ...train import train
from ..statistics.samplers import starts
from ..study import Job, table
from . import methods, pair_methods
from .worlds import World, gpt_world

SIZES = (100, 300, 1_000, 3_000, 10_000, 30_000, 100_000, 300_000, 1_000_000)
GPT_SIZES = (100, 1_000, 10_000, 100_000, 1_000_000)
REPLICATES, PPO_SETS, GPT_SEEDS = 20, 2, 2  # data sets a size: of the table, with PPO, of the GPT
SAMPLER_SIZES = (1_000, 10_000, 100_000)
HELD_OUT = 0.1  # of the comparisons, to stop by
NARROW = 8  # width of the GPT that cannot express pi*
STEPS = 1200  # of the reward model: as many as DPO's on a table
PRIOR_STEPS = 400  # with a prior no reward grows without limit, and Adam arrives sooner
POPULATION = math.inf  # pairs, where preferences are exact


def population(world: World, *, flip_probability: float = 0.0) -> Rankings:
    """The exact preferences of all pairs that the reference draws."""
    return expected_pairs(world.rewards, reference_pairs(world.ref_logps), flip_probability=flip_probability)


def comparisons(world: World, args: argparse.Namespace, *, seed: int) -> Rankings:
    """What the methods of the frontier learn from: exact preferences, or sampled ones."""
    if args.population:
        return population(world, flip_probability=args.flip_probability)
    return sample_pairs(
        world.rewards, args.num_pairs, slate=reference_pairs(world.ref_logps),
        flip_probability=args.flip_probability, generator=torch.Generator().manual_seed(seed + 1000),
    )  # fmt: skip


def draw(population: Rankings, num_pairs: float, generator: np.random.Generator) -> Rankings:
    """N comparisons as counts of the population's outcomes: one multinomial draw, whatever N is."""
    if num_pairs == POPULATION:
        return population
    chance = population.weight.numpy()
    counts = torch.from_numpy(generator.multinomial(int(num_pairs), chance / chance.sum())).double()
    seen = counts > 0
    return Rankings(population.prompt[seen], population.order[seen], counts[seen])


def split(rankings: Rankings, generator: np.random.Generator) -> tuple[Rankings, Rankings]:
    """Comparisons to learn from, and a tenth to stop by, drawn without regard to what they are."""
    counts = rankings.weight.numpy().astype(np.int64)
    held = torch.from_numpy(generator.binomial(counts, HELD_OUT)).double()
    return rankings._replace(weight=rankings.weight - held), rankings._replace(weight=held)


def fit_rewards(wins: Tensor, held_out: Tensor, *, steps: int = STEPS, prior: float | None = None) -> Tensor:
    """Bradley-Terry rewards by Adam from zero, stopped where held-out comparisons are predicted best.

    The same steps and schedule as DPO has on a table, measured after the same steps; DPO's rate is this one
    over beta, and its policy is the closed form of these rewards at every step [D11.7]. Data sets are
    independent, and fitted at once.

    Args:
        wins, held_out: (R, X, Y, Y): how often the row's completion beat the column's; without held-out
            comparisons, all steps are taken.
        prior: the deviation of rewards known beforehand: s^2 / (2 prior^2) is added for each reward s, which
            then needs no stopping.
    Returns: (R, X, Y) rewards.
    """
    scores = nn.Parameter(wins.new_zeros(wins.shape[:-1]))
    games = wins.sum((-3, -2, -1)).clamp(min=1)

    def objective(wins: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        total = _losses(scores, wins)
        if prior is not None:
            total = total + scores.square().sum((-2, -1)) / (2 * prior**2)
        return (total / games).sum(), {}

    optimizer, schedule = methods.adam([scores], pair_methods.TABLE_RATE, steps)
    stream = train(objective, optimizer, itertools.repeat(wins, steps), scheduler=schedule)
    path, _, _ = methods.follow(lambda: scores.detach().clone(), stream, steps)
    losses = torch.stack([_losses(each, held_out) for each in path])  # (L, R)
    best = len(path) - 1 - losses.flip(0).argmin(0)  # of equals, as where nothing is held out, the last
    return path[best, torch.arange(len(best))]


def _losses(scores: Tensor, wins: Tensor) -> Tensor:
    """(R,) sum of -log sigmoid(s_i - s_j) over the comparisons of each data set."""
    margins = scores.unsqueeze(-1) - scores.unsqueeze(-2)
    return -(wins * F.logsigmoid(margins)).sum((-3, -2, -1))


def learned_rewards(world: World, shown: Rankings, held_out: Rankings | None) -> Tensor:
    """The reward model that comparisons of a world teach, of mean zero under the reference [D2.2].

    Args: held_out: to stop by; None to train to the end.
    """
    X, Y = world.rewards.shape
    wins = win_counts(shown, X, Y).unsqueeze(0)
    held = torch.zeros_like(wins) if held_out is None else win_counts(held_out, X, Y).unsqueeze(0)
    return methods.centred(world, fit_rewards(wins, held)[0])


def with_prior(world: World, sets: list[Rankings], *, beta: float) -> Tensor:
    """(R, X, Y) policies of the likeliest rewards given each data set and the law that rewards were drawn
    from: what data can tell somebody who knows as much as can be known beforehand."""
    wins = torch.stack([win_counts(each, *world.rewards.shape) for each in sets])
    rewards = fit_rewards(wins, torch.zeros_like(wins), steps=PRIOR_STEPS, prior=world.reward_scale)
    return optimal_logps(world.ref_logps.expand_as(rewards), rewards, beta=beta)


def covered(world: World, rankings: Rankings, *, beta: float) -> Tensor:
    """The policy that knows the true rewards of what was compared, up to a constant in each group that chains
    of comparisons connect, and nothing of the rest: where descent on infinitely many labels of the same pairs
    would end [D11.9]. (X, Y) log-probabilities."""
    games = win_counts(rankings, *world.rewards.shape)
    group = connected(games + games.mT).double()
    mean = (group @ world.rewards.unsqueeze(-1)).squeeze(-1) / group.sum(-1)
    return (world.ref_logps + (world.rewards - mean) / beta).log_softmax(-1)


class Point(NamedTuple):
    """One measurement: gap in nats of one method, for N pairs and one data set."""

    world: str
    method: str
    pairs: float
    gap: float


def plan(world: World, args: argparse.Namespace) -> list[Job]:
    """What is to be run on a world: each job returns points."""
    if world.name == "table":
        jobs = [partial(_points, size, args, _on_table, world) for size in (*SIZES, POPULATION)]
    else:
        narrow = gpt_world(args.seed, quick=args.quick, width=NARROW)
        sets = [(size, k) for size in GPT_SIZES for k in range(1 if args.quick else GPT_SEEDS)]
        sets.append((POPULATION, 0))
        jobs = [partial(_points, size, args, _on_gpt, world, narrow, k) for size, k in sets]
    return [*jobs, partial(_points, POPULATION, args, _by_the_true_reward, world)]


def _points(size: float, args: argparse.Namespace, policies: Callable[..., Iterator], *worlds) -> list[Point]:
    """The gap of each policy to its own world's pi*; policies yields world, method, log pi."""
    found = policies(size, args, *worlds)
    return [Point(w.name, name, size, gap_to_optimum(w, logps, beta=args.beta)) for w, name, logps in found]


def _on_table(size: float, args: argparse.Namespace, world: World) -> Iterator[tuple[World, str, Tensor]]:
    """All methods on the data sets of one size, whose reward models are fitted together."""
    generator = np.random.default_rng([args.seed, 0 if size == POPULATION else int(size)])
    count = 1 if size == POPULATION else REPLICATES
    sets = [draw(population(world), size, generator) for _ in range(count)]
    parts = [_parts(each, size, generator) for each in sets]
    shown, held = (torch.stack([win_counts(p[k], *world.rewards.shape) for p in parts]) for k in (0, 1))
    rewards = fit_rewards(shown, held, steps=STEPS)
    for data, learned in zip(sets, rewards):
        yield world, "DPO", optimal_logps(world.ref_logps, learned, beta=args.beta)
        yield world, "coverage", covered(world, data, beta=args.beta)
    if size != POPULATION:
        yield from ((world, "prior", policy) for policy in with_prior(world, sets, beta=args.beta))
    for k in range(min(count, 1 if args.quick else PPO_SETS)):
        yield world, "PPO", _ppo(world, rewards[k], args, k)


def _on_gpt(
    size: float, args: argparse.Namespace, world: World, narrow: World, k: int
) -> Iterator[tuple[World, str, Tensor]]:
    """All methods on the k-th data set of one size, and DPO of the narrow GPT on one of its own."""
    generator = np.random.default_rng([args.seed, k, 0 if size == POPULATION else int(size)])
    data = draw(population(world), size, generator)
    parts = _parts(data, size, generator)
    steps = methods.effort(world, quick=args.quick).steps
    yield world, "DPO", train_dpo(world, args.beta, *parts, steps)[-1].path[-1]
    if size != POPULATION:
        yield world, "prior", with_prior(world, [data], beta=args.beta)[0]
    yield world, "coverage", covered(world, data, beta=args.beta)
    narrow_parts = _parts(draw(population(narrow), size, generator), size, generator)
    yield narrow, "DPO, narrow GPT", train_dpo(narrow, args.beta, *narrow_parts, steps)[-1].path[-1]
    rewards = methods.gpt_reward_model(world, *parts, steps=steps, seed=args.seed + k)
    yield world, "reward model + closed form", optimal_logps(world.ref_logps, rewards, beta=args.beta)
    yield world, "PPO", _ppo(world, rewards, args, k)


def _by_the_true_reward(size: float, args: argparse.Namespace, world: World) -> Iterator:
    yield world, "PPO-GT", _ppo(world, world.rewards, args, 0)


def sampler_plan(world: World, args: argparse.Namespace) -> list[Job]:
    """DPO on pairs that others draw, as many for each prompt [D11.19]: each job returns points."""
    drawn = starts(optimal_logps(world.ref_logps, world.rewards, beta=args.beta), world.ref_logps)
    sizes = (10_000,) if args.quick else SAMPLER_SIZES
    return [partial(_points, n, args, _of_sampler, world, *each) for each in drawn.items() for n in sizes]


def _of_sampler(size: int, args: argparse.Namespace, world: World, name: str, drawn: tuple) -> Iterator:
    (sampler, start, rounds), count = drawn, max(1, REPLICATES // 4) if args.quick else REPLICATES
    generator = np.random.default_rng([args.seed, size, *name.encode()])
    tables = (each.repeat(count, 1) for each in (start, world.rewards, world.ref_logps))
    label = partial(label_in_rounds, sampler, *tables, size // len(start), beta=args.beta)
    wins = label(rounds=rounds, generator=generator).unflatten(0, (count, -1))
    held = torch.from_numpy(generator.binomial(wins.long().numpy(), HELD_OUT)).double()
    for learned in fit_rewards(wins - held, held, steps=STEPS):
        yield world, f"DPO, {name}", optimal_logps(world.ref_logps, learned, beta=args.beta)


def sampler_summary(points: list[Point], world: World, beta: float) -> list[str]:
    """The table of who draws the pairs, with each law at the most pairs."""
    optimal, found, rows = optimal_logps(world.ref_logps, world.rewards, beta=beta), spreads(points), []
    for (name, (sampler, *start)), gaps in zip(starts(optimal, world.ref_logps).items(), found.values()):
        slate = average_design(sampler, start[0], optimal, world.ref_logps, beta=beta, rounds=start[1])
        law = design_law(slate, optimal, world.ref_logps, beta=beta).sum().item() / max(gaps)
        texts = (f"{each.median:.2g} ({each.mean:.2g})" for each in gaps.values())
        rows.append([name, *texts, "-" if math.isnan(law) else law])
    columns = [("sampler", "<18", ""), *((f"{n:,} pairs", ">18", "") for n in gaps), ("its law", ">9", ".2g")]
    title = f"Who draws the pairs: DPO's gap to pi* in nats, median (mean): {world.name}, beta = {beta:g}"
    return [title, *table(columns, rows, indent="  "), "  The first six samplers know pi*."]


def _parts(data: Rankings, size: float, generator: np.random.Generator) -> tuple[Rankings, Rankings]:
    """Comparisons to learn from and to stop by; exact preferences serve as both."""
    return (data, data) if size == POPULATION else split(data, generator)


def _ppo(world: World, rewards: Tensor, args: argparse.Namespace, k: int) -> Tensor:
    effort = methods.effort(world, quick=args.quick)
    run = methods.train_by_ppo(world, rewards, "", beta=args.beta, effort=effort, seed=args.seed + k)
    return run.path[-1]


def gap_to_optimum(world: World, logps: Tensor, *, beta: float) -> float:
    """KL(pi || pi*), nats, the mean over prompts."""
    return kl_divergence(logps, optimal_logps(world.ref_logps, world.rewards, beta=beta)).mean().item()


def train_dpo(
    world: World, beta: float, shown: Rankings, held_out: Rankings | None, steps: int
) -> list[methods.Run]:
    """DPO to the end, and the policy of its path that predicts held-out comparisons best."""
    found = methods.train_on_pairs(world, pair_methods.pair_method("dpo", beta=beta), shown, steps=steps)
    if held_out is None:
        return [found]
    end = best_on_path(found, held_out, beta=beta) + 1
    cut = replace(
        found, family="DPO, stopped early", path=found.path[:end], steps_at=found.steps_at[:end],
        optimum=None, ends="-",
    )  # fmt: skip
    return [found, cut]


def best_on_path(found: methods.Run, held_out: Rankings, *, beta: float) -> int:
    """Where along a path the implicit rewards predict held-out comparisons best."""
    rewards = beta * (found.path - found.world.ref_logps)
    return int(np.argmin([methods.pairs_loss(each, held_out).item() for each in rewards]))


class Spread(NamedTuple):
    """Of the gaps of one method at one number of pairs: quartiles, and the mean, which the law is about."""

    low: float
    median: float
    high: float
    mean: float


def spreads(points: list[Point]) -> dict[str, dict[float, Spread]]:
    """For each method and number of pairs, increasing. A few unlucky data sets may carry a mean, hence the
    median."""
    gaps: dict[str, dict[float, list[float]]] = {}
    for point in points:
        gaps.setdefault(point.method, {}).setdefault(point.pairs, []).append(point.gap)

    def spread(found: list[float]) -> Spread:
        return Spread(*np.quantile(found, (0.25, 0.5, 0.75)), np.mean(found))

    return {name: {n: spread(of_size[n]) for n in sorted(of_size)} for name, of_size in gaps.items()}


def law_of(world: World, *, beta: float) -> float:
    """N times the mean gap of estimates from N pairs, for many pairs: tr(Sigma I^+) / (2 beta^2) [D11.5]."""
    optimal = optimal_logps(world.ref_logps, world.rewards, beta=beta)
    mean, _ = kl_law(optimal, world.ref_logps, population(world), beta=beta)
    return mean.sum().item()  # X prompts share N pairs, and the gap is a mean over prompts


def summary(points: list[Point], law: float, beta: float) -> list[str]:
    """The table of a world, and how many pairs the reward function was worth."""
    found = spreads(points)
    gap = found.pop("PPO-GT")[POPULATION].median
    columns = [("pairs", ">10", ""), ("law", ">9", ".2g")]
    columns += [(name, f">{max(len(name), 18)}", "") for name in found]
    rows = []
    for size in found["DPO"]:
        cells = [each.get(size) for each in found.values()]
        texts = ["-" if each is None else f"{each.median:.2g} ({each.mean:.2g})" for each in cells]
        rows.append(["exact" if size == POPULATION else f"{int(size):,}", law / size, *texts])
    return [
        f"Gap to pi* in nats, median over data sets (mean): {points[0].world}, beta = {beta:g}",
        *table(columns, rows, indent="  "),
        f"  PPO with the true reward: {gap:.2g} nats; the law reaches that with {law / gap:.2g} pairs.",
    ]
