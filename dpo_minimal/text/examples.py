"""Rows as token ids in flat arrays: 4 bytes an id, of which lists of Python's integers need up to 40.

But: what a row becomes, and which rows meet, is batches.py's business.
"""

from __future__ import annotations

import copy
from array import array
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, pairwise
from typing import Any, NamedTuple


class Example(NamedTuple):
    """One row as token ids.

    Its K completions are [chosen, rejected] of a pair, best first of a ranking, a single one of a
    demonstration or a labelled completion.
    """

    prompt: list[int]  # at least one token
    completions: list[list[int]]  # K, each with one end-of-text, its last token
    place: str  # where the row comes from, for messages
    label: bool | None = None  # True (good) or False (bad) of a labelled completion


class Examples(Sequence[Example]):
    """Rows that are made of the arrays when asked for; a slice, or those of some indices, share the arrays.

    >>> rows = Examples(Example([number], [[5, 0]], f"row {number}") for number in range(1, 9))
    >>> rows[[7, 3]][1]
    Example(prompt=[4], completions=[[5, 0]], place='row 4', label=None)
    """

    def __init__(self, rows: Iterable[Example] = ()):
        if isinstance(rows, Examples):
            vars(self).update(vars(rows[:]))
            return
        self._ids, self._ends = array("i"), array("q", [0])  # prompt, completions, next prompt, ...: parts
        self._firsts, self._facts = array("q", [0]), []  # of each row its first part, its place and label
        self._rows = array("q")  # which rows of the arrays are in the sequence
        for row in rows:
            self.append(row)

    def append(self, row: Example) -> None:
        for ids in (row.prompt, *row.completions):
            self._ids.extend(ids)
            self._ends.append(len(self._ids))
        self._firsts.append(len(self._ends) - 1)
        self._rows.append(len(self._facts))
        self._facts.append(row[2:])

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, int):
            row = self._as_arrays(self._rows[index])
            return Example(row.prompt.tolist(), [ids.tolist() for ids in row.completions], *row[2:])
        part = copy.copy(self)
        indices = range(len(self))[index] if isinstance(index, slice) else index
        part._rows = array("q", [self._rows[i] for i in indices])
        return part

    def __add__(self, other: Examples) -> Examples:
        if other._ids is not self._ids:
            return Examples(chain(self, other))
        both = self[:]
        both._rows.extend(other._rows)
        return both

    def as_arrays(self) -> Iterator[Example]:
        """The rows with arrays for lists, made faster: for the lengths and digests of all."""
        return map(self._as_arrays, self._rows)

    def _as_arrays(self, row: int) -> Example:
        ends = self._ends[self._firsts[row] : self._firsts[row + 1] + 1]
        prompt, *completions = (self._ids[start:end] for start, end in pairwise(ends))
        return Example(prompt, completions, *self._facts[row])
