"""Records in, figure out. Made for a projector: large type, few lines, colours safe for the colour-blind."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib

matplotlib.use("Agg")  # figures go to files; no screen is needed
import matplotlib.pyplot as plt
import torch
from torch import Tensor

from .bandit import Bandit
from .closed_form import optimal_logps, reward_kl_frontier
from .runs import write_atomically

if TYPE_CHECKING:
    from .experiments.fit import Outcome
    from .experiments.replicates import Law, Size

# Okabe and Ito's palette
BLUE, ORANGE, GREEN, PINK, GREY = "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#666666"
COLOURS = {"tabular": BLUE, "finite": ORANGE, "gpt": GREEN, "plackett_luce": PINK}
LABELS = {
    "tabular": "table, exact preferences",
    "finite": "table, sampled pairs",
    "gpt": "GPT-2, exact preferences",
    "plackett_luce": "table, rankings",
}
STYLE = {
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


def bandit_figure(outcomes: list[Outcome], path: Path) -> None:
    """Four panels: policy against pi*, distance and certificate by step, gradient weights, the frontier."""
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(2, 2, figsize=(16, 12), layout="constrained")
        _policy_panel(axes[0, 0], outcomes)
        _distance_panel(axes[0, 1], outcomes)
        _weight_panel(axes[1, 0], outcomes)
        _frontier_panel(axes[1, 1], outcomes)
        save_figure(figure, path)


def save_figure(figure, path: Path) -> None:
    """Write a figure, whole or not at all, and close it."""
    write_atomically(path, lambda temporary: figure.savefig(temporary, dpi=110))
    plt.close(figure)


def _policy_panel(axis, outcomes: list[Outcome]) -> None:
    axis.set_title(r"The trained policy is $\pi_{\rm ref}\, e^{r/\beta} / Z$")
    lowest = 0.0
    for outcome in outcomes:
        optimal = optimal_logps(outcome.ref_logps, outcome.rewards, beta=outcome.beta)
        exists = outcome.ref_logps > -math.inf
        x, y, start = (table[exists] / math.log(10) for table in (optimal, outcome.logps, outcome.ref_logps))
        if outcome.name in ("tabular", "gpt"):
            axis.scatter(x, start, s=14, color="0.75", zorder=1)
        size = {"finite": 22, "gpt": 10, "plackett_luce": 70}.get(outcome.name, 30)
        face = (
            "none" if outcome.name == "plackett_luce" else COLOURS[outcome.name]
        )  # rings: what is under shows
        axis.scatter(
            x, y, s=size, edgecolor=COLOURS[outcome.name], facecolor=face, label=LABELS[outcome.name],
            zorder=2 if outcome.name == "finite" else 3,
        )  # fmt: skip
        lowest = min(lowest, x.min().item(), y.min().item())
    axis.scatter([], [], s=40, color="0.75", label=r"before training: $\pi_{\rm ref}$")
    axis.plot([lowest, 0], [lowest, 0], color="black", linewidth=1, zorder=0)
    axis.set(
        xlabel=r"$\log_{10}\, \pi^*(y|x)$, closed form", ylabel=r"$\log_{10}\, \pi(y|x)$, trained by DPO"
    )
    axis.legend(loc="upper left", markerscale=1.6)


def _distance_panel(axis, outcomes: list[Outcome]) -> None:
    axis.set_title("… provably: distance, certificate above")
    for outcome in outcomes:
        last = outcome.records[-1]["step"]
        share = [100 * record["step"] / last for record in outcome.records]
        target = "MLE" if outcome.target == "MLE" else r"$\pi^*$"
        label = f"{LABELS[outcome.name]}, to {target}: {last} steps"
        distances = [record["distance/max_logp"] for record in outcome.records]
        bounds = [record["distance/bound"] for record in outcome.records]
        bounds = [bound if math.isfinite(bound) else math.nan for bound in bounds]
        axis.plot(share, distances, color=COLOURS[outcome.name], label=label)
        axis.plot(share, bounds, "--", color="black", linewidth=1.2)
    axis.plot([], [], "--", color="black", linewidth=1.2, label="certificate: proved upper bound")
    axis.set(
        yscale="log", xlabel="optimisation steps done, % of each run",
        ylabel=r"$\max_{x,y} |\log \pi - \log \pi^{\rm target}|$, nats",
    )  # fmt: skip
    axis.legend(loc="lower left")


def _weight_panel(axis, outcomes: list[Outcome]) -> None:
    axis.set_title(r"Gradient weight $\beta\,\sigma(-\mathrm{margin})$, mean")
    for outcome in outcomes:
        steps = [max(record["step"], 0.7) for record in outcome.records]
        weights = [record["dpo/gradient_weight"] / outcome.beta for record in outcome.records]
        label = LABELS[outcome.name] + (", best answer" if outcome.name == "plackett_luce" else "")
        axis.plot(steps, weights, color=COLOURS[outcome.name], label=label)
    axis.axhline(0.5, color="black", linewidth=1, linestyle=":")
    axis.text(
        0.98, 0.5, "½: a pair at the reference", ha="right", va="bottom", transform=axis.get_yaxis_transform()
    )
    axis.set(xscale="log", xlabel="optimisation step (start at the left edge)", ylabel=r"weight $/\,\beta$")
    axis.set_ylim(0, None)
    axis.legend(loc="lower left")


def _frontier_panel(axis, outcomes: list[Outcome]) -> None:
    axis.set_title("The optimum lies on the reward–KL frontier")
    for outcome in outcomes:
        if outcome.name not in ("tabular", "gpt"):
            continue
        betas = torch.logspace(-0.5, 3, 200, dtype=torch.float64) * outcome.beta
        kl, reward = reward_kl_frontier(outcome.ref_logps, outcome.rewards, betas)
        axis.plot(kl.mean(-1), reward.mean(-1), color="black", linewidth=1.5, zorder=1)
        world = "GPT's world" if outcome.name == "gpt" else "table's world"
        place = (kl[0].mean().item(), reward[0].mean().item())
        axis.annotate(world, place, xytext=(8, 0), textcoords="offset points", va="center")
    axis.set_xlim(right=1.25 * axis.get_xlim()[1])  # room for the names
    axis.plot([], [], color="black", linewidth=1.5, label="frontier: most reward at this KL")
    for outcome in outcomes:
        path = [(record["kl/policy_reference"], record["reward"]) for record in outcome.records]
        colour = COLOURS[outcome.name]
        axis.plot(*zip(*path), color=colour, linewidth=2, alpha=0.6, zorder=2)
        size = 420 if outcome.name == "plackett_luce" else 130  # a ring around the table's point: they agree
        axis.scatter(
            *path[-1], s=size, facecolor="none" if size > 130 else colour, edgecolor=colour, linewidth=2.5,
            zorder=3, label=LABELS[outcome.name],
        )  # fmt: skip
    axis.set(xlabel=r"KL$(\pi \| \pi_{\rm ref})$, nats, mean over prompts", ylabel="expected reward")
    axis.legend(loc="lower right", markerscale=0.8)


def ranking_figure(world: Bandit, rewards: Tensor, errors: Tensor, path: Path, *, most: int = 6) -> None:
    """Rewards with 95 % intervals, best first, for the first `most` prompts (said in the title)."""
    shown = min(most, len(world.prompts))
    heights = [len(names) for names in world.completions[:shown]]
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(
            shown, 1, figsize=(12, 1.6 * shown + 0.45 * sum(heights)), layout="constrained",
            squeeze=False, height_ratios=heights, sharex=True,
        )  # fmt: skip
        for x, axis in enumerate(axes[:, 0]):
            order = rewards[x, : heights[x]].argsort(descending=True)
            axis.errorbar(
                rewards[x, order], range(heights[x]), xerr=1.96 * errors[x, order], fmt="o",
                color=COLOURS["tabular"], markersize=9, capsize=4,
            )  # fmt: skip
            axis.set_yticks(range(heights[x]), [world.completions[x][y] for y in order.tolist()])
            axis.set_ylim(heights[x] - 0.5, -0.5)  # best on top
            axis.axvline(0, color="black", linewidth=1)
            axis.set_title(world.prompts[x])
        axes[-1, 0].set_xlabel("estimated reward, mean zero per prompt, with 95 % intervals")
        if shown < len(world.prompts):
            figure.suptitle(f"The first {shown} of {len(world.prompts)} prompts")
        save_figure(figure, path)


def statistics_figure(sizes: list[Size], degrees: int, path: Path) -> None:
    """Four panels: N KL, coverage, the law of the score statistic, squared error; each beside theory."""
    count = len(sizes[0].sample["score"])
    with plt.rc_context(STYLE | {"font.size": 18, "axes.titlesize": 20, "legend.fontsize": 17}):
        figure, axes = plt.subplots(2, 2, figsize=(16, 12), layout="constrained")
        figure.get_layout_engine().set(w_pad=0.15, h_pad=0.15)
        left_out = [f"{size.missing} at N = {size.pairs}" for size in sizes if size.missing]
        left_out = ", ".join(left_out[:3]) + (", …" if len(left_out) > 3 else "")
        figure.suptitle(
            f"{count} simulated data sets for each N; error bars are two standard errors"
            + (f"\nno estimate, hence only a score statistic: {left_out}" if left_out else "")
        )
        _kl_panel(axes[0, 0], sizes)
        _coverage_panel(axes[0, 1], sizes)
        _score_panel(axes[1, 0], sizes, degrees)
        _efficiency_panel(axes[1, 1], sizes)
        save_figure(figure, path)


def _laws(sizes: list[Size], key: str) -> list[Law]:
    return [law for size in sizes for law in size.laws if law.key == key]


def _measured(axis, sizes: list[Size], key: str, *, shift: float = 1.0, **style) -> None:
    """One measurement at every N, moved sideways by a factor so that error bars stay apart."""
    laws = _laws(sizes, key)
    axis.errorbar(
        [size.pairs * shift for size in sizes], [law.measured for law in laws],
        yerr=[2 * law.error for law in laws], capsize=6, markersize=9, **style,
    )  # fmt: skip


def _pairs_axis(axis, sizes: list[Size]) -> None:
    axis.set(xscale="log", xlabel="N, pairs in a data set")
    axis.set_xlim(sizes[0].pairs / 1.5, sizes[-1].pairs * 1.5)
    room = (1.5**2 * sizes[-1].pairs / sizes[0].pairs) ** 0.12  # of one label, as a factor
    labels, last = [], 0.0
    for size in sizes:
        fits = size.pairs >= room * last
        labels.append(str(size.pairs) if fits else "")
        last = size.pairs if fits else last
    axis.set_xticks([size.pairs for size in sizes], labels)
    axis.minorticks_off()


def _estimated(axis, sizes: list[Size]) -> list[Size]:
    """The sizes at which at least 90 % of the data sets have an estimate; says so where there are none."""
    shown = [size for size in sizes if not size.few_estimates]
    if not shown:
        middle = {"ha": "center", "va": "center", "transform": axis.transAxes}
        axis.text(0.5, 0.35, "fewer than 90 % have an estimate", **middle)
    return shown


def _kl_panel(axis, sizes: list[Size]) -> None:
    axis.set_title("KL divergence × N, and its limit")
    shown = _estimated(axis, sizes)
    theory = r"theory, $\mathrm{tr}(\Sigma\, I^+) / 2\beta^2$"
    axis.axhline(_laws(sizes, "kl")[0].theory, color="black", linewidth=1.5, label=theory)
    for key, shift, outcome, line, label in (
        ("kl", 0.96, "tabular", "o-", r"KL$(\hat\pi \| \pi^*)$"),
        ("reverse_kl", 1.04, "finite", "s--", r"KL$(\pi^* \| \hat\pi)$"),
    ):
        _measured(axis, shown, key, shift=shift, color=COLOURS[outcome], fmt=line, label=label)
    _pairs_axis(axis, sizes)
    axis.set(ylabel="N × mean KL, nats")
    axis.margins(y=0.15)
    axis.legend()


def _coverage_panel(axis, sizes: list[Size]) -> None:
    axis.set_title("Coverage of confidence regions")
    shown = [size for size in sizes if not math.isnan(_laws([size], "wald/95")[0].error)]
    edges = [sizes[0].pairs / 1.5, *(size.pairs for size in shown), sizes[-1].pairs * 1.5]
    for level in (90, 95, 99):
        theory, laws = level / 100, _laws(shown, f"wald/{level}")
        chance = [2 * law.error for law in (*laws[:1], *laws, *laws[-1:])] or [0.0, 0.0]
        first = level == 90  # one legend for all levels
        axis.fill_between(
            edges, [theory - e for e in chance], [theory + e for e in chance], color="0.82", zorder=0,
            label="theory, and chance" if first else None,
        )  # fmt: skip
        axis.axhline(theory, color="black", linewidth=1.5)
        for key, shift, outcome, line, label in (
            ("wald", 0.96, "finite", "s--", "Wald region"),
            ("likelihood_ratio", 1.04, "tabular", "o-", "likelihood-ratio region"),
        ):
            colour, label = COLOURS[outcome], label if first else None
            _measured(axis, sizes, f"{key}/{level}", shift=shift, color=colour, fmt=line, label=label)
    _pairs_axis(axis, sizes)
    axis.set_yticks([0.90, 0.95, 0.99], ["90 %", "95 %", "99 %"])
    axis.set(ylabel="coverage of the true rewards")
    # below the axis, where there are no data
    axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=3, columnspacing=1, handlelength=1.2)


def _score_panel(axis, sizes: list[Size], degrees: int) -> None:
    axis.set_title(rf"Score statistic, and its limit $\chi^2$ ({degrees} d.o.f.)")
    end = degrees + 6 * math.sqrt(2 * degrees)
    bins = torch.linspace(0, end, 41).numpy()
    for size, outcome in zip(
        sizes[:: len(sizes) - 1 or 1], ("finite", "tabular")
    ):  # the smallest, the largest
        axis.hist(
            size.sample["score"].numpy(), bins=bins, density=True, histtype="step", linewidth=2.5,
            color=COLOURS[outcome], label=f"N = {size.pairs}",
        )  # fmt: skip
    q = torch.linspace(1e-3, end, 400, dtype=torch.float64)
    half = torch.tensor(degrees / 2, dtype=torch.float64)
    density = ((half - 1) * (q / 2).log() - q / 2 - half.lgamma()).exp() / 2
    axis.plot(q, density, color="black", linewidth=1.5, label=r"theory, $\chi^2$")
    axis.set(xlabel=r"score statistic $N g^\top I^+ g$ at the truth", ylabel="probability density")
    axis.set(xlim=(0, end), ylim=(0, min(1.1 * axis.get_ylim()[1], 1)))
    axis.locator_params(nbins=5)
    axis.legend()


def _efficiency_panel(axis, sizes: list[Size]) -> None:
    axis.set_title("Squared error, and the best possible")
    axis.axhline(1, color="black", linewidth=1.5, label="theory, the Cramér–Rao bound")
    label = r"mean of $|\hat r - r|^2$"
    _measured(axis, _estimated(axis, sizes), "efficiency", color=COLOURS["gpt"], fmt="o-", label=label)
    _pairs_axis(axis, sizes)
    axis.set(ylabel="squared error / bound")
    axis.margins(y=0.15)
    axis.legend()
