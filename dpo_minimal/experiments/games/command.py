"""`python -m dpo_minimal games`: preferences without a reward, and where each method takes them.

Where a beats b, b beats c and c beats a, no reward explains the preferences, and there is no pi*. What there
is instead: the equilibrium of a game, the one policy that no other beats by more than it pays in KL.

  python -m dpo_minimal games                             rock-paper-scissors, and a partly cyclic world
  python -m dpo_minimal games --preferences matrix.csv    columns completion, each completion's name and, if
                                                          not uniform, reference; or a matrix in JSON
  python -m dpo_minimal games --preferences battles.csv   comparisons, as bandit --comparisons reads them

All are trained from the reference on all pairs with their exact probabilities, DPO at 4 beta, since near even
a log-odds is four times a win probability. `bound` is what a policy itself proves about KL(pi || pi*).
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from functools import partial
from itertools import accumulate, repeat
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from ...bandit import TabularPolicy, dpo_objective, safe_learning_rate
from ...certificates import maximum_likelihood
from ...closed_form import kl_divergence, optimal_logps
from ...laws import games
from ...preferences import win_counts
from ...text.files import read_bytes, read_rows
from ...text.runs import refuse_used_folder, write_json
from ...train import train
from ...validation import InputError, check_positive
from ..bandit.tables import load_comparisons, read_table, table_rows
from ..options import RUN, Option, add_options, resolve
from ..study import run_folder, table, write_csv
from . import figure

OPTIONS = {
    "options": {
        "preferences": Option(
            "probabilities that the row's completion is preferred to the column's, or comparisons (default: "
            "two worlds of three completions)", str, metavar="FILE",
        ),
        "beta": Option("of the KL penalty, win probability per nat", float, 0.1, check=check_positive),
        "steps": Option("of each training, at most", int, 10_000),
        "output_dir": RUN["output_dir"],
    }
}  # fmt: skip
add_arguments = partial(add_options, groups=OPTIONS)
ENOUGH = 1e-9  # nats of KL, at which a training ends
COLUMNS = [
    ("policy", "<24", ""), ("probabilities", "<18", ""), ("wins", ">6", ".1%"), ("gap", ">8", ".1e"),
    ("KL(p|p*)", ">8", ".1e"), ("bound", ">8", ".1e"),
]  # fmt: skip


class World(NamedTuple):
    """A game: its name, its completions, log pi_ref (1, Y) and preferences (1, Y, Y)."""

    name: str
    completions: tuple[str, ...]
    ref_logps: Tensor
    preferences: Tensor


def world_of(name: str, completions, preferences, reference=None) -> World:
    """The world of a matrix and of a reference in probabilities or counts. Raises InputError for bad ones."""
    try:
        if len(completions) < 2:
            raise InputError("has only one completion; give it two or more.")
        if uneven := [row for row in preferences if len(row) != len(completions)]:
            raise InputError(f"a row has {len(uneven[0])} numbers, but there are {len(completions)} rows.")
        tables = reference or [1.0] * len(completions), preferences
        reference, P = (torch.tensor([t], dtype=torch.float64) for t in tables)
        world = World(name, tuple(completions), reference.log().log_softmax(-1), P)
        games.best_response(P, world.ref_logps, world.ref_logps, beta=1.0)  # checks both
    except (ValueError, OverflowError) as error:  # too large a number, and InputError
        raise InputError(f"{name}: {error}") from None
    return world


def default_worlds() -> list[World]:
    """Rock-paper-scissors, and a world where DPO and von Neumann's winner disagree on what is best."""
    cycle = [[0.5, 0.0, 1.0], [1.0, 0.5, 0.0], [0.0, 1.0, 0.5]]
    first = world_of("rock, paper, scissors", ("rock", "paper", "scissors"), cycle, [0.7, 0.2, 0.1])
    partly = [[0.5, 0.9, 0.4], [0.1, 0.5, 0.7], [0.6, 0.3, 0.5]]
    return [first, world_of("partly cyclic", "abc", partly, [0.3, 0.5, 0.2])]


def load_worlds(path: str) -> list[World]:
    """One world of a matrix; or one of each prompt of comparisons, from their win rates."""
    if read_bytes(path).lstrip()[:1] == b"[":
        rows = [parse() for _, parse in read_rows(path)]
        if all(isinstance(row, list) and {*map(type, row)} <= {int, float} for row in rows):
            return [world_of(path, [f"y{y}" for y in range(len(rows))], rows)]
    _, header, _ = read_table(path)
    if "completion" in header:
        rows = table_rows(path, [tuple(header)])
        names = [row.name("completion") for row in rows]
        if sorted(map(str.lower, names)) != sorted({*header} - {"completion", "reference"}):
            raise InputError(f"{path}: must have a row and a column of each completion's name; rename them.")
        matrix = [[row.number(name.lower()) for name in names] for row in rows]
        return [world_of(path, names, matrix, [row.number("reference") for row in rows])]
    world, data = load_comparisons(path)
    print("A pair that was never compared is taken for even, and the reference for uniform.\n")
    wins = win_counts(data, *world.exists.shape)
    rates = torch.where(wins + wins.mT > 0, wins / (wins + wins.mT), 0.5)
    each = zip(world.prompts, world.completions, rates)
    return [world_of(x, names, P[: len(names), : len(names)].tolist()) for x, names, P in each]


