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

LABELS = {
    "ours": "ours",
    "trl": "TRL as it comes",
    "trl-precomputed": "TRL, references precomputed",
    "trl-no-checkpointing": "TRL, no checkpointing",
    "trl-precomputed-no-checkpointing": "TRL, precomputed, no checkpointing",
    "plain": "plain loop of tutorials",
    "ours-sampling": "ours, sampling (tokens/s)",
    "hugging-face-sampling": "Hugging Face generate (tokens/s)",
}
COLUMNS = (
    "shape", "dtype", "contestant", "pairs/s", "ours ÷ it", "epoch 1, pairs/s", "ours ÷ it", "peak MiB", "ours ÷ it"
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


def rate_ratio(duel: Duel, *, first_epoch: bool) -> Ratio:
    """How many times as fast ours is, in the later epochs or in the first."""
    ratios = []
    for ours, theirs in duel.rounds:
        rates = rate(ours), rate(theirs)
        if first_epoch:
            rates = first_epoch_rate(rates[0], duel.ours_facts), first_epoch_rate(rates[1], duel.facts)
        ratios.append(rates[0] / rates[1])
    return Ratio(median(ratios), min(ratios), max(ratios))


def peak(blocks: Sequence[dict]) -> float:
    """MiB at the highest: of the GPU where there is one, else of the process."""
    return max(block.get("peak_gpu_mib", block["peak_mib"]) for block in blocks)


def rows(duels: list[Duel], ours: str) -> list[list[str]]:
    """The lines of one contest: ours, then every opponent."""
    our_blocks = [block for duel in duels for block, _ in duel.rounds]
    first = duels[0]
    lines = [_row(first.task._replace(contestant=ours), our_blocks, first.ours_facts, ["1"] * 3)]
    for duel in duels:
        our_peak = peak([block for block, _ in duel.rounds])
        blocks = [block for _, block in duel.rounds]
        ratios = [
            str(rate_ratio(duel, first_epoch=False)),
            str(rate_ratio(duel, first_epoch=True)),
            f"{our_peak / peak(blocks):.2f}",
        ]
        lines.append(_row(duel.task, blocks, duel.facts, ratios))
    return lines


def _row(task, blocks: list[dict], facts: dict, ratios: list[str]) -> list[str]:
    later = median(map(rate, blocks))
    first = f"{first_epoch_rate(later, facts):.3g}"
    if task.contestant in ("ours-sampling", "hugging-face-sampling"):
        first = ratios[1] = "–"  # nothing is cached there
    return [
        task.shape,
        task.dtype,
        LABELS[task.contestant],
        f"{later:.3g}" if later < 1000 else f"{later:.0f}",
        ratios[0],
        first,
        ratios[1],
        f"{peak(blocks):.0f}",
        ratios[2],
    ]


def table(lines: list[list[str]]) -> str:
    """Markdown, padded so that it reads as plain text too."""
    cells = [list(COLUMNS), *lines]
    widths = [max(len(line[column]) for line in cells) for column in range(len(COLUMNS))]
    padded = ["| " + " | ".join(c.ljust(w) for c, w in zip(line, widths)) + " |" for line in cells]
    return "\n".join([padded[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *padded[1:]])
