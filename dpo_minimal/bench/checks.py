"""Is a function right? If not: the smallest input that shows it, and which known mistake gives these answers.

A check compares the function with brute force, an identity or autograd on many random draws.
Known mistakes are functions too: an answer that agrees with one of them everywhere has made it.

But: which exercises there are (notebooks/exercises).
"""

from __future__ import annotations

import contextlib
import io
import math
import warnings
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple

import torch
from hypothesis.errors import HypothesisException
from torch import Tensor

from .exercises import SINGLE, Exercise, Given, samples, smallest


class Verdict(NamedTuple):
    """What a check found."""

    status: Literal["right", "wrong", "not solved yet"]
    message: str  # several lines for the student
    mistake: str | None = None  # the name of a known one

    @property
    def passed(self) -> bool:
        """Whether it is right: `assert verdict.passed, verdict.message` in anybody's pytest."""
        return self.status == "right"

    __bool__ = passed.fget  # a tuple would always be true

    def require(self) -> None:
        """Raise AssertionError with the message unless it is right: for pytest, nbgrader and the like."""
        if not self.passed:
            raise AssertionError(self.message)

    def __str__(self) -> str:
        return self.message

    def _ipython_display_(self) -> None:
        """Nothing: at a cell's end in Jupyter, what `check` has printed stands there already."""


def judge(
    exercise: Exercise, function: Callable[..., Any], guess: Callable[..., str | None] = lambda *_: None
) -> Verdict:
    """Whether `function` solves the exercise, and if not, the smallest input that shows it.

    What gives no known mistake's answers is named by `guess`, from exercise and function, if it can.
    """
    name = f"{exercise.number} {exercise.function}".strip()
    if not callable(function):
        return Verdict("wrong", f"{name}: give the check the function itself, without calling it.")
    try:
        with _silence():
            counterexample = smallest(exercise.inputs, lambda given: complain(exercise, function, given))
    except NotImplementedError:
        return Verdict("not solved yet", f"{name}: not solved yet.")
    except HypothesisException:
        return Verdict("wrong", name + _UNDECIDED)
    if counterexample is None:
        right = f"{name}: right. Compared with {exercise.source}."
        return Verdict("right", "\n".join([right, *_strained(exercise, function)]))
    complaint = complain(exercise, function, counterexample)  # here its own prints are shown, once
    with _silence():
        if complaint is None or complain(exercise, function, counterexample) != complaint:
            return Verdict("wrong", name + _UNDECIDED)
        mistake = recognise(exercise, function) or guess(exercise, function)
    lines = [f"{name}: not right yet.", *_rows("smallest input", _show_given(counterexample)), *complaint]
    if mistake is not None:
        lines += _rows("looks like", [mistake])
    return Verdict("wrong", "\n".join(lines), mistake)


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """No prints and no warnings: a search calls the function hundreds of times."""
    nowhere = io.StringIO()
    with warnings.catch_warnings(), contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        warnings.simplefilter("ignore")
        yield


def _strained(exercise: Exercise, function: Callable[..., Any]) -> list[str]:
    """Lines on an input at which a right formula overflows, which is no mistake."""
    if exercise.strain is None:
        return []
    with _silence():
        answer = _outcome(function, exercise.strain)
    numbers = _tensor(answer)
    if numbers is not None and numbers.isfinite().all():
        return []
    reason = "the exponentials leave the range of numbers; stay with logarithms"
    return _rows("but here", _show_given(exercise.strain)) + _rows("it gives", [show(answer), reason])


_UNDECIDED = ": not right yet.\n  It answers the same question differently each time."


def complain(exercise: Exercise, function: Callable[..., Any], given: Given) -> list[str] | None:
    """What is wrong with the answer to one input, as lines of text; None if it is right."""
    arguments = copy(given)
    try:
        answer = function(*arguments.values())
    except NotImplementedError:
        raise
    except (Exception, SystemExit) as error:
        return _rows("it raises", [f"{type(error).__name__}: {error}"[:300]])
    pairs = ((arguments[name], given[name]) for name in given)
    if not all(torch.equal(a, b) if isinstance(a, Tensor) else a == b for a, b in pairs):
        return _rows("but", ["the function has changed its own input; work on a copy"])
    if exercise.complaint is not None:
        complaint = exercise.complaint(answer, **copy(given))
        return None if complaint is None else [*_rows("yours", [show(answer)]), *_rows("but", [complaint])]
    expected = exercise.expected(**copy(given))
    nothing = ["it returns nothing: is the return missing?"]
    misfits = nothing if answer is None else _misfits(answer, expected)
    if not misfits and agrees(answer, expected, exercise.within):
        return None
    rows = [*_rows("expected", [show(expected)]), *_rows("yours", [show(answer)])]
    return rows + _rows("but", misfits)