def run(args: argparse.Namespace) -> Path:
    """Solve and train every world, print its table, write the run folder, which is returned."""
    torch.set_num_threads(1)
    options = resolve(args, OPTIONS)
    refuse_used_folder(args.output_dir)
    worlds = default_worlds() if options.preferences is None else load_worlds(options.preferences)
    rows, ways = [], []
    for world in worlds:
        policies, paths = policies_of(world, options.beta, options.steps)
        ways.append(paths)
        found = [measured(world, name, logps, options.beta) for name, logps in policies.items()]
        values = [[*row.values()][1:] for row in found]
        cells = [[name, " ".join(f"{p:.3f}" for p in v[4:7]), *v[:4]] for name, *v in values]
        title = f"{world.name}: the probabilities are of {', '.join(world.completions[:3])}"
        print(f"{title}; beta = {options.beta:g}", *table(COLUMNS, cells, "  "), "", sep="\n", flush=True)
        rows += found
    folder = run_folder("games", vars(options))
    write_json(folder / "result.json", rows)
    write_csv(folder / "table.csv", rows)
    figure.games_figure(worlds, ways, rows, folder / "games.png")
    print(f"Wrote {folder}/games.png, result.json, table.csv and config.json.")
    return folder


def policies_of(world: World, beta: float, steps: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Every policy of the table, log pi (1, Y), and the paths of those that are trained, (T, Y)."""
    _, _, ref, P = world

    def bound(logps: Tensor) -> float:
        return games.duality_gap(P, logps, ref, beta=beta).item() / (2 * beta)

    pairs, most = games.game_pairs(P), games.copeland_scores(P)
    mirrored = accumulate(
        repeat(None), lambda logps, _: games.nash_md_step(P, logps, ref, beta=beta), initial=ref
    )
    online = partial(games.online_ipo_objective, ref_logps=ref, preferences=P, beta=beta)
    rate = 4 * beta**2 / (1 + 4 * beta**2)  # beta times the step of Nash-MD, which has this direction
    paths = {
        "Nash-MD": _path("Nash-MD", mirrored, steps, bound),
        "online IPO": _path("online IPO", _descent(ref, online, rate), steps, bound),
    }
    try:
        projection = optimal_logps(ref, maximum_likelihood(pairs, ref > -math.inf), beta=4 * beta)
        rate = safe_learning_rate(pairs, beta=4 * beta) / 10  # slow, for a path that can be seen
        dpo = lambda logps: dpo_objective(logps, ref, pairs, beta=4 * beta)[0]  # noqa: E731
        to_end = lambda logps: kl_divergence(logps, projection).item()  # noqa: E731
        paths["DPO"] = _path("DPO", _descent(ref, dpo, rate), steps, to_end)
    except InputError as error:
        print(f"{world.name}: no row for DPO, because {error}")
    policies = {
        "reference": ref,
        "Borda: offline IPO's end": optimal_logps(ref, games.borda_scores(P), beta=beta),
        "Copeland's winner": torch.where(most > most.max() - 1e-12, 0, -math.inf).double().log_softmax(-1),
        "von Neumann's winner": games.von_neumann_winner(P),
        "equilibrium": games.regularised_equilibrium(P, ref, beta=beta)[0],
    }
    return policies | {f"{name}, steps: {len(p) - 1}": p[-1:] for name, p in paths.items()}, paths


def _descent(ref: Tensor, objective, rate: float) -> Iterator[Tensor]:
    """Gradient descent on a table: the reference, and the policy after each step."""
    policy = TabularPolicy(ref)
    optimizer = torch.optim.SGD(policy.parameters(), lr=rate)
    yield ref
    for _ in train(lambda _: (objective(policy()), {}), optimizer, repeat(None)):
        yield policy().detach()


def _path(name: str, policies: Iterator[Tensor], steps: int, distance) -> Tensor:
    """The policies up to the first within a distance of `ENOUGH`, or of so many steps (T, Y)."""
    path = [next(policies)]
    with tqdm(total=steps, desc=name, disable=None, leave=False) as bar:
        while len(path) <= steps and distance(path[-1]) > ENOUGH:
            path.append(next(policies))
            bar.update()
    return torch.cat(path)


def measured(world: World, policy: str, logps: Tensor, beta: float) -> dict[str, object]:
    """A row: how often it beats the equilibrium, its gap, its divergence and the bound, its probabilities."""
    star, _ = games.regularised_equilibrium(world.preferences, world.ref_logps, beta=beta)
    gap = games.duality_gap(world.preferences, logps, world.ref_logps, beta=beta).item()
    row = {"win_rate": (logps.exp() @ world.preferences[0] @ star.exp().mT).item(), "gap": gap}
    row |= {"kl": kl_divergence(logps, star).item(), "kl_bound": gap / (2 * beta)}
    shares = {f"p({name})": p for name, p in zip(world.completions, logps[0].exp().tolist())}
    return {"world": world.name, "policy": policy, **row, **shares}
