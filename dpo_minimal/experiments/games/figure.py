"""games.png: the paths of DPO, Nash-MD and online IPO over the simplex of three completions."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from ...bench.figures import BLUE, GREEN, GREY, ORANGE, RED, panels
from ...laws.games import regularised_equilibrium

WAYS = {"DPO": (RED, "-", 17), "Nash-MD": (BLUE, "-", 12), "online IPO": (ORANGE, "--", 6)}  # size of the end


def games_figure(worlds: list, ways: list[dict[str, Tensor]], rows: list[dict], path: Path) -> None:
    """The first four worlds: the simplex of three completions, bars for another number of them."""
    number = min(4, len(worlds))
    with panels(path, 1, number, figsize=(8 * number, 8), squeeze=False) as (figure, axes):
        for axis, world, paths in zip(axes[0], worlds, ways):
            if len(world.completions) == 3:
                _simplex(axis, world, paths)
            else:
                _bars(axis, world, [row for row in rows if row["world"] == world.name])
        figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3)


def _plane(p: Tensor) -> tuple[Tensor, Tensor]:
    """The first completion is the left corner, the second the right one, the third the top."""
    return p[:, 1] + p[:, 2] / 2, p[:, 2] * 3**0.5 / 2


def _simplex(axis, world, paths: dict[str, Tensor]) -> None:
    axis.plot(*_plane(torch.eye(3)[[0, 1, 2, 0]]), color=GREY, linewidth=1.2)
    axis.text(-0.05, 0.85, world.name[-40:], weight="bold", fontsize=17)
    for name, x, y in zip(world.completions, (0, 1, 0.5), (-0.02, -0.02, 0.88)):
        axis.text(x, y, name[:20], ha="center", va="bottom" if y > 0 else "top")
    solve = partial(regularised_equilibrium, world.preferences, world.ref_logps)
    ends = torch.cat([solve(beta=beta)[0].exp() for beta in torch.logspace(1, -3, 70).tolist()])
    style = {"color": GREEN, "label": r"equilibrium, $\beta$ from $\infty$ to 0"}
    axis.plot(*_plane(ends), linewidth=6, alpha=0.35, **style)
    axis.plot(*_plane(ends[-1:]), "*", color=GREEN, markersize=20, label="von Neumann's winner")
    for name, (colour, line, size) in ((n, WAYS[n]) for n in WAYS if n in paths):
        p = paths[name].exp()
        axis.plot(*_plane(p), line, color=colour, label=f"{name}, to its end")
        axis.plot(*_plane(p[-1:]), "o", color=colour, markersize=size)
    axis.plot(*_plane(world.ref_logps.exp()), "s", color="black", markersize=8, label=r"$\pi_{\rm ref}$")
    axis.set_aspect("equal")
    axis.axis("off")


def _bars(axis, world, rows: list[dict]) -> None:
    axis.set_title(world.name[-40:])
    names, shown = world.completions[:12], [row for row in rows if "winner" not in row["policy"]]
    for k, row in enumerate(shown):
        places = [y + 0.8 * k / len(shown) for y in range(len(names))]
        values = [row[f"p({name})"] for name in names]
        axis.barh(places, values, 0.8 / len(shown), label=row["policy"].split(",")[0])
    axis.set_yticks([y + 0.4 for y in range(len(names))], [name[:20] for name in names])
    axis.invert_yaxis()
    axis.set_xlabel("probability")
