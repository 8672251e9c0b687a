"""`python -m dpo_minimal bandit`: DPO finds pi_ref exp(r / beta) / Z, from a table to a GPT-2.

Four trainings, each from the reference, each against a target known beforehand: a table on exact
preference probabilities, a table on sampled pairs, a GPT on exact probabilities, a table on rankings.
"""

from __future__ import annotations

import argparse
import math
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from ...bandit import Bandit, random_bandit
from ...certificates import maximum_likelihood
from ...closed_form import kl_divergence, optimal_logps
from ...laws.sampling_laws import finite_data_law
from ...preferences import Rankings, all_sets, sample_pairs
from ...text.runs import refuse_used_folder, write_arrays, write_records
from ...validation import InputError, check_positive, check_range, check_seed
from ..options import COMMON, RUN, Option, add_options, at_least, resolve
from ..study import run_folder, table
from . import convergence, figure, ranking
from .convergence import Settings
from .fit import Outcome, expected_reward, max_distance
from .tables import load_table

OPTIONS = {
    "world": {
        "prompts": Option("prompts of the tabular world", int, 8, metavar="X"),
        "completions": Option("completions of each", int, 16, check=at_least(2), metavar="Y"),
        "table": Option(
            "run the tabular experiments on your own world: columns prompt, completion, reward and, if not "
            "uniform, reference (a probability or a count)", str, metavar="FILE.csv",
        ),
        "comparisons": Option(
            "train on your own comparisons instead: columns winner, loser (or an arena's model_a, model_b, "
            "winner) and, optionally, prompt and count; writes ranking.csv with rewards, standard errors and "
            "the trained policy", str, metavar="FILE",
        ),
    },
    "training": {
        # a figure can show the pi* of this default
        "beta": Option("strength of the KL penalty, 1e-4 to 1e4", float, 0.5, check=check_positive),
        "pairs": Option("pairs to sample", int, 20_000),
        "steps": Option(
            "at most, of each experiment (default: 2000, but tables stop early once certified; with "
            "--comparisons 60000, or 5000 by ipo)"
        ),
        "loss": Option(
            "with --comparisons: ipo has a finite optimum even where a completion never lost (default dpo)",
            str, choices=("dpo", "ipo"),
        ),
        "prior": Option(
            "with --comparisons: give each completion this many imaginary wins and losses, spread over the "
            "others (standard errors are then the posterior's)", float, check=check_positive, metavar="X",
        ),
    },
    "run": {
        "seed": Option("the same seed gives the same numbers, on a CPU", int, 0, check=check_seed),
        "output_dir": RUN["output_dir"],
        "device": COMMON["device"],
        "quick": Option(
            "85 instead of 341 completions a prompt for the GPT, and 1000 steps instead of 2000", bool
        ),
    },
}  # fmt: skip
add_arguments = partial(add_options, groups=OPTIONS)


def _resolved(args: argparse.Namespace) -> argparse.Namespace:
    compares, has_table = args.comparisons is not None, args.table is not None
    options = resolve(
        args, OPTIONS,
        (f"{ranking.UNUSED} quick", compares, "{} is not used with --comparisons; leave it out."),
        ("loss prior", not compares, "{} is used only with --comparisons; leave it out."),
        ("prompts completions", has_table, "{} is given by the file of --table; leave it out."),
        ("quick", args.steps is not None, "{} and --steps both set the number of steps; give one of them."),
        ("quick", has_table, "{} shortens only the GPT's training, which --table leaves out; leave it out."),
    )  # fmt: skip
    options.quick = bool(options.quick)
    if not compares:
        check_range("--beta", options.beta, 1e-4, 10_000, "float64 has too few digits beyond")
        pairs = options.prompts * math.comb(options.completions, 2)
        check_range("--prompts with --completions: the number of pairs", pairs, 1, 10**7, "all are listed")
    return options


