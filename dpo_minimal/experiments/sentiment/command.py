"""`python -m dpo_minimal sentiment`: the paper's controlled-sentiment experiment, at the size of a laptop.

A policy must continue the beginning of a film review, 2 to 8 tokens, with something positive. Who judges is
known, so each method is held to the true reward and to its divergence from the reference (Fig. 2, left):

  SFT on reviews -> four samples of each prefix -> six pairs, labelled by the true reward -> reward model
  -> Preferred-FT, DPO, Unlikelihood, IPO, cDPO, KTO, ORPO, SimPO, PPO, PPO with the true reward, best of N

  dpo-minimal sentiment                           the package's own grammar of reviews
  dpo-minimal sentiment --quick                   the same with fewer settings, in a minute and a half
  dpo-minimal sentiment --reviews FILE.tsv        your reviews, lines label<TAB>text with label 1 or 0; the
                                                  truth is then a logistic regression on their words
  dpo-minimal sentiment --resume runs/sentiment-001

All methods have one budget: gradient steps, completions in each, completions with a true reward behind them,
and one learning rate; nothing is tuned for one of them. Labels are free of noise, as in the paper, so the DPO
loss has no finite optimum for any beta; those of --label-noise bradley-terry contradict each other.

Columns: reward, KL and win rate (against a sample of the SFT model, a tie one half) of samples at temperature
1 of held-out prefixes, with 95 % intervals over prompts and trainings; in 2.5 and 8 nats, the most reward on
a training's path within that KL; repeated, the share of runs of three tokens that a sample had before. Of
best of N the KL is an upper bound; GT: by the true reward.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import torch

from ...text.allocator import keep_freed_memory
from ...text.judge import read_reviews
from ...text.runs import new_run_folder, versions, write_json
from ...validation import check_count, check_seed
from ..options import CONFIG_FILE, RUN, Option, add_options, resolve
from ..study import Study, carry_out, kept
from ..text.setup import resumable
from .methods import all_runs, jobs_of, learn_reward, path_of
from .report import files, report
from .results import results_of
from .world import NOISES, Plan, load_world, make_world

GRAMMAR = Plan(
    demonstrations=16000, vocab_size=704, context=64, n_layer=2, n_embd=128, sft_epochs=1,
    sft_learning_rate=3e-3, prefixes=640, held_out=192, other=192, max_new_tokens=44, steps=120, pairs=32,
    learning_rate=3e-4, warmup=10, best_of=96,
)  # fmt: skip
QUICK = GRAMMAR._replace(demonstrations=6400, prefixes=240, steps=45, held_out=96, other=96, best_of=16)
REVIEWS = GRAMMAR._replace(
    vocab_size=2048, context=72, n_layer=3, sft_epochs=5, sft_learning_rate=1.5e-3, max_new_tokens=56,
    prefixes=560, steps=105,
)  # fmt: skip
QUICK_REVIEWS = REVIEWS._replace(
    n_layer=2, sft_epochs=2, prefixes=160, steps=30, held_out=64, other=64, best_of=8
)
SEEDS = 3

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


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    add_options(parser, OPTIONS | {"processes": {"workers": WORKERS}})


def run(args: argparse.Namespace) -> Path:
    """Check everything, make what is missing, and write the run folder, which is returned."""
    torch.set_num_threads(1)  # models this small; and the same sums everywhere
    keep_freed_memory()
    workers = vars(args).pop("workers")
    if workers is not None:
        check_count("--workers", workers)
    options = resolve(args, OPTIONS, command="sentiment")
    folder = options.resume or _new_folder(options)
    plan = Plan(**options.plan)
    with resumable("sentiment", folder):
        make_world(
            folder, plan, reviews=options.reviews, noise=options.label_noise, seed=options.seed,
            resume=options.resume is not None,
        )  # fmt: skip
        carry_out(_study(folder, plan, options), folder, workers=workers or min(2, os.cpu_count() or 1))
    return folder


def _new_folder(options: argparse.Namespace) -> Path:
    """A new run's folder, with its config.json; the options that depend on others are filled in."""
    options.quick = bool(options.quick)
    options.seeds = options.seeds or (1 if options.quick else SEEDS)
    plans = (GRAMMAR, QUICK) if options.reviews is None else (REVIEWS, QUICK_REVIEWS)
    options.plan = plans[options.quick]._asdict()
    if options.reviews is not None:
        read_reviews(options.reviews)  # before anything is written
    folder = new_run_folder(options.output_dir, "sentiment")
    given = {name: value for name, value in vars(options).items() if name != "resume"}
    write_json(folder / CONFIG_FILE, {"command": "sentiment", "options": given, "threads": 1, **versions()})
    return folder


def _study(folder: Path, plan: Plan, options: argparse.Namespace) -> Study:
    """Every training of the plan, from the world in the folder to the figures."""
    folder = folder.resolve()  # one name for what a process keeps of it
    runs = all_runs(seeds=options.seeds, quick=options.quick)
    reward = kept(path_of(folder, "reward-model"), learn_reward, folder, plan, options.seed)
    jobs, world = jobs_of(folder, runs, plan), load_world(folder)
    what = "film reviews of a file" if options.reviews else "the grammar's film reviews"
    return Study(
        plan={"methods": list(jobs.values())},
        runs=lambda found: results_of(dict(zip(jobs, found)) | {"reward-model": reward}, runs, plan),
        table=lambda results: report(results, plan, world, options.label_noise),
        files=lambda found: files(*found, world, what),
    )
