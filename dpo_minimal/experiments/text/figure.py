"""The figure of a training on text. Records in, figure out."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np

from ...bench.figures import BLUE, GREEN, GREY, ORANGE, panels
from ...rivals.evaluate import Samples, mean_of
from ...train import Record


def preference_figure(
    records: list[Record], start: float | None, before: Samples | None, after: Samples | None, path: Path
) -> None:
    """Loss, log-ratios of chosen and rejected, accuracy and weight, and what the samples became.

    Args:
        start: the loss where policy = reference (ln 2 for DPO); None for a loss without a reference, whose
            rewards are not log-ratios either.
        before, after: samples of the reference and of the trained policy for the same prompts, or None.
    """
    with panels(path, 2, 2, figsize=(16, 12)) as (_, ((loss, ratio), (accuracy, samples))):
        _curves(loss, records, "loss")
        _trace(ratio, records, "rewards/chosen", BLUE, "chosen")
        _trace(ratio, records, "rewards/rejected", ORANGE, "rejected")
        reward = "reward of the loss, made of log π"
        if start is not None:
            value = "ln 2" if math.isclose(start, math.log(2)) else f"{start:.3g}"
            loss.axhline(start, color=GREY, linestyle=":", label=f"policy = reference ({value})")
            loss.legend()
            ratio.axhline(0, color=GREY, linestyle=":", label="as likely as under the reference")
            reward = "implicit reward β log π/π_ref (nats)"
        ratio.legend()
        _label_steps(loss, "Loss", "loss per row")
        _label_steps(ratio, "Are the chosen becoming likelier?", reward)
        _accuracy_panel(accuracy, records)
        if before is None or after is None:
            samples.axis("off")
        else:
            _samples_panel(samples, before, after)


def sft_figure(records: list[Record], path: Path) -> None:
    """One panel: nats a token."""
    with panels(path, figsize=(10, 6)) as (_, axis):
        _curves(axis, records, "loss")
        _label_steps(axis, "Supervised fine-tuning", "loss (nats per token)")


def _series(records: list[Record], name: str) -> tuple[list[float], list[float]]:
    """Steps and values of a metric, of the records that have it."""
    found = [(record["step"], record[name]) for record in records if record.get(name) is not None]
    return [step for step, _ in found], [value for _, value in found]


def _running_mean(values: list[float], width: int = 10) -> np.ndarray:
    """Mean of the last few values, fewer at the beginning."""
    sums = np.cumsum([0.0, *values])
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(ends - width, 0)
    return (sums[ends] - sums[starts]) / (ends - starts)


def _trace(axis, records: list[Record], name: str, colour: str, label: str) -> None:
    """A metric of single steps, thin, and its running mean."""
    steps, values = _series(records, name)
    axis.plot(steps, values, color=colour, alpha=0.25, linewidth=1)
    mark = "o" if len(steps) == 1 else ""  # one point makes no line
    axis.plot(steps, _running_mean(values), mark, color=colour, label=label)


def _curves(axis, records: list[Record], name: str, label: str = "training") -> None:
    """A metric in training and, as points, on held-out rows."""
    _trace(axis, records, name, BLUE, label)
    steps, values = _series(records, f"eval_{name}")
    if values:
        axis.plot(steps, values, "o--", color=ORANGE, markersize=8, label="held out")
        axis.legend()


def _label_steps(axis, title: str, label: str) -> None:
    axis.set(title=title, xlabel="optimizer step", ylabel=label)
    axis.locator_params(axis="x", integer=True)


def _accuracy_panel(axis, records: list[Record]) -> None:
    # Where policy = reference all rewards are equal: neither right nor wrong, so not to be drawn as wrong.
    decided = [r for r in records if max(r.get("dpo/ties", 0), r.get("eval_dpo/ties", 0)) < 0.5]
    _curves(axis, decided, "rewards/accuracies", label="rows ordered rightly")
    steps, weights = _series(records, "dpo/gradient_weight")
    relative = [weight / weights[0] for weight in weights]
    axis.plot(steps, _running_mean(relative), color=GREEN, label="gradient weight / its first value")
    axis.axhline(0.5, color=GREY, linestyle=":", label="guessing")
    axis.legend(loc="center", bbox_to_anchor=(0.5, 0.68), ncols=2)  # between the two groups of curves
    _label_steps(axis, "Order, and how much gradient is left", "share of rows; ratio")


def _samples_panel(axis, before: Samples, after: Samples) -> None:
    divergence = mean_of(after.log_ratios)
    if after.rewards is None:
        axis.hist(after.log_ratios.numpy(), bins=30, color=BLUE, alpha=0.7)
        axis.axvline(divergence.value, color=ORANGE, label=f"mean, the KL: {divergence} nats")
        axis.legend()
        title, label = "How far the samples have moved", "log π/π_ref of a sample (nats)"
    else:
        names = f"reference: mean {mean_of(before.rewards)}", f"policy: mean {mean_of(after.rewards)}"
        both = [samples.rewards.numpy() for samples in (before, after)]
        axis.hist(both, bins=np.linspace(-3, 3, 13), color=[GREY, BLUE], label=names)
        axis.set_ylim(top=1.4 * axis.get_ylim()[1])  # space for the legend
        axis.legend(title=f"KL(policy, reference) = {divergence} nats", title_fontsize=13, loc="upper left")
        title, label = "What the samples became", "true reward of a sample"
    axis.set(title=title, xlabel=label, ylabel="samples")