def run(args: argparse.Namespace) -> Path:
    """Check everything, then run the experiments and write the run folder, which is returned."""
    torch.set_num_threads(1)  # tables and models this small are faster on one core, and the same everywhere
    options = _resolved(args)
    if args.comparisons is not None:
        return ranking.run(options)
    gpt_steps = options.steps or (1000 if options.quick else 2000)
    others = options.seed, options.device, options.quick
    settings = Settings(options.beta, options.pairs, options.steps or 2000, gpt_steps, *others)
    refuse_used_folder(args.output_dir)
    stream = convergence.seeded_generator(settings, "world")
    shape = options.prompts, options.completions
    world = load_table(args.table) if args.table is not None else random_bandit(*shape, generator=stream)
    generator = convergence.seeded_generator(settings, "pairs")
    data = sample_pairs(world.rewards, settings.pairs, slate=all_sets(world.exists), generator=generator)
    estimate, missing = None, None
    try:
        estimate = maximum_likelihood(data, world.exists, (world.prompts, world.completions))
    except InputError as error:
        missing = f"with {settings.pairs} sampled pairs {error}"
        if args.table is None:
            raise InputError(f"raise --pairs: {missing}") from None
    folder = run_folder("bandit", {**vars(args), **vars(settings)})

    X, Y = world.rewards.shape
    size = min(convergence.RANKED, int(world.exists.sum(-1).min()))  # what every prompt has
    experiments = {
        f"tabular: {X} prompts x {Y} completions, every pair with its exact probability (float64).":
            lambda: convergence.tabular(world, settings),
        f"finite: {settings.pairs} sampled pairs; the target is their maximum-likelihood estimate (float64).":
            lambda: convergence.finite(world, data, estimate, settings),
        f"gpt: a GPT-2 and all its completions for {convergence.GPT_PROMPTS} prompts, exact probabilities on "
        "a sparse graph of pairs (trained in float32, judged in float64).":
            lambda: convergence.gpt_population(settings),
        f"plackett_luce: rankings of {size} with their exact probability (float64).":
            lambda: convergence.plackett_luce(world, settings, size),
    }  # fmt: skip
    print(f"Training towards pi* = pi_ref exp(r / beta) / Z with beta = {settings.beta:g}.\n", flush=True)
    outcomes = []
    for explanation, experiment in experiments.items():
        name = explanation.partition(":")[0]
        if name == "gpt" and args.table is not None:
            continue
        if name == "finite" and estimate is None:
            print(f"   finite: left out, because {missing} (--pairs sets their number)")
            continue
        print(f"{len(outcomes) + 1}. {explanation}", flush=True)
        outcomes.append(experiment())

    print("\n" + results_table(outcomes))
    if estimate is not None:
        print(_statistical_line(world, data, estimate, settings))
    print(_verdict(outcomes))
    _write(folder, outcomes)
    print(f"\nWrote {folder}/bandit.png, result.npz, metrics.jsonl and config.json.")
    return folder


# --------------------------------------------------------------------------------------------- reporting


COLUMNS = [
    ("experiment", "<21", ""), ("max|dlogp|", ">10", ".1e"), ("bound", ">9", ".1e"), ("TV", ">8", ".1e"),
    ("KL(p|t)", ">8", ".1e"), ("KL(t|p)", ">8", ".1e"), ("reward", ">8", ".4f"), ("(best)", ">8", ".4f"),
    ("KL(p|ref)", ">9", ".4f"), ("(best)", ">8", ".4f"), ("weight", ">16", ""), ("sec", ">5", ".1f"),
]  # fmt: skip


