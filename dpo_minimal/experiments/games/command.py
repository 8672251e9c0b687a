"""`python -m dpo_minimal games`: preferences without a reward, and where each method takes them.

Where a beats b, b beats c and c beats a, no reward explains the preferences, and there is no pi*. What there
is instead is the equilibrium of a game: the one policy that no other beats by more than it pays in KL.

  python -m dpo_minimal games                             rock-paper-scissors, and a partly cyclic world
  python -m dpo_minimal games --preferences matrix.csv    columns completion, each completion's name and, if
                                                          not uniform, reference; or a matrix in JSON
  python -m dpo_minimal games --preferences battles.csv   comparisons, as bandit --comparisons reads them

DPO, Nash-MD and online IPO are trained from the reference, on all pairs with their exact probabilities, and
compared with the equilibrium. The bound on KL(pi || pi*) is proved from the policy alone.
"""

from __future__ import annotations

import argparse
import copy
import itertools
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ...bandit import TabularPolicy, dpo_objective, safe_learning_rate
from ...certificates import maximum_likelihood
from ...closed_form import kl_divergence, optimal_logps
from ...laws import games
from ...policy import EnumeratedPolicy, enumerate_completions
from ...preferences import win_counts
from ...text.files import read_bytes, read_rows
from ...text.runs import new_run_folder, refuse_used_folder, versions, write_json
from ...train import train
from ...validation import InputError, check_range
from ..bandit import convergence
from ..bandit.fit import float64_table
from ..bandit.tables import _read, load_comparisons
from ..options import RUN, Option, add_options, resolve
from ..study import table, write_csv
from . import figure

OPTIONS = {
    "world": {
        "preferences": Option(
            "a matrix of the probabilities that the row's completion is preferred to the column's, or "
            "comparisons (default: two worlds of three completions)", str, metavar="FILE",
        ),
    },
    "training": {
        "beta": Option(
            "strength of the KL penalty, in win probability per nat, 0.01 to 1000", float, 0.1,
            check=lambda flag, beta: check_range(flag, beta, 0.01, 1e3, "beyond, training takes too long"),
        ),
        "steps": Option("at most, of each training of a table", int, 10_000),
    },
    "run": {"output_dir": RUN["output_dir"], "quick": Option("leave out the GPT", bool)},
}  # fmt: skip
add_arguments = partial(add_options, groups=OPTIONS)
ENOUGH, GPT_STEPS = 1e-9, 600  # nats of KL, at which the training of a table ends


class World(NamedTuple):
    """A game: its name, its completions, log pi_ref (1, Y) and preferences (1, Y, Y)."""

    name: str
    completions: tuple[str, ...]
    ref_logps: Tensor
    preferences: Tensor


def world_of(name: str, completions: tuple[str, ...], reference, preferences) -> World:
    """The world of a reference in probabilities or counts, and of a matrix."""
    tables = (torch.as_tensor(numbers, dtype=torch.float64)[None] for numbers in (reference, preferences))
    reference, preferences = tables
    return World(name, completions, reference.log().log_softmax(-1), preferences)


def default_worlds() -> list[World]:
    """Rock-paper-scissors, and a world where DPO puts first what the equilibrium hardly ever answers."""
    cyclic = [[0.5, 0.0, 1.0], [1.0, 0.5, 0.0], [0.0, 1.0, 0.5]]
    partly = [[0.5, 0.9, 0.4], [0.1, 0.5, 0.7], [0.6, 0.3, 0.5]]
    return [
        world_of("rock, paper, scissors", ("rock", "paper", "scissors"), [0.7, 0.2, 0.1], cyclic),
        world_of("partly cyclic", ("a", "b", "c"), [0.3, 0.5, 0.2], partly),
    ]


