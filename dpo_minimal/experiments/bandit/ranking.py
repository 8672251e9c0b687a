"""`python -m dpo_minimal bandit --comparisons FILE.csv`: real comparisons to rewards and a policy."""

from __future__ import annotations

import argparse
import csv
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from ...bandit import Bandit, dpo_objective
from ...certificates import maximum_likelihood
from ...closed_form import optimal_logps
from ...laws.finite_data import add_prior, ipo_standard_errors, standard_errors
from ...preferences import Rankings, win_counts
from ...text.runs import (
    new_run_folder,
    refuse_used_folder,
    versions,
    write_atomically,
    write_json,
    write_records,
)
from ...zoo.ipo import ipo_estimate, ipo_objective
from .fit import Task, fit_table, max_distance
from .tables import load_comparisons

UNUSED = "table prompts completions pairs seed"  # options of the command that are of no use here
COLUMNS = ["prompt", "completion", "wins", "losses", "reward", "standard_error", "reference", "policy"]
STEPS = {"dpo": 20_000, "ipo": 5_000}  # DPO stops once certified; IPO, which has no certificate, takes all
BOUND = 1e-8  # nats: closer than anybody reads, reached in seconds on well-connected data


def run(args: argparse.Namespace) -> Path:
    """Estimate rewards from comparisons, train a tabular policy on them by DPO (or IPO), compare the two."""
    refuse_used_folder(args.output_dir)
    loss = args.loss or "dpo"
    steps = args.steps or STEPS[loss]
    world, data = load_comparisons(args.comparisons)
    weighted = data if args.prior is None else add_prior(data, world.exists, args.prior)

    # Where the estimate does not exist, this says so before anything is trained or written.
    names, certified = (world.prompts, world.completions), loss == "dpo"
    if certified:
        objective, rewards = dpo_objective, maximum_likelihood(weighted, world.exists, names)
        errors = standard_errors(rewards, weighted)
    else:
        objective, logratios = ipo_objective, ipo_estimate(weighted, world.exists, names, beta=args.beta)
        rewards = args.beta * logratios
        errors = args.beta * ipo_standard_errors(logratios, weighted, world.exists, beta=args.beta)
    world = replace(world, rewards=rewards)
    target = optimal_logps(world.ref_logps, rewards, beta=args.beta)

    folder = new_run_folder(args.output_dir, "ranking")
    config = {"command": "bandit", **vars(args), **dict.fromkeys(UNUSED.split()), "steps": steps}
    write_json(folder / "config.json", {**config, **versions()})
    print(
        f"{data.weight.sum():g} comparisons of {int(world.exists.sum())} completions "
        f"for {len(world.prompts)} prompts; training a table by {loss.upper()} with beta = {args.beta:g}.",
        flush=True,
    )
    task = Task("ranking", "estimate", args.beta, world.ref_logps, rewards, target, weighted, objective)
    outcome = fit_table(
        task, args.device, certified=certified, steps=steps, measure_every=20, stop_at_bound=BOUND
    )
    distance = max_distance(outcome.logps, target)
    print(f"Trained policy against the closed form of the estimate: max |dlogp| {distance:.1e} nats", end="")
    print(f", certified below {outcome.logp_bound.max():.1e}." if certified else ".")
    if distance > 1e-6:
        print("That is not converged: raise --steps or, where a completion wins almost always, set --prior.")

    _write_csv(folder / "ranking.csv", world, data, errors, outcome.logps)
    write_records(folder / "metrics.jsonl", outcome.records)
    from .figure import ranking_figure

    ranking_figure(world, errors, folder / "ranking.png")
    print(f"Wrote {folder}/ranking.csv, ranking.png, metrics.jsonl and config.json.")
    return folder


def _write_csv(path: Path, world: Bandit, data: Rankings, errors: Tensor, logps: Tensor) -> None:
    """One row a completion, each prompt's best first."""
    wins = win_counts(data, *world.rewards.shape)
    probabilities = world.ref_logps.exp(), logps.exp()
    numbers = torch.stack([wins.sum(-1), wins.sum(-2), world.rewards, errors, *probabilities], -1)

    def write(temporary: Path) -> None:
        with open(temporary, "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(COLUMNS)
            for x, (prompt, names) in enumerate(zip(world.prompts, world.completions)):
                for y in world.rewards[x, : len(names)].argsort(descending=True).tolist():
                    writer.writerow([prompt, names[y], *(f"{n:.10g}" for n in numbers[x, y].tolist())])

    write_atomically(path, write)
