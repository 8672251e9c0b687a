"""`python -m dpo_minimal statistics`: data sets by the thousand, and the laws that their estimates obey.

One prompt, K completions, random rewards. A data set is N comparisons of random pairs, labelled by
Bradley-Terry; it has its own maximum-likelihood estimate of the rewards, hence its own DPO optimum pi_hat.
For each N thousands of data sets are drawn, and measured beside theory, with Monte-Carlo standard errors:

  N KL           distance of pi_hat from pi*, nats, times N; tends to tr(Sigma I^+) / (2 beta^2)
  squared error  of the rewards, over the Cramer-Rao bound: 1 is the best possible with many pairs
  regions        how often a 90, 95 or 99 % confidence region, Wald's or the likelihood ratio's, contains
                 the true rewards
  score          N g' I^+ g at the truth: its mean and variance are known exactly at every N
  excess loss    of pi_hat over pi*, in the population, times N; tends to (K - 1) / 2. On its own data
                 pi_hat looks better than pi* by as much
  no estimate    some group of completions never lost to the others; a union bound limits how often

All this is with pairs drawn uniformly. Last, at the largest N, other samplers draw them: two different
completions of the reference, of pi*, of half of each, of pi* at temperature 2 ("tempered"); the pairs that
are best in hindsight; and rounds, each drawn for the policy that all labels so far have trained.

I is the Fisher information of one comparison, Sigma = diag(pi*) - pi* pi*', g the gradient, and rho^2 the
variance (times N) of the worst estimated difference of rewards.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

from ...laws.sampling_laws import kl_law
from ...text.runs import refuse_used_folder, write_arrays, write_records
from ...validation import InputError, check_range, check_seed
from ..study import run_folder
from . import figure, samplers
from .replicates import Law, Settings, Size, Truth, make_truth, simulate

PAIRS = (100, 400, 1600, 6400, 25600)  # 2 to 500 times rho^2 in the default world
REPLICATES, QUICK_REPLICATES = 20_000, 2_000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    world = parser.add_argument_group("world")
    world.add_argument(
        "--completions", type=int, default=5, metavar="K", help="2 to 16 (default %(default)s)"
    )
    world.add_argument(
        "--beta", type=float, default=0.5,
        help="strength of the KL penalty, 0.01 to 100 (default %(default)s); only the KL depends on it, and "
        "is judged once N is 16 rho^2 and 4 (1 + 1 / beta^2) rho^2",
    )  # fmt: skip
    simulation = parser.add_argument_group("simulation")
    simulation.add_argument(
        "--pairs", type=int, nargs="+", default=PAIRS, metavar="N",
        help="comparisons in a data set: one to eight increasing numbers "
        f"(default {' '.join(map(str, PAIRS))})",
    )  # fmt: skip
    simulation.add_argument(
        "--replicates", type=int, metavar="R",
        help=f"data sets drawn for each N, 1000 to 1000000 (default {REPLICATES})",
    )  # fmt: skip
    run = parser.add_argument_group("run")
    run.add_argument("--seed", type=int, default=0, help="the same seed gives the same numbers (default 0)")
    run.add_argument("--output-dir", metavar="DIR", help="new folder (default runs/statistics-NNN)")
    run.add_argument("--quick", action="store_true", help=f"{QUICK_REPLICATES} data sets for each N")


def run(args: argparse.Namespace) -> Path:
    """Check everything, simulate each N, print table and verdict, write the run folder, which is returned."""
    torch.set_num_threads(1)  # as in bandit
    settings = _settings(args)
    truth = make_truth(settings)
    refuse_used_folder(args.output_dir)
    rewards = " ".join(f"{reward:z.2f}" for reward in truth.world.rewards[0])
    print(
        f"{settings.replicates} data sets for each number N of pairs. One prompt, {settings.completions} "
        f"completions, beta = {settings.beta:g}, rho^2 = {truth.resistance:.1f}, "
        f"true rewards {rewards} nats.",
        flush=True,
    )
    sizes = []
    for num_pairs in settings.pairs:
        sizes.append(simulate(truth, num_pairs, settings))
        print(f"  N = {num_pairs}: drawn and estimated, {sizes[-1].missing} have no estimate", flush=True)
    print("\n" + results_table(truth, sizes) + "\n")
    print("\n".join(verdict(sizes)))
    rows = samplers.compare(truth, settings) if settings.completions > 2 else []  # of two there is one pair
    if rows:
        print("", *samplers.samplers_table(rows, settings.pairs[-1], measured), sep="\n")
    # Only now: an interrupted run leaves no folder behind.
    folder = run_folder("statistics", {**vars(args), **asdict(settings)})
    _write(folder, truth, sizes)
    write_records(folder / "samplers.jsonl", rows)
    print(f"\nWrote {folder}/statistics.png, result.npz, metrics.jsonl, samplers.jsonl and config.json.")
    return folder


def _settings(args: argparse.Namespace) -> Settings:
    check_range("--completions", args.completions, 2, 16, "all groups of them are listed")
    check_range("--beta", args.beta, 0.01, 100, "a KL has too few digits beyond")
    for num_pairs in args.pairs:
        check_range("--pairs", num_pairs, 1, 10**9, "N KL has too few digits beyond")
    if len(args.pairs) > 8 or list(args.pairs) != sorted(set(args.pairs)):
        listed = " ".join(map(str, args.pairs))
        raise InputError(f"--pairs takes one to eight numbers, each above the one before, got {listed}.")
    if args.quick and args.replicates is not None:
        raise InputError("--quick and --replicates both set the number of data sets; give one of them.")
    replicates = args.replicates
    if replicates is None:
        replicates = QUICK_REPLICATES if args.quick else REPLICATES
    check_range(
        "--replicates", replicates, 1000, 10**6, "standard errors are rough below, memory short above"
    )
    check_seed("--seed", args.seed)
    return Settings(args.completions, args.beta, tuple(args.pairs), replicates, args.seed)


# --------------------------------------------------------------------------------------------- reporting


def measured(value: float, error: float) -> str:
    """A number and its standard error, to two digits of the error: 1.0051 ± 0.0054."""
    if math.isnan(error):
        return "-"
    if error == 0:
        return f"{value:g}"
    decimals = max(0, 1 - math.floor(math.log10(error)))
    if decimals > 6:
        return f"{value:.3g} ± {error:.1g}"
    return f"{value:.{decimals}f} ± {error:.{decimals}f}"


def results_table(truth: Truth, sizes: list[Size]) -> str:
    """The table that the command prints: a row for each quantity, a column for each N, and explanations."""
    rows = [["", "theory", *(f"N = {size.pairs}" for size in sizes)]]
    rows.append(["N / rho^2", "", *(f"{size.pairs / truth.resistance:.3g}" for size in sizes)])
    for law, *others in zip(*(size.laws for size in sizes)):
        if not law.key.endswith(("/90", "/99")):  # those are in the figure and in metrics.jsonl
            cells = map(_cell, (law, *others), sizes)
            rows.append([law.label, f"{law.theory:.4g}", *cells])
    rows.append(["share without an estimate", "", *map(_share, sizes)])
    rows.append(["  at most, by the union bound", "", *(f"{min(size.bound, 1):.3g}" for size in sizes)])
    width, *widths = (max(map(len, column)) for column in zip(*rows))
    lines = ["  ".join([label.ljust(width), *map(str.rjust, cells, widths)]) for label, *cells in rows]
    lines.insert(1, "-" * len(lines[0]))
    lines += [
        "",
        "±: Monte-Carlo standard error. Score statistic: theory is exact at every N; all data sets count.",
        "Other rows: the limit of many pairs, at least 16 rho^2; those with an estimate count. <, >: 95 %.",
    ]
    if any(size.few_estimates for size in sizes):
        lines.append("(...): fewer than 90 % of the data sets have an estimate; not comparable with theory.")
    return "\n".join(lines)


def _cell(law: Law, size: Size) -> str:
    text = measured(law.measured, law.error) + (" !" if law.outside else "")
    aside = size.few_estimates and not law.key.startswith("score") and text != "-"
    return f"({text})" if aside else text


def _share(size: Size) -> str:
    number = len(size.sample["score"])
    if size.missing in (0, number):  # 0 and 1 would look exact: 95 % limits, by the rule of three
        text = f"< {3 / number:.6g}" if size.missing == 0 else f"> {1 - 3 / number:.6g}"
    else:
        share = size.missing / number
        text = measured(share, math.sqrt(share * (1 - share) / number))
    return text + (" !" if size.too_many_missing else "")


def verdict(sizes: list[Size]) -> list[str]:
    """At most three sentences: the largest N in numbers, what disagrees with theory, what was not judged."""
    last, law = sizes[-1], {law.key: law for law in sizes[-1].laws}
    wald, ratio, efficiency, kl = (law[k] for k in ("wald/95", "likelihood_ratio/95", "efficiency", "kl"))
    if last.few_estimates:
        lines = [f"At N = {last.pairs} fewer than 90 % of the data sets have an estimate."]
    else:
        lines = [
            f"At N = {last.pairs}: squared error / Cramer-Rao bound "
            f"{measured(efficiency.measured, efficiency.error)}; 95 % regions cover "
            f"{100 * wald.measured:.1f} % (Wald) and {100 * ratio.measured:.1f} % (likelihood ratio; "
            f"Monte-Carlo error {100 * ratio.error:#.2g} %); "
            f"N KL {measured(kl.measured, kl.error)}, limit {kl.theory:.4g}."
        ]
    outside = [f"{law.label} at N = {size.pairs}" for size in sizes for law in size.laws if law.outside]
    outside += [f"share without an estimate at N = {size.pairs}" for size in sizes if size.too_many_missing]
    judged = sum(law.judged for size in sizes for law in size.laws) + sum(size.bound < 1 for size in sizes)
    allowed = "4 standard errors"
    slack = max((law.slack / abs(law.theory) for law in last.laws if law.judged), default=0)
    if slack > 0:
        allowed += f" plus second-order slack (at most {100 * slack:.2g} % at N = {last.pairs})"
    within = f"All {judged} measurements judged lie within {allowed}."
    lines.append(f"OUTSIDE {allowed}: {'; '.join(outside)}." if outside else within)
    few = {}
    for key, name in (
        ("kl", "the KL"), ("efficiency", "the other limits"), ("wald/95", "coverage"),
        ("score/variance", "the score's variance"),
    ):  # fmt: skip
        unripe = [str(s.pairs) for s in sizes for law in s.laws if law.key == key and not law.judged]
        if unripe and (name != "coverage" or unripe != few.get("the other limits")):
            few[name] = unripe
    if few:
        listed = "; ".join(f"{name} at N = {', '.join(unripe)}" for name, unripe in few.items())
        lines.append(f"Not judged, for want of pairs or estimates: {listed}.")
    return lines


def _record(size: Size) -> dict:
    record = {
        "pairs": size.pairs, "data_sets": len(size.sample["score"]), "without_estimate": size.missing,
        "without_estimate/bound": size.bound,
    }  # fmt: skip
    for law in size.laws:
        record[law.key] = law.measured
        record |= {f"{law.key}/{name}": getattr(law, name) for name in ("error", "theory", "slack", "judged")}
    return record


def _write(folder: Path, truth: Truth, sizes: list[Size]) -> None:
    eigenvalues = kl_law(truth.optimal, truth.world.ref_logps, truth.population, beta=truth.beta)[1]
    arrays = {
        "pairs": np.array([size.pairs for size in sizes]), "beta": np.float64(truth.beta),
        "rewards": truth.world.rewards[0].numpy(), "ref_logps": truth.world.ref_logps[0].numpy(),
        "order": truth.population.order.numpy(), "probability": truth.population.weight.numpy(),
        "kl_eigenvalues": eigenvalues[0].numpy(),
    }  # fmt: skip
    for key in sizes[0].sample:
        arrays[key] = np.stack([size.sample[key].numpy() for size in sizes])  # (sizes, data sets)
    write_arrays(folder / "result.npz", arrays)
    write_records(folder / "metrics.jsonl", (_record(size) for size in sizes))
    figure.statistics_figure(sizes, truth.degrees, folder / "statistics.png")
