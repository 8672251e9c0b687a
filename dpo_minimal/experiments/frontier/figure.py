"""Figures of the frontier: methods below the best possible, and the gap as the number of pairs grows."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib.pyplot as plt
import torch

from ...closed_form import reward_kl_frontier
from ..figures import BLUE, GREEN, GREY, ORANGE, PINK, STYLE, save_figure

if TYPE_CHECKING:
    from .gaps import Point
    from .methods import Explored

RED, SKY = "#D55E00", "#56B4E9"  # the rest of Okabe and Ito's palette
LOOKS = {  # family: colour, marker
    "DPO": (BLUE, "o"),
    "DPO, stopped early": (BLUE, "*"),
    "cDPO": (SKY, "s"),
    "robust DPO": (SKY, "D"),
    "IPO": (BLUE, "v"),
    "DPO without weight": (RED, "X"),
    "Unlikelihood": (RED, "v"),
    "KTO": (PINK, "s"),
    "ORPO": (PINK, "^"),
    "SimPO": (PINK, "P"),
    "Preferred-FT": (GREY, "s"),
    "best of N": (GREY, "o"),
    "best of N, learned reward": (GREY, "x"),
    "reward model + closed form": (ORANGE, "x"),
    "PPO": (ORANGE, "^"),
    "PPO-GT": (GREEN, "D"),
}


def frontier_figure(found: list[Explored], drawn: str, path: Path) -> None:
    """One panel a world: the analytic frontier, and each method's path from the reference to its end."""
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(
            1, len(found), figsize=(11 * len(found), 10), layout="constrained", squeeze=False
        )
        # One panel's width holds less: half of a title, three columns of a legend.
        between, columns = (" ", 4) if len(found) > 1 else ("\n", 3)
        figure.suptitle(f"Nobody crosses the frontier:{between}{drawn}, KL and reward exact", fontsize=20)
        for axis, explored in zip(axes[0], found):
            _world_panel(axis, explored)
        handles, labels = axes[0, 0].get_legend_handles_labels()
        figure.legend(
            handles, labels, loc="outside lower center", ncols=columns, fontsize=15, markerscale=1.2
        )
        save_figure(figure, path)


def _world_panel(axis, explored: Explored) -> None:
    world = explored.world
    betas = torch.logspace(-3, 3, 400, dtype=torch.float64) * world.rewards.std()
    curve = reward_kl_frontier(world.ref_logps, world.rewards, betas)
    kl, reward = (value.mean(-1).numpy() for value in curve)
    axis.plot(kl, reward, color="black", linewidth=3, label=r"frontier: $\pi_{\rm ref}\, e^{r/\beta}/Z$")
    low = (world.ref_logps.exp() * world.rewards).sum(-1).mean().item()
    furthest, lowest, top = kl.max(), low, reward.max()
    seen = set()
    for run, gap in zip(explored.runs, explored.gaps):
        colour, marker = LOOKS[run.family]
        label = None if run.family in seen else run.family
        seen.add(run.family)
        if run.steps > 0 and run.family != "DPO, stopped early":  # whose path is DPO's
            axis.plot(gap.kl.numpy(), gap.reward.numpy(), color=colour, linewidth=1.3, alpha=0.45, zorder=2)
        face = "none" if run.family in ("IPO", "ORPO", "SimPO", "robust DPO") else colour
        style = {"color": colour} if marker == "x" else {"facecolor": face, "edgecolor": colour}
        end = gap.kl[-1].item(), gap.reward[-1].item()
        furthest, lowest = max(furthest, end[0]), min(lowest, end[1])
        axis.scatter(*end, marker=marker, s=130, linewidth=2, zorder=3, label=label, **style)
    name = "a table of logits" if world.name == "table" else "a GPT-2, all completions enumerated"
    axis.set_title(f"{name[0].upper()}{name[1:]}")
    axis.set(xlabel=r"KL$(\pi\,\|\,\pi_{\rm ref})$, nats, mean over prompts", ylabel="expected true reward")
    margin = 0.08 * (top - low)
    axis.set(xlim=(-0.03 * furthest, 1.08 * furthest), ylim=(lowest - margin, top + margin))


PAIRS_LOOKS = {  # method: colour, marker, line, label
    "DPO": (BLUE, "o", "-", "DPO"),
    "DPO, narrow GPT": (SKY, "s", "-", "DPO, a GPT too narrow for π*"),
    "reward model + closed form": (ORANGE, "x", "-", "reward model + closed form"),
    "PPO": (PINK, "^", "-", "PPO, learned reward"),
    "prior": (RED, "", "-.", "likeliest rewards, given pairs and prior"),
    "coverage": (GREY, "", ":", "true rewards, but only of what was compared"),
}


