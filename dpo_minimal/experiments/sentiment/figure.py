"""The figures of the sentiment experiment: the paper's Fig. 2 to 4 and Table 1. Results in, figures out."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib.pyplot as plt
import numpy as np

from ..figures import BLUE, GREEN, GREY, ORANGE, PINK, STYLE, save_figure

if TYPE_CHECKING:
    from .results import Group, Interval, Results

RED, SKY = "#D55E00", "#56B4E9"  # of the same palette; red is best of N
COLOURS = {  # other methods are grey
    "DPO": BLUE, "PPO": ORANGE, "PPO-GT": GREEN, "Unlikelihood": PINK, "Preferred-FT": SKY, "SFT": "black",
}  # fmt: skip
MARKERS = {"DPO": "o", "PPO": "s", "PPO-GT": "D", "Unlikelihood": "v", "Preferred-FT": "P", "SFT": "*",
           "IPO": "<", "cDPO": ">", "KTO": "^", "ORPO": "X", "SimPO": "p"}  # fmt: skip
LARGE = {"font.size": 17, "axes.titlesize": 19, "legend.fontsize": 14}


def frontier_figure(results: Results, path: Path, *, what: str) -> None:
    """Mean true reward against sampled KL along each training: Fig. 2, left.

    Args: what, where the reviews are from, for the title.
    """
    with plt.rc_context(STYLE | LARGE):
        figure, axis = plt.subplots(figsize=(15, 10.5), layout="constrained")
        axis.set_title(f"Reward and divergence of every training; {what}")
        _frontier_lines(axis, results)
        named: set[str] = set()
        for group in results.groups:
            if group.method != "SFT":
                _path(axis, results, group, named)
        axis.scatter(
            [0], [results.start.mean().item()], marker="*", s=420, color="black", zorder=6, clip_on=False,
            label="SFT: the reference",
        )  # fmt: skip
        right = _right_edge(axis, results)
        _settings(axis, results, right)
        # Near the reference the frontier is linear in sqrt(KL), and the scale has room for 0.
        axis.set_xscale("function", functions=(lambda x: np.sqrt(np.maximum(x, 0)), np.square))
        axis.set_xlim(0, right)
        rewards = [reward for group in results.groups for _, reward in group.path]
        rewards += [entry.reward.value for entry in results.true_best]
        axis.set_ylim(min(rewards) - 0.2, max(rewards) + 0.3)  # a long interval may go on beyond
        ticks = [0.0]
        for tick in (0.2, 0.5, 1, 2, 3, 5, 7, 10, 15, 20, 30, 40, 60, 80, 100, 150, 200, 300):
            if tick <= right and tick**0.5 - ticks[-1] ** 0.5 > 0.05 * right**0.5:  # room for its label
                ticks.append(tick)
        axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axis.minorticks_off()
        axis.set(
            xlabel=r"sequence-level KL$(\pi \,\|\, \pi_{\rm ref})$, nats (square-root scale)",
            ylabel="mean true reward on held-out prefixes",
        )
        axis.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), markerscale=0.9)
        save_figure(figure, path)


def _frontier_lines(axis, results: Results) -> None:
    """The ceiling, and best of N, whose divergence is bounded."""
    axis.plot(
        *zip(*results.frontier), color="black", linewidth=3, zorder=1,
        label="most reward possible\n(from 128 draws a prefix)",
    )  # fmt: skip
    for best, line, face, label in (
        (results.true_best, "-", RED, "best of N, true reward\n(KL: its upper bound)"),
        (results.learned_best, ":", "white", "best of N, learned reward"),
    ):
        points = [(entry.kl, entry.reward.value) for entry in best]
        axis.plot(
            *zip(*points), line, color=RED, marker="h", markersize=10, markerfacecolor=face, linewidth=2,
            zorder=4, label=label,
        )  # fmt: skip
    for entry in results.true_best[1:]:
        axis.annotate(
            f"{entry.n}", (entry.kl, entry.reward.value), xytext=(-5, 8), textcoords="offset points",
            ha="right", color=RED, fontsize=13,
        )  # fmt: skip


def _path(axis, results: Results, group: Group, named: set[str]) -> None:
    """One setting's way from the SFT model; at its end a marker and an interval of the reward.

    A sampled divergence may be below 0, where the scale ends.
    """
    from .results import crossed_interval

    colour, central = COLOURS.get(group.method, GREY), group.method in COLOURS
    points = [(0.0, results.start.mean().item()), *((max(kl, 0.0), r) for kl, r in group.path)]
    axis.plot(*zip(*points), color=colour, linewidth=1.8 if central else 1.0, alpha=0.5, zorder=2)
    label = None if group.method in named else group.method + ("" if central else f" ({group.setting})")
    named.add(group.method)
    axis.errorbar(
        *points[-1], yerr=crossed_interval(group.rewards[:, -1]).half, color=colour, linewidth=0,
        marker=MARKERS[group.method], markersize=11, capsize=4, elinewidth=1.2, label=label, zorder=5,
    )  # fmt: skip


def _right_edge(axis, results: Results) -> float:
    """Where the axis ends: Unlikelihood may run so far off that nothing else could be told apart."""
    ends = [(group.path[-1][0], group) for group in results.groups]
    right = 1.15 * max(kl for kl, group in ends if group.method != "Unlikelihood")
    beyond = [
        rf"{group.label} ends at {kl:.0f} nats, {group.path[-1][1]:.2f} $\rightarrow$"
        for kl, group in ends if kl > right
    ]  # fmt: skip
    if beyond:
        place = {"transform": axis.transAxes, "ha": "right", "va": "bottom"}
        axis.text(0.99, 0.02, "\n".join(beyond), color=COLOURS["Unlikelihood"], **place)
    return right


def _settings(axis, results: Results, right: float) -> None:
    """The settings' names at the ends; those of a method that end close together share a label."""
    for method in ("DPO", "Unlikelihood", "PPO", "PPO-GT"):
        labels: list[tuple[float, float, str]] = []
        for group in results.groups:
            kl, reward = group.path[-1]
            if group.method != method or kl > right:
                continue
            for place, (x, y, text) in enumerate(labels):
                if abs(max(kl, 0) ** 0.5 - x**0.5) < 0.06 * right**0.5 and abs(reward - y) < 0.15:
                    labels[place] = (x, y, f"{text}, {group.setting.split()[-1]}")
                    break
            else:
                labels.append((max(kl, 0.0), reward, group.setting))
        left = method in ("Unlikelihood", "PPO-GT")
        for x, y, text in labels:
            axis.annotate(
                text, (x, y), xytext=(-9, 5) if left else (9, -5), textcoords="offset points", fontsize=14,
                color=COLOURS[method], zorder=7, ha="right" if left else "left",
                va="bottom" if left else "top",
            )  # fmt: skip


