"""`python -m dpo_minimal frontier`: every method beside the best possible, where that is known exactly.

The best trade-off between reward and KL from the reference is a curve with a closed form: the policies
pi_ref exp(r / beta) / Z for all beta. Nobody crosses it. Two worlds are small enough that every completion is
enumerated, so that KL, reward and the distance to the curve are exact: a table of logits, and a GPT-2.

First, the roads to one optimum, with exact preferences: DPO, DPO on rankings, a reward model with the closed
form, PPO with the true reward, and (for the table) the natural gradient must all end at the same pi*.

Then the frontier: DPO (to the end of its training, and stopped where held-out comparisons are predicted
best, as the reward model is), IPO, cDPO, robust DPO, KTO, ORPO, SimPO, DPO without its weight, Unlikelihood,
Preferred-FT, best of N, and PPO with the learned and with the true reward (PPO-GT). They learn from the same
comparisons: pairs of completions drawn from the reference, labelled by Bradley-Terry. Of sampled ones
a tenth is held out; only Preferred-FT learns from all, and from others for each of its seeds. The learned
reward is a table, one number a completion, in both worlds; a reward model that is a GPT is seen by --pairs.

  dpo-minimal frontier                           20,000 sampled pairs
  dpo-minimal frontier --population              exact preferences: only each method's own aim is left
  dpo-minimal frontier --flip-probability 0.1    some labels are wrong, which robust DPO is told
  dpo-minimal frontier --pairs                   how many pairs is a reward function worth?

Columns: KL and reward of the policy; gap, what it falls short of the curve, in reward at its KL and in nats
at its reward; end, KL(pi || where it must end), nats: "none" where the comparisons have no optimum, "-" where
no formula is known, "exact" for closed forms. On the roads, bound is what a policy's gradient proves about
max|dlogp|.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ...certificates import certify
from ...closed_form import frontier_gap, kl_divergence, optimal_logps
from ...laws.finite_data import maximum_likelihood
from ...preferences import (
    Rankings,
    expected_pairs,
    expected_rankings,
    random_cycles,
    reference_pairs,
    sample_pairs,
)
from ...rivals.baselines import natural_gradient_step
from ...text.runs import new_run_folder, refuse_used_folder, versions, write_arrays, write_json, write_records
from ...validation import InputError, check_count, check_flip_probability, check_positive, check_seed
from . import methods, pair_methods, pairs
from .methods import Explored, Run
from .worlds import World, gpt_world, table_world

BETAS = (0.05, 0.1, 1.0, 5.0)  # the paper's, Fig. 2
ALPHAS = (0.05, 0.1, 0.5, 1.0)
TARGETS = (1.0, 3.0, 6.0, 9.0, 12.0)  # nats: the paper's and a nearer one
BEST_OF = (1, 4, 16, 64, 128)
NOISE = 0.1  # that cDPO and robust DPO expect where labels have none: what a wrong guess costs
FT_SEEDS = 3
ROAD = 3  # times the usual effort for each of the roads
MOST_PAIRS = 10_000_000  # what memory allows; by then the exact preferences are as good


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    data = parser.add_argument_group("preferences")
    data.add_argument(
        "--num-pairs", type=int, metavar="N", help="comparisons to sample in each world (default 20000)"
    )
    data.add_argument(
        "--population", action="store_true", help="exact preference probabilities instead of sampled pairs"
    )
    data.add_argument(
        "--flip-probability", type=float, metavar="E",
        help="label noise: the chance that a label is reversed, 0 to 1/2 (default 0); cDPO and robust DPO "
        f"are told it, or {NOISE:g} where it is 0",
    )  # fmt: skip
    data.add_argument(
        "--beta", type=float, default=0.5,
        help="of the roads, of the methods without a range of their own, and of --pairs; where PPO's "
        "coefficient starts (default %(default)s)",
    )  # fmt: skip
    data.add_argument(
        "--pairs", action="store_true",
        help="instead of the frontier: the gap to pi* as the number of pairs grows from 100 to a million",
    )  # fmt: skip
    run = parser.add_argument_group("run")
    run.add_argument("--world", choices=("table", "gpt"), help="only this one (default both)")
    run.add_argument("--seed", type=int, default=0, help="the same seed gives the same numbers (default 0)")
    run.add_argument("--output-dir", metavar="DIR", help="new folder to write to (default runs/frontier-NNN)")
    run.add_argument(
        "--quick", action="store_true",
        help="85 instead of 341 completions a prompt for the GPT, and a quarter of the steps",
    )  # fmt: skip


def run(args: argparse.Namespace) -> Path:
    """Check everything, run, print, and write the run folder, which is returned."""
    torch.set_num_threads(1)  # tables and models this small are faster on one core, and the same everywhere
    _check(args)
    refuse_used_folder(args.output_dir)
    folder = new_run_folder(args.output_dir, "frontier")
    write_json(folder / "config.json", {"command": "frontier", **vars(args), **versions()})
    worlds = _worlds(args)
    if args.pairs:
        return pairs.run(worlds, args, folder)
    print("Every way to the same optimum first, then every method below the frontier.\n", flush=True)
    for world in worlds:
        print("\n".join(_roads(world, args)), flush=True)
    found = []
    for world in worlds:
        jobs = _jobs(world, _comparisons(world, args, seed=args.seed), args)
        bar = tqdm(jobs, desc=world.name, unit="method", leave=False, disable=None)
        runs = [each for job in bar for each in job()]
        gaps = [frontier_gap(each.path, world.ref_logps, world.rewards) for each in runs]
        found.append(Explored(world, runs, gaps))
        print("\n".join(results_table(found[-1])), flush=True)
    _write(folder, found, args)
    print(f"Wrote {folder}/frontier.png, result.npz, metrics.jsonl and config.json.")
    return folder


def _check(args: argparse.Namespace) -> None:
    check_positive("--beta", args.beta)
    if not 1e-2 <= args.beta <= 1e2:
        raise InputError(f"--beta must lie between 0.01 and 100, got {args.beta}; the rewards are about one.")
    check_seed("--seed", args.seed)
    if args.population and args.num_pairs is not None:
        raise InputError("--population has no number of pairs; leave --num-pairs out.")
    if args.pairs and (args.population or args.num_pairs is not None or args.flip_probability is not None):
        raise InputError(
            "--pairs goes through its own numbers of clean pairs; leave --population, --num-pairs and "
            "--flip-probability out."
        )
    args.num_pairs = 20_000 if args.num_pairs is None else args.num_pairs
    check_count("--num-pairs", args.num_pairs)
    if args.num_pairs > MOST_PAIRS:
        raise InputError(
            f"--num-pairs must be at most {MOST_PAIRS:,}, got {args.num_pairs:,}; beyond, use --population."
        )
    args.flip_probability = 0.0 if args.flip_probability is None else args.flip_probability
    check_flip_probability(args.flip_probability, "--flip-probability")


def _worlds(args: argparse.Namespace) -> list[World]:
    worlds = []
    if args.world != "gpt":
        worlds.append(table_world(args.seed))
    if args.world != "table":
        worlds.append(gpt_world(args.seed, quick=args.quick))
    return worlds


def _comparisons(world: World, args: argparse.Namespace, *, seed: int) -> Rankings:
    slate = reference_pairs(world.ref_logps)
    if args.population:
        return expected_pairs(world.rewards, slate, flip_probability=args.flip_probability)
    return sample_pairs(
        world.rewards, args.num_pairs, slate=slate, flip_probability=args.flip_probability,
        generator=torch.Generator().manual_seed(seed + 1000),
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------ roads


def _roads(world: World, args: argparse.Namespace) -> list[str]:
    """Train towards one pi* in every way there is; the lines to print."""
    beta, effort = args.beta, methods.effort(world, quick=args.quick)
    optimal = optimal_logps(world.ref_logps, world.rewards, beta=beta)
    exists = torch.ones_like(world.rewards, dtype=torch.bool)
    generator = torch.Generator().manual_seed(args.seed)
    # Any connected choice of pairs has the same optimum; rings of neighbours cover rare completions too.
    slate = random_cycles(exists, cycles=4, generator=generator)
    population = expected_pairs(world.rewards, slate)
    triples = random_cycles(exists, cycles=2, size=3, generator=generator)
    rankings = expected_rankings(world.rewards, triples)
    lines = [
        f"Roads to one optimum: {world.name}, exact preferences, beta = {beta:g}",
        f"  {'road':<38} {'KL(pi||pi*)':>11} {'max|dlogp|':>10} {'bound':>8} {'steps':>6} {'sec':>5}",
    ]

    def line(name: str, logps: Tensor, steps: int, seconds: float, data: Rankings | None = None) -> None:
        kl = kl_divergence(logps, optimal).max().item()
        worst = (logps - optimal).abs().max().item()
        proved = "-"
        if data is not None:
            bound = certify(logps, world.ref_logps, data, beta=beta).logp_bound.max().item()
            proved = f"{bound:.1e}" if math.isfinite(bound) else "-"
        lines.append(f"  {name:<38} {kl:>11.1e} {worst:>10.1e} {proved:>8} {steps:>6} {seconds:>5.1f}")

    for name, method, data in (
        ("DPO", pair_methods.dpo(beta), population),
        ("DPO on rankings of 3", pair_methods.plackett_luce(beta), rankings),
    ):
        found = methods.train_on_pairs(world, method, data, steps=ROAD * effort.steps)
        line(name, found.path[-1], found.steps, found.seconds, data)
    started = time.perf_counter()
    estimate = maximum_likelihood(population, exists)
    seconds = time.perf_counter() - started
    closed = optimal_logps(world.ref_logps, estimate, beta=beta)
    line("reward model (Newton) + closed form", closed, 0, seconds, population)
    longer = effort._replace(iterations=ROAD * effort.iterations)
    climbed = methods.climb(
        world, world.rewards, "PPO-GT", beta=beta, target=None, effort=longer, seed=args.seed
    )
    line("PPO with the true reward", climbed.path[-1], climbed.steps, climbed.seconds)
    if world.name == "table":
        reached = natural_gradient_step(
            world.ref_logps, world.ref_logps, world.rewards, beta=beta, learning_rate=1 / beta
        )
        line("natural gradient, one step of 1/beta", reached, 1, 0.0)
    return [*lines, ""]


# ---------------------------------------------------------------------------------------- the frontier


def _jobs(world: World, rankings: Rankings, args: argparse.Namespace) -> list[Callable[[], list[Run]]]:
    """What is to be run on a world, each a function without arguments that returns runs.

    A tenth of sampled comparisons is held out, for the reward model and for DPO that is stopped in time.
    """
    beta, effort = args.beta, methods.effort(world, quick=args.quick)
    noise = args.flip_probability or NOISE
    shown, held_out = rankings, None
    if not args.population:
        shown, held_out = pairs.split(rankings, np.random.default_rng(args.seed))
    learned = pairs.learned_rewards(world, shown, held_out)
    jobs: list[Callable[[], list[Run]]] = [
        partial(_dpo, world, b, shown, held_out, effort.steps) for b in BETAS
    ]  # fmt: skip
    others = [
        *(pair_methods.ipo(b) for b in (0.1, 1.0)),
        pair_methods.cdpo(beta, noise), pair_methods.robust(beta, noise),
        pair_methods.kto(beta), pair_methods.orpo(1.0), pair_methods.simpo(2.0, 0.5),
        pair_methods.unweighted(beta),
        *(pair_methods.unlikelihood(a) for a in ALPHAS),
    ]  # fmt: skip
    jobs += [partial(_one, methods.train_on_pairs, world, each, shown, steps=effort.steps) for each in others]
    for k in range(1 if args.population else FT_SEEDS):
        data = _comparisons(world, args, seed=args.seed + k)
        method = pair_methods.preferred_ft()
        if not args.population:
            method = method._replace(setting=f"seed {k}")
        jobs.append(partial(_one, methods.train_on_pairs, world, method, data, steps=effort.steps))
    for family, rewards in (("best of N", world.rewards), ("best of N, learned reward", learned)):
        jobs += [partial(_one, methods.best_of_n, world, rewards, family, n) for n in BEST_OF]
    family = "reward model + closed form"
    jobs += [partial(_one, methods.closed_form, world, learned, family, b) for b in BETAS]
    reachable = [target for target in TARGETS if target < kl_of_best(world)]
    for family, rewards in (("PPO", learned), ("PPO-GT", world.rewards)):
        for target in reachable:
            jobs.append(
                partial(
                    _one, methods.climb, world, rewards, family, beta=beta, target=target, effort=effort,
                    seed=args.seed,
                )
            )  # fmt: skip
    return jobs


def _one(function: Callable[..., Run], *arguments, **options) -> list[Run]:
    return [function(*arguments, **options)]


def _dpo(world: World, beta: float, shown: Rankings, held_out: Rankings | None, steps: int) -> list[Run]:
    """DPO to the end, and the policy on its way that predicts held-out comparisons best."""
    found = methods.train_on_pairs(world, pair_methods.dpo(beta), shown, steps=steps)
    if held_out is None:
        return [found]
    look = pairs.best_look(world, found, held_out, beta=beta) + 1
    cut = found._replace(
        family="DPO, stopped early", ends="-", path=found.path[:look], steps_at=found.steps_at[:look],
        optimum=None, steps=found.steps_at[look - 1],
    )  # fmt: skip
    return [found, cut]


def kl_of_best(world: World) -> float:
    """The divergence of the policy that says only the best completion: beyond it there is nothing to gain."""
    best = world.rewards.argmax(-1, keepdim=True)
    return -world.ref_logps.gather(-1, best).mean().item()


def results_table(explored: Explored) -> list[str]:
    """The lines that are printed for a world."""
    world = explored.world
    X, Y = world.rewards.shape
    lines = [
        f"Frontier: {world.name}, {X} prompts x {Y} completions; no policy needs more than "
        f"{kl_of_best(world):.2f} nats, so PPO has no target beyond",
        f"  {'method':<31} {'setting':<14} {'KL':>6} {'reward':>7} {'gap':>7} {'in nats':>8} {'end':>8} "
        f"{'steps':>6} {'sec':>5}",
    ]
    for found, gap in zip(explored.runs, explored.gaps):
        end = f"{found.distance:.1e}" if found.distance < math.inf else found.ends
        end = "exact" if found.family in methods.CLOSED_FORMS else end
        lines.append(
            f"  {found.family:<31} {found.setting:<14} {gap.kl[-1]:>6.3f} {gap.reward[-1]:>7.3f} "
            f"{gap.reward_gap[-1]:z7.4f} {gap.kl_gap[-1]:z8.4f} {end:>8} {found.steps:>6} "
            f"{found.seconds:>5.1f}"
        )
    return [*lines, ""]


def _write(folder: Path, found: list[Explored], args: argparse.Namespace) -> None:
    from .figure import frontier_figure  # matplotlib is slow to import: not before it is needed

    arrays, records = {}, []
    for world, runs, gaps in found:
        arrays |= {f"{world.name}_ref_logps": world.ref_logps.numpy()}
        arrays |= {f"{world.name}_rewards": world.rewards.numpy()}
        for number, (each, gap) in enumerate(zip(runs, gaps)):
            arrays[f"{world.name}_{number:02d}_logps"] = each.path[-1].numpy()
            for look, step in enumerate(each.steps_at):
                records.append(
                    {"world": world.name, "number": number, "method": each.family, "setting": each.setting,
                     "step": step, "kl/policy_reference": gap.kl[look].item(),
                     "reward": gap.reward[look].item(), "gap/reward": gap.reward_gap[look].item(),
                     "gap/nats": gap.kl_gap[look].item()}
                )  # fmt: skip
    write_arrays(folder / "result.npz", arrays)
    write_records(folder / "metrics.jsonl", records)
    drawn = "exact preferences" if args.population else f"{args.num_pairs:,} sampled pairs"
    if args.flip_probability:
        drawn += f", {args.flip_probability:.3g} of the labels flipped"
    frontier_figure(found, drawn, folder / "frontier.png")
