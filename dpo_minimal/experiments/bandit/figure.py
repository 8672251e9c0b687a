"""bandit.png and ranking.png: policies against their closed form. Outcomes in, figures out."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor

from ...bandit import Bandit
from ...bench.figures import COLOURS, panels
from ...closed_form import optimal_logps, reward_kl_frontier
from .fit import Outcome

LABELS = {
    "tabular": "table, exact preferences",
    "finite": "table, sampled pairs",
    "gpt": "GPT-2, exact preferences",
    "plackett_luce": "table, rankings",
}


def bandit_figure(outcomes: list[Outcome], path: Path) -> None:
    """Four panels: policy against pi*, distance and certificate by step, gradient weights, the frontier."""
    with panels(path, 2, 2, figsize=(16, 12)) as (_, axes):
        for panel, axis in zip((_policy_panel, _distance_panel, _weight_panel, _frontier_panel), axes.flat):
            panel(axis, outcomes)


def _policy_panel(axis, outcomes: list[Outcome]) -> None:
    axis.set_title(r"The trained policy is $\pi_{\rm ref}\, e^{r/\beta} / Z$")
    lowest = 0.0
    for outcome in outcomes:
        optimal = optimal_logps(outcome.ref_logps, outcome.rewards, beta=outcome.beta)
        exists = outcome.ref_logps > -math.inf
        x, y, start = (table[exists] / math.log(10) for table in (optimal, outcome.logps, outcome.ref_logps))
        if outcome.name in ("tabular", "gpt"):
            axis.scatter(x, start, s=14, color="0.75", zorder=1)
        colour, ring = COLOURS[outcome.name], outcome.name == "plackett_luce"  # which shows what is under it
        axis.scatter(
            x, y, s={"finite": 22, "gpt": 10, "plackett_luce": 70}.get(outcome.name, 30), edgecolor=colour,
            facecolor="none" if ring else colour, label=LABELS[outcome.name],
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
        bounds = [record["distance/bound"] for record in outcome.records]  # inf is not drawn
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
    place = {"ha": "right", "va": "bottom", "transform": axis.get_yaxis_transform()}
    axis.text(0.98, 0.5, "½: a pair at the reference", **place)
    axis.set(xscale="log", xlabel="optimisation step (start at the left edge)", ylabel=r"weight $/\,\beta$")
    axis.set_ylim(0, None)
    axis.legend(loc="lower left")


def _frontier_panel(axis, outcomes: list[Outcome]) -> None:
    axis.set_title("The optimum lies on the reward–KL frontier")
    for outcome in outcomes:
        if world := {"tabular": "table's world", "gpt": "GPT's world"}.get(outcome.name):
            betas = torch.logspace(-0.5, 3, 200, dtype=torch.float64) * outcome.beta
            frontier = reward_kl_frontier(outcome.ref_logps, outcome.rewards, betas)
            kl, reward = (numbers.mean(-1) for numbers in frontier)
            axis.plot(kl, reward, color="black", linewidth=1.5, zorder=1)
            axis.annotate(world, (kl[0], reward[0]), (8, 0), textcoords="offset points", va="center")
    axis.set_xlim(right=1.25 * axis.get_xlim()[1])  # space for the names
    axis.plot([], [], color="black", linewidth=1.5, label="frontier: most reward at this KL")
    for outcome in outcomes:
        path = [(record["kl/policy_reference"], record["reward"]) for record in outcome.records]
        colour, ring = COLOURS[outcome.name], outcome.name == "plackett_luce"  # round the table's point
        axis.plot(*zip(*path), color=colour, linewidth=2, alpha=0.6, zorder=2)
        axis.scatter(
            *path[-1], s=420 if ring else 130, facecolor="none" if ring else colour, edgecolor=colour,
            linewidth=2.5, zorder=3, label=LABELS[outcome.name],
        )  # fmt: skip
    axis.set(xlabel=r"KL$(\pi \| \pi_{\rm ref})$, nats, mean over prompts", ylabel="expected reward")
    axis.legend(loc="lower right", markerscale=0.8)


def ranking_figure(world: Bandit, errors: Tensor, path: Path, *, of: str = "") -> None:
    """Rewards with 95 % intervals (`of` what), best first: 100 of each of the first 6 prompts, as it says."""

    def label(name: str) -> str:
        return " ".join(name.split())[:30].replace("$", r"\$")  # between two of them it would be TeX

    shown = min(6, len(world.prompts))
    heights = [min(100, len(names)) for names in world.completions[:shown]]
    size = (12, 1.6 * shown + 0.45 * sum(heights))
    options = {"squeeze": False, "height_ratios": heights, "sharex": True}
    with panels(path, shown, 1, figsize=size, **options) as (figure, axes):
        for axis, height, prompt, names, rewards, own in zip(
            axes[:, 0], heights, world.prompts, world.completions, world.rewards, errors
        ):
            order = rewards[: len(names)].argsort(descending=True)[:height]
            axis.errorbar(
                rewards[order], range(height), xerr=1.96 * own[order], fmt="o", color=COLOURS["tabular"],
                markersize=9, capsize=4,
            )  # fmt: skip
            axis.set_yticks(range(height), [label(names[y]) for y in order.tolist()])
            axis.set_ylim(height - 0.5, -0.5)  # best on top
            axis.axvline(0, color="black", linewidth=1)
            axis.set_title(label(prompt) + f" (best {height} of {len(names)})" * (height < len(names)))
        axes[-1, 0].set_xlabel(f"reward, mean zero per prompt, with 95 % intervals{of}")
        if shown < len(world.prompts):
            figure.suptitle(f"The first {shown} of {len(world.prompts)} prompts")