# --------------------------------------------------------------------------------------------- win rates


def win_rate_figure(results: Results, path: Path) -> None:
    """Four panels: over temperatures, over training, of best of N, and on other prompts."""
    with plt.rc_context(STYLE | LARGE):
        figure, axes = plt.subplots(2, 2, figsize=(17, 13), layout="constrained")
        figure.get_layout_engine().set(w_pad=0.15, h_pad=0.15)
        figure.suptitle(
            "Win rate against a sample of the SFT model, by the true reward; bars: 95 % intervals"
        )
        _temperature_panel(axes[0, 0], results)
        _training_panel(axes[0, 1], results)
        _best_of_panel(axes[1, 0], results)
        _other_panel(axes[1, 1], results)
        for axis in axes.flat:
            axis.axhline(50, color=GREY, linestyle=":", linewidth=1.5, zorder=0)
            axis.set_ylabel("win rate, %")
        save_figure(figure, path)


def _full(results: Results) -> list[Group]:
    """The settings that were looked at everywhere."""
    return [group for group in results.groups if "temperature_rewards" in group.last]


def _bars(axis, places, intervals: list[Interval], **style) -> None:
    """Win rates in per cent, with their intervals."""
    middle = [100 * interval.value for interval in intervals]
    below = [100 * max(0.0, interval.value - interval.low) for interval in intervals]
    above = [100 * max(0.0, interval.high - interval.value) for interval in intervals]
    axis.errorbar(places, middle, yerr=[below, above], capsize=4, elinewidth=1.3, **style)


