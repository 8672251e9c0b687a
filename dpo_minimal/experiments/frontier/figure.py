"""Figures of the frontier: methods below the best possible, and the gap as the number of pairs grows."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from ...bench.figures import BLUE, GREEN, GREY, ORANGE, PINK, RED, SKY, panels, with_intervals
from ...closed_form import reward_kl_frontier
from .methods import Run
from .pairs import POPULATION, Point, spreads

STYLES = {  # family: colour, marker, filled
    "DPO": (BLUE, "o", True),
    "DPO, stopped early": (BLUE, "*", True),
    "cDPO": (SKY, "s", True),
    "robust DPO": (SKY, "D", False),
    "IPO": (BLUE, "v", False),
    "DPO without weight": (RED, "X", True),
    "Unlikelihood": (RED, "v", True),
    "KTO": (PINK, "s", True),
    "ORPO": (PINK, "^", False),
    "SimPO": (PINK, "P", False),
    "Preferred-FT": (GREY, "s", True),
    "best of N": (GREY, "o", True),
    "best of N, learned reward": (GREY, "x", True),
    "reward model + closed form": (ORANGE, "x", True),
    "PPO": (ORANGE, "^", True),
    "PPO-GT": (GREEN, "D", True),
}
PAIRS_STYLES = {  # method: colour, marker, line, label
    "DPO": (BLUE, "o", "-", "DPO"),
    "DPO, narrow GPT": (SKY, "s", "-", "DPO, a GPT too narrow for π*"),
    "reward model + closed form": (ORANGE, "x", "-", "reward model + closed form"),
    "PPO": (PINK, "^", "-", "PPO, learned reward"),
    "prior": (RED, "", "-.", "likeliest rewards, given pairs and prior"),
    "coverage": (GREY, "", ":", "true rewards, but only of what was compared"),
}


def _figure(path: Path, draw: Callable, parts: list, title: str, height: float, legend: int = 0) -> None:
    """A panel for each world, drawn by draw(axis, the world's part); legend: its columns below all panels.

    The title has {} where it may break: one panel's width holds only half of it.
    """
    count = len(parts)
    with panels(path, 1, count, figsize=(11 * count, height), squeeze=False) as (figure, axes):
        figure.suptitle(title.format(" " if count > 1 else "\n"), fontsize=20)
        for axis, part in zip(axes[0], parts):
            draw(axis, part)
        if legend:
            place = {"loc": "outside lower center", "fontsize": 15, "markerscale": 1.2}
            figure.legend(*axes[0, 0].get_legend_handles_labels(), ncols=legend, **place)


def frontier_figure(found: list[list[Run]], drawn: str, path: Path) -> None:
    """One panel a world: the analytic frontier, and each method's path from the reference to its end."""
    title = f"Nobody crosses the frontier:{{}}{drawn}, KL and reward exact"
    _figure(path, _world_panel, found, title, 10, legend=4 if len(found) > 1 else 3)


def pairs_figure(found: list[list[Point]], laws: dict[str, float], beta: float, path: Path) -> None:
    """One panel a world: gap to pi* against the number of pairs, beside theory's law."""
    title = "How many pairs is a reward function worth?{}"
    title += f"(β = {beta:g}; medians, quartiles over data sets)"
    _figure(path, partial(_pairs_panel, laws=laws), found, title, 9)


def _world_panel(axis, runs: list[Run]) -> None:
    world = runs[0].world
    betas = torch.logspace(-3, 3, 400, dtype=torch.float64) * world.rewards.std()
    curve = reward_kl_frontier(world.ref_logps, world.rewards, betas)
    kl, reward = (value.mean(-1).numpy() for value in curve)
    axis.plot(kl, reward, color="black", linewidth=3, label=r"frontier: $\pi_{\rm ref}\, e^{r/\beta}/Z$")
    low = (world.ref_logps.exp() * world.rewards).sum(-1).mean().item()
    furthest, lowest, top = kl.max(), low, reward.max()
    seen = set()
    for run in runs:
        colour, marker, filled = STYLES.get(run.family, (GREY, "x", True))  # a loss added at run time
        if run.steps > 0 and run.family != "DPO, stopped early":  # whose path is DPO's
            axis.plot(run.gap.kl, run.gap.reward, color=colour, linewidth=1.3, alpha=0.45, zorder=2)
        end = run.gap.kl[-1].item(), run.gap.reward[-1].item()
        furthest, lowest = max(furthest, end[0]), min(lowest, end[1])
        style = {"facecolor": colour if filled else "none", "edgecolor": colour}
        style = {"color": colour} if marker == "x" else style
        label = None if run.family in seen else run.family
        axis.scatter(*end, marker=marker, s=130, linewidth=2, zorder=3, label=label, **style)
        seen.add(run.family)
    axis.set_title("A table of logits" if world.name == "table" else "A GPT-2, all completions enumerated")
    axis.set(xlabel=r"KL$(\pi\,\|\,\pi_{\rm ref})$, nats, mean over prompts", ylabel="expected true reward")
    margin = 0.08 * (top - low)
    axis.set(xlim=(-0.03 * furthest, 1.08 * furthest), ylim=(lowest - margin, top + margin))


def _pairs_panel(axis, points: list[Point], laws: dict[str, float]) -> None:
    world = points[0].world
    law = laws[world]
    floor = 1e-6 if world == "table" else 1e-4  # what is less is drawn there or left out
    of_methods = spreads(points)
    gap = of_methods.pop("PPO-GT")[POPULATION].median
    finite = [n for n in of_methods["DPO"] if n != POPULATION]
    end = 10 * finite[-1]  # where the population is drawn
    theory = r"theory, for the mean: $\mathrm{tr}(\Sigma I^+)/2\beta^2 N$"
    ends = [finite[0], finite[-1]]
    axis.plot(ends, [law / n for n in ends], "--", color="black", linewidth=1.8, label=theory)
    for name, found in of_methods.items():
        colour, marker, line, label = PAIRS_STYLES[name]
        style = {"color": colour, "marker": marker or None, "markersize": 9}
        if world == "table" and name == "PPO":  # on few data sets, whose medians would not be DPO's
            single = [(min(p.pairs, end), p.gap) for p in points if p.method == "PPO"]
            axis.errorbar(*zip(*single), linestyle="none", label=f"{label}: single data sets", **style)
            continue
        if world == "table" and name == "DPO":
            label = "DPO = reward model + closed form, at each step"
        inside = {n: s for n, s in found.items() if n != POPULATION and s.median > floor}
        bars = [(s.median, max(s.low, floor), s.high) for s in inside.values()]
        with_intervals(axis, list(inside), bars, linestyle=line, label=label, **style)
        if not marker or POPULATION not in found:
            continue
        exact = found[POPULATION].median  # below the axis it points down, with its value beside it
        marker = marker if exact >= floor else "v"
        axis.scatter([end], [max(exact, floor)], color=colour, marker=marker, s=110, zorder=3)
        if exact < floor:
            place = {"xytext": (-12, 0), "textcoords": "offset points", "ha": "right", "va": "center"}
            axis.annotate(f"{exact:.2g}", (end, floor), color=colour, **place)
    axis.axhline(max(gap, floor), color=GREEN, label=f"PPO, true reward: {gap:.1g} nats")
    powers = range(2, round(math.log10(finite[-1])) + 1)
    axis.set(xscale="log", yscale="log", xlabel="preference pairs", ylim=(floor / 1.5, None))
    axis.set_xticks(
        [*(10.0**k for k in powers), end], [*(f"$10^{k}$" for k in powers), "exact\nprobabilities"]
    )
    axis.minorticks_off()
    axis.set_ylabel(r"gap: KL$(\pi\,\|\,\pi^*)$, nats, mean over prompts")
    axis.set_title("A table of logits" if world == "table" else "A GPT-2, all completions enumerated")
    axis.legend(loc="upper right")
