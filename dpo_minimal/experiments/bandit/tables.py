"""Worlds that people bring: CSV files of rewards or of comparisons, checked row by row."""

from __future__ import annotations

import csv
import io
import math
from pathlib import Path
from typing import NamedTuple

import torch
from torch.nn.utils.rnn import pad_sequence

from ...bandit import Bandit
from ...preferences import Rankings, tally
from ...text.files import read_bytes
from ...validation import InputError


def load_table(path: str | Path) -> Bandit:
    """Read a world with columns prompt, completion, reward and, optionally, reference.

    The reference is a probability or a count, made to sum to one for each prompt; where the column is
    absent it is uniform. Prompts may have different numbers of completions.

    Raises InputError naming file, row and field: a missing column, an empty name, a completion listed
    twice for its prompt, a number that is not finite, a reference that is not positive, a prompt with
    fewer than two completions.
    """
    cells: dict[str, dict[str, tuple[float, float]]] = {}
    for row in _rows(path, required=("prompt", "completion", "reward"), optional=("reference",)):
        prompt, completion = row.name("prompt"), row.name("completion")
        if completion in cells.setdefault(prompt, {}):
            raise row.error("completion", f"{completion!r} is listed twice for prompt {prompt!r}")
        reference = row.number("reference", positive=True) if "reference" in row.cells else 1.0
        cells[prompt][completion] = (reference, row.number("reward"))
    for prompt, completions in cells.items():
        if len(completions) < 2:
            raise InputError(f"{path}: prompt {prompt!r} has only one completion; give it two or more.")
    tables = [torch.tensor([*completions.values()], dtype=torch.float64) for completions in cells.values()]
    reference, rewards = pad_sequence(tables, batch_first=True).unbind(-1)  # zero where there is none
    return Bandit(reference.log().log_softmax(-1), rewards, tuple(cells), tuple(map(tuple, cells.values())))


def load_comparisons(path: str | Path) -> tuple[Bandit, Rankings]:
    """Read real comparisons with columns prompt, winner, loser and, optionally, count.

    Returns (world, rankings): completions in order of first appearance, a uniform reference, rewards zero
    because they are unknown; the rankings are the comparisons with their counts.

    Raises InputError naming file, row and field: a missing column, an empty name, a completion compared
    with itself, a count that is not positive.
    """
    place: dict[str, int] = {}  # prompt -> its number
    numbers: dict[str, dict[str, int]] = {}  # prompt -> completion -> its number
    prompts, orders, counts = [], [], []
    for row in _rows(path, required=("prompt", "winner", "loser"), optional=("count",)):
        prompt, winner, loser = row.name("prompt"), row.name("winner"), row.name("loser")
        if winner == loser:
            raise row.error("loser", f"{loser!r} is compared with itself")
        prompts.append(place.setdefault(prompt, len(place)))
        known = numbers.setdefault(prompt, {})
        orders.append([known.setdefault(name, len(known)) for name in (winner, loser)])
        counts.append(row.number("count", positive=True) if "count" in row.cells else 1.0)
    ones = [torch.ones(len(known), dtype=torch.float64) for known in numbers.values()]
    ref_logps = pad_sequence(ones, batch_first=True).log().log_softmax(-1)
    names = tuple(map(tuple, numbers.values()))
    world = Bandit(ref_logps, torch.zeros_like(ref_logps), tuple(numbers), names)
    counts = torch.tensor(counts, dtype=torch.float64)
    return world, tally(torch.tensor(prompts), torch.tensor(orders), counts)


class _Row(NamedTuple):
    """One row of a CSV file, which knows where it stands when something is wrong with it."""

    place: str
    cells: dict[str, str]

    def error(self, field: str, problem: str) -> InputError:
        return InputError(f"{self.place}, column {field!r}: {problem}.")

    def name(self, field: str) -> str:
        if not self.cells[field]:
            raise self.error(field, "is empty; give it a name")
        return self.cells[field]

    def number(self, field: str, *, positive: bool = False) -> float:
        try:
            value = float(self.cells[field])
        except ValueError:
            raise self.error(field, f"{self.cells[field]!r} is not a number") from None
        if not math.isfinite(value) or (positive and value <= 0):
            kind = "a positive finite number" if positive else "a finite number"
            raise self.error(field, f"{self.cells[field]!r} is not {kind}")
        return value


def _rows(path: str | Path, *, required: tuple[str, ...], optional: tuple[str, ...]) -> list[_Row]:
    try:
        text = io.StringIO(read_bytes(path).decode(), newline="")
        reader = csv.reader(text, strict=True)
        header = [cell.strip() for cell in next(reader, [])]
        lines = [(reader.line_num, [cell.strip() for cell in cells]) for cells in reader]
    except UnicodeDecodeError:
        raise InputError(f"{path}: is not UTF-8 text; save it as CSV in UTF-8.") from None
    except csv.Error as error:
        raise InputError(f"{path}: is not valid CSV ({error}).") from None
    if missing := [column for column in required if column not in header]:
        raise InputError(
            f"{path}: column {missing[0]!r} is missing; the first line must name the columns "
            f"{', '.join(required)} and may name {', '.join(optional)}."
        )
    if repeated := [column for column in header if header.count(column) > 1]:
        raise InputError(f"{path}: column {repeated[0]!r} appears twice; keep one.")
    rows = [_Row(f"{path}, line {number}", cells) for number, cells in lines if any(cells)]
    for place, cells in rows:
        if len(cells) != len(header):
            raise InputError(
                f"{place}: {len(cells)} cells where the header has {len(header)}; "
                "quote cells that hold commas."
            )
    if not rows:
        raise InputError(f"{path}: has no rows below its header.")
    return [_Row(place, dict(zip(header, cells))) for place, cells in rows]
