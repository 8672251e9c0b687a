"""`python -m dpo_minimal bandit`: DPO finds pi_ref exp(r / beta) / Z, from a table to a GPT-2.

Four trainings, each from the reference, each against a target known beforehand: a table on exact
preference probabilities, a table on sampled pairs, a GPT on exact probabilities, a table on rankings.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor

from ..bandit import Bandit, random_bandit
from ..closed_form import kl_divergence, optimal_logps
from ..finite_data import FiniteDataLaw, finite_data_law, maximum_likelihood
from ..preferences import all_sets, sample_pairs
from ..runs import new_run_folder, versions, write_arrays, write_json, write_records
from ..tables import load_table
from ..validation import InputError, check_count, check_device, check_positive
from . import ranking
from .convergence import (
    GPT_PROMPTS,
    Settings,
    finite,
    gpt_population,
    plackett_luce,
    ranking_size,
    seeded_generator,
    tabular,
)
from .fit import Outcome, expected_reward, max_distance


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    world = parser.add_argument_group("world")
    world.add_argument("--prompts", type=int, metavar="X", help="prompts of the tabular world (default 8)")
    world.add_argument("--completions", type=int, metavar="Y", help="completions of each (default 16)")
    world.add_argument(
        "--table", metavar="FILE.csv",
        help="run the tabular experiments on your own world: columns prompt, completion, reward and, "
        "if not uniform, reference (a probability or a count)",
    )  # fmt: skip
    world.add_argument(
        "--comparisons", metavar="FILE.csv",
        help="train on your own comparisons instead: columns prompt, winner, loser and, optionally, count; "
        "writes ranking.csv with rewards, standard errors and the trained policy",
    )  # fmt: skip
    training = parser.add_argument_group("training")
    training.add_argument(
        "--beta", type=float, default=0.5,
        help="strength of the KL penalty (default %(default)s; the paper's 0.1 works too, but not being 1 "
        "is what matters here: at 1, forgetting beta goes unnoticed)",
    )  # fmt: skip
    training.add_argument("--pairs", type=int, metavar="N", help="pairs to sample (default 20000)")
    training.add_argument(
        "--steps", type=int,
        help="optimisation steps at most, of each experiment (default: 2000 for tables, which stop early "
        "once certified; 2500 for the GPT)",
    )  # fmt: skip
    training.add_argument(
        "--loss", choices=("dpo", "ipo"),
        help="with --comparisons: ipo has a finite optimum even where a completion never lost (default dpo)",
    )  # fmt: skip
    training.add_argument(
        "--prior", type=float, metavar="WINS",
        help="with --comparisons: add this many imaginary wins each way between any two completions",
    )  # fmt: skip
    run = parser.add_argument_group("run")
    run.add_argument("--seed", type=int, help="the same seed gives the same numbers (default 0)")
    run.add_argument("--output-dir", metavar="DIR", help="new folder to write to (default runs/bandit-NNN)")
    run.add_argument("--device", default="cpu", help="cpu or cuda (default cpu)")
    run.add_argument(
        "--quick", action="store_true",
        help="85 instead of 341 completions a prompt for the GPT, and 1000 steps instead of 2500",
    )  # fmt: skip


def run(args: argparse.Namespace) -> Path:
    """Check everything, then run the experiments and write the run folder, which is returned."""
    if args.comparisons is not None:
        return ranking.run(args)
    for option in ("loss", "prior"):
        if getattr(args, option) is not None:
            raise InputError(f"--{option} is used only with --comparisons; leave it out.")
    settings = _settings(args)
    world = _world(args, settings)
    data = sample_pairs(
        world.rewards,
        settings.pairs,
        slate=all_sets(world.exists),
        generator=seeded_generator(settings, "pairs"),
    )
    try:
        estimate = maximum_likelihood(data, world.exists, (world.prompts, world.completions))
    except InputError as error:
        raise InputError(f"--pairs {settings.pairs} are too few for this world: {error}") from None
    folder = new_run_folder(args.output_dir, "bandit")
    config = {"command": "bandit", **vars(args), **vars(settings), **versions()}
    write_json(folder / "config.json", config)

    X, Y = world.rewards.shape
    gpt = args.table is None
    print(f"Training towards pi* = pi_ref exp(r / beta) / Z with beta = {settings.beta:g}.\n")
    outcomes = []

    def note(text: str) -> None:
        print(f"{len(outcomes) + 1}. {text}", flush=True)

    note(f"tabular: {X} prompts x {Y} completions, every pair with its exact probability (float64).")
    outcomes.append(tabular(world, settings))
    note(f"finite: {settings.pairs} sampled pairs; the target is their maximum-likelihood estimate.")
    outcomes.append(finite(world, data, estimate, settings))
    if gpt:
        note(
            f"gpt: all completions of a GPT-2 for {GPT_PROMPTS} prompts, exact probabilities on a sparse "
            "graph of pairs (float32, judged in float64)."
        )
        outcomes.append(gpt_population(settings))
    size = ranking_size(world)
    note(f"plackett_luce: rankings of {size} with their exact probability (float64).")
    outcomes.append(plackett_luce(world, settings, size))

    law = finite_data_law(
        optimal_logps(world.ref_logps, world.rewards, beta=settings.beta),
        world.ref_logps, data, beta=settings.beta,
    )  # fmt: skip
    print("\n" + results_table(outcomes, law))
    _write(folder, outcomes)
    print(f"\nWrote {folder}/bandit.png, result.npz, metrics.jsonl and config.json.")
    return folder


def _settings(args: argparse.Namespace) -> Settings:
    check_positive("--beta", args.beta)
    check_device(args.device)
    pairs = 20_000 if args.pairs is None else args.pairs
    check_count("--pairs", pairs)
    if args.steps is not None:
        check_count("--steps", args.steps)
    seed = 0 if args.seed is None else args.seed
    if not 0 <= seed < 2**60:
        raise InputError(f"--seed must lie in [0, 2^60), got {seed}.")
    if args.quick and args.steps is not None:
        raise InputError("--quick and --steps both set the number of steps; give one of them.")
    if args.quick and args.table is not None:
        raise InputError("--quick shortens only the GPT's training, which --table leaves out; leave it out.")
    return Settings(
        beta=args.beta,
        pairs=pairs,
        table_steps=args.steps or 2000,
        gpt_steps=args.steps or (1000 if args.quick else 2500),
        seed=seed,
        device=args.device,
        quick=args.quick,
    )


def _world(args: argparse.Namespace, settings: Settings) -> Bandit:
    if args.table is not None:
        for option in ("prompts", "completions"):
            if getattr(args, option) is not None:
                raise InputError(f"--{option} is given by the file of --table; leave it out.")
        return load_table(args.table)
    prompts = 8 if args.prompts is None else args.prompts
    completions = 16 if args.completions is None else args.completions
    check_count("--prompts", prompts)
    check_count("--completions", completions, minimum=2)
    return random_bandit(prompts, completions, generator=seeded_generator(settings, "world"))


# --------------------------------------------------------------------------------------------- reporting


def results_table(outcomes: list[Outcome], law: FiniteDataLaw) -> str:
    """The table that the command prints, with a line of explanation for what is not obvious in it."""
    header = (
        f"{'experiment':<22}{'max|dlogp|':>11}{'bound':>10}{'TV':>9}{'KL(p|t)':>9}{'KL(t|p)':>9}"
        f"{'reward':>9}{'(best)':>9}{'KL(p|ref)':>10}{'(best)':>9}{'weight':>15}{'sec':>6}"
    )
    lines = [header, "-" * len(header)]
    for outcome in outcomes:
        lines.append(_row(outcome, outcome.target_logps, outcome.target, outcome.logp_bound.max().item()))
        if outcome.name == "finite":
            optimal = optimal_logps(outcome.ref_logps, outcome.rewards, beta=outcome.beta)
            lines.append(_row(outcome, optimal, "pi*", law.logp_limit.max().item()))
            distance = torch.where(law.logp_limit > 0, outcome.logps - optimal, 0).abs()
            excess = (distance / law.logp_limit.clamp(min=1e-300)).max()
    lines += [
        "",
        "max|dlogp|: largest |log policy - log target| in nats; bound: what the certificate proves about it",
        "  (for finite -> pi*: the statistical limit of the least certain completion, false alarms 1e-6);",
        "TV: total variation; p policy, t target; weight: mean gradient weight at the start and at the end.",
        f"Sampled pairs against pi*: the worst completion is at {excess:.0%} of its own limit; score "
        f"statistic {law.score:.1f}, expected {law.degrees}, limit {law.score_limit:.1f}.",
    ]
    return "\n".join(lines)


def _row(outcome: Outcome, target: Tensor, target_name: str, bound: float) -> str:
    logps, ref_logps, rewards = outcome.logps, outcome.ref_logps, outcome.rewards
    start, end = (outcome.records[k]["dpo/gradient_weight"] for k in (0, -1))
    variation = ((logps.exp() - target.exp()).abs().sum(-1) / 2).max().item()
    kls = (kl_divergence(logps, target).max().item(), kl_divergence(target, logps).max().item())
    return (
        f"{outcome.name + ' -> ' + target_name:<22}{max_distance(logps, target):>11.1e}{bound:>10.1e}"
        f"{variation:>9.1e}{kls[0]:>9.1e}{kls[1]:>9.1e}"
        f"{expected_reward(logps, rewards):>9.4f}{expected_reward(target, rewards):>9.4f}"
        f"{kl_divergence(logps, ref_logps).mean():>10.4f}{kl_divergence(target, ref_logps).mean():>9.4f}"
        f"{start:>8.3f}{end:>7.3f}{outcome.seconds:>6.1f}"
    )


def _write(folder: Path, outcomes: list[Outcome]) -> None:
    from ..plots import bandit_figure  # matplotlib is slow to import: not before it is needed

    arrays = {}
    for outcome in outcomes:
        tables = {
            "ref_logps": outcome.ref_logps, "rewards": outcome.rewards, "logps": outcome.logps,
            "beta": torch.tensor(outcome.beta, dtype=torch.float64), "logp_bound": outcome.logp_bound,
            "prompt": outcome.rankings.prompt, "order": outcome.rankings.order,
            "weight": outcome.rankings.weight,
        }  # fmt: skip
        arrays |= {f"{outcome.name}_{key}": table.numpy() for key, table in tables.items()}
    write_arrays(folder / "result.npz", arrays)
    write_records(
        folder / "metrics.jsonl",
        ({"experiment": outcome.name, **record} for outcome in outcomes for record in outcome.records),
    )
    bandit_figure(outcomes, folder / "bandit.png")
