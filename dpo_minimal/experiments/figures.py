"""What all figures share: style, colours safe for the colour-blind, and how one is written."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # figures go to files; no screen is needed
import matplotlib.pyplot as plt

from ..text.runs import write_atomically

# Okabe and Ito's palette
BLUE, ORANGE, GREEN, PINK, GREY = "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#666666"
RED, SKY = "#D55E00", "#56B4E9"
COLOURS = {"tabular": BLUE, "finite": ORANGE, "gpt": GREEN, "plackett_luce": PINK}
STYLE = {  # made for a projector: large type, few lines
    "font.size": 15,
    "axes.titlesize": 17,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "lines.linewidth": 2.5,
    "legend.frameon": False,
    "legend.fontsize": 13,
}


@contextmanager
def panels(path: Path, *shape: int, style: dict[str, Any] | None = None, **options) -> Iterator[tuple]:
    """Figure and axes (rows, columns; one axis without them) to draw on; the block's end writes the file.

    Args: style: what differs from the common one; options of `plt.subplots`.
    """
    with plt.rc_context(STYLE | (style or {})):
        figure, axes = plt.subplots(*shape, layout="constrained", **options)
        yield figure, axes
        save_figure(figure, path)


def save_figure(figure, path: Path) -> None:
    """Write a figure, whole or not at all, and close it."""
    write_atomically(path, lambda temporary: figure.savefig(temporary, dpi=110))
    plt.close(figure)


def with_intervals(axis, places: Sequence[float], values: Sequence[tuple], **style) -> None:
    """Values (value, low, high) with error bars, at places along the x-axis."""
    below = [max(0.0, value - low) for value, low, _ in values]
    above = [max(0.0, high - value) for value, _, high in values]
    axis.errorbar(places, [value for value, _, _ in values], yerr=[below, above], **({"capsize": 4} | style))
