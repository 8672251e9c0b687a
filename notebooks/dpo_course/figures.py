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


# ------------------------------------------------------------------------------ what several notebooks draw


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


def lines(x: Sequence[float], curves: dict[str, Sequence[float]], **labels: object) -> tuple:
    """Named curves over the same numbers, each in a style of its own; return the figure and its axes.

    Args:
        labels: what `Axes.set` takes: xlabel, ylabel, ylim, xscale.
    """
    figure, axes = plt.subplots()
    for (name, values), style in zip(curves.items(), ("-", "--", ":", "-.")):
        axes.plot(x, values, style, label=name)
    axes.set(**labels)
    axes.legend()
    return figure, axes


def pipeline() -> plt.Figure:
    """From a language model to one that people prefer: by a reward model and PPO, or by DPO."""
    figure, axes = plt.subplots(figsize=(12, 3.4))
    axes.axis("off")
    axes.set(xlim=(0, 1), ylim=(0, 1))
    places = {
        "language\nmodel": (0.06, BLACK),
        "reference\nπ_ref": (0.24, BLACK),
        "two answers,\none is chosen": (0.47, BLACK),
        "reward\nmodel r": (0.71, ORANGE),
        "policy\nπ*": (0.93, BLUE),
    }
    boxes = []
    for text, (x, colour) in places.items():
        frame = {"boxstyle": "round,pad=0.5", "facecolor": "white", "edgecolor": colour, "linewidth": 2.5}
        boxes.append(axes.text(x, 0.68, text, ha="center", va="center", bbox=frame))
    steps = [("SFT", 0, 1, BLACK), ("sample", 1, 2, BLACK), ("fit", 2, 3, ORANGE), ("PPO", 3, 4, ORANGE)]
    for name, start, end, colour in [*steps, ("DPO: one loss, no reward model, no sampling", 2, 4, BLUE)]:
        begin, stop = boxes[start].get_position(), boxes[end].get_position()
        shape = {"arrowstyle": "-|>", "color": colour, "linewidth": 2.5, "mutation_scale": 22}
        shape["connectionstyle"] = f"arc3,rad={0.3 * (end - start > 1)}"
        shape |= {"patchA": boxes[start].get_bbox_patch(), "patchB": boxes[end].get_bbox_patch()}
        axes.annotate("", stop, begin, arrowprops=shape)
        middle, height = (begin[0] + stop[0]) / 2, 0.75 if end - start == 1 else 0.2
        axes.text(middle, height, name, ha="center", color=colour)
    return figure


def rows_of_words(
    axes: plt.Axes, rows: Sequence[Sequence[str]], prompts: Sequence[int], lengths: Sequence[int]
) -> None:
    """Rows of a batch, one box a token: the prompt grey, the completion in colour, the padding hatched.

    Args:
        rows: words, as many in each row.
        prompts, lengths: of each row, tokens of the prompt, and of prompt and completion together.
    """
    for y, (row, prompt, length) in enumerate(zip(rows, prompts, lengths, strict=True)):
        for x, word in enumerate(row):
            colour = "0.88" if x < prompt else "white" if x >= length else SKY
            hatch = "//" if x >= length else None
            box = plt.Rectangle((x, -y), 0.94, 0.8, facecolor=colour, edgecolor="0.5", hatch=hatch)
            axes.add_patch(box)
            if x < length:
                axes.text(x + 0.47, 0.4 - y, word, ha="center", va="center", fontsize=13)
    axes.set(xlim=(-0.1, len(rows[0]) + 0.1), ylim=(0.1 - len(rows), 1))
    axes.axis("off")
