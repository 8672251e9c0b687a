"""`python -m dpo_minimal frontier`: every method beside the best possible, where that is known exactly.

The best trade-off between reward and KL from the reference is a curve with a closed form: the policies
pi_ref exp(r / beta) / Z for all beta. Nobody crosses it. Two worlds are small enough that every completion is
enumerated, so that KL, reward and the distance to the curve are exact: a table of logits, and a GPT-2.

First, five roads to one optimum, with exact preferences: DPO, DPO on rankings, a reward model with the closed
form, PPO with the true reward, and (for the table) the natural gradient must all end at the same pi*.

Then the frontier: DPO, IPO, cDPO, robust DPO, KTO, ORPO, SimPO, DPO without its weight, Unlikelihood,
Preferred-FT, best of N, and PPO with the learned and with the true reward (PPO-GT), each trained on the same
comparisons: pairs of completions drawn from the reference, labelled by Bradley-Terry.

  dpo-minimal frontier                           20,000 sampled pairs
  dpo-minimal frontier --population              exact preferences: only each method's own aim is left
  dpo-minimal frontier --flip-probability 0.1    some labels are wrong, which robust DPO is told
  dpo-minimal frontier --pairs                   how many pairs is a reward function worth?

Columns: KL and reward of the policy; gap, what it falls short of the curve, in reward at its KL and in nats
at its reward; end, KL(pi || where it must end), nats: "-" where that does not exist or no formula is known,
"exact" for closed forms. On the roads, bound is what a policy's own gradient proves about max|dlogp|.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from ..baselines import natural_gradient_step
from ..certificates import certify
from ..closed_form import frontier_gap, kl_divergence, optimal_logps
from ..finite_data import maximum_likelihood
from ..preferences import (
    Rankings,
    expected_pairs,
    expected_rankings,
    random_cycles,
    reference_pairs,
    sample_pairs,
)
from ..runs import new_run_folder, refuse_used_folder, versions, write_arrays, write_json, write_records
from ..validation import InputError, check_count, check_flip_probability, check_positive, check_seed
from . import methods, pairs
from .methods import Run
from .worlds import World, gpt_world, table_world

BETAS = (0.05, 0.1, 1.0, 5.0)  # the paper's, Fig. 2
ALPHAS = (0.05, 0.1, 0.5, 1.0)
TARGETS = (1.0, 3.0, 6.0, 9.0, 12.0)  # nats: the paper's and a nearer one
BEST_OF = (1, 4, 16, 64, 128)
NOISE = 0.1  # that cDPO and robust DPO expect where labels have none: what a wrong guess costs
FT_SEEDS = 3
ROAD = 3  # times the usual effort for each of the five roads


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
        help="of the five roads, of the methods without a range of their own, and of --pairs "
        "(default %(default)s)",
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
        help="85 instead of 341 completions a prompt for the GPT, and a third of the steps",
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
    roads = [line for world in worlds for line in _roads(world, args)]
    print("\n" + "\n".join(roads), flush=True)
    found: dict[str, tuple[World, list[Run]]] = {}
    for world in worlds:
        rankings = _comparisons(world, args, seed=args.seed)
        jobs = _jobs(world, rankings, args)
        bar = tqdm(jobs, desc=world.name, unit="method", leave=False, disable=None)
        found[world.name] = world, [job() for job in bar]
    print("\n" + "\n".join(line for each in found.values() for line in results_table(*each)))
    _write(folder, found, args)
    print(f"\nWrote {folder}/frontier.png, result.npz, metrics.jsonl and config.json.")
    return folder


def _check(args: argparse.Namespace) -> None:
    check_positive("--beta", args.beta)
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


# ------------------------------------------------------------------------------------------- five roads


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
        f"Five roads to one optimum: {world.name}, exact preferences, beta = {beta:g}",
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
        ("DPO", methods.dpo(beta), population),
        ("DPO on rankings of 3", methods.plackett_luce(beta), rankings),
    ):
        found = methods.train_on_pairs(world, method, data, steps=ROAD * effort.steps)
        line(name, found.path[-1], found.steps, found.seconds, data)
    started = time.perf_counter()
    estimate = maximum_likelihood(population, exists)
    seconds = time.perf_counter() - started
    line(
        "reward model (Newton) + closed form", optimal_logps(world.ref_logps, estimate, beta=beta), 0, seconds
    )
    effort.climb["iterations"] = 2 * effort.climb["iterations"]
    climbed = methods.climb(
        world, world.rewards, "PPO-GT", beta=beta, target=None, effort=effort, seed=args.seed
    )
    line("PPO with the true reward", climbed.path[-1], climbed.steps, climbed.seconds)
    if world.name == "table":
        reached = natural_gradient_step(
            world.ref_logps, world.ref_logps, world.rewards, beta=beta, learning_rate=1 / beta
        )
        line("natural gradient, one step of 1/beta", reached, 1, 0.0)
    return [*lines, ""]


# ---------------------------------------------------------------------------------------- the frontier


def _jobs(world: World, rankings: Rankings, args: argparse.Namespace) -> list:
    """What is to be run on a world, each a function without arguments that returns a `Run`."""
    beta, effort = args.beta, methods.effort(world, quick=args.quick)
    noise = args.flip_probability or NOISE
    listed = [
        *(methods.dpo(b) for b in BETAS),
        *(methods.ipo(b) for b in (0.1, 1.0)),
        methods.cdpo(beta, noise), methods.robust(beta, noise),
        methods.kto(beta), methods.orpo(1.0), methods.simpo(2.0, 0.5), methods.unweighted(beta),
        *(methods.unlikelihood(a) for a in ALPHAS),
    ]  # fmt: skip
    jobs = [_train(world, method, rankings, effort) for method in listed]
    for k in range(1 if args.population else FT_SEEDS):
        data = _comparisons(world, args, seed=args.seed + k)
        method = methods.preferred_ft()
        jobs.append(_train(world, method._replace(setting=f"seed {k}"), data, effort))
    # The reward model that PPO and best of N are given: the same comparisons, stopped where held-out ones
    # are predicted best.
    learned = pairs.learned_rewards(
        world, rankings, args.num_pairs, population=args.population, seed=args.seed
    )
    for family, rewards in (("best of N", world.rewards), ("best of N, learned reward", learned)):
        jobs += [lambda n=n, f=family, r=rewards: methods.best_of_n(world, r, f, n) for n in BEST_OF]
    jobs += [lambda b=b: methods.closed_form(world, learned, "reward model + closed form", b) for b in BETAS]
    furthest = kl_of_best(world)
    for family, rewards in (("PPO", learned), ("PPO-GT", world.rewards)):
        for target in TARGETS:
            if target < furthest:
                jobs.append(
                    lambda f=family, r=rewards, t=target: methods.climb(
                        world, r, f, beta=beta, target=t, effort=effort, seed=args.seed
                    )
                )
    return jobs


def _train(world: World, method: methods.PairMethod, rankings: Rankings, effort: methods.Effort):
    return lambda: methods.train_on_pairs(world, method, rankings, steps=effort.steps)


def kl_of_best(world: World) -> float:
    """The divergence of the policy that says only the best completion: beyond it there is nothing to gain."""
    best = world.rewards.argmax(-1, keepdim=True)
    return -world.ref_logps.gather(-1, best).mean().item()


def results_table(world: World, runs: list[Run]) -> list[str]:
    """The lines that are printed for a world."""
    X, Y = world.rewards.shape
    lines = [
        f"Frontier: {world.name}, {X} prompts x {Y} completions; no policy needs more than "
        f"{kl_of_best(world):.2f} nats, so PPO has no target beyond",
        f"  {'method':<31} {'setting':<14} {'KL':>6} {'reward':>7} {'gap':>7} {'in nats':>8} {'end':>8} "
        f"{'steps':>6} {'sec':>5}",
    ]
    for found in runs:
        gap = frontier_gap(found.path[-1], world.ref_logps, world.rewards)
        end = "exact" if found.steps == 0 else f"{found.distance:.1e}" if found.distance < math.inf else "-"
        lines.append(
            f"  {found.family:<31} {found.setting:<14} {gap.kl:>6.3f} {gap.reward:>7.3f} "
            f"{gap.reward_gap:>7.4f} {gap.kl_gap:>8.4f} {end:>8} {found.steps:>6} {found.seconds:>5.1f}"
        )
    return [*lines, ""]


def _write(folder: Path, found: dict[str, tuple[World, list[Run]]], args: argparse.Namespace) -> None:
    from ..frontier_plots import frontier_figure  # matplotlib is slow to import: not before it is needed

    arrays, records = {}, []
    for name, (world, runs) in found.items():
        arrays |= {f"{name}_ref_logps": world.ref_logps.numpy(), f"{name}_rewards": world.rewards.numpy()}
        for number, each in enumerate(runs):
            arrays[f"{name}_{number:02d}_logps"] = each.path[-1].numpy()
            gap = frontier_gap(each.path, world.ref_logps, world.rewards)
            for look, step in enumerate(each.steps_at):
                records.append(
                    {"world": name, "number": number, "method": each.family, "setting": each.setting,
                     "step": step, "kl/policy_reference": gap.kl[look].item(),
                     "reward": gap.reward[look].item(), "gap/reward": gap.reward_gap[look].item(),
                     "gap/nats": gap.kl_gap[look].item()}
                )  # fmt: skip
    write_arrays(folder / "result.npz", arrays)
    write_records(folder / "metrics.jsonl", records)
    drawn = "exact preferences" if args.population else f"{args.num_pairs:,} sampled pairs"
    frontier_figure(list(found.values()), drawn, folder / "frontier.png")
