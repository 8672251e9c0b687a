"""`check("3.1", dpo_loss)`: right, or wrong with the smallest counterexample and a guess at the mistake.

But: how an answer is judged (dpo_minimal/bench/checks.py).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from dpo_minimal.bench import checks
from dpo_minimal.bench.checks import Verdict
from dpo_minimal.bench.exercises import Exercise

from . import own_work
from .exercises import CHAPTERS, of_chapter

__all__ = ["Verdict", "check", "judge"]


def check(number: str | float, function: Callable[..., Any]) -> Verdict:
    """Print whether `function` solves exercise `number`, and if not, the smallest input that shows it; return
    the verdict, whose `.require()` raises AssertionError unless the answer is right.

    Args:
        number: "3.1" is the first exercise of notebook 3.
        function: the student's answer.
    Raises:
        ValueError: there is no such exercise.
    """
    verdict = judge(number, function)
    print(verdict.message)
    return verdict


def judge(number: str | float, function: Callable[..., Any]) -> Verdict:
    """What `check` prints, as a `Verdict`. The right numbers are not enough: the answer must not be a call of
    the library's own function."""
    exercise = find_exercise(number)
    verdict = checks.judge(exercise, own_work.guarded(function))
    if not verdict.passed:
        return verdict
    with checks.silence():  # nbgrader gives no points to a check that writes to stderr, be it a warning
        lender = own_work.lender(exercise, function)
    if lender is None:
        return verdict
    mistake = f"the library's `{lender}` does the work; write it without that call"
    rows = [f"{exercise.number} {exercise.function}: not right yet.", f"  {'but':<15} {mistake}"]
    return Verdict("wrong", "\n".join(rows), mistake)


def find_exercise(number: str | float) -> Exercise:
    """The exercise of that number, which may be written 3.1 as well. Raises ValueError."""
    number = str(number)
    chapter = number.partition(".")[0]
    exercises = of_chapter(chapter) if chapter in CHAPTERS else {}
    if number not in exercises:
        known = f"this notebook has {', '.join(exercises)}" if exercises else "numbers are such as 1.1"
        raise ValueError(f"there is no exercise {number!r}; {known}.")
    return exercises[number]
