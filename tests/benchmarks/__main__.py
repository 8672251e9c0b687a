"""Measure ours against TRL's DPOTrainer, a tutorial's plain loop and Hugging Face's generate.

All contestants load the same random GPT-2 and train on the same random tokens (prompts of 16-48 tokens,
completions of 8-64) with DPO at beta 0.1: AdamW at a constant rate, no weight decay, no dropout, gradients
clipped to norm 1. Each runs in a process of its own and loads its data itself. Ours meets one opponent after
the other: first both take the same steps, whose losses must agree, then they take turns in blocks of whole
epochs, and the ratio is the median of the rounds.

TRL as it comes checkpoints gradients and runs its reference at every step; its variants precompute the
reference's log-probabilities, as ours always does, or do without checkpointing. "epoch 1" counts that
pass; "pairs/s" is every later epoch. Sampling draws 64 sequences of 64 tokens on the small shape in float32.

Needs requirements-bench.txt. Let nothing else run meanwhile: with as many threads as cores, a busy
neighbour slows a step many times over.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import os
import platform
import sys
import tempfile
from pathlib import Path

import torch

from dpo_minimal.validation import InputError, check_count, check_positive

from .duels import LOSS_TOLERANCE, Duel, contest
from .ours import write_weights
from .results import rate_ratio, rows, table
from .tasks import CHECKED_STEPS, CONTESTANTS, SHAPES, STEPS_PER_EPOCH, Task

PEERS = [name for name in CONTESTANTS if not name.startswith("ours")]
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
        allow_abbrev=False,
    )
    add = result.add_argument
    add("--shape", choices=(*SHAPES, "both"), default="small", help="of the GPT-2 (default: small)")
    add("--dtype", choices=("float32", "bfloat16", "both"), default="both", help="default: both")
    add("--device", choices=("cpu", "cuda"), default="cpu", help="default: cpu")
    add("--against", nargs="+", choices=PEERS, metavar="PEER", help=f"default: all of {', '.join(PEERS)}")
    add("--rounds", type=int, default=5, help="of each duel (default: 5)")
    add("--seconds", type=float, default=3.0, help="that a block lasts at least (default: 3)")
    add("--threads", type=int, default=torch.get_num_threads(), help="default: %(default)s")
    add("--pairs-per-step", type=int, help="default: 32 (small), 8 (124M)")
    add("--micro-size", type=int, help="pairs that ours takes at a time (default: 8; 16 for small in "
        "bfloat16; on cuda the whole step)")  # fmt: skip
    return result


def check(options: argparse.Namespace) -> None:
    """Refuse before the first minute what would fail after the last."""
    for name in ("rounds", "threads", "pairs_per_step", "micro_size"):
        if getattr(options, name) is not None:
            check_count(f"--{name.replace('_', '-')}", getattr(options, name))
    check_positive("--seconds", options.seconds)
    if options.device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: torch finds no GPU here; use --device cpu.")
    sampled = options.shape != "124M" and options.dtype != "bfloat16"
    if SAMPLER in (options.against or []) and not sampled:
        raise InputError(
            f"--against {SAMPLER}: is for --shape small in float32; leave it out or ask for these."
        )
    for package in ("transformers", "trl", "datasets", "accelerate"):
        if importlib.util.find_spec(package) is None:
            raise InputError(f"{package} is not installed; run pip install -r requirements-bench.txt.")


def run(options: argparse.Namespace) -> None:
    """Every contest that the options ask for, then the table."""
    about = machine(options)
    lines: list[list[str]] = []
    duels: list[Duel] = []
    with tempfile.TemporaryDirectory() as folder:
        for shape in SHAPES if options.shape == "both" else [options.shape]:
            planned = contests(options, shape, str(Path(folder) / shape))
            write_weights(planned[0][0])
            for ours, opponents in planned:
                played = contest(
                    ours, opponents, rounds=options.rounds, seconds=options.seconds, notify=announce
                )
                lines += rows(played, ours.contestant)
                duels += played
    print("\n" + table(lines))
    print(notes(options, duels))
    print("; ".join(f"{name} {value}" for name, value in about.items()))


def contests(options: argparse.Namespace, shape: str, folder: str) -> list[tuple[Task, list[str]]]:
    """(our side, its opponents) for each dtype, and for sampling."""
    against = options.against or PEERS
    trainers = [name for name in against if name != SAMPLER]
    pairs = options.pairs_per_step or SHAPES[shape].pairs_per_step
    result = []
    for dtype in ("float32", "bfloat16") if options.dtype == "both" else (options.dtype,):
        best = pairs if options.device == "cuda" else 16 if (shape, dtype) == ("small", "bfloat16") else 8
        ours = Task(
            contestant="ours",
            shape=shape,
            dtype=dtype,
            device=options.device,
            threads=options.threads,
            folder=folder,
            pairs_per_step=pairs,
            micro_size=options.micro_size or min(best, pairs),
        )
        if ours.micro_size > pairs:
            raise InputError(f"--micro-size {ours.micro_size}: a step has only {pairs} pairs; lower it.")
        if trainers:
            result.append((ours, trainers))
        if SAMPLER in against and (shape, dtype) == ("small", "float32"):
            result.append((ours._replace(contestant="ours-sampling"), [SAMPLER]))
    return result


def announce(duel: Duel) -> None:
    """One line a duel, so that a long run shows how far it is."""
    task = duel.task
    times = rate_ratio(duel, first_epoch=False)
    label, *_ = CONTESTANTS[task.contestant]
    print(
        f"{task.shape}, {task.dtype}: ours is {times} times as fast as {label}", file=sys.stderr, flush=True
    )


def notes(options: argparse.Namespace, duels: list[Duel]) -> str:
    """What a reader of the table must know about how it was made."""
    gpu = options.device == "cuda"
    lines = [
        "",
        "ours ÷ it: median of the rounds (lowest–highest). epoch 1: with the pass that caches reference "
        f"log-probabilities, over {STEPS_PER_EPOCH} steps. peak: of "
        + ("GPU memory." if gpu else "the process; ours imports torch alone, hence the second number."),
    ]
    for dtype, tolerance in LOSS_TOLERANCE.items():
        found = [d.loss_difference for d in duels if d.task.dtype == dtype and d.loss_difference is not None]
        if found:
            lines.append(
                f"{dtype}: losses of the first {CHECKED_STEPS} steps differ from ours by at most "
                f"{max(found):.1g} (allowed {tolerance:g})."
            )
    return "\n".join(lines)


def machine(options: argparse.Namespace) -> dict[str, str]:
    """Where the table was made, and how busy it was before."""
    cpus = Path("/proc/cpuinfo")
    lines = cpus.read_text().splitlines() if cpus.exists() else []
    models = [line.partition(": ")[2] for line in lines if line.startswith("model name")]
    about = {"processor": models[0] if models else platform.processor() or "unknown"}
    if options.device == "cuda":
        about["gpu"] = torch.cuda.get_device_name()
    about |= {"threads": str(options.threads), "load before": f"{os.getloadavg()[0]:.1f}"}
    return about | {
        package: importlib.metadata.version(package) for package in ("torch", "transformers", "trl")
    }


if __name__ == "__main__":
    main()
