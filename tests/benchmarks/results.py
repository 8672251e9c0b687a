"""Blocks in, one table out: medians, ratios round by round, and what the reference's pass costs.

A rate is items (pairs or tokens) a second. A contestant that caches reference log-probabilities has two: its
rate of every later epoch, and that of the first, whose seconds include the pass of the reference over its
pairs. A contestant that runs the reference at each step has one.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import NamedTuple

from .duels import Duel
from .tasks import CONTESTANTS, Task

COLUMNS = (
    "shape", "dtype", "contestant", "pairs/s", "ours ÷ it", "epoch 1, pairs/s", "ours ÷ it",
    "peak MiB (above imports)", "ours ÷ it",
)  # fmt: skip


class Ratio(NamedTuple):
    """Ours divided by the opponent: the median of the rounds, the lowest and the highest."""

    middle: float
    lowest: float
    highest: float

    def __str__(self) -> str:
        return f"{self.middle:.2f} ({self.lowest:.2f}–{self.highest:.2f})"


def rate(block: dict) -> float:
    """Items a second of one block."""
    return block["items"] / block["seconds"]


def first_epoch_rate(later: float, facts: dict) -> float:
    """Items a second where each item also has its share of the reference's pass."""
    return 1 / (1 / later + facts["reference_seconds"] / facts["rows"])


def rate_ratio(duel: Duel, *, first_epoch: bool = False) -> Ratio:
    """How many times as fast ours is, in the later epochs or in the first."""
    ratios = []
    for ours, theirs in duel.rounds:
        rates = rate(ours), rate(theirs)
        if first_epoch:
            rates = first_epoch_rate(rates[0], duel.ours_facts), first_epoch_rate(rates[1], duel.facts)
        ratios.append(rates[0] / rates[1])
    return Ratio(median(ratios), min(ratios), max(ratios))


def peaks(blocks: Sequence[dict], facts: dict) -> list[float]:
    """MiB at the highest: of the process and above its imports; where there is a GPU, of the GPU alone."""
    if "peak_gpu_mib" in blocks[0]:
        return [max(block["peak_gpu_mib"] for block in blocks)]
    peak = max(block["peak_mib"] for block in blocks)
    return [peak, peak - facts["imports_mib"]]


def rows(duels: list[Duel], ours: str) -> list[list[str]]:
    """The lines of one contest: ours, then every opponent."""
    our_facts = duels[0].ours_facts
    our_blocks = [block for duel in duels for block, _ in duel.rounds]
    lines = [_row(duels[0].task._replace(contestant=ours), our_blocks, our_facts, ["1"] * 3)]
    for duel in duels:
        blocks = [block for _, block in duel.rounds]
        memory = zip(peaks([block for block, _ in duel.rounds], our_facts), peaks(blocks, duel.facts))
        ratios = [str(rate_ratio(duel)), str(rate_ratio(duel, first_epoch=True))]
        ratios.append(_joined([f"{mine / theirs:.2f}" for mine, theirs in memory]))
        lines.append(_row(duel.task, blocks, duel.facts, ratios))
    return lines


def _row(task: Task, blocks: list[dict], facts: dict, ratios: list[str]) -> list[str]:
    later = median(map(rate, blocks))
    first = [_number(first_epoch_rate(later, facts)), ratios[1]]
    if task.contestant.endswith("sampling"):
        first = ["–", "–"]  # nothing is cached there
    memory = _joined([f"{mib:.0f}" for mib in peaks(blocks, facts)])
    label, *_ = CONTESTANTS[task.contestant]
    return [task.shape, task.dtype, label, _number(later), ratios[0], *first, memory, ratios[2]]


def _number(rate: float) -> str:
    return f"{rate:.3g}" if rate < 1000 else f"{rate:.0f}"


def _joined(texts: list[str]) -> str:
    return texts[0] + "".join(f" ({text})" for text in texts[1:])


def table(lines: list[list[str]]) -> str:
    """Markdown, padded so that it reads as plain text too."""
    widths = [max(map(len, column)) for column in zip(COLUMNS, *lines)]
    rule = ["-" * width for width in widths]
    return "\n".join(
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths)) + " |"
        for line in [COLUMNS, rule, *lines]
    )
