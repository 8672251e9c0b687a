"""`python -m dpo_minimal frontier --pairs`: how many pairs is a reward function worth?

The gap to pi* in nats, KL(pi || pi*): what a policy falls short of in the objective of Eq. 3, over beta, as
the number N of comparisons grows. Four things can keep a policy away from pi*:

  finite data   the labels of N comparisons leave rewards uncertain; theory gives tr(Sigma I^+) / (2 beta^2 N)
                these laws are for many pairs; before, what is known beforehand helps: a prior on rewards
  coverage      completions that no comparison ever showed keep the reference's odds, whatever their reward
  optimisation  training has not arrived
  capacity      the policy's weights cannot express pi*

DPO on a table meets only the first two, and is at every step the closed form of a reward model trained by the
same steps. PPO with the true reward meets neither: it asks the reward for every completion it draws.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from ...certificates import connected
from ...closed_form import kl_divergence, optimal_logps
from ...laws.sampling_laws import kl_law
from ...preferences import Rankings, expected_pairs, reference_pairs, win_counts
from ...text.runs import write_arrays, write_records
from . import methods, pair_methods
from .gaps import POPULATION, Point, spreads
from .worlds import World, gpt_world

SIZES = (100, 300, 1_000, 3_000, 10_000, 30_000, 100_000, 300_000, 1_000_000)
GPT_SIZES = (100, 1_000, 10_000, 100_000, 1_000_000)
REPLICATES, CLIMBED, GPT_SEEDS = 20, 2, 2  # data sets a size: of the table, with PPO, of the GPT
HELD_OUT = 0.1  # of the comparisons, to stop by
NARROW = 8  # width of the GPT that cannot express pi*
STEPS = 1200  # of the reward model: as many as DPO's on a table
PRIOR_STEPS = 400  # with a prior nothing runs away, and Adam is there sooner


# ------------------------------------------------------------------------------------------- comparisons


def draw(population: Rankings, num_pairs: int, generator: np.random.Generator) -> Rankings:
    """N comparisons as counts of the population's outcomes: one multinomial draw, whatever N is."""
    chance = population.weight.numpy()
    counts = torch.from_numpy(generator.multinomial(num_pairs, chance / chance.sum())).double()
    seen = counts > 0
    return Rankings(population.prompt[seen], population.order[seen], counts[seen])


def split(rankings: Rankings, generator: np.random.Generator) -> tuple[Rankings, Rankings]:
    """Comparisons to learn from, and a tenth to stop by, drawn without regard to what they are."""
    counts = rankings.weight.numpy().astype(np.int64)
    held = torch.from_numpy(generator.binomial(counts, HELD_OUT)).double()
    return rankings._replace(weight=rankings.weight - held), rankings._replace(weight=held)


def fit_rewards(wins: Tensor, held_out: Tensor, *, steps: int = STEPS, prior: float | None = None) -> Tensor:
    """Bradley-Terry rewards by Adam from zero, stopped where held-out comparisons are predicted best.

    The same steps, looks and schedule as DPO has on a table, whose rate is this one over beta: its policy is
    the closed form of these rewards at every step [D11.7]. Data sets are independent, and fitted at once.

    Args:
        wins, held_out: (R, X, Y, Y): how often the row's completion beat the column's; without held-out
            comparisons, all steps are taken.
        prior: the deviation of rewards known beforehand: s^2 / (2 prior^2) is added for each reward s, which
            then needs no stopping.
    Returns: (R, X, Y) rewards.
    """
    scores = nn.Parameter(wins.new_zeros(wins.shape[:-1]))
    games = wins.sum((-3, -2, -1)).clamp(min=1)
    optimizer, schedule = methods.adam([scores], pair_methods.TABLE_RATE, steps)
    best, lowest = scores.detach().clone(), _losses(scores.detach(), held_out)
    marks = methods.looks(steps)
    for step in range(1, steps + 1):
        optimizer.zero_grad()
        total = _losses(scores, wins)
        if prior is not None:
            total = total + scores.square().sum((-2, -1)) / (2 * prior**2)
        (total / games).sum().backward()
        optimizer.step()
        schedule.step()
        if step in marks:
            with torch.no_grad():
                found = _losses(scores, held_out)
                better = found <= lowest  # equal where nothing is held out: the last
                best[better], lowest = scores[better], torch.minimum(found, lowest)
    return best


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
    rewards = fit_rewards(wins, held)[0]
    return rewards - (world.ref_logps.exp() * rewards).sum(-1, keepdim=True)


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


