"""`python -m dpo_minimal bandit --comparisons FILE.csv`: real comparisons to rewards and a policy."""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

import torch
from torch import Tensor

from ...bandit import Bandit, TabularPolicy, dpo_objective, safe_learning_rate
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
from ...validation import InputError, check_count, check_device, check_positive
from ...zoo.ipo import ipo_estimate, ipo_objective
from .fit import fit, max_distance
from .tables import load_comparisons

COLUMNS = ["prompt", "completion", "wins", "losses", "reward", "standard_error", "reference", "policy"]
STEPS = {"dpo": 20_000, "ipo": 5_000}
BOUND = 1e-8  # nats: closer than anybody reads, reached in seconds on well-connected data


def run(args: argparse.Namespace) -> Path:
    """Estimate rewards from comparisons, train a tabular policy on them by DPO (or IPO), compare the two."""
    for option in ("table", "prompts", "completions", "pairs", "seed"):
        if getattr(args, option) is not None:
            raise InputError(f"--{option} is not used with --comparisons; leave it out.")
    if args.quick:
        raise InputError("--quick is not used with --comparisons; leave it out.")
    loss = args.loss or "dpo"
    check_positive("--beta", args.beta)
    check_device(args.device)
    refuse_used_folder(args.output_dir)
    # DPO stops once certified; IPO, which has no certificate, takes all its steps.
    steps = STEPS[loss] if args.steps is None else args.steps
    check_count("--steps", steps)
    world, data = load_comparisons(args.comparisons)
    weighted = data
    if args.prior is not None:
        check_positive("--prior", args.prior)
        weighted = add_prior(data, world.exists, args.prior)

    # The estimate first: where it does not exist, this says so before anything is trained or written.
    rewards, errors = _estimate(world, weighted, loss, args.beta)
    target = optimal_logps(world.ref_logps, rewards, beta=args.beta)

    folder = new_run_folder(args.output_dir, "ranking")
    write_json(folder / "config.json", {"command": "bandit", **vars(args), "steps": steps, **versions()})
    print(
        f"{data.weight.sum():g} comparisons of {int(world.exists.sum())} completions "
        f"for {len(world.prompts)} prompts; training a table by {loss.upper()} with beta = {args.beta:g}.",
        flush=True,
    )
    training = weighted.normalised_by_prompt().to(args.device)
    policy = TabularPolicy(world.ref_logps.to(args.device))
    learning_rate = safe_learning_rate(training, beta=args.beta if loss == "dpo" else None)
    optimizer = torch.optim.SGD(policy.parameters(), lr=learning_rate, momentum=0.9, nesterov=True)
    ref_logps, target_on_device = world.ref_logps.to(args.device), target.to(args.device)
    outcome = fit(
        "ranking", policy, optimizer, training,
        objective=dpo_objective if loss == "dpo" else ipo_objective,
        ref_logps=ref_logps, rewards=rewards.to(args.device), target_logps=target_on_device,
        target="estimate", beta=args.beta, steps=steps, measure_every=20, stop_at_bound=BOUND,
        certified=loss == "dpo",
    )  # fmt: skip
    distance = max_distance(outcome.logps, target)
    print(f"Trained policy against the closed form of the estimate: max |dlogp| {distance:.1e} nats", end="")
    print(f", certified below {outcome.logp_bound.max():.1e}." if loss == "dpo" else ".")
    if distance > 1e-6:
        print("That is not converged: raise --steps or, where a completion wins almost always, set --prior.")

    wins = win_counts(data, *world.rewards.shape)
    _write_csv(folder / "ranking.csv", world, wins, rewards, errors, outcome.logps)
    write_records(folder / "metrics.jsonl", outcome.records)
    from .figure import ranking_figure

    ranking_figure(world, rewards, errors, folder / "ranking.png")
    print(f"Wrote {folder}/ranking.csv, ranking.png, metrics.jsonl and config.json.")
    return folder


def _estimate(world: Bandit, data: Rankings, loss: str, beta: float) -> tuple[Tensor, Tensor]:
    """Rewards (X, Y) and their standard errors: of maximum likelihood, or beta times those of IPO's
    log-ratios."""
    names = (world.prompts, world.completions)
    if loss == "dpo":
        rewards = maximum_likelihood(data, world.exists, names)
        return rewards, standard_errors(rewards, data)
    logratios = ipo_estimate(data, world.exists, names, beta=beta)
    return beta * logratios, beta * ipo_standard_errors(logratios, data, world.exists, beta=beta)


def _write_csv(
    path: Path, world: Bandit, wins: Tensor, rewards: Tensor, errors: Tensor, logps: Tensor
) -> None:
    """One row a completion, each prompt's best first."""

    def write(temporary: Path) -> None:
        with open(temporary, "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(COLUMNS)
            for x, prompt in enumerate(world.prompts):
                for y in rewards[x, : len(world.completions[x])].argsort(descending=True).tolist():
                    numbers = (
                        wins[x, y].sum(), wins[x, :, y].sum(), rewards[x, y], errors[x, y],
                        world.ref_logps[x, y].exp(), logps[x, y].exp(),
                    )  # fmt: skip
                    row = [f"{number.item():.10g}" for number in numbers]
                    writer.writerow([prompt, world.completions[x][y], *row])

    write_atomically(path, write)
