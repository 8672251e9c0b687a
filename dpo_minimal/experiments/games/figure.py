"""games.png: the paths of DPO, Nash-MD and online IPO over the simplex of three completions."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from ...bench.figures import BLUE, GREEN, GREY, ORANGE, RED, panels
from ...laws.games import regularised_equilibrium

WAYS = {"DPO": (RED, "-"), "Nash-MD": (BLUE, "-"), "online IPO": (ORANGE, "--")}


def games_figure(worlds: list, ways: list[dict[str, Tensor]], rows: list[dict], path: Path) -> None:
    """A panel a world: a simplex where it has three completions, probabilities as bars where it has more."""
    with panels(path, 1, len(worlds), figsize=(8 * len(worlds), 7.6), squeeze=False) as (figure, axes):
        for axis, world, paths in zip(axes[0], worlds, ways):
            axis.set_title(world.name[:40])
            if len(world.completions) == 3:
                _simplex(axis, world, paths)
            else:
                _bars(axis, [row for row in rows if row["world"] == world.name])
        figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3)


def _plane(logps: Tensor) -> tuple[Tensor, Tensor]:
    """The first completion is the left corner, the second the right one, the third the top."""
    p = logps.exp()
    return p[:, 1] + p[:, 2] / 2, p[:, 2] * 3**0.5 / 2


def _simplex(axis, world, paths: dict[str, Tensor]) -> None:
    corners = torch.eye(3)[[0, 1, 2, 0]].log()
    axis.plot(*_plane(corners), color=GREY, linewidth=1.2)
    for name, corner, place in zip(world.completions, torch.eye(3).log(), ((-8, -8), (8, -8), (0, 8))):
        x, y = (float(c) for c in _plane(corner[None]))
        align = {"ha": "center", "va": "bottom" if y else "top"}
        axis.annotate(name[:20], (x, y), place, textcoords="offset points", **align)
    for name, found in paths.items():
        colour, line = WAYS[name]
        axis.plot(*_plane(found), line, color=colour, label=name)
        axis.plot(*_plane(found[-1:]), "o", color=colour, markersize=11)
    betas = torch.logspace(1.5, -3, 80).tolist()
    P, ref = world.preferences, world.ref_logps
    ends = torch.cat([regularised_equilibrium(P, ref, beta=beta)[0] for beta in betas])
    axis.plot(
        *_plane(ends), color=GREEN, linewidth=5, alpha=0.35, label=r"equilibrium, $\beta$ from $\infty$ to 0"
    )
    axis.plot(*_plane(ends[-1:]), "*", color=GREEN, markersize=20, label="von Neumann's winner")
    axis.plot(*_plane(ref), "s", color="black", markersize=11, label=r"$\pi_{\rm ref}$")
    axis.set_aspect("equal")
    axis.axis("off")


def _bars(axis, rows: list[dict]) -> None:
    names = [*rows[0]][6:][:12]
    for k, row in enumerate(rows):
        axis.barh(
            [y + 0.8 * k / len(rows) for y in range(len(names))],
            [row[n] for n in names],
            0.8 / len(rows),
            label=row["policy"],
        )
    axis.set_yticks([y + 0.4 for y in range(len(names))], [n[:20] for n in names])
    axis.invert_yaxis()
    axis.set_xlabel("probability")