# --------------------------------------------------------------------------------------------- the study


def run(worlds: list[World], args: argparse.Namespace, folder: Path) -> Path:
    """All measurements, a table of them, pairs.png; returns the folder."""
    points: list[Point] = []
    laws: dict[str, float] = {}
    for world in worlds:
        population = expected_pairs(world.rewards, reference_pairs(world.ref_logps))
        optimal = optimal_logps(world.ref_logps, world.rewards, beta=args.beta)
        mean, _ = kl_law(optimal, world.ref_logps, population, beta=args.beta)
        laws[world.name] = mean.sum().item()  # X prompts share N pairs, and the gap is a mean over prompts
        study = _table if world.name == "table" else _gpt
        points += study(world, population, optimal, args)
    print("\n".join(summary(points, laws, args.beta)))
    write_records(folder / "metrics.jsonl", [point._asdict() for point in points])
    write_arrays(folder / "result.npz", {f"{name}_law": np.array(law) for name, law in laws.items()})
    from .figure import pairs_figure  # matplotlib is slow to import: not before it is needed

    pairs_figure(points, laws, args.beta, folder / "pairs.png")
    print(f"\nWrote {folder}/pairs.png, metrics.jsonl, result.npz and config.json.")
    return folder


def _gap(logps: Tensor, optimal: Tensor) -> float:
    return kl_divergence(logps, optimal).mean().item()


def _table(world: World, population: Rankings, optimal: Tensor, args: argparse.Namespace) -> list[Point]:
    X, Y = world.rewards.shape
    effort = methods.effort(world, quick=args.quick)
    points = []
    for size in tqdm((*SIZES, POPULATION), desc="table", unit="size", leave=False, disable=None):
        generator = np.random.default_rng([args.seed, 0 if size == POPULATION else int(size)])
        count = 1 if size == POPULATION else REPLICATES
        sets = [population if size == POPULATION else draw(population, size, generator) for _ in range(count)]
        parts = [split(each, generator) if size != POPULATION else (each, each) for each in sets]
        shown, held = (torch.stack([win_counts(p[k], X, Y) for p in parts]) for k in (0, 1))
        rewards = fit_rewards(shown, held, steps=STEPS)
        for k in range(count):
            trained = optimal_logps(world.ref_logps, rewards[k], beta=args.beta)
            points.append(Point("table", "DPO", size, _gap(trained, optimal)))
            oracle = covered(world, sets[k], beta=args.beta)
            points.append(Point("table", "coverage", size, _gap(oracle, optimal)))
        if size != POPULATION:
            known = with_prior(world, sets, beta=args.beta)
            points += [Point("table", "prior", size, _gap(policy, optimal)) for policy in known]
        for k in range(min(count, 1 if args.quick else CLIMBED)):
            found = methods.climb(
                world, rewards[k], "PPO", beta=args.beta, target=None, effort=effort, seed=args.seed + k
            )
            points.append(Point("table", "PPO", size, _gap(found.path[-1], optimal)))
    found = methods.climb(
        world, world.rewards, "PPO-GT", beta=args.beta, target=None, effort=effort, seed=args.seed
    )
    return [*points, Point("table", "PPO-GT", POPULATION, _gap(found.path[-1], optimal))]


