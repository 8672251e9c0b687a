"""Measure what a file of the field's size takes: seconds, and memory at the highest, at several sizes.

Writes dialogues in the form of the Anthropic HH file (160,000 rows, 170 MB) and reads them with GPT-2's
vocabulary, each time in a process of its own: `audit`, and one step of `sft` on a tiny model, which shows
what a training run keeps of its data. Both grow linearly where each 1,000 rows more cost the same; imports
alone take two seconds and 280 MiB. Words are those of the reviews' grammar, and others made of syllables so
that a token holds about as many letters as in English. Needs Linux and GPT-2's vocabulary; ten minutes.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from itertools import accumulate, pairwise
from pathlib import Path
from typing import NamedTuple

from dpo_minimal.text import reviews
from dpo_minimal.validation import InputError, check_count

NAME = "python -m tests.benchmarks"
SIZES = (10_000, 40_000, 160_000)
RUNS = {
    "audit": "audit --data {file} --tokenizer gpt2",
    "sft, one step": "sft --data {file} --tokenizer gpt2 --n-layer 1 --n-head 1 --n-embd 8 --max-length 1024 "
    "--max-steps 1 --eval-steps 0 --held-out 0.001 --output-dir {folder}",
}
SYLLABLES = ("ba", "ce", "di", "fo", "gu", "la", "me", "ni", "po", "ru", "sa", "te", "vi", "tra", "ple",
             "sti")  # fmt: skip
REPEATED = 0.02  # of the rows: people ask the same again


class Cost(NamedTuple):
    """Of one process: seconds by the clock, of all its cores together, and MiB at the highest."""

    wall: float
    cpu: float
    peak: float  # of this process, or of ours when it started it, where that is more


# ---------------------------------------------------------------------------------------------- the file


def vocabulary(draw: random.Random) -> list[str]:
    """Frequent words first: those of the reviews, then words of two to four syllables."""
    tables = [value for name, value in vars(reviews).items() if name.isupper() and name[0] != "_"]
    known = sorted({word for table in tables for word in re.findall(r"[a-z]+", repr(table).lower())})
    draw.shuffle(known)
    made = {"".join(draw.choices(SYLLABLES, k=draw.randint(2, 4))) for _ in range(2000)}
    return known + sorted(made)


def dialogues(count: int, seed: int = 0) -> Iterator[dict[str, str]]:
    """So many rows {chosen, rejected}: transcripts that share all but the last answer, some 1,060 bytes."""
    draw = random.Random(f"dialogues {seed}")
    words = vocabulary(draw)
    weights = list(accumulate(rank**-1.8 for rank in range(10, 10 + len(words))))  # Zipf's law

    def speech(least: int, most: int) -> str:
        said, left = [], draw.randint(least, most)
        while left > 0:
            sentence = draw.choices(words, cum_weights=weights, k=min(left, draw.randint(4, 18)))
            said.append(" ".join(sentence).capitalize() + draw.choice([".", ".", ".", "?", ", isn't it?"]))
            left -= len(sentence)
        return " ".join(said)

    before = ""
    for _ in range(count):
        if not before or draw.random() > REPEATED:
            turns = [(speech(4, 20), speech(8, 40)) for _ in range(draw.choice([0, 0, 1, 1, 2]))]
            before = "".join(f"\n\nHuman: {asked}\n\nAssistant: {told}" for asked, told in turns)
            before += f"\n\nHuman: {speech(4, 20)}\n\nAssistant: "
        yield {"chosen": before + speech(4, 72), "rejected": before + speech(4, 68)}


def write_dialogues(path: Path, count: int) -> None:
    """One JSON object a line."""
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in dialogues(count))


# ------------------------------------------------------------------------------------------ measurements


def measure(command: str) -> Cost:
    """Run `python -m dpo_minimal COMMAND`. Raises InputError with its last words where it fails."""
    with tempfile.TemporaryFile("w+") as output:
        start = time.perf_counter()
        arguments = [sys.executable, "-m", "dpo_minimal", *command.split()]
        process = subprocess.Popen(arguments, stdout=output, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)  # of this child; getrusage would mix all of them
        seconds = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        if status:
            output.seek(0)
            raise InputError(f"{command.split()[0]} failed: {output.read().strip().splitlines()[-1]}")
    return Cost(seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024)  # Linux counts KiB


def slopes(sizes: Sequence[int], costs: Sequence[float]) -> str:
    """What 1,000 rows more cost from each size to the next: equal numbers where the growth is linear."""
    steps = zip(pairwise(sizes), pairwise(costs))
    return ", then ".join(f"{1000 * (b - a) / (more - few):.2g}" for (few, more), (a, b) in steps)


def main(arguments: list[str]) -> None:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(f"{NAME} files", description=__doc__, formatter_class=form)
    parser.add_argument("--rows", nargs="+", type=int, default=SIZES, help="default: 10000 40000 160000")
    sizes = parser.parse_args(arguments).rows
    for rows in sizes:
        check_count("--rows", rows, minimum=2000)
    print("| command | rows | MB | seconds | CPU seconds | peak MiB |\n| --- | --- | --- | --- | --- | --- |")
    found: dict[str, list[Cost]] = {name: [] for name in RUNS}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "dialogues.jsonl"
        for rows in sizes:
            write_dialogues(path, rows)
            size = f"{path.stat().st_size / 1e6:.0f}"
            for name, command in RUNS.items():
                cost = measure(command.format(file=path, folder=f"{folder}/{rows}"))
                found[name].append(cost)
                numbers = f"{cost.wall:.1f} | {cost.cpu:.1f} | {cost.peak:.0f}"
                print(f"| {name} | {rows:,} | {size} | {numbers} |", flush=True)
    for name, costs in found.items():
        if len(costs) > 1:
            seconds, peak = (slopes(sizes, [cost[k] for cost in costs]) for k in (1, 2))
            print(f"\n{name}: 1,000 rows more take {seconds} CPU seconds and {peak} MiB.")
