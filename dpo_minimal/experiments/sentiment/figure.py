"""The figures of the sentiment experiment: the paper's Fig. 2 to 4 and Table 1. Results in, figures out."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from ...bench.figures import BLUE, GREEN, GREY, ORANGE, PINK, RED, SKY, panels, with_intervals
from ...rivals.evaluate import crossed_interval, win_interval
from .methods import TEMPERATURES
from .results import Group, Results, Row
from .rewards import DRAWS

DARK_BLUE = "#003a5c"
COLOURS = {  # other methods are grey, best of N is red
    "DPO": BLUE, "DPO in rounds": DARK_BLUE, "PPO": ORANGE, "PPO-GT": GREEN, "Unlikelihood": PINK,
    "Preferred-FT": SKY, "SFT": "black",
}  # fmt: skip
MARKERS = {"DPO": "o", "DPO in rounds": "d", "PPO": "s", "PPO-GT": "D", "Unlikelihood": "v",
           "Preferred-FT": "P", "SFT": "*", "IPO": "<", "KTO": "^", "ORPO": "X"}  # fmt: skip
BY_TRUE = {"color": RED, "marker": "h", "linestyle": "-"}  # best of N
BY_LEARNED = BY_TRUE | {"linestyle": ":", "markerfacecolor": "white"}
BY_IMPLICIT = BY_LEARNED | {"color": BLUE}
LARGE = {"font.size": 17, "axes.titlesize": 19, "legend.fontsize": 14}


def frontier_figure(results: Results, what: str, path: Path) -> None:
    """Mean true reward against sampled KL along each training: Fig. 2, left.

    Args: what, where the reviews are from, for the title.
    """
    with panels(path, style=LARGE, figsize=(15, 10.5)) as (_, axis):
        axis.set_title(f"Reward and divergence of every training; {what}")
        _best_lines(axis, results)
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
        # Near the reference the frontier is linear in sqrt(KL), and the scale includes 0.
        axis.set_xscale("function", functions=(lambda x: np.sqrt(np.maximum(x, 0)), np.square))
        rewards = [reward for group in results.groups for _, reward in group.path]
        rewards += [row["reward"] for row in results.best["true"].values()]
        axis.set(
            xlim=(0, right),
            ylim=(min(rewards) - 0.2, max(rewards) + 0.3),  # a long interval may be cut
            xlabel=r"sequence-level KL$(\pi \,\|\, \pi_{\rm ref})$, nats (square-root scale)",
            ylabel="mean true reward on held-out prefixes",
        )
        ticks = [0.0]
        for tick in (0.2, 0.5, 1, 2, 3, 5, 7, 10, 15, 20, 30, 40, 60, 80, 100, 150, 200, 300):
            if tick <= right and tick**0.5 - ticks[-1] ** 0.5 > 0.05 * right**0.5:  # labels stay apart
                ticks.append(tick)
        axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axis.minorticks_off()
        axis.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), markerscale=0.9)


def _best_lines(axis, results: Results) -> None:
    """The most that is possible, and best of N, whose divergence is bounded."""
    axis.plot(
        *zip(*results.frontier), color="black", linewidth=3, zorder=1,
        label=f"most reward possible\n({DRAWS} draws a prefix)",
    )  # fmt: skip
    own = [*results.best][-1]  # of the DPO setting that stays nearest to the reference
    for name, style, label in (
        ("true", BY_TRUE, "best of N, true reward\n(KL: its upper bound)"),
        ("learned", BY_LEARNED, "best of N, learned reward"),
        (own, BY_IMPLICIT, f"best of N, {own.removesuffix(' implicit')}'s reward"),
    ):
        points = [(row["kl"], row["reward"]) for row in results.best[name].values()]
        axis.plot(*zip(*points), markersize=10, linewidth=2, zorder=4, label=label, **style)
    beside = {"xytext": (-5, 8), "textcoords": "offset points", "ha": "right", "color": RED, "fontsize": 13}
    for n, row in results.best["true"].items():
        if n > 1:
            axis.annotate(f"{n}", (row["kl"], row["reward"]), **beside)


def _path(axis, results: Results, group: Group, named: set[str]) -> None:
    """One setting's path from the SFT model; at its end a marker and an interval of the reward.

    A sampled divergence may be below 0, where the scale ends.
    """
    colour, central = COLOURS.get(group.method, GREY), group.method in COLOURS
    points = [(0.0, results.start.mean().item()), *((max(kl, 0.0), r) for kl, r in group.path)]
    axis.plot(*zip(*points), color=colour, linewidth=1.8 if central else 1.0, alpha=0.5, zorder=2)
    label = None if group.method in named else group.method + ("" if central else f" ({group.setting})")
    named.add(group.method)
    reward = crossed_interval(group.rewards[:, -1])
    axis.errorbar(
        *points[-1], yerr=reward.high - reward.value, color=colour, linewidth=0,
        marker=MARKERS[group.method], markersize=11, capsize=4, elinewidth=1.2, label=label, zorder=5,
    )  # fmt: skip


def _right_edge(axis, results: Results) -> float:
    """Where the axis ends: Unlikelihood may end so far away that all others would lie in one place."""
    ends = [(group.path[-1][0], group) for group in results.groups]
    right = 1.15 * max(kl for kl, group in ends if group.method != "Unlikelihood")
    beyond = [
        rf"{group.label} ends at {kl:.0f} nats, {group.path[-1][1]:.2f} $\rightarrow$"
        for kl, group in ends if kl > right
    ]  # fmt: skip
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


def win_rate_figure(results: Results, path: Path) -> None:
    """Four panels: over temperatures, over training, of best of N, and on other prompts."""
    with panels(path, 2, 2, style=LARGE, figsize=(17, 13)) as (figure, axes):
        figure.get_layout_engine().set(w_pad=0.15, h_pad=0.15)
        figure.suptitle(
            "Win rate against a sample of the SFT model, by the true reward; bars: 95 % intervals"
        )
        for axis, draw in zip(axes.flat, (_temperatures, _training, _best_of, _other_prompts)):
            draw(axis, results)
            axis.axhline(50, color=GREY, linestyle=":", linewidth=1.5, zorder=0)
            axis.set_ylabel("win rate, %")


def _win_rates(axis, places, intervals: Iterable[Sequence[float]], **style) -> None:
    """Win rates in per cent, with their intervals (value, low, high)."""
    per_cent = [tuple(100 * number for number in interval) for interval in intervals]
    with_intervals(axis, places, per_cent, elinewidth=1.3, **style)


def _rates(rows: Iterable[Row], **wanted) -> list[tuple[float, float, float]]:
    """The win rates, with their intervals, of the rows that have the values wanted."""
    found = [row for row in rows if all(row[name] == value for name, value in wanted.items())]
    return [(row["win_rate"], row["win_rate_low"], row["win_rate_high"]) for row in found]


def _style_of(group: Group) -> dict:
    return {
        "color": COLOURS.get(group.method, GREY), "marker": MARKERS[group.method], "markersize": 10,
        "label": group.label,
    }  # fmt: skip


def _temperatures(axis, results: Results) -> None:
    axis.set_title("Over sampling temperatures (Fig. 2, right)")
    for place, group in enumerate(results.full):
        rates = _rates(results.win_rates, method=group.method, setting=group.setting, prompts="held out")
        shift = 0.008 * (place - 3)  # so that the bars of seven settings stay apart
        _win_rates(axis, [t + shift for t in TEMPERATURES], rates, **_style_of(group))
    axis.set(xlabel="sampling temperature (opponent: 1)", xticks=TEMPERATURES)
    axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=3, columnspacing=1.0)


def _training(axis, results: Results) -> None:
    axis.set_title("Over training, temperature 1 (Fig. 3)")
    for group in results.full:
        if group.method != "SFT":
            rates = [win_interval(table, results.opponents) for table in group.rewards.unbind(1)]
            _win_rates(axis, group.steps, rates, **_style_of(group))
    axis.set(xlabel="gradient steps", xscale="log")
    ticks = [step for step in (3, 10, 30, 100, 300, 1000, 3000) if step <= max(results.full[1].steps) * 1.2]
    axis.set_xticks(ticks, [str(step) for step in ticks])
    axis.minorticks_off()


def _best_of(axis, results: Results) -> None:
    axis.set_title("Best of N samples of the SFT model (Fig. 4)")
    for name, shift, style, label in (
        ("true", 0.97, BY_TRUE, "chosen by the true reward"),
        ("learned", 1.03, BY_LEARNED, f"by the learned one ({results.accuracy:.0%} right)"),
    ):
        best = results.best[name]
        places, rates = [n * shift for n in best], _rates(best.values())
        _win_rates(axis, places, rates, markersize=11, label=label, **style)
    lowest = min(low for rows in results.best.values() for _, low, _ in _rates(rows.values()))
    axis.set(xlabel="N", xscale="log", ylim=(min(40, 100 * lowest), 103))
    axis.set_xticks(list(best), [str(n) for n in best])
    axis.minorticks_off()
    axis.legend(loc="lower right")


def _other_prompts(axis, results: Results) -> None:
    axis.set_title("On prompts of another kind (Table 1)")
    groups = results.full
    for shift, marker, prompts, temperature, label in (
        (-0.3, "s", "held out", 0.25, "temperature 0.25"), (-0.1, "s", "other", 0.25, "0.25, other prompts"),
        (0.1, "o", "held out", 1, "temperature 1"), (0.3, "o", "other", 1, "1, other prompts"),
    ):  # fmt: skip
        rates = _rates(results.win_rates, prompts=prompts, temperature=temperature)
        hollow = "white" if prompts == "other" else None  # None: as the edge
        style = {"marker": marker, "linestyle": "none", "markerfacecolor": hollow}
        for place, (group, rate) in enumerate(zip(groups, rates)):
            colour = COLOURS.get(group.method, GREY)
            _win_rates(axis, [place + shift], [rate], markersize=12, color=colour, **style)
        axis.plot([], [], markersize=11, color=GREY, label=label, **style)
    labels = [group.label.replace("DPO in ", "DPO in\n").replace(" β 0", "\nβ 0") for group in groups]
    labels = [label if "\n" in label else label.replace(" ", "\n", 1) for label in labels]
    axis.set_xticks(range(len(labels)), labels, fontsize=12)
    axis.grid(axis="x", visible=False)
    axis.legend(
        loc="upper center", bbox_to_anchor=(0.5, -0.17), ncols=4, columnspacing=0.8, handletextpad=0.2
    )
