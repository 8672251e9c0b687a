"""How the course's figures look: large enough for a projector, in colours that everyone can tell apart."""

from __future__ import annotations

import base64
import functools
import html
import importlib.util
import io
import os
import tomllib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
from IPython.display import display

# Okabe and Ito's palette: distinct under every common colour blindness, and in grey.
BLUE, ORANGE, GREEN, RED, PURPLE, SKY, BLACK = (
    "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#000000",
)  # fmt: skip
REFERENCE, OPTIMUM = BLACK, BLUE  # one meaning, one colour, in all notebooks

STYLE = {
    "figure.figsize": (9, 4.5),
    "figure.constrained_layout.use": True,
    "savefig.dpi": 90,
    "font.size": 15,
    "axes.titlesize": 16,
    "legend.fontsize": 13,
    "legend.frameon": False,
    "lines.linewidth": 2.5,
    "lines.markersize": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "axes.prop_cycle": matplotlib.cycler(color=[BLUE, ORANGE, GREEN, RED, PURPLE, SKY, BLACK]),
}


def use_style() -> None:
    """Set the course's style for all figures that follow."""
    matplotlib.rcParams.update(STYLE)


@functools.cache
def descriptions() -> dict[str, str]:
    """What each figure shows, by its name such as "3.b"."""
    return tomllib.loads((Path(__file__).parent / "descriptions.toml").read_text(encoding="utf-8"))


def show(figure: plt.Figure, name: str) -> None:
    """Display a figure with its description, for those who cannot see it.

    Args:
        name: "3.b" is the second of notebook 3; `descriptions.toml` describes it.
    Raises:
        ValueError: an axis has no label, or the description is missing.
    """
    description = descriptions().get(name, "")
    if not description.strip():
        raise ValueError(
            f"describe figure {name!r} in a sentence in descriptions.toml, for those who cannot see it."
        )
    for axes in figure.axes:
        unlabelled = not (axes.get_xlabel() or figure.get_supxlabel()) or not (
            axes.get_ylabel() or figure.get_supylabel() or axes.get_subplotspec().colspan.start > 0
        )
        if axes.axison and unlabelled:
            raise ValueError("every axis of a figure needs a label, with its unit.")
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    plt.close(figure)
    source = "data:image/png;base64," + base64.b64encode(picture.getvalue()).decode()
    # As HTML and not as image/png: JupyterLab gives that no alternative text, whatever its metadata say.
    image = f'<img alt="{html.escape(description)}" src="{source}" style="max-width: 100%">'
    display({"text/html": image, "text/plain": description}, raw=True)


def slide(draw: Callable[[float], plt.Figure], values: Sequence[float], name: str, figure: str) -> None:
    """A slider over `values`, if ipywidgets is installed and someone is there to move it.

    The static picture of the same thing is the notebook's own business: this one is an extra.
    """
    if importlib.util.find_spec("ipywidgets") is None or os.environ.get("COURSE_STATIC"):
        print(f"With ipywidgets installed, a slider for {name} stands here.")
        return
    from ipywidgets import SelectionSlider, interact

    slider = SelectionSlider(options=list(values), value=values[len(values) // 2], description=name)
    interact(lambda value: show(draw(value), figure), value=slider)


def bars_side_by_side(
    axes: plt.Axes,
    names: Sequence[object],
    heights: Mapping[str, Sequence[float]],
    colours: Sequence[str],
    *,
    fmt: str = "",
) -> None:
    """Groups of bars, one group a name, one bar a key of `heights` in each, with a legend.

    Args:
        axes: where to draw.
        names: what stands below the groups.
        heights: label of the legend -> one height for each name.
        colours: one for each key.
        fmt: how a bar's height is written at its end; not at all, unless given.
    """
    width = 0.76 / len(heights)
    for place, (colour, (label, row)) in enumerate(zip(colours, heights.items(), strict=True)):
        at = [group + (place - (len(heights) - 1) / 2) * width for group in range(len(names))]
        bars = axes.bar(at, row, 0.94 * width, color=colour, label=label)
        if fmt:
            axes.bar_label(bars, fmt=fmt, padding=3)
    axes.set_xticks(range(len(names)), [str(name) for name in names])
    axes.legend()
