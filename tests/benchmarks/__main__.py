"""Measure ours against TRL's DPOTrainer, a tutorial's plain loop and Hugging Face's generate.

All contestants load the same random GPT-2 and train on the same random tokens (prompts of 16-48 tokens,
completions of 8-64) with DPO at beta 0.1: AdamW at a constant rate, no weight decay, no dropout, gradients
clipped to norm 1. Each runs in a process of its own and loads its data itself. Ours meets one opponent after
the other: first both take the same steps, whose losses must agree, then they take turns in blocks of whole
epochs, and the ratio is the median of the rounds. Against trl-lora and all-weights ours learns an adapter.

TRL as it comes checkpoints gradients and runs its reference at every step; its variants precompute the
reference's log-probabilities, as ours always does, or do without checkpointing. "epoch 1" counts that
pass; "pairs/s" is every later epoch. Sampling draws 64 sequences of 64 tokens on the small shape in float32.

`python -m tests.benchmarks files` measures another thing, how large files are read; it has a --help.

Needs requirements-bench.txt and Linux. On two cores the default takes some ten minutes; 124M, where an epoch
of TRL takes one and a half, some eighty (--rounds 3 --against trl trl-precomputed plain: thirty). Let nothing
else run meanwhile: with as many threads as cores, a busy neighbour slows a step many times over.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import sys
import tempfile
from pathlib import Path

import torch

from dpo_minimal.validation import InputError, check_count, check_positive

from . import files
from .duels import LOSS_TOLERANCE, Duel, contest, describe
from .ours import write_weights
from .results import rate_ratio, rows, table
from .tasks import CHECKED_STEPS, CONTESTANTS, OURS_OF, SHAPES, STEPS_PER_EPOCH, Task

PEERS = [name for name in CONTESTANTS if not name.startswith("ours")]
SAMPLER = "hugging-face-sampling"


def main(arguments: list[str] | None = None) -> None:
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        if arguments[:1] == ["files"]:
            return files.main(arguments[1:])
        options = parser().parse_args(arguments)
        run(options, planned(options), about=machine(options))
    except InputError as error:
        print(f"tests.benchmarks: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def parser() -> argparse.ArgumentParser:
    form = argparse.RawDescriptionHelpFormatter
    result = argparse.ArgumentParser(files.NAME, description=__doc__, formatter_class=form)
    add = result.add_argument
    add("--shape", choices=(*SHAPES, "both"), default="small", help="of the GPT-2 (default: small)")
    add("--dtype", choices=("float32", "bfloat16", "both"), default="both", help="default: both")
    add("--device", choices=("cpu", "cuda"), default="cpu", help="default: cpu")
    peers = f"some of {', '.join(PEERS)} (default: all without an adapter)"
    add("--against", nargs="+", choices=PEERS, metavar="PEER", help=peers)
    add("--rounds", type=int, default=5, help="of each duel (default: 5)")
    add("--seconds", type=float, default=3.0, help="that a block lasts at least (default: 3)")
    add("--threads", type=int, default=torch.get_num_threads(), help="default: %(default)s")
    add("--pairs-per-step", type=int, help="default: 32 (small), 8 (124M)")
    micro = "pairs that ours takes at a time (default: 8; on cuda the whole step)"
    add("--micro-size", type=int, help=micro)
    return result


def planned(options: argparse.Namespace) -> list[tuple[Task, list[str]]]:
    """(our side, its opponents) of every contest, the folder of weights still missing.

    Raises InputError where an option would fail or be without effect later.
    """
    for name in ("rounds", "threads", "pairs_per_step", "micro_size"):
        if getattr(options, name) is not None:
            check_count(f"--{name.replace('_', '-')}", getattr(options, name))
    check_positive("--seconds", options.seconds)
    if options.device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: torch finds no GPU here; use --device cpu.")
    against, contests = options.against or [name for name in PEERS if OURS_OF.get(name) != "ours-lora"], []
    for shape in SHAPES if options.shape == "both" else [options.shape]:
        for dtype in ("float32", "bfloat16") if options.dtype == "both" else [options.dtype]:
            pairs = options.pairs_per_step or SHAPES[shape].pairs_per_step
            best = pairs if options.device == "cuda" else 8
            micro = options.micro_size or min(best, pairs)
            if micro > pairs:
                raise InputError(f"--micro-size {micro}: a step has only {pairs} pairs; lower it.")
            ours = Task("ours", shape, dtype, options.device, options.threads, "", pairs, micro)
            for side in ("ours", "ours-lora", "ours-sampling"):
                if side != "ours-sampling" or (shape, dtype) == ("small", "float32"):
                    opponents = [name for name in against if OURS_OF.get(name, "ours") == side]
                    contests.append((ours._replace(contestant=side), opponents))
    if SAMPLER in (options.against or []) and [SAMPLER] not in [names for _, names in contests]:
        raise InputError(
            f"--against {SAMPLER}: is for the small shape in float32; leave it out or add these."
        )
    return [(ours, opponents) for ours, opponents in contests if opponents]


def run(options: argparse.Namespace, contests: list[tuple[Task, list[str]]], *, about: str) -> None:
    """Every contest, then the table."""
    lines: list[list[str]] = []
    duels: list[Duel] = []
    with tempfile.TemporaryDirectory() as folder:
        for ours, opponents in contests:
            ours = ours._replace(folder=f"{folder}/{ours.shape}")
            write_weights(ours)
            duel = contest(ours, opponents, rounds=options.rounds, seconds=options.seconds, notify=announce)
            lines += rows(duel, ours.contestant)
            duels += duel
    print(f"\n{table(lines)}\n\n{notes(duels)}\n{about}")


def announce(duel: Duel) -> None:
    """One line a duel, so that a long run shows how far it is."""
    print(f"ours is {rate_ratio(duel)} times as fast as {describe(duel.task)}", file=sys.stderr, flush=True)


def notes(duels: list[Duel]) -> str:
    """What a reader of the table must know about how it was made."""
    gpu = duels[0].task.device == "cuda"
    lines = [
        "ours ÷ it: median of the rounds (lowest–highest). epoch 1: with the pass that caches reference "
        f"log-probabilities, over {STEPS_PER_EPOCH} steps; that pass is timed once, which the range leaves "
        "out. peak: of "
        + ("GPU memory." if gpu else "the process; ours imports torch alone, hence the second number."),
    ]
    tasks = {(duel.task.shape, duel.task.micro_size, duel.task.pairs_per_step) for duel in duels}
    lines += [f"{shape}: ours takes {m} of a step's {n} pairs at a time." for shape, m, n in sorted(tasks)]
    for dtype, allowed in LOSS_TOLERANCE.items():
        found = [duel.disagreement for duel in duels if duel.task.dtype == dtype and duel.disagreement]
        if found:
            lines.append(
                f"{dtype}: the losses of the first {CHECKED_STEPS} steps agree with ours to {max(found):.1g} "
                f"of their way from ln 2 (allowed {allowed:g})."
            )
    return "\n".join(lines)


def machine(options: argparse.Namespace) -> str:
    """Where the table was made, and how busy it was before. Raises InputError where a package is missing."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    about = [next((line.partition(": ")[2] for line in lines if line.startswith("model name")), "CPU")]
    if options.device == "cuda":
        about.append(torch.cuda.get_device_name())
    about += [f"{options.threads} threads", f"load before {os.getloadavg()[0]:.1f}"]
    for package in ("torch", "transformers", "trl", "peft", "datasets", "accelerate"):
        try:
            about.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            raise InputError(f"{package} is missing; run pip install -r requirements-bench.txt.") from None
    return "; ".join(about)


if __name__ == "__main__":
    main()
