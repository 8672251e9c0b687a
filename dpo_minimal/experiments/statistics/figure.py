"""statistics.png: what thousands of data sets gave, beside theory. Sizes in, figure out."""

from __future__ import annotations

import math
from pathlib import Path

import torch

from ...bench.figures import BLUE, GREEN, ORANGE, panels
from .replicates import Law, Size


def statistics_figure(sizes: list[Size], degrees: int, path: Path) -> None:
    """Four panels: N KL, coverage, the law of the score statistic, squared error; each beside theory."""
    count = len(sizes[0].sample["score"])
    style = {"font.size": 18, "axes.titlesize": 20, "legend.fontsize": 17}
    with panels(path, 2, 2, style=style, figsize=(16, 12)) as (figure, axes):
        figure.get_layout_engine().set(w_pad=0.15, h_pad=0.15)
        title = f"{count} simulated data sets for each N; error bars are two standard errors"
        left_out = [f"{size.missing} at N = {size.pairs}" for size in sizes if size.missing]
        if left_out:
            more = ", …" if len(left_out) > 3 else ""
            title += f"\nno estimate, hence only a score statistic: {', '.join(left_out[:3])}{more}"
        figure.suptitle(title)
        _kl_panel(axes[0, 0], sizes)
        _coverage_panel(axes[0, 1], sizes)
        _score_panel(axes[1, 0], sizes, degrees)
        _efficiency_panel(axes[1, 1], sizes)


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
    label_width = (1.5**2 * sizes[-1].pairs / sizes[0].pairs) ** 0.12  # as a factor
    labels, last = [], 0.0
    for size in sizes:
        fits = size.pairs >= label_width * last
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
    forward, reverse = r"KL$(\hat\pi \| \pi^*)$", r"KL$(\pi^* \| \hat\pi)$"
    _measured(axis, shown, "kl", shift=0.96, color=BLUE, fmt="o-", label=forward)
    _measured(axis, shown, "reverse_kl", shift=1.04, color=ORANGE, fmt="s--", label=reverse)
    _pairs_axis(axis, sizes)
    axis.set(ylabel="N × mean KL, nats", ymargin=0.15)
    axis.legend()


def _coverage_panel(axis, sizes: list[Size]) -> None:
    axis.set_title("Coverage of confidence regions")
    shown = [size for size in sizes if not math.isnan(_laws([size], "wald/95")[0].error)]
    edges = [sizes[0].pairs / 1.5, *(size.pairs for size in shown), sizes[-1].pairs * 1.5]
    for level in (90, 95, 99):
        theory, laws = level / 100, _laws(shown, f"wald/{level}")
        chance = [2 * law.error for law in (*laws[:1], *laws, *laws[-1:])] or [0.0, 0.0]
        names = ["theory, and chance", "Wald region", "likelihood-ratio region"]
        band, wald, ratio = names if level == 90 else [None] * 3  # one legend for all levels
        low, high = [theory - e for e in chance], [theory + e for e in chance]
        axis.fill_between(edges, low, high, color="0.82", zorder=0, label=band)
        axis.axhline(theory, color="black", linewidth=1.5)
        _measured(axis, sizes, f"wald/{level}", shift=0.96, color=ORANGE, fmt="s--", label=wald)
        _measured(axis, sizes, f"likelihood_ratio/{level}", shift=1.04, color=BLUE, fmt="o-", label=ratio)
    _pairs_axis(axis, sizes)
    axis.set_yticks([0.90, 0.95, 0.99], ["90 %", "95 %", "99 %"])
    axis.set(ylabel="coverage of the true rewards")
    # below the axis, where there are no data
    axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=3, columnspacing=1, handlelength=1.2)


def _score_panel(axis, sizes: list[Size], degrees: int) -> None:
    axis.set_title(rf"Score statistic, and its limit $\chi^2$ ({degrees} d.o.f.)")
    end = degrees + 6 * math.sqrt(2 * degrees)
    bins = torch.linspace(0, end, 41).numpy()
    for size, colour in zip(sizes[:: len(sizes) - 1 or 1], (ORANGE, BLUE)):  # the smallest and the largest
        axis.hist(
            size.sample["score"].numpy(), bins=bins, density=True, histtype="step", linewidth=2.5,
            color=colour, label=f"N = {size.pairs}",
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
    _measured(axis, _estimated(axis, sizes), "efficiency", color=GREEN, fmt="o-", label=label)
    _pairs_axis(axis, sizes)
    axis.set(ylabel="squared error / bound", ymargin=0.15)
    axis.legend()