def _style_of(group: Group) -> dict:
    return {
        "color": COLOURS.get(group.method, GREY), "marker": MARKERS[group.method], "markersize": 10,
        "label": group.label,
    }  # fmt: skip


def _temperature_panel(axis, results: Results) -> None:
    from .results import win_interval
    from .runs import TEMPERATURES

    axis.set_title("Over sampling temperatures (Fig. 2, right)")
    for place, group in enumerate(_full(results)):
        table = group.last["temperature_rewards"]  # (S, M, P)
        rates = [win_interval(table[:, k], results.opponents) for k in range(len(TEMPERATURES))]
        shift = 0.008 * (place - 2.5)  # so that the bars of six settings stay apart
        _bars(axis, [t + shift for t in TEMPERATURES], rates, **_style_of(group))
    axis.set_xlabel("sampling temperature (opponent: 1)")
    axis.set_xticks(TEMPERATURES)
    axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=3, columnspacing=1.0)


def _training_panel(axis, results: Results) -> None:
    from .results import win_interval

    axis.set_title("Over training, temperature 1 (Fig. 3)")
    for group in _full(results):
        if group.method == "SFT":
            continue
        rates = [win_interval(group.rewards[:, k], results.opponents) for k in range(len(group.steps))]
        _bars(axis, group.steps, rates, **_style_of(group))
    axis.set(xlabel="gradient steps", xscale="log")
    steps = next(group.steps for group in results.groups if group.method != "SFT")
    axis.set_xticks(steps, [str(step) for step in steps])
    axis.minorticks_off()


def _best_of_panel(axis, results: Results) -> None:
    axis.set_title("Best of N samples of the SFT model (Fig. 4)")
    learned = f"by the learned one ({results.accuracy:.0%} right)"
    for best, shift, line, face, label in (
        (results.true_best, 0.97, "-", RED, "chosen by the true reward"),
        (results.learned_best, 1.03, ":", "white", learned),
    ):
        _bars(
            axis, [entry.n * shift for entry in best], [entry.win for entry in best], color=RED,
            linestyle=line, marker="h", markersize=11, markerfacecolor=face, label=label,
        )  # fmt: skip
    counts = [entry.n for entry in results.true_best]
    axis.set(xscale="log", xlabel="N")
    axis.set_xticks(counts, [str(n) for n in counts])
    axis.minorticks_off()
    lowest = min(entry.win.low for entry in (*results.true_best, *results.learned_best))
    axis.set_ylim(min(40, 100 * lowest), 103)
    axis.legend(loc="lower right")


def _other_panel(axis, results: Results) -> None:
    from .results import win_interval
    from .runs import OTHER_TEMPERATURES, TEMPERATURES

    axis.set_title("On prompts of another kind (Table 1)")
    groups = _full(results)
    quarter = TEMPERATURES.index(OTHER_TEMPERATURES[0])
    for place, group in enumerate(groups):
        own, other = group.last["temperature_rewards"], group.last["other_rewards"]
        looks = (
            (own[:, quarter], results.opponents, -0.3, "s", True),
            (other[:, 0], results.other_opponents, -0.1, "s", False),
            (own[:, -1], results.opponents, 0.1, "o", True),
            (other[:, 1], results.other_opponents, 0.3, "o", False),
        )
        for rewards, opponents, shift, marker, filled in looks:
            colour = COLOURS.get(group.method, GREY)
            _bars(
                axis, [place + shift], [win_interval(rewards, opponents)], color=colour, marker=marker,
                markersize=12, markerfacecolor=colour if filled else "white", linestyle="none",
            )  # fmt: skip
    for marker, filled, label in (
        ("s", True, "temperature 0.25"), ("s", False, "0.25, other prompts"),
        ("o", True, "temperature 1"), ("o", False, "1, other prompts"),
    ):  # fmt: skip
        axis.plot(
            [], [], marker=marker, color=GREY, markerfacecolor=GREY if filled else "white", markersize=11,
            linestyle="none", label=label,
        )  # fmt: skip
    axis.set_xticks(range(len(groups)), [group.label.replace(" ", "\n", 1) for group in groups], fontsize=14)
    axis.grid(axis="x", visible=False)
    axis.legend(
        loc="upper center", bbox_to_anchor=(0.5, -0.17), ncols=4, columnspacing=0.8, handletextpad=0.2
    )
