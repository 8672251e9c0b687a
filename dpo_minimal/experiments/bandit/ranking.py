"""`python -m dpo_minimal bandit --comparisons FILE.csv`: real comparisons to rewards and a policy."""

from __future__ import annotations

import argparse
import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from ...bandit import Bandit, dpo_objective
from ...certificates import maximum_likelihood, missing_links
from ...closed_form import optimal_logps
from ...laws.finite_data import add_prior, goodness_of_fit, ipo_standard_errors, standard_errors
from ...laws.finite_data import strongest_cycles as cycles_of
from ...laws.games import borda_scores, copeland_scores, regularised_equilibrium
from ...preferences import Rankings, by_size, win_counts
from ...text import runs
from ...validation import InputError
from ...zoo.ipo import ipo_estimate, ipo_objective
from ..study import run_folder, write_csv
from . import figure
from .fit import Task, fit_table, max_distance
from .tables import load_comparisons

UNUSED = "table prompts completions pairs seed"  # options of the command that are of no use here
STEPS = {"dpo": 60_000, "ipo": 5_000}  # DPO stops once certified; IPO, which has no certificate, takes all
BOUND = 1e-8  # nats: closer than anybody reads, reached in seconds on well-connected data


def run(args: argparse.Namespace) -> Path:
    """Estimate rewards from comparisons, train a tabular policy on them by DPO (or IPO), compare the two."""
    runs.refuse_used_folder(args.output_dir)
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
    if args.prior is not None:
        _say_prior(world, data, args.prior, loss)
    target = optimal_logps(world.ref_logps, rewards, beta=args.beta)
    games = _as_games(world, data, weighted, args.beta)
    _say_fit(world, data)

    config = {"command": "bandit", **vars(args), **dict.fromkeys(UNUSED.split()), "steps": steps}
    folder = run_folder("ranking", config)
    print(
        f"{data.weight.sum():.10g} comparisons of {int(world.exists.sum())} completions "
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
        remedy = " or, where a completion wins almost always, use --loss ipo" * certified
        print(f"The policy is not converged, though rewards and errors are: raise --steps{remedy}.")

    tables = {"standard_error": errors, "reference": world.ref_logps.exp(), "policy": outcome.logps.exp()}
    tables |= games
    _write_csv(folder / "ranking.csv", world, data, args.prior, tables)
    runs.write_records(folder / "metrics.jsonl", outcome.records)
    figure.ranking_figure(
        world, errors, folder / "ranking.png", of=" of the posterior" * (args.prior is not None)
    )
    print(f"Wrote {folder}/ranking.csv, ranking.png, metrics.jsonl and config.json.")
    return folder


def _say_prior(world: Bandit, data: Rankings, strength: float, loss: str) -> None:
    """What the standard errors are then, and whom nothing else compares."""
    scatter = math.sqrt(2 / strength) / (1 if loss == "dpo" else 4)
    print(
        f"Each completion gets {strength:g} imaginary wins and losses; standard errors are the posterior's, "
        f"which hold where rewards scatter by no more than {scatter:.2g} (one standard deviation)."
    )
    if groups := missing_links(data, world.exists, (world.prompts, world.completions), loss="ipo")[0]:
        print(f"Nothing but the prior compares these groups with the others: {groups}.")


def _as_games(world: Bandit, data: Rankings, weighted: Rankings, beta: float) -> dict[str, Tensor]:
    """What needs no reward, from win rates [D11.17]; the surest cycles are printed."""
    tables = {name: torch.zeros_like(world.ref_logps) for name in ("borda", "copeland", "equilibrium")}
    cycles = []
    for (rows, width, own), (_, _, real) in zip(*(by_size(d, world.exists) for d in (weighted, data))):
        wins, there = win_counts(own, len(rows), width), world.exists[rows, :width]
        rates = torch.where(wins + wins.mT > 0, wins / (wins + wins.mT), 0.5)
        logps = regularised_equilibrium(rates, world.ref_logps[rows, :width], beta=beta)[0]
        share = width / there.sum(-1, keepdim=True)  # what does not exist was counted as a tie
        scores = [(score(rates) - 0.5) * share + 0.5 for score in (borda_scores, copeland_scores)]
        for table, values in zip(tables.values(), (*scores, logps.exp())):
            table[rows, :width] = torch.where(there, values, 0)
        for x, wins in zip(rows.tolist(), win_counts(real, len(rows), width)):
            cycles += [(sure, x, circle, wins) for sure, circle in cycles_of(wins)]

    print("Borda, Copeland and the equilibrium take 1/2 for the win rate of a pair never compared.")
    for sure, x, circle, wins in sorted(cycles, key=lambda cycle: -cycle[0])[:3]:
        counts = ", ".join(f"{wins[i, j]:g} to {wins[j, i]:g}" for i, j in pairwise([*circle, circle[0]]))
        chain = " beats ".join(world.completions[x][y][:30] for y in [*circle, circle[0]])
        print(f"Cycle, prompt {world.prompts[x][:30]}: {chain} ({counts}; weakest link {sure:.1f} s.e.).")
    if not cycles:
        print("No majorities run in a circle.")
    return tables


def _say_fit(world: Bandit, data: Rankings) -> None:
    """Bradley-Terry against one probability a pair [D11.18]."""
    try:
        fit = goodness_of_fit(maximum_likelihood(data, world.exists), data)
    except InputError:
        return print("Test of fit: none, because without a prior no maximum-likelihood estimate exists.")
    if fit.degrees == 0:
        return print("Test of fit: none, because rewards can fit the win rates of these pairs exactly.")
    few = f"of {fit.rare:.0%} of the pairs fewer than 5 wins are expected on one side."
    chance = f"p = {fit.p_value:.2g}; ties, where there are any, make it reject less."
    print(
        f"Test of fit, Bradley-Terry against one probability a pair: likelihood ratio {fit.statistic:.2f}, "
        f"chi-square with {fit.degrees} degrees of freedom (pairs - completions + components), "
        f"{chance if fit.rare <= 0.5 else f'but no p, as the law does not hold: {few}'}"
    )
    if 0 < fit.rare <= 0.5:
        print(f"Its law is rough: {few}")


def _write_csv(path: Path, world: Bandit, data: Rankings, prior, tables: dict[str, Tensor]) -> None:
    """One row a completion, each prompt's best first."""
    zeros = torch.zeros_like(world.rewards)
    wins, losses = (
        zeros.index_put((data.prompt, data.order[:, k]), data.weight, accumulate=True) for k in (0, 1)
    )
    columns = {"wins": wins, "losses": losses, "reward": world.rewards, **tables}
    if prior is not None:
        columns["prior_share"] = 2 * prior / (2 * prior + wins + losses)
    rows = []
    for x, (prompt, names) in enumerate(zip(world.prompts, world.completions)):
        for y in world.rewards[x, : len(names)].argsort(descending=True).tolist():
            numbers = {name: f"{values[x, y]:.10g}" for name, values in columns.items()}
            rows.append({"prompt": prompt, "completion": names[y], **numbers})
    write_csv(path, rows, line_end="\r\n")  # RFC 4180's, which spreadsheets write