def load_worlds(path: str) -> list[World]:
    """One world of a matrix; or one of each prompt of comparisons, from their win rates."""
    if read_bytes(path).lstrip()[:1] == b"[":
        rows = [parse() for _, parse in read_rows(path)]
        if all(isinstance(row, list) and {*map(type, row)} <= {int, float} for row in rows):
            if {*map(len, rows)} != {len(rows)}:
                raise InputError(f"{path}: must be a square matrix, with as many numbers a row as rows.")
            return [
                world_of(Path(path).stem, tuple(f"y{y}" for y in range(len(rows))), [1] * len(rows), rows)
            ]
    _, header, lines = _read(path)
    if "completion" in header:
        rows = [dict(zip(header, cells)) for _, cells in lines]
        names = tuple(str(row["completion"]) for row in rows)
        try:
            matrix = [[float(row[name.lower()]) for name in names] for row in rows]
            return [
                world_of(Path(path).stem, names, [float(row.get("reference", 1)) for row in rows], matrix)
            ]
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"{path}: needs a column of numbers for each completion ({error}).") from None
    world, data = load_comparisons(path)
    if len(world.prompts) > 4:
        raise InputError(f"{path}: has {len(world.prompts)} prompts; leave all but 4 of them out.")
    print("A pair that was never compared is taken for even, and the reference for uniform.\n")
    wins = win_counts(data, *world.exists.shape)
    rates = torch.where(wins + wins.mT > 0, wins / (wins + wins.mT), 0.5)
    sizes = map(len, world.completions)
    each = zip(world.prompts, world.completions, sizes, rates)
    return [world_of(prompt, names, [1] * size, P[:size, :size]) for prompt, names, size, P in each]


def run(args: argparse.Namespace) -> Path:
    """Solve and train every world, print its table, write the run folder, which is returned."""
    torch.set_num_threads(1)
    options = resolve(args, OPTIONS)
    refuse_used_folder(args.output_dir)
    worlds = default_worlds() if options.preferences is None else load_worlds(options.preferences)
    rows, ways, beta = [], [], options.beta
    for world in worlds:
        policies, paths = policies_of(world, beta, options.steps)
        ways.append(paths)
        measures = [measured(world, logps, beta, policy=name) for name, logps in policies.items()]
        rows += _said(f"{world.name}: {', '.join(world.completions[:8])}; beta = {beta:g}", measures)
    if not options.quick and options.preferences is None:
        rows += _said("a GPT: 21 completions of each of 4 prompts, random preferences", trained_gpts(beta))
    folder = new_run_folder(args.output_dir, "games")
    write_json(folder / "config.json", {"command": "games", **vars(options), **versions()})
    write_json(folder / "result.json", rows)
    write_csv(folder / "table.csv", rows)
    figure.games_figure(worlds, ways, rows, folder / "games.png")
    print(f"Wrote {folder}/games.png, result.json, table.csv and config.json.")
    return folder


# ------------------------------------------------------------------------------------------- training


