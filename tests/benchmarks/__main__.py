"""Measure ours against TRL's DPOTrainer, a tutorial's plain loop and Hugging Face's generate.

All contestants load the same random GPT-2 and train on the same random tokens (prompts of 16-48 tokens,
completions of 8-64) with DPO at beta 0.1: AdamW at a constant 1e-5, no weight decay, no dropout, gradients
clipped to norm 1. Each runs in a process of its own and loads its data itself. Ours meets one opponent after
the other: they take turns in blocks of some seconds, and the ratio is the median of the rounds.

TRL as it comes checkpoints gradients and runs its reference at every step; its variants precompute the
reference's log-probabilities, as ours always does, or do without checkpointing. "epoch 1" counts that
pass; "pairs/s" is every later epoch. Sampling draws 64 sequences of 64 tokens on the small shape in float32.

Needs requirements-bench.txt. The default takes some ten minutes on two cores, --shape both some fifty. Let
nothing else run meanwhile: with as many threads as cores, a busy neighbour slows a step many times over.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import platform
import sys
import tempfile
from pathlib import Path

import torch

from dpo_minimal.runs import write_json
from dpo_minimal.validation import InputError, check_count, check_positive

from .contestant import TRL_VARIANTS
from .duels import Duel, contest, write_weights
from .results import LABELS, rate_ratio, rows, table
from .tasks import SHAPES, STEPS_PER_EPOCH, Task

TRAINERS = (*TRL_VARIANTS, "plain")
SAMPLER = "hugging-face-sampling"


def main(arguments: list[str] | None = None) -> None:
    options = parser().parse_args(arguments)
    try:
        check(options)
        run(options)
    except InputError as error:
        print(f"tests.benchmarks: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(
        "python -m tests.benchmarks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = result.add_argument
    add("--shape", choices=(*SHAPES, "both"), default="small", help="of the GPT-2 (default: small)")
    add("--dtype", choices=("float32", "bfloat16", "both"), default="both", help="default: both")
    add("--device", choices=("cpu", "cuda"), default="cpu", help="default: cpu")
    add(
        "--against",
        nargs="+",
        choices=(*TRAINERS, SAMPLER),
        default=[*TRAINERS, SAMPLER],
        help="default: all",
    )
    add("--rounds", type=int, default=5, help="of each duel (default: 5)")
    add("--seconds", type=float, default=3.0, help="that a block lasts at least (default: 3)")
    add("--threads", type=int, default=torch.get_num_threads(), help="default: %(default)s")
    add("--pairs-per-step", type=int, help="default: 32 (small), 8 (124M)")
    add("--micro-size", type=int, help="pairs that ours takes at a time (default: 8; on cuda the whole step)")
    add("--json", type=Path, help="a new file for every block's numbers")
    return result


def check(options: argparse.Namespace) -> None:
    """Refuse before the first minute what would fail after the last."""
    for name in ("rounds", "threads", "pairs_per_step", "micro_size"):
        if getattr(options, name) is not None:
            check_count(f"--{name.replace('_', '-')}", getattr(options, name))
    check_positive("--seconds", options.seconds)
    if options.device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: torch finds no GPU here; use --device cpu.")
    if options.json is not None and (options.json.exists() or not options.json.parent.is_dir()):
        raise InputError(f"--json {options.json}: exists or has no folder; name a new file in a folder.")
    for package in ("transformers", "trl", "datasets", "accelerate"):
        if importlib.util.find_spec(package) is None:
            raise InputError(f"{package} is not installed; run pip install -r requirements-bench.txt.")


def run(options: argparse.Namespace) -> None:
    """Every contest that the options ask for, then the table."""
    lines: list[list[str]] = []
    duels: list[Duel] = []
    with tempfile.TemporaryDirectory() as folder:
        for shape in SHAPES if options.shape == "both" else [options.shape]:
            task = task_of(options, shape, str(Path(folder) / shape))
            write_weights(task)
            for ours, opponents in contests(options, task):
                played = contest(
                    ours, opponents, rounds=options.rounds, seconds=options.seconds, notify=announce
                )
                lines += rows(played, ours.contestant)
                duels += played
    about = machine(options)
    print("\n" + table(lines))
    print(
        "\nours ÷ it: median of the rounds (lowest–highest). epoch 1: with the pass that caches reference "
        f"log-probabilities, over {STEPS_PER_EPOCH} steps. "
        f"peak: {'GPU memory allocated' if options.device == 'cuda' else 'resident memory of the process'}."
    )
    print("; ".join(f"{name} {value}" for name, value in about.items()))
    if options.json is not None:
        blocks = [duel._replace(task=duel.task._asdict())._asdict() for duel in duels]
        write_json(options.json, {"machine": about, "columns": lines, "duels": blocks})


def task_of(options: argparse.Namespace, shape: str, folder: str) -> Task:
    pairs = options.pairs_per_step or SHAPES[shape].pairs_per_step
    return Task(
        contestant="ours",
        shape=shape,
        dtype="float32",
        device=options.device,
        threads=options.threads,
        folder=folder,
        pairs_per_step=pairs,
        micro_size=min(pairs, options.micro_size or (pairs if options.device == "cuda" else 8)),
    )


def contests(options: argparse.Namespace, task: Task) -> list[tuple[Task, list[str]]]:
    """(our side, its opponents) for each dtype, and for sampling."""
    trainers = [name for name in TRAINERS if name in options.against]
    dtypes = ("float32", "bfloat16") if options.dtype == "both" else (options.dtype,)
    result = [(task._replace(dtype=dtype), trainers) for dtype in dtypes if trainers]
    if SAMPLER in options.against and task.shape == "small" and "float32" in dtypes:
        result.append((task._replace(contestant="ours-sampling"), [SAMPLER]))
    return result


def announce(duel: Duel) -> None:
    """One line a duel, so that a long run shows how far it is."""
    task = duel.task
    print(
        f"{task.shape}, {task.dtype}: ours is {rate_ratio(duel, first_epoch=False)} times as fast as "
        f"{LABELS[task.contestant]}",
        file=sys.stderr,
        flush=True,
    )


def machine(options: argparse.Namespace) -> dict[str, str]:
    """What a reader of the table must know about where it was made."""
    cpus = Path("/proc/cpuinfo")
    models = (
        [line for line in cpus.read_text().splitlines() if line.startswith("model name")]
        if cpus.exists()
        else []
    )
    about = {"processor": models[0].partition(": ")[2] if models else platform.processor() or "unknown"}
    if options.device == "cuda":
        about["gpu"] = torch.cuda.get_device_name()
    about["threads"] = str(options.threads)
    for package in ("torch", "transformers", "trl"):
        about[package] = importlib.metadata.version(package)
    return about


if __name__ == "__main__":
    main()
