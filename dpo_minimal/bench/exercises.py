"""What an exercise is, how its inputs are drawn, and the search for the smallest input that fails.

Inputs are Hypothesis strategies, so a counterexample is shrunk to the smallest one before it is shown. Hence
numbers are tenths and betas stand in an order of preference: a shrunk input should be easy to check on paper.
"""

from __future__ import annotations

import contextlib
import functools
import random
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from hypothesis import Phase, find, settings
from hypothesis import strategies as st
from hypothesis.errors import NoSuchExample
from torch import Tensor

Given = dict[str, Any]  # the arguments of one call, by name
SINGLE = 1e-5  # a hundred roundings of float32


class Strain(NamedTuple):
    """An input at which numbers leave the range of float64 unless one stays with logarithms.

    A right formula may overflow there: it is seen in the answer, and the message says so. A clamp, or a small
    number inside a logarithm, gives another finite number, which nobody sees: that is a mistake.
    """

    given: Given
    expected: Any  # written down, since what an exercise compares with overflows here as well


class Exercise(NamedTuple):
    """A function to be written, and what decides whether it is right."""

    number: str  # "3.1" is the first of notebook 3
    function: str  # the name that the answer has
    inputs: st.SearchStrategy[Given]  # the arguments of one call, in the order of the parameters
    # From the same arguments to what must come out: by brute force, an identity or autograd, never by the
    # formula that is asked for written a second time.
    expected: Callable[..., Any]
    source: str  # what `expected` does, in a few words that complete "expected, by ..."
    # From a mistake's name, as the message gives it, to the function that somebody with that mistake writes.
    mistakes: dict[str, Callable[..., Any]]
    # Largest error allowed, relative to one plus the size of what is expected. The default is a few million
    # roundings of float64: far above a right answer's error, far below any mistake's.
    within: float = 1e-9
    # For questions with many right answers: from (answer, **arguments) to what is wrong with it, or None. It
    # replaces the comparison with `expected`, which then is one right answer.
    complaint: Callable[..., str | None] | None = None
    strain: Strain | None = None
    central: bool = False  # one of the course's main results, for which five mistakes at least are known

    @property
    def points(self) -> int:
        """What a right answer is worth."""
        return 2 if self.central else 1


# ---------------------------------------------------------------------------------------------- numbers


def tenths(low: float = -5, high: float = 5) -> st.SearchStrategy[float]:
    """Numbers with one decimal between low and high; they shrink towards 0, or the end nearest to it."""
    return st.integers(round(10 * low), round(10 * high)).map(lambda n: n / 10)


@functools.cache  # a new strategy takes longer than a draw
def vector(size: int, low: float = -5, high: float = 5) -> st.SearchStrategy[Tensor]:
    """(size,) tenths, float64."""
    rows = st.tuples(*size * [st.integers(round(10 * low), round(10 * high))])  # the fastest to draw
    return rows.map(lambda row: torch.tensor([n / 10 for n in row], dtype=torch.float64))


def completion_logps(size: int, low: float = -5) -> st.SearchStrategy[Tensor]:
    """(size,) log-probabilities of completions, each below log 1/2, so that two sum to less than one."""
    return vector(size, low, -0.7)


def table(rows: int, columns: int, low: float = -5, high: float = 5) -> st.SearchStrategy[Tensor]:
    """(rows, columns) tenths, float64."""
    return vector(rows * columns, low, high).map(lambda flat: flat.view(rows, columns))


@functools.cache
def log_distribution(*shape: int) -> st.SearchStrategy[Tensor]:
    """Log-probabilities that sum to one along the last axis; they shrink to the uniform ones."""
    size = torch.Size(shape).numel()
    parts = st.tuples(*size * [st.integers(1, 20)])
    counts = parts.map(lambda flat: torch.tensor(flat, dtype=torch.float64).view(shape))
    return counts.map(lambda t: (t / t.sum(-1, keepdim=True)).log())


def betas() -> st.SearchStrategy[float]:
    """Strengths of the KL penalty; they shrink to 1, with which a counterexample is easiest to follow."""
    return st.sampled_from([1.0, 2.0, 0.5, 0.1, 3.0, 0.2, 5.0])


# ------------------------------------------------------------------------------------------ the search


def _search(tries: int, *phases: Phase) -> settings:
    """Set here and not taken from a Hypothesis profile, which would change what a check finds."""
    return settings(max_examples=tries, derandomize=False, database=None, deadline=None, phases=phases)


def smallest(
    strategy: st.SearchStrategy[Given], fails: Callable[[Given], Any], tries: int = 100
) -> Given | None:
    """The smallest input that fails, found and shrunk by Hypothesis; None where `tries` draws do not fail.

    Where one number decides how many others there are, shrinking stops too early. So the search begins again
    among inputs with fewer numbers, until none of them fails. The same function gets the same draws again.
    """
    best, found = None, _found(strategy, fails, tries)
    while found is not None:
        best, limit = found, _size(found)
        found = _found(strategy, lambda given, limit=limit: _size(given) < limit and fails(given), tries)
    return best


def _found(strategy: st.SearchStrategy[Given], fails: Callable[[Given], Any], tries: int) -> Given | None:
    try:
        return find(
            strategy, fails, settings=_search(tries, Phase.generate, Phase.shrink), random=random.Random(0)
        )
    except NoSuchExample:
        return None


def _size(given: Given) -> int:
    return sum(value.numel() for value in given.values() if isinstance(value, Tensor))


@functools.cache
def samples(strategy: st.SearchStrategy[Given], count: int = 30) -> list[Given]:
    """The first `count` different draws of a strategy, always the same ones."""
    drawn: list[Given] = []

    def keep(given: Given) -> bool:
        drawn.append(given)
        return len(drawn) >= count + 10

    with contextlib.suppress(NoSuchExample):  # a strategy with few values runs out of them
        find(strategy, keep, settings=_search(10 * count, Phase.generate), random=random.Random(1))
    different = {repr([_listed(value) for value in given.values()]): given for given in drawn}
    return list(different.values())[-count:]  # the first draws are the simplest, and say least


def _listed(value: Any) -> Any:
    """A tensor's numbers, which are written down faster than the tensor."""
    return value.tolist() if isinstance(value, Tensor) else value