def policies_of(world: World, beta: float, steps: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Every policy of the table, log pi (1, Y), and the paths of those that are trained, (T, Y)."""
    P, ref = world.preferences, world.ref_logps
    pairs, uniform = games.game_pairs(P), torch.zeros_like(ref).log_softmax(-1)
    gap = lambda logps: games.duality_gap(P, logps, ref, beta=beta).item() / (2 * beta)  # noqa: E731
    copeland = games.copeland_scores(P)
    winners = torch.where(copeland > copeland.max() - 1e-12, 0.0, -torch.inf).double().log_softmax(-1)
    policies, paths = {"reference": ref}, {}
    try:
        projection = optimal_logps(ref, maximum_likelihood(pairs, ref > -torch.inf), beta=beta)
        policies["DPO: reward r, pi_ref exp(r / beta) / Z"] = projection
        far = lambda logps: kl_divergence(logps, projection).item()  # noqa: E731
        rate = safe_learning_rate(pairs, beta=beta)
        paths["DPO"] = _descend(ref, partial(dpo_objective, rankings=pairs, beta=beta), rate, steps, far)
    except InputError as error:
        print(f"{world.name}: {error}")
    policies |= {
        "IPO: Borda b, pi_ref exp(b / beta) / Z": games.best_response(P, uniform, ref, beta=beta),
        "Copeland's winner": winners,
        "von Neumann's winner": games.von_neumann_winner(P),
        "equilibrium": games.regularised_equilibrium(P, ref, beta=beta)[0],
    }
    path = [ref]
    while len(path) <= steps and gap(path[-1]) > ENOUGH:
        path.append(games.nash_md_step(P, path[-1], ref, beta=beta))
    paths["Nash-MD"] = torch.cat(path)
    rate = 4 * beta**2 / (1 + 4 * beta**2)  # beta times the step of Nash-MD, whose direction this is
    online = lambda logps, ref: (games.online_ipo_objective(logps, ref, P, beta=beta), None)  # noqa: E731
    paths["online IPO"] = _descend(ref, online, rate, steps, gap)
    trained = {f"{name}, {len(found) - 1} steps": found[-1:] for name, found in paths.items()}
    return policies | trained, paths


def _descend(ref: Tensor, objective: Callable, rate: float, steps: int, distance: Callable) -> Tensor:
    """The path of gradient descent on a table, from the reference to a distance of `ENOUGH` (T, Y)."""
    policy = TabularPolicy(ref)
    optimizer = torch.optim.SGD(policy.parameters(), lr=rate)
    path = [ref]
    for _ in train(lambda _: (objective(policy(), ref)[0], {}), optimizer, itertools.repeat(None, steps)):
        path.append(policy().detach())
        if distance(path[-1]) < ENOUGH:
            break
    return torch.cat(path)


def trained_gpts(beta: float, *, max_length: int = 2, steps: int = GPT_STEPS, seed: int = 0) -> list[dict]:
    """Nash-MD, against mixtures with the reference, and online IPO on a GPT all of whose completions are
    enumerated: the worst prompt's measures."""
    settings = convergence.Settings(beta, 0, 0, steps, seed, "cpu")
    gpt, prompts, _, _, _ = convergence.gpt_world(settings)
    completions = enumerate_completions(convergence.VOCAB, max_length, convergence.EOS)
    ref = float64_table(EnumeratedPolicy(gpt, prompts, completions))
    noise = torch.randn(*ref.shape, ref.shape[-1], generator=torch.Generator().manual_seed(seed)).double()
    world = World("gpt", (), ref, torch.sigmoid(2 * (noise - noise.mT)))
    P, mixture = world.preferences, 0.25
    found = [measured(world, ref, beta, policy="reference")]
    for name in ("Nash-MD", "online IPO"):
        policy = EnumeratedPolicy(copy.deepcopy(gpt), prompts, completions)
        optimizer = torch.optim.Adam(policy.parameters(), lr=0.01, betas=(0.9, 0.95), eps=1e-8 * beta)
        schedule = lambda step: convergence.gpt_schedule(step, steps)  # noqa: E731
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
        if name == "Nash-MD":  # its mixtures end at the equilibrium of the penalty over 1 - mixture
            options = {"beta": beta * (1 - mixture), "mixture": mixture}
            objective = partial(games.self_play_objective, preferences=P, **options)
        else:
            objective = partial(games.online_ipo_objective, preferences=P.float(), beta=beta)
        step = lambda _: (objective(policy(), ref.float()), {})  # noqa: B023, E731
        for _ in train(step, optimizer, itertools.repeat(None, steps), scheduler=scheduler):
            pass
        logps = float64_table(policy)
        if name == "Nash-MD":
            logps = ((1 - mixture) * logps + mixture * ref).log_softmax(-1)
        found.append(measured(world, logps, beta, policy=f"{name}, {steps} steps"))
    return found


# ------------------------------------------------------------------------------------------- reporting

COLUMNS = [
    ("policy", "<40", ""), ("probabilities", "<18", ""), ("wins", ">6", ".1%"), ("gap", ">8", ".1e"),
    ("KL(p|p*)", ">8", ".1e"), ("bound", ">8", ".1e"),
]  # fmt: skip


def measured(world: World, logps: Tensor, beta: float, *, policy: str) -> dict[str, object]:
    """A row: how often it wins of the equilibrium, its gap, its divergence, the bound; of the worst prompt."""
    star, _ = games.regularised_equilibrium(world.preferences, world.ref_logps, beta=beta)
    wins = (logps.exp().unsqueeze(-2) @ world.preferences @ star.exp().unsqueeze(-1)).min().item()
    gap = games.duality_gap(world.preferences, logps, world.ref_logps, beta=beta).max().item()
    row = {"world": world.name, "policy": policy, "wins": wins, "gap": gap}
    row |= {"kl": kl_divergence(logps, star).max().item(), "bound": gap / (2 * beta)}
    return row | dict(zip(world.completions, logps[0].exp().tolist()))


def _said(title: str, rows: list[dict]) -> list[dict]:
    """The same rows, after their table was printed."""
    cells = [
        [row["policy"], " ".join(f"{p:.3f}" for p in [*row.values()][6:9]) or "-", *[*row.values()][2:6]]
        for row in rows
    ]
    print("\n".join([title, *table(COLUMNS, cells, "  "), ""]), flush=True)
    return rows