def results_table(outcomes: list[Outcome]) -> str:
    """The table that the command prints, with a line of explanation for what is not obvious in it."""
    rows = []
    for outcome in outcomes:
        first, last = (outcome.records[k]["dpo/gradient_weight"] for k in (0, -1))
        trained = outcome.logp_bound.max().item(), f"{first:.4g} -> {last:.4g}", outcome.seconds
        label = f"{outcome.name} -> {outcome.target}"
        rows.append(_row(label, outcome, outcome.logps, outcome.target_logps, *trained))
        if outcome.target != "pi*":
            optimal = optimal_logps(outcome.ref_logps, outcome.rewards, beta=outcome.beta)
            rows.append(_row(f"  {outcome.target} -> pi*", outcome, outcome.target_logps, optimal))
    header, *lines = table(COLUMNS, rows)
    explanation = """
max|dlogp|: largest |log p - log t| in nats, policy p against target t; bound: what p's gradient
proves about it; TV: total variation; (best): of the target; weight: mean gradient weight, first
and last (of rankings: that of the best answer); sec: training and measuring."""
    return "\n".join([header, "-" * len(header), *lines, explanation])


def _row(label, outcome: Outcome, logps: Tensor, target: Tensor, bound="-", weight="-", seconds="-") -> list:
    """A policy beside its target; the last three are known of what was trained."""
    variation = ((logps.exp() - target.exp()).abs().sum(-1) / 2).max().item()
    kls = (kl_divergence(*pair).max().item() for pair in ((logps, target), (target, logps)))
    rewards = (expected_reward(p, outcome.rewards).item() for p in (logps, target))
    from_reference = (kl_divergence(p, outcome.ref_logps).mean().item() for p in (logps, target))
    return [
        label, max_distance(logps, target), bound, variation, *kls, *rewards, *from_reference, weight, seconds
    ]  # fmt: skip


def _statistical_line(world: Bandit, data: Rankings, estimate: Tensor, settings: Settings) -> str:
    """Is the estimate as close to pi* as the number of pairs demands?"""
    optimal = optimal_logps(world.ref_logps, world.rewards, beta=settings.beta)
    estimated = optimal_logps(world.ref_logps, estimate, beta=settings.beta)
    law = finite_data_law(optimal, world.ref_logps, data, beta=settings.beta)
    limited = law.logp_limit > 0
    share = ((estimated - optimal).abs()[limited] / law.logp_limit[limited]).max()
    worst = f"worst log-probability at {share:.0%} of its own limit"
    return (
        f"MLE -> pi* at a false-alarm rate of 1e-6: score statistic {law.score:.1f}, expected {law.degrees}, "
        f"limit {law.score_limit:.1f}; "
        f"{worst if law.plenty >= 8 else 'too few pairs for a limit on each log-probability'}."
    )


def _verdict(outcomes: list[Outcome]) -> str:
    """Did every training arrive: KL <= 1e-6, 1e-3 nats where the target has 1e-4 or more, certified?"""
    late, false = [], []
    for outcome in outcomes:
        logps, target = outcome.logps, outcome.target_logps
        gap = torch.where(logps == target, 0, logps - target).abs()
        distance, divergence = gap[target >= math.log(1e-4)].max(), kl_divergence(logps, target).max()
        if divergence > 1e-6 or distance > 1e-3 or not outcome.logp_bound.isfinite().all():
            late.append(outcome.name)
        if (gap.amax(-1) > outcome.logp_bound).any():
            false.append(outcome.name)
    if false:
        return f"BEYOND ITS BOUND: {', '.join(false)}; a certificate was wrong, which is a bug in here."
    if late:
        return f"NOT CONVERGED: {', '.join(late)}; raise --steps, or scale the rewards down."
    return "Every training reached its target, within its bound."


def _write(folder: Path, outcomes: list[Outcome]) -> None:
    arrays = {}
    for outcome in outcomes:
        fields = {key: getattr(outcome, key) for key in ("ref_logps", "rewards", "logps")}
        fields |= {"beta": torch.tensor(outcome.beta, dtype=torch.float64), "logp_bound": outcome.logp_bound}
        fields |= outcome.rankings._asdict()
        arrays |= {f"{outcome.name}_{key}": table.numpy() for key, table in fields.items()}
    write_arrays(folder / "result.npz", arrays)
    write_records(
        folder / "metrics.jsonl",
        ({"experiment": outcome.name, **record} for outcome in outcomes for record in outcome.records),
    )
    figure.bandit_figure(outcomes, folder / "bandit.png")