def recognise(exercise: Exercise, function: Callable[..., Any]) -> str | None:
    """The name of the known mistake that answers as `function` does, on every one of many inputs."""
    drawn = samples(exercise.inputs)
    answers = [_outcome(function, given) for given in drawn]
    for name, mistake in exercise.mistakes.items():
        theirs = (_outcome(mistake, given) for given in drawn)
        if all(agrees(a, b, exercise.within) for a, b in zip(answers, theirs)):
            return name
    return None


def _outcome(function: Callable[..., Any], given: Given) -> Any:
    """The answer; where there is none, the kind of error."""
    try:
        return function(*copy(given).values())
    except (Exception, SystemExit) as error:
        return f"raises {type(error).__name__}"


# ---------------------------------------------------------------------------------------- comparing


def agrees(answer: Any, expected: Any, within: float) -> bool:
    """Same structure, same shape, and every number within `within * (1 + |expected|)`.

    For an answer in float32, such as `torch.tensor` of Python's numbers, it is at least `SINGLE`.
    """
    if isinstance(expected, tuple):
        alike = isinstance(answer, (tuple, list)) and len(answer) == len(expected)
        return alike and all(agrees(a, b, within) for a, b in zip(answer, expected))
    if expected is None or isinstance(expected, (str, bool, dict, list)):
        return type(answer) is type(expected) and answer == expected
    left, right = _tensor(answer), _tensor(expected)
    if left is None or right is None or left.shape != right.shape:
        return False
    same = (left == right) | (left.isnan() & right.isnan())  # infinities; a mistake's NaN is recognised
    within = max(within, SINGLE) if isinstance(answer, Tensor) and answer.dtype == torch.float32 else within
    close = right.isfinite() & ((left - right).abs() <= within * (1 + right.abs()))
    return bool((same | close).all())


def _tensor(value: Any) -> Tensor | None:
    if isinstance(value, (str, dict)) or value is None:
        return None
    try:
        return torch.as_tensor(value, dtype=torch.float64).detach()  # not float32, as for plain floats
    except (TypeError, ValueError, RuntimeError):
        return None


def _misfits(answer: Any, expected: Any) -> list[str]:
    """What is wrong whatever the numbers are: not as many parts, another shape, no booleans."""
    if isinstance(expected, tuple):
        if not isinstance(answer, (tuple, list)) or len(answer) != len(expected):
            order = ", ".join(["first", "second", "third"][: len(expected)])
            return [f"{len(expected)} tensors are asked for: return ({order})"]
        parts = enumerate(zip(answer, expected), start=1)
        return [f"part {place}: {misfit}" for place, part in parts for misfit in _misfits(*part)]
    if not isinstance(expected, Tensor):
        return []
    given, shape = _tensor(answer), tuple(expected.shape)
    if given is None or (isinstance(answer, tuple) and given.shape != shape):
        return [f"one tensor of shape {shape} is asked for, yours is of type {type(answer).__name__}"]
    if given.shape != shape:
        return [f"the shape should be {shape}, yours is {tuple(given.shape)}"]
    kind = torch.as_tensor(answer).dtype
    if expected.dtype == torch.bool and kind != torch.bool:
        return [f"a mask of booleans is asked for, yours is {str(kind).removeprefix('torch.')}"]
    return []


def copy(given: Given) -> Given:
    """The same arguments, for a function that may write into them."""
    return {name: value.clone() if isinstance(value, Tensor) else value for name, value in given.items()}


# ------------------------------------------------------------------------------------------ printing


def show(value: Any) -> str:
    """A value as a student would write it: `[0, -1.5]` rather than a tensor's repr."""
    if isinstance(value, Tensor):
        return show(value.detach().tolist())
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(show(entry) for entry in value) + "]"
    if isinstance(value, float):
        return f"{value:.5g}" if math.isfinite(value) else str(value)
    return repr(value)[:300]


def _show_given(given: Given) -> list[str]:
    return [f"{name} = {show(value)}" for name, value in given.items()]


def _rows(label: str, entries: list[str]) -> list[str]:
    """Entries under one another, the label beside the first."""
    return [f"  {label if place == 0 else '':<15} {entry}" for place, entry in enumerate(entries)]
