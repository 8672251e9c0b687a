"""What all figures share: style, colours safe for the colour-blind, and how one is written."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

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


def _pyplot():
    """matplotlib, which is slow to import: not before a figure is drawn."""
    import matplotlib

    matplotlib.use("Agg")  # figures go to files; no screen is needed
    import matplotlib.pyplot as plt

    return plt


@contextmanager
def panels(path: Path, *shape: int, style: dict[str, Any] | None = None, **options) -> Iterator[tuple]:
    """Figure and axes (rows, columns; one axis without them) to draw on; the block's end writes the file.

    Args: style: what differs from the common one; options of `plt.subplots`.
    """
    plt = _pyplot()
    with plt.rc_context(STYLE | (style or {})):
        figure, axes = plt.subplots(*shape, layout="constrained", **options)
        yield figure, axes
        save_figure(figure, path)


def save_figure(figure, path: Path) -> None:
    """Write a figure, whole or not at all, and close it."""
    write_atomically(path, lambda temporary: figure.savefig(temporary, dpi=110))
    _pyplot().close(figure)


def with_intervals(axis, places: Sequence[float], values: Sequence[tuple], **style) -> None:
    """Values (value, low, high) with error bars, at places along the x-axis."""
    below = [max(0.0, value - low) for value, low, _ in values]
    above = [max(0.0, high - value) for value, _, high in values]
    axis.errorbar(places, [value for value, _, _ in values], yerr=[below, above], **({"capsize": 4} | style))


def draw_card(path: Path, curves: dict[str, Any], verdict: str) -> None:
    """The loss and both pulls against the margin: the loss itself, and those that stand beside it."""
    style = {"font.size": 12, "axes.titlesize": 14, "legend.fontsize": 11}
    with panels(path, 1, 3, style=style, figsize=(15, 4.8), sharex=True) as (figure, axes):
        for (name, drawn), colour, width in zip(curves.items(), (BLUE, ORANGE, GREEN), (3, 1.8, 1.8)):
            for axis, values in zip(axes, drawn[1:]):
                axis.plot(drawn.margins, values, color=colour, linewidth=width, label=name)
        own = next(iter(curves.values()))
        titles = "loss", "pull on the chosen", "pull on the rejected"
        for axis, title, values in zip(axes, titles, own[1:]):
            axis.set_title(title)
            axis.set_xlabel("margin (nats of reward)")
            axis.axvline(0, color=GREY, linewidth=0.8)
            axis.axhline(0, color=GREY, linewidth=0.8)
            finite = values[values.isfinite()]
            low, high = finite.min().item(), finite.max().item()
            room = 0.35 * max(high - low, abs(high), 1e-3)
            axis.set_ylim(min(low, 0) - room, high + room)
        axes[0].legend()
        figure.suptitle(f"{next(iter(curves))} {verdict}", fontsize=12, x=0.01, ha="left", wrap=True)