def _gpt(world: World, population: Rankings, optimal: Tensor, args: argparse.Namespace) -> list[Point]:
    effort = methods.effort(world, quick=args.quick)
    narrow = gpt_world(args.seed, quick=args.quick, width=NARROW)
    narrow_population = expected_pairs(narrow.rewards, reference_pairs(narrow.ref_logps))
    narrow_optimal = optimal_logps(narrow.ref_logps, narrow.rewards, beta=args.beta)
    method = pair_methods.dpo(args.beta)
    points = []
    jobs = [(size, k) for size in (*GPT_SIZES, POPULATION) for k in range(1 if args.quick else GPT_SEEDS)]
    for size, k in tqdm(jobs, desc="gpt", unit="data set", leave=False, disable=None):
        if size == POPULATION and k:
            continue
        generator = np.random.default_rng([args.seed, k, 0 if size == POPULATION else int(size)])
        if size == POPULATION:
            data, parts, narrow_parts = population, (population,) * 2, (narrow_population,) * 2
        else:
            data = draw(population, size, generator)
            parts = split(data, generator)
            narrow_parts = split(draw(narrow_population, size, generator), generator)
        found = methods.train_on_pairs(world, method, parts[0], steps=effort.steps)
        policy = found.path[best_look(world, found, parts[1], beta=args.beta)]
        points.append(Point("gpt", "DPO", size, _gap(policy, optimal)))
        if size != POPULATION:
            points.append(
                Point("gpt", "prior", size, _gap(with_prior(world, [data], beta=args.beta)[0], optimal))
            )
        points.append(Point("gpt", "coverage", size, _gap(covered(world, data, beta=args.beta), optimal)))
        found = methods.train_on_pairs(narrow, method, narrow_parts[0], steps=effort.steps)
        policy = found.path[best_look(narrow, found, narrow_parts[1], beta=args.beta)]
        points.append(Point("gpt", "DPO, narrow GPT", size, _gap(policy, narrow_optimal)))
        rewards = methods.gpt_reward_model(world, *parts, steps=effort.steps, seed=args.seed + k)
        closed = optimal_logps(world.ref_logps, rewards, beta=args.beta)
        points.append(Point("gpt", "reward model + closed form", size, _gap(closed, optimal)))
        found = methods.climb(
            world, rewards, "PPO", beta=args.beta, target=None, effort=effort, seed=args.seed + k
        )
        points.append(Point("gpt", "PPO", size, _gap(found.path[-1], optimal)))
    found = methods.climb(
        world, world.rewards, "PPO-GT", beta=args.beta, target=None, effort=effort, seed=args.seed
    )
    return [*points, Point("gpt", "PPO-GT", POPULATION, _gap(found.path[-1], optimal))]


def best_look(world: World, found: methods.Run, held_out: Rankings, *, beta: float) -> int:
    """Where along a path the implicit rewards predict held-out comparisons best."""
    margins = [beta * held_out.gather(table - world.ref_logps) for table in found.path]
    losses = [-(held_out.weight @ F.logsigmoid(each[:, 0] - each[:, 1])).item() for each in margins]
    return int(np.argmin(losses))


def summary(points: list[Point], laws: dict[str, float], beta: float) -> list[str]:
    """The table, and how many pairs the reward function was worth."""
    lines = []
    for world, law in laws.items():
        names = list(dict.fromkeys(p.method for p in points if p.world == world and p.method != "PPO-GT"))
        lines += [
            "",
            f"Gap to pi* in nats, median over data sets (mean): {world}, beta = {beta:g}",
            f"  {'pairs':>10} {'law':>9} " + " ".join(f"{name:>{max(len(name), 18)}}" for name in names),
        ]
        table = {name: spreads(points, world, name) for name in names}
        for size in table["DPO"]:
            cells = []
            for name in names:
                spread = table[name].get(size)
                text = "-" if spread is None else f"{spread.median:.2g} ({spread.mean:.2g})"
                cells.append(f"{text:>{max(len(name), 18)}}")
            label = "exact" if size == POPULATION else f"{int(size):,}"
            lines.append(f"  {label:>10} {law / size:>9.2g} " + " ".join(cells))
        gap = spreads(points, world, "PPO-GT")[POPULATION].median
        lines.append(
            f"  PPO with the true reward: {gap:.2g} nats; the law reaches that with {law / gap:.2g} pairs."
        )
    return lines
