"""`python -m dpo_minimal frontier`: every method beside the best possible, where that is known exactly.

The best trade-off between reward and KL from the reference is a curve with a closed form: the policies
pi_ref exp(r / beta) / Z for all beta. Nobody crosses it. Two worlds are small enough that every completion is
enumerated, so that KL, reward and the distance to the curve are exact: a table of logits, and a GPT-2.

First, with exact preferences, every way to one optimum must end at the same pi*. Then all methods learn from
the same comparisons: pairs of completions drawn from the reference, labelled by Bradley-Terry. Of sampled
ones a tenth is held out, which stops the reward model, and DPO where the table says so; only Preferred-FT
learns from all, and from others for each of its seeds. The learned reward is a table, one number a
completion, in both worlds; --pairs has a reward model that is a GPT. PPO-GT knows the true reward.

  dpo-minimal frontier                           20,000 sampled pairs
  dpo-minimal frontier --population              exact preferences: only each method's own aim is left
  dpo-minimal frontier --flip-probability 0.1    labels are wrong as often as robust DPO expects
  dpo-minimal frontier --pairs                   how many pairs is a reward function worth?

Columns: KL and reward of the policy; gap, what it falls short of the curve, in reward at its KL and in nats
at its reward; end, KL(pi || where it must end), nats: "none" where the comparisons have no optimum, "-" where
no formula is known, "exact" for closed forms. In the first table, bound is what a policy's gradient proves
about max|dlogp|.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ...certificates import certify, maximum_likelihood
from ...closed_form import kl_divergence, optimal_logps
from ...preferences import expected_pairs, expected_rankings, random_cycles
from ...rivals.baselines import natural_gradient_step
from ...text.runs import write_arrays, write_records
from ...validation import check_flip_probability
from ..options import COMMON, RUN, Option, add_options, must, resolve
from ..study import Job, Study, carry_out, run_folder, table
from . import figure, methods, pair_methods, pairs
from .methods import Run
from .worlds import World, gpt_world, table_world

BETAS = (0.05, 0.1, 1.0, 5.0)  # the paper's, Fig. 2
ALPHAS = (0.05, 0.1, 0.5, 1.0)
TARGETS = (1.0, 3.0, 6.0, 9.0, 12.0)  # nats: the paper's and a nearer one
BEST_OF = (1, 4, 16, 64, 128)
NOISE = 0.1  # that cDPO and robust DPO expect where labels have none: what a wrong guess costs
FT_SEEDS = 3
LONGER = 3  # times the usual effort on the ways to one optimum
MOST_PAIRS = 10_000_000  # what memory allows; by then the exact preferences are as good

WAYS = (
    ("way", "<38", ""), ("KL(pi||pi*)", ">11", ".1e"), ("max|dlogp|", ">10", ".1e"), ("bound", ">8", ".1e"),
    ("steps", ">6", ""), ("sec", ">5", ".1f"),
)  # fmt: skip
COLUMNS = (
    ("method", "<31", ""), ("setting", "<14", ""), ("KL", ">6", ".3f"), ("reward", ">7", ".3f"),
    ("gap", ">7", "z.4f"), ("in nats", ">8", "z.4f"), ("end", ">8", ".1e"), ("steps", ">6", ""),
    ("sec", ">5", ".1f"),
)  # fmt: skip


OPTIONS = {
    "preferences": {
        "num_pairs": Option(
            "comparisons to sample in each world", int, 20_000,
            check=must(lambda n: 1 <= n <= MOST_PAIRS,
                       f"be at least 1 and at most {MOST_PAIRS:,} (beyond, use --population)"),
        ),
        "population": Option("exact preference probabilities instead of sampled pairs", bool),
        "flip_probability": Option(
            "label noise: the chance that a label is reversed, 0 to 1/2; cDPO and robust DPO expect it, "
            f"or {NOISE:g} where it is 0", float, 0.0,
            check=lambda flag, share: check_flip_probability(share, flag),
        ),
        "beta": Option(
            "of the ways to one optimum, of the methods without a range of their own, and of --pairs; where "
            "PPO's coefficient starts", float, 0.5,
            check=must(lambda b: 0.01 <= b <= 100, "lie between 0.01 and 100, as rewards are about one"),
        ),
        "pairs": Option(
            "instead of the frontier: the gap to pi* as the number of pairs grows from 100 to a million, and "
            "by who draws them", bool
        ),
    },
    "run": {
        "world": Option("only this one (default both)", str, choices=("table", "gpt")),
        "seed": COMMON["seed"],
        "output_dir": RUN["output_dir"],
        "quick": Option(
            "85 instead of 341 completions a prompt for the GPT, and a quarter of the steps", bool
        ),
    },
}  # fmt: skip
add_arguments = partial(add_options, groups=OPTIONS)


def run(args: argparse.Namespace) -> Path:
    """Check everything, run, print, and write the run folder, which is returned."""
    torch.set_num_threads(1)  # tables and models this small are faster on one core, and the same everywhere
    args = resolve(
        args, OPTIONS,
        ("num_pairs", args.population, "--population has no number of pairs; leave {} out."),
        ("population num_pairs flip_probability", args.pairs,
         "--pairs goes through its own numbers of clean pairs; leave {} out."),
    )  # fmt: skip
    args.population, args.pairs, args.quick = map(bool, (args.population, args.pairs, args.quick))
    folder = run_folder("frontier", vars(args))
    worlds = [] if args.world == "gpt" else [table_world(args.seed)]
    worlds += [] if args.world == "table" else [gpt_world(args.seed, quick=args.quick)]
    if not args.pairs:
        for world in worlds:
            print("", *ways_to_one_optimum(world, args), sep="\n", flush=True)
    carry_out(pairs_study(worlds, args) if args.pairs else frontier_study(worlds, args), folder)
    return folder


def ways_to_one_optimum(world: World, args: argparse.Namespace) -> list[str]:
    """Train towards one pi* in every way there is; the lines to print."""
    beta, effort = args.beta, methods.effort(world, quick=args.quick)
    exists = torch.ones_like(world.rewards, dtype=torch.bool)
    generator = torch.Generator().manual_seed(args.seed)
    # Any connected choice of pairs has the same optimum; rings of neighbours cover rare completions too.
    population = expected_pairs(world.rewards, random_cycles(exists, cycles=4, generator=generator))
    triples = random_cycles(exists, cycles=2, size=3, generator=generator)
    rankings = expected_rankings(world.rewards, triples)
    train = partial(methods.train_on_pairs, world, steps=LONGER * effort.steps)
    dpo, of_rankings = (pair_methods.pair_method(name, beta=beta) for name in ("dpo", "plackett_luce"))
    started = time.perf_counter()
    newton = methods.closed_form(world, maximum_likelihood(population, exists), "", beta)
    newton = replace(newton, seconds=time.perf_counter() - started)
    longer = effort._replace(iterations=LONGER * effort.iterations)
    ways = {
        "DPO": (train(dpo, population), population),
        "DPO on rankings of 3": (train(of_rankings, rankings), rankings),
        "reward model (Newton) + closed form": (newton, population),
        "PPO with the true reward": (
            methods.train_by_ppo(world, world.rewards, "", beta=beta, effort=longer, seed=args.seed), None
        ),
    }  # fmt: skip
    if world.name == "table":
        one = natural_gradient_step(
            world.ref_logps, world.ref_logps, world.rewards, beta=beta, learning_rate=1 / beta
        )
        step = Run(world, "", "", torch.stack([world.ref_logps, one]), [0, 1], None)
        ways["natural gradient, one step of 1/beta"] = step, None
    optimal, rows = optimal_logps(world.ref_logps, world.rewards, beta=beta), []
    for name, (run, data) in ways.items():
        logps, bound = run.path[-1], math.inf
        if data is not None:
            bound = certify(logps, world.ref_logps, data, beta=beta).logp_bound.max().item()
        kl, worst = kl_divergence(logps, optimal).max().item(), (logps - optimal).abs().max().item()
        rows.append((name, kl, worst, bound if bound < math.inf else "-", run.steps, run.seconds))
    title = f"Ways to one optimum: {world.name}, exact preferences, beta = {beta:g}"
    return [title, *table(WAYS, rows, indent="  ")]


def frontier_study(worlds: list[World], args: argparse.Namespace) -> Study:
    """Every method beside the best possible: a part a world."""
    drawn = "exact preferences" if args.population else f"{args.num_pairs:,} sampled pairs"
    if args.flip_probability:
        drawn += f", {args.flip_probability:.3g} of the labels flipped"
    return Study(
        plan={world.name: plan(world, args) for world in worlds},
        table=results_table,
        files=lambda found: {
            "frontier.png": partial(figure.frontier_figure, found, drawn),
            "result.npz": partial(write_arrays, arrays=_arrays(found)),
            "metrics.jsonl": partial(write_records, records=_rows(found)),
        },
    )


def pairs_study(worlds: list[World], args: argparse.Namespace) -> Study:
    """The gap to pi* as the number of pairs grows: a part a world; then who draws the pairs of the table."""
    plan = {world.name: pairs.plan(world, args) for world in worlds}
    if "table" in plan:
        plan["samplers"] = pairs.sampler_plan(worlds[0], args)
    laws = {world.name: pairs.law_of(world, beta=args.beta) for world in worlds}
    arrays = {f"{name}_law": law for name, law in laws.items()}
    return Study(
        plan=plan,
        table=lambda points: (
            pairs.summary(points, laws[points[0].world], args.beta)
            if points[0].method == "DPO"
            else pairs.sampler_summary(points, worlds[0], args.beta)
        ),
        files=lambda found: {
            "pairs.png": partial(figure.pairs_figure, found[: len(worlds)], laws, args.beta),
            "metrics.jsonl": partial(write_records, records=[p._asdict() for ps in found for p in ps]),
            "result.npz": partial(write_arrays, arrays=arrays),
        },
    )


def plan(world: World, args: argparse.Namespace) -> list[Job]:
    """What is to be run on a world: each job returns a run or several.

    A tenth of sampled comparisons is held out, for the reward model and for DPO that is stopped in time.
    """
    beta, effort = args.beta, methods.effort(world, quick=args.quick)
    noise = args.flip_probability or NOISE
    shown, held_out = pairs.comparisons(world, args, seed=args.seed), None
    if not args.population:
        shown, held_out = pairs.split(shown, np.random.default_rng(args.seed))
    learned = pairs.learned_rewards(world, shown, held_out)
    trained = pair_methods.others(beta, noise, ALPHAS)
    jobs: list[Job] = [partial(pairs.train_dpo, world, b, shown, held_out, effort.steps) for b in BETAS]
    jobs += [partial(methods.train_on_pairs, world, each, shown, steps=effort.steps) for each in trained]
    for k in range(1 if args.population else FT_SEEDS):
        method = pair_methods.preferred_ft()._replace(setting="" if args.population else f"seed {k}")
        data = pairs.comparisons(world, args, seed=args.seed + k)
        jobs.append(partial(methods.train_on_pairs, world, method, data, steps=effort.steps))
    for family, rewards in (("best of N", world.rewards), ("best of N, learned reward", learned)):
        jobs += [partial(methods.best_of_n, world, rewards, family, n) for n in BEST_OF]
    jobs += [partial(methods.closed_form, world, learned, "reward model + closed form", b) for b in BETAS]
    by_ppo = partial(methods.train_by_ppo, world, beta=beta, effort=effort, seed=args.seed)
    for family, rewards in (("PPO", learned), ("PPO-GT", world.rewards)):
        jobs += [partial(by_ppo, rewards, family, target=t) for t in TARGETS if t < kl_of_best(world)]
    return jobs


def kl_of_best(world: World) -> float:
    """The divergence of the policy that says only the best completion: beyond it there is nothing to gain."""
    best = world.rewards.argmax(-1, keepdim=True)
    return -world.ref_logps.gather(-1, best).mean().item()


def results_table(runs: list[Run]) -> list[str]:
    """The lines that are printed for a world."""
    rows = []
    for run in runs:
        end = "exact" if run.steps == 0 else run.distance if run.distance < math.inf else run.ends
        ends = [values[-1] for values in run.gap]  # KL, reward, and the two gaps
        rows.append((run.family, run.setting, *ends, end, run.steps, run.seconds))
    world = runs[0].world
    X, Y = world.rewards.shape
    return [
        f"Frontier: {world.name}, {X} prompts x {Y} completions; no policy needs more than "
        f"{kl_of_best(world):.2f} nats, so PPO has no target beyond",
        *table(COLUMNS, rows, indent="  "),
    ]


def _arrays(found: list[list[Run]]) -> dict[str, Tensor]:
    arrays = {}
    for runs in found:
        world = runs[0].world
        arrays |= {f"{world.name}_ref_logps": world.ref_logps, f"{world.name}_rewards": world.rewards}
        arrays |= {f"{world.name}_{number:02d}_logps": run.path[-1] for number, run in enumerate(runs)}
    return arrays


def _rows(found: list[list[Run]]) -> Iterator[dict]:
    """A row for each policy along the path of each run."""
    names = ("kl/policy_reference", "reward", "gap/reward", "gap/nats")
    for number, run in ((number, run) for runs in found for number, run in enumerate(runs)):
        who = {"world": run.world.name, "number": number, "method": run.family, "setting": run.setting}
        for step, *values in zip(run.steps_at, *(each.tolist() for each in run.gap)):
            yield who | {"step": step} | dict(zip(names, values))