def pairs_figure(points: list[Point], laws: dict[str, float], beta: float, path: Path) -> None:
    """One panel a world: gap to pi* against the number of pairs, beside theory's law."""
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(
            1, len(laws), figsize=(11 * len(laws), 9), layout="constrained", squeeze=False
        )
        between = " " if len(laws) > 1 else "\n"
        figure.suptitle(
            f"How many pairs is a reward function worth?{between}"
            f"(β = {beta:g}; medians, quartiles over data sets)",
            fontsize=20,
        )
        for axis, (world, law) in zip(axes[0], laws.items()):
            _pairs_panel(axis, points, world, law)
        save_figure(figure, path)


def _pairs_panel(axis, points: list[Point], world: str, law: float) -> None:
    from .gaps import POPULATION, spreads

    floor = 1e-6 if world == "table" else 1e-4  # what is less is drawn there or left out
    finite = [n for n in spreads(points, world, "DPO") if n != POPULATION]
    end = 10 * finite[-1]  # where the population is drawn
    theory = r"theory, for the mean: $\mathrm{tr}(\Sigma I^+)/2\beta^2 N$"
    ends = [finite[0], finite[-1]]
    axis.plot(ends, [law / n for n in ends], "--", color="black", linewidth=1.8, label=theory)
    for name in dict.fromkeys(p.method for p in points if p.world == world and p.method != "PPO-GT"):
        colour, marker, line, label = PAIRS_LOOKS[name]
        if world == "table" and name == "DPO":
            label = "DPO = reward model + closed form, at each step"
        if world == "table" and name == "PPO":  # on few data sets, whose medians would not be DPO's
            _climbed(axis, points, end)
            continue
        found = spreads(points, world, name)
        inside = [(n, spread) for n, spread in found.items() if n != POPULATION and spread.median > floor]
        below = [spread.median - max(spread.low, floor) for _, spread in inside]
        above = [spread.high - spread.median for _, spread in inside]
        axis.errorbar(
            [n for n, _ in inside], [spread.median for _, spread in inside], yerr=[below, above],
            color=colour, marker=marker or None, linestyle=line, capsize=4, markersize=9, label=label,
        )  # fmt: skip
        if marker and POPULATION in found:
            _exact(axis, end, found[POPULATION].median, floor, color=colour, marker=marker)
    gap = spreads(points, world, "PPO-GT")[POPULATION].median
    axis.axhline(max(gap, floor), color=GREEN, label=f"PPO, true reward: {gap:.1g} nats")
    ticks = [10.0**k for k in range(2, round(math.log10(finite[-1])) + 1)]
    names = [f"$10^{round(math.log10(tick))}$" for tick in ticks]
    axis.set(xscale="log", yscale="log", xlabel="preference pairs", ylim=(floor / 1.5, None))
    axis.set_xticks([*ticks, end], [*names, "exact\nprobabilities"])
    axis.minorticks_off()
    axis.set_ylabel(r"gap: KL$(\pi\,\|\,\pi^*)$, nats, mean over prompts")
    axis.set_title("A table of logits" if world == "table" else "A GPT-2, all completions enumerated")
    axis.legend(loc="upper right")


def _climbed(axis, points: list[Point], end: float) -> None:
    """PPO on the table's data sets, a point each: too few for quartiles."""
    from .gaps import POPULATION

    colour, marker, _, label = PAIRS_LOOKS["PPO"]
    seen = [
        (end if point.pairs == POPULATION else point.pairs, point.gap)
        for point in points if (point.world, point.method) == ("table", "PPO")
    ]  # fmt: skip
    style = {"color": colour, "marker": marker, "linestyle": "none", "markersize": 9}
    axis.errorbar(*zip(*seen), **style, label=f"{label}: single data sets")


def _exact(axis, end: float, gap: float, floor: float, *, color: str, marker: str) -> None:
    """The gap with exact probabilities; what lies below the axis points down, with its value beside it."""
    below = gap < floor
    axis.scatter([end], [max(gap, floor)], color=color, marker="v" if below else marker, s=110, zorder=3)
    if below:
        axis.annotate(
            f"{gap:.2g}", (end, floor), xytext=(-12, 0), textcoords="offset points", ha="right", va="center",
            color=color,
        )  # fmt: skip
