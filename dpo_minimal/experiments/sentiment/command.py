"""`python -m dpo_minimal sentiment`: the paper's controlled-sentiment experiment, at the size of a laptop.

A policy must continue the beginning of a film review, 2 to 8 tokens, with something positive. The reward is
known, so each method is held to the true reward and to its divergence from the reference (Fig. 2, left):

  SFT on reviews -> four samples of each prefix -> six pairs, labelled by the true reward -> reward model
  -> Preferred-FT, DPO, Unlikelihood, IPO, KTO, ORPO, PPO, PPO with the true reward, best of N

and DPO in rounds, whose pairs the policy itself draws, a quarter of the prefixes at a time.

  dpo-minimal sentiment                           the package's own grammar of reviews
  dpo-minimal sentiment --quick                   the same with fewer settings, in a minute and a half
  dpo-minimal sentiment --methods dpo --prefixes 2500 --steps 3000 --seeds 1      14,000 labels
  dpo-minimal sentiment --reviews FILE.tsv        your reviews, lines label<TAB>text with label 1 or 0; the
                                                  truth is then a logistic regression on their words
  dpo-minimal sentiment --resume runs/sentiment-001

All methods hear as much from people: four completions of each prefix with a true reward behind them, of
which those that learn from pairs hold a tenth out. These take as many steps at a learning rate that falls to
zero; PPO stops when its samples are used up. Labels are free of noise, as in the paper, so the DPO loss has
no finite optimum for any beta; those of --label-noise bradley-terry contradict each other.

Columns: reward, KL and win rate (against a sample of the SFT model, a tie one half) of samples at temperature
1 of held-out prefixes, with 95 % intervals over prompts and trainings; possible, the share of the most reward
that any policy has at that KL; in 2.5 and 8 nats, the most reward on a training's path within that KL;
repeated, the share of runs of three tokens that a sample had before; orders, the share of held-out pairs
whose chosen completion gained on the rejected one. Of best of N the KL is an upper bound; GT: by the true
reward; implicit: by beta log pi/pi_ref of DPO's policy.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from functools import partial
from operator import itemgetter
from pathlib import Path

import numpy as np
import torch

from ...text.allocator import keep_freed_memory
from ...text.runs import write_json, write_records, write_text
from ...text.truth import read_reviews
from ...validation import InputError, check_count, check_seed
from ..options import RUN, Option, add_options, at_least, resolve
from ..study import Files, Study, carry_out, run_jobs, table, write_csv
from ..text.report import prompt_line, text_lines
from ..text.setup import open_folder, resumable
from . import figure
from .methods import PPO_BATCH, PPO_EPOCHS, ROUNDS_RATE, ROUNDS_STEPS, SHOWN, all_runs, jobs_of
from .results import CHARACTER, WITHIN, Group, Results, Row, path_rows, results_of
from .rewards import DRAWS, REWARD_EPOCHS, first_jobs
from .world import NOISES, K, Plan, World, load_world, make_world

GRAMMAR = Plan(
    demonstrations=16000, vocab_size=704, context=64, n_layer=2, n_embd=128, sft_epochs=1,
    sft_learning_rate=3e-3, prefixes=640, held_out=192, other=192, max_new_tokens=44, steps=750, batch=8,
    learning_rate=3e-4, warmup=10, best_of=48, noise=NOISES[0],
)  # fmt: skip
QUICK = GRAMMAR._replace(demonstrations=6400, prefixes=240, steps=150, held_out=96, other=96, best_of=16)
REVIEWS = GRAMMAR._replace(
    vocab_size=2048, context=72, n_layer=3, sft_epochs=5, sft_learning_rate=1.5e-3, max_new_tokens=56,
    prefixes=560, steps=600,
)  # fmt: skip
QUICK_REVIEWS = REVIEWS._replace(
    n_layer=2, sft_epochs=2, prefixes=160, steps=90, held_out=64, other=64, best_of=8
)
SEEDS, METHODS = 3, ("all", "dpo")
IN_TABLE, POSSIBLE = (2.5, 8.0), (1.84, 2.5, 3.5)  # nats
PRINTED = 2  # prompts whose samples are printed
COLUMNS = (
    ("method", "<14", ""), ("setting", "<13", ""), ("seeds", ">5", ""), ("reward", ">13", ""),
    ("KL, nats", ">13", ""), ("possible", ">9", ""), ("win rate, %", ">14", ""),
    *((f"in {nats:g} nats", ">12", "") for nats in IN_TABLE), ("sec", ">5", ".0f"),
)  # fmt: skip
CHARACTER_COLUMNS = (
    ("what it writes", "<26", ""), ("tokens", ">7", ".1f"), ("ended", ">7", ".0%"), ("repeated", ">9", ".1%"),
    ("log pi_ref a token", ">19", ".2f"), ("orders", ">8", ".0%"),
)  # fmt: skip

OPTIONS = {
    "data": {
        "reviews": Option(
            "real reviews, a line each: label (1 or 0), tab, text (default: the package's grammar)", str,
            metavar="FILE.tsv",
        ),
        "label_noise": Option(
            "none: the better completion is always chosen, as in the paper; bradley-terry: with probability "
            "sigmoid of the difference in reward", str, default=NOISES[0], choices=NOISES,
        ),
        "prefixes": Option(
            "to train on, six labels each; the grammar has some 2600, with --quick 1500 (default "
            f"{GRAMMAR.prefixes}; fewer for reviews and with --quick)", check=at_least(20),
        ),
    },
    "training": {
        "steps": Option(
            f"of a training on pairs; in rounds {ROUNDS_STEPS} times as many (default {GRAMMAR.steps}; fewer "
            "for reviews and with --quick)"
        ),
        "methods": Option("all, or dpo: only DPO and DPO in rounds", str, default="all", choices=METHODS),
    },
    "run": {
        "seeds": Option(f"trainings of each method and setting (default {SEEDS}; 1 with --quick)"),
        "seed": Option("of the SFT model, the prefixes and the pairs", int, 0, check=check_seed),
        "quick": Option("fewer settings, prompts and steps, one seed", bool),
        "output_dir": RUN["output_dir"],
        "resume": RUN["resume"],
    },
}  # fmt: skip
WORKERS = Option(
    "processes that train at the same time; the results do not depend on it (default: the cores, 2 at most)"
)
add_arguments = partial(add_options, groups=OPTIONS | {"processes": {"workers": WORKERS}})


def run(args: argparse.Namespace) -> Path:
    """Check everything, make what is missing, and write the run folder, which is returned."""
    torch.set_num_threads(1)  # models this small; and the same sums everywhere
    keep_freed_memory()
    workers = vars(args).pop("workers")
    if workers is not None:
        check_count("--workers", workers)
    options = resolve(args, OPTIONS, command="sentiment")
    if options.resume is None:  # options that depend on others; a file is read before anything is written
        options.quick = bool(options.quick)
        options.seeds = options.seeds or (1 if options.quick else SEEDS)
        plans = (GRAMMAR, QUICK) if options.reviews is None else (REVIEWS, QUICK_REVIEWS)
        sizes = {name: getattr(options, name) for name in ("prefixes", "steps") if getattr(options, name)}
        options.plan = plans[options.quick]._replace(noise=options.label_noise, **sizes)._asdict()
        if options.reviews is not None:
            read_reviews(options.reviews)
    if set(options.plan) != set(Plan._fields):
        raise InputError(f"--resume {options.resume}: was made by another version; start a new run.")
    plan = Plan(**options.plan)
    with resumable("sentiment", open_folder(options, "sentiment")) as folder:
        make_world(
            folder, plan, reviews=options.reviews, seed=options.seed, resume=options.resume is not None
        )  # fmt: skip
        workers = workers or min(2, os.cpu_count() or 1)
        carry_out(_study(folder, plan, options, workers), folder, workers=workers)
    return folder


def _study(folder: Path, plan: Plan, options: argparse.Namespace, workers: int) -> Study:
    """Every training of the plan, from the world in the folder to tables, figures and files."""
    folder = folder.resolve()  # one name for what a process keeps of it
    runs = all_runs(seeds=options.seeds, quick=options.quick)
    if options.methods == "dpo":
        runs = [run for run in runs if run.method in ("SFT", "DPO", "DPO in rounds")]
    reward, _ = run_jobs(first_jobs(folder, plan, options.seed), "reward model, draws", workers)
    jobs, world = jobs_of(folder, runs, plan), load_world(folder)
    what = "film reviews of a file" if options.reviews else "the grammar's film reviews"

    def files(results: Results) -> Files:
        samples = "\n".join([*sample_lines(world, SHOWN, results.groups), ""])
        return {
            "sentiment.png": partial(figure.frontier_figure, results, what),
            "win_rates.png": partial(figure.win_rate_figure, results),
            "table.csv": partial(write_csv, rows=results.rows),
            "win_rates.csv": partial(write_csv, rows=results.win_rates),
            "result.json": partial(write_json, content=results.rows),
            "metrics.jsonl": partial(write_records, records=path_rows(results)),
            "samples.txt": partial(write_text, text=samples),
        }

    return Study(
        plan={"methods": list(jobs.values())},
        runs=lambda found: results_of(dict(zip(jobs, found)) | {"reward-model": reward}, runs, plan),
        table=lambda results: [
            *results_table(results.rows), "",
            *learnt_from(results, plan, world.rows), "",
            *comparison(results), "", *character_table(results), "",
            *sample_lines(world, PRINTED, results.full),
        ],
        files=lambda found: files(*found),
    )  # fmt: skip


def results_table(rows: Sequence[Row]) -> list[str]:
    """Every method and setting; of best of N the KL is an upper bound."""
    cells = []
    for row in rows:
        win, low, high = (100 * row[name] for name in ("win_rate", "win_rate_low", "win_rate_high"))
        kl = f"<= {row['kl']:.2f}" if row["method"].startswith("Best") else _plus_minus(row, "kl")
        cells.append(
            (row["method"], row["setting"], row["seeds"], _plus_minus(row, "reward"), kl,
             "-" if row.get("possible") is None else f"{row['possible']:.0%}",
             f"{win:.0f} [{low:.0f}, {high:.0f}]", *(_plus_minus(row, WITHIN[nats]) for nats in IN_TABLE),
             row["seconds"])
        )  # fmt: skip
    return table(COLUMNS, cells)


def _plus_minus(row: Row, name: str) -> str:
    if row.get(name) is None:
        return "-"
    return f"{row[name]:z.2f} ± {(row[f'{name}_high'] - row[f'{name}_low']) / 2:.2f}"


def learnt_from(results: Results, plan: Plan, drawn: Sequence[Row]) -> list[str]:
    """What every method may use, how the pairs came about, and what the learned and the true reward tell."""
    judged, at_once = K * plan.prefixes, PPO_BATCH * plan.batch
    pairs, left_out = sum(len(row["pairs"]) for row in drawn), sum(row["left_out"] for row in drawn)
    with_ppo = any(group.method == "PPO" for group in results.groups)
    labels = "always the better one is chosen; the DPO loss has no finite optimum for any beta [D11.6]"
    if plan.noise != "none":
        wrong = sum(row["rewards"][w] < row["rewards"][l] for row in drawn for w, l in row["pairs"])
        labels = f"Bradley-Terry's; {wrong / pairs:.0%} choose the worse one"
    return [
        f"Every method: AdamW at {plan.learning_rate:g} after {plan.warmup} steps of warm-up, clipped at 1.",
        f"On pairs: {plan.steps} steps of {K * plan.batch} completions, to a rate of zero, and a tenth of "
        f"the prefixes held out; in rounds {ROUNDS_STEPS:g} times as many at {ROUNDS_RATE:g} times the rate.",
        *[f"PPO: {judged // at_once} rounds of {at_once} samples, {PPO_EPOCHS} steps each."] * with_ppo,
        f"Pairs: {pairs:,} of {judged:,} judged completions of {len(drawn):,} prefixes, {left_out} left out.",
        f"Labels: {labels}.",
        f"The learned reward, {REWARD_EPOCHS} epochs of the pairs, orders {results.accuracy:.0%} of "
        f"{results.pairs:,} held-out pairs rightly.",
        *_judged_by_steps(results),
    ]


def _judged_by_steps(results: Results) -> list[str]:
    """Whether trainings on pairs went on long enough: what DPO orders rightly by the end, and long before."""
    lines = []
    for group in results.groups:
        if group.method.startswith("DPO"):
            shares = group.last["accuracies"].mean(0).tolist()
            steps = ", ".join(f"{share:.0%} ({step})" for step, share in zip(group.steps, shares))
            lines.append(f"{group.label} orders, after so many steps: {steps}.")
    return lines


def comparison(results: Results) -> list[str]:
    """DPO beside PPO and best of N at equal divergence, and beside what is possible."""
    lines = ["The most reward within a divergence, of each method's best setting (95 %):"]
    for method in ("DPO", "DPO in rounds", "PPO", "PPO-GT"):
        of_method, texts = [row for row in results.rows if row["method"] == method], []
        for nats, name in WITHIN.items() if of_method else ():
            best = max(of_method, key=itemgetter(name))
            texts.append(f"{_plus_minus(best, name)} in {nats:g} nats ({best['setting']})")
        lines += [f"  {method:<14}{'; '.join(texts)}"] * bool(texts)
    for name, entries in results.best.items():
        n, row = max((n, row) for n, row in entries.items() if row["kl"] <= min(WITHIN))
        reward = f"{_plus_minus(row, 'reward')} in {row['kl']:.2f} nats"
        lines.append(f"  {'best of N':<14}{reward} (N {n}, by the {name} reward)")
    possible = [f"{np.interp(nats, *zip(*results.frontier)):.2f} in {nats:g} nats" for nats in POSSIBLE]
    text = f"{'; '.join(possible)} (pi_ref exp(r / beta) / Z on {DRAWS} draws a prefix)"
    return [*lines, f"  {'possible':<14}{text}"]


def character_table(results: Results) -> list[str]:
    """Lengths, repetitions, likelihood under the reference: where a policy stops being a language model."""
    rows = [(g.label, *(row[name] for name in CHARACTER)) for g, row in zip(results.groups, results.rows)]
    return table(CHARACTER_COLUMNS, rows)


def sample_lines(world: World, shown: int, groups: Sequence[Group]) -> list[str]:
    """Samples of the same prompts side by side, with their rewards."""
    lines = []
    for place in range(min(shown, SHOWN, len(world.held_out))):
        lines += ["", prompt_line(world.policy.tokenizer.decode(world.held_out[place]))]
        for group in groups:
            label = group.label.replace("Unlikelihood", "Unlikelih.").replace("DPO in rounds", "DPO rounds")
            reward = group.rewards[0, -1, place].item()
            lines += text_lines(label, f"[{reward:+.2f}] {group.last['texts'][0][place]}")
    return lines[1:]
