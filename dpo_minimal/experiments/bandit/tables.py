"""Worlds that people bring: files of rewards or of comparisons, CSV or JSON, checked row by row."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.nn.utils.rnn import pad_sequence

from ...bandit import Bandit
from ...preferences import Rankings, tally
from ...text.files import read_bytes, read_cells, read_rows
from ...validation import InputError

GAMES, ARENA = ("winner", "loser"), ("model_a", "model_b", "winner")  # columns of comparisons
SHARES = {"modela": 1.0, "a": 1.0, "modelb": 0.0, "b": 0.0}  # of the win that goes to model_a
SHARES |= dict.fromkeys(["tie", "tiebothbad", "bothbad", "draw"], 0.5)  # letters only
SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars"}
NUMBERS = {  # what they must be, the least and the largest
    "reward": ("a finite number", -math.inf, math.inf),
    "reference": ("a positive finite number", 5e-324, math.inf),
    "count": ("a number from 0 to 1e15, to which float64 can count", 0, 1e15),
}


def load_table(path: str | Path) -> Bandit:
    """Read a world with columns prompt, completion, reward and, optionally, reference.

    The reference is a probability or a count, made to sum to one for each prompt; where the column is
    absent it is uniform. Prompts may have different numbers of completions.

    Raises InputError naming file, row and field: a missing column, an empty name, a completion listed
    twice for its prompt, a number that is not finite, a reference that is not positive, a prompt with
    fewer than two completions.
    """
    cells: dict[str, dict[str, tuple[float, float]]] = {}
    for row in table_rows(path, [("prompt", "completion", "reward")], "reference"):
        prompt, completion = row.name("prompt"), row.name("completion")
        if completion in cells.setdefault(prompt, {}):
            raise row.error("completion", f"{completion!r} is listed twice for prompt {prompt!r}")
        cells[prompt][completion] = (row.number("reference"), row.number("reward"))
    for prompt, completions in cells.items():
        if len(completions) < 2:
            raise InputError(f"{path}: prompt {prompt!r} has only one completion; give it two or more.")
    tables = [torch.tensor([*completions.values()], dtype=torch.float64) for completions in cells.values()]
    reference, rewards = pad_sequence(tables, batch_first=True).unbind(-1)  # zero where there is none
    return Bandit(reference.log().log_softmax(-1), rewards, tuple(cells), tuple(map(tuple, cells.values())))


def load_comparisons(path: str | Path) -> tuple[Bandit, Rankings]:
    """Read real comparisons: columns winner and loser, or an arena's, whose ties are half a win each way;
    without a column prompt all are of one prompt, without a column count each counts once.

    Returns (world, rankings): completions in order of first appearance, a uniform reference, rewards zero
    because they are unknown; the rankings are the comparisons with their counts.

    Raises InputError naming file, row and field: a missing column, an empty name, a completion compared
    with itself, an unknown winner, a count that is not between 0 and 1e15.
    """
    rows = table_rows(path, [GAMES, ARENA], "prompt", "count")
    games = [_game(row) for row in rows]
    if ties := sum(won == lost > 0 for *_, won, lost in games):
        print(f"Ties, which are half a win each way: {ties}.")
    if zeros := sum(won == lost == 0 for *_, won, lost in games):
        print(f"Rows with a count of 0, which are left out: {zeros}.")
        games = [game for game in games if game[-2:] != (0, 0)]
    if not games:
        raise InputError(f"{path}: every count is 0; add comparisons.")
    times = Counter(prompt for prompt, *_ in games)
    names = {name for _, *pair, _, _ in games for name in pair}
    if "prompt" not in rows[0].cells:
        print("No column 'prompt': all comparisons are of one prompt.")
    elif 2 * sum(n == 1 for n in times.values()) > len(times) > 1 and len(names) <= len(games):
        if "loser" in rows[0].cells:
            print("Each prompt is ranked by itself; to rank over all of them, delete the column 'prompt'.")
        else:
            print("Most prompts have a single battle: the models are ranked over all prompts together.")
            games = [("all", *game[1:]) for game in games]

    numbers: dict[str, tuple[int, dict[str, int]]] = {}  # prompt -> its number, its completions' numbers
    outcomes = []  # prompt, winner, loser, count
    for prompt, one, other, won, lost in games:
        x, known = numbers.setdefault(prompt, (len(numbers), {}))
        i, j = (known.setdefault(name, len(known)) for name in (one, other))
        outcomes += [outcome for outcome in ((x, i, j, won), (x, j, i, lost)) if outcome[-1] > 0]
    _say_alike(numbers)
    _say_alike(names)
    ones = [torch.ones(len(known), dtype=torch.float64) for _, known in numbers.values()]
    ref_logps = pad_sequence(ones, batch_first=True).log().log_softmax(-1)
    completions = tuple(tuple(known) for _, known in numbers.values())
    world = Bandit(ref_logps, torch.zeros_like(ref_logps), tuple(numbers), completions)
    prompts, winners, losers, counts = zip(*outcomes)
    order, counts = torch.tensor([winners, losers]).T, torch.tensor(counts, dtype=torch.float64)
    return world, tally(torch.tensor(prompts), order, counts)


def _game(row: TableRow) -> tuple[str, str, str, float, float]:
    """Prompt, two completions, how often the first won and how often the second."""
    prompt = row.name("prompt") if "prompt" in row.cells else "all"
    columns = GAMES if "loser" in row.cells else ARENA
    one, other, winner, count = *map(row.name, (*columns[:2], "winner")), row.number("count")
    if one == other:
        raise row.error(columns[1], f"{one!r} is compared with itself; a tie is two rows of count 0.5")
    share = {one: 1.0, other: 0.0}.get(winner, SHARES.get(re.sub(r"[\W_]", "", winner).lower()))
    if share is None:
        raise row.error("winner", f"{winner!r} does not say who won; write model_a, model_b or tie")
    return prompt, one, other, share * count, (1 - share) * count


def _say_alike(names: Iterable[str]) -> None:
    alike: dict[str, list[str]] = {}
    for name in sorted(names):
        alike.setdefault(" ".join(name.split()).casefold(), []).append(repr(name))
    if same := "; ".join(" and ".join(group) for group in alike.values() if len(group) > 1):
        print(f"Names that differ only by case or white space are kept apart: {same[:200]}.")


class TableRow(NamedTuple):
    """One row of a file, which knows where it stands when something is wrong with it."""

    place: str
    cells: dict[str, Any]
    separator: str

    def error(self, field: str, problem: str) -> InputError:
        return InputError(f"{self.place}, column {field!r}: {problem}.")

    def text(self, field: str) -> str:
        value = self.cells[field]
        if isinstance(value, list | dict):
            raise self.error(field, "holds several values; give one text or number")
        return "" if value is None or value != value else str(value).strip()  # NaN: a data frame's nothing

    def name(self, field: str) -> str:
        if not (text := self.text(field)):
            raise self.error(field, "is empty; give it a name")
        return text

    def number(self, field: str) -> float:
        """The number in a column, 1 where there is no such column."""
        if field not in self.cells:
            return 1.0
        text, (kind, least, most) = self.text(field), NUMBERS.get(field, NUMBERS["reward"])
        # A comma has one meaning only between thousands in a file with commas, and elsewhere in another file.
        thousands = bool(re.fullmatch(r"[+-]?[1-9]\d{0,2}(,\d{3})+(\.\d+)?", text))
        clear = thousands == (self.separator == ",")
        try:
            value = float(text.replace(",", "" if thousands else ".") if clear else text)
        except ValueError:
            raise self.error(field, f"{text!r} is not a number; write it like 1234.5") from None
        if not (math.isfinite(value) and least <= value <= most):
            raise self.error(field, f"{text!r} is not {kind}")
        return value


def table_rows(path: str | Path, layouts: list[tuple[str, ...]], *optional: str) -> list[TableRow]:
    """Rows that have all columns of one of the layouts, the first of them where they have several."""
    separator, header, lines = read_table(path)
    needed = min(layouts, key=lambda layout: len({*layout} - {*header}))
    if missing := [column for column in needed if column not in header]:
        there, wanted = ", ".join(header)[:90], " or ".join(map(", ".join, layouts))
        raise InputError(
            f"{path}: column {missing[0]!r} is missing; there are {there!r}, needed are {wanted} and, if you "
            f"have them, {', '.join(optional)}."
        )
    if repeated := [column for column in header if column and header.count(column) > 1]:
        raise InputError(f"{path}: column {repeated[0]!r} appears twice; keep one.")
    for place, cells in lines:
        if len(cells) != len(header):
            sizes = f"{len(cells)} cells where the header has {len(header)}"
            raise InputError(f"{place}: {sizes}; quote cells that hold {SEPARATORS[separator]}.")
    if not lines:
        raise InputError(f"{path}: has no rows below its header.")
    if separator != ",":
        print(f"Columns are separated by {SEPARATORS[separator]}.")
    if unread := [column for column in header if column and column not in (*needed, *optional)]:
        print(f"Columns not read: {', '.join(repr(name)[1:-1] for name in unread)[:200]}.")
    return [TableRow(place, dict(zip(header, cells)), separator) for place, cells in lines]


def read_table(path: str | Path) -> tuple[str, list[str], list[tuple[str, list[Any]]]]:
    """The separator, the names of the columns in lower case, and the rows with their places."""
    data = read_bytes(path)
    if data.lstrip()[:1] in (b"[", b"{"):
        return ",", *_read_json(path)
    separator = max(SEPARATORS, key=data.partition(b"\n")[0].decode(errors="replace").count)
    _, header = next(lines := read_cells(path, data, separator), ("", []))
    stripped = ((place, [cell.strip() for cell in cells]) for place, cells in lines)
    rows = [(place, cells) for place, cells in stripped if any(cells)]
    return separator, [name.strip().lower() for name in header], rows


def _read_json(path: str | Path) -> tuple[list[str], list[tuple[str, list[Any]]]]:
    rows = [(place, parse()) for place, parse in read_rows(path)]
    for k, (place, row) in enumerate(rows):
        if isinstance(row, list) and len(row) in (2, 3):
            row = dict(zip((*GAMES, "count"), (*row, 1)))
        if not isinstance(row, dict):
            raise InputError(f"{place}: must be an object with named fields, or a list [winner, loser].")
        rows[k] = place, {name.strip().lower(): value for name, value in row.items()}
    header = [*dict.fromkeys(chain.from_iterable(row for _, row in rows))]
    return header, [(place, [row.get(name) for name in header]) for place, row in rows]
