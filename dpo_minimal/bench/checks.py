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
        with silence():
            counterexample, inexact = _searched(exercise, function)
    except NotImplementedError:
        return Verdict("not solved yet", f"{name}: not solved yet.")
    except HypothesisException:
        return Verdict("wrong", name + _UNDECIDED)
    if counterexample is None:
        refused, strained = _strained(exercise, function)
        if refused:
            return Verdict("wrong", "\n".join([f"{name}: not right yet.", *strained]), BOUNDED)
        right = f"{name}: right. Compared with {exercise.source}."
        digits = _lost_digits(exercise, function, inexact) if inexact is not None else []
        return Verdict("right", "\n".join([right, *digits, *strained]))
    complaint = complain(exercise, function, counterexample)  # here its own prints are shown, once
    with silence():
        if complaint is None or complain(exercise, function, counterexample) != complaint:
            return Verdict("wrong", name + _UNDECIDED)
        mistake = recognise(exercise, function) or guess(exercise, function) or _bound(exercise, function)
    lines = [f"{name}: not right yet.", *_rows("smallest input", _show_given(counterexample)), *complaint]
    if mistake is not None:
        lines += _rows("looks like", [mistake])
    return Verdict("wrong", "\n".join(lines), mistake)


def _searched(exercise: Exercise, function: Callable[..., Any]) -> tuple[Given | None, Given | None]:
    """The smallest input on which the answer is wrong, and one on which it only lacks digits."""

    def search(within: float) -> Given | None:
        return smallest(exercise.inputs, lambda given: complain(exercise, function, given, within))

    found, single = search(exercise.within), max(exercise.within, SINGLE)
    if found is None or complain(exercise, function, found, single) is not None:
        return found, None
    return search(single), found


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """No prints and no warnings: a search calls the function hundreds of times."""
    nowhere = io.StringIO()
    with warnings.catch_warnings(), contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        warnings.simplefilter("ignore")
        yield


def _strained(exercise: Exercise, function: Callable[..., Any]) -> tuple[bool, list[str]]:
    """Whether the answer is refused at the strain, and the lines about it: an overflow is no mistake."""
    if exercise.strain is None:
        return False, []
    given, expected = exercise.strain
    with silence():
        answer = _outcome(function, given)
    if agrees(answer, expected, SINGLE):
        return False, []
    if _is_finite(answer):
        shown = [*_rows("expected", [show(expected)]), *_rows("yours", [show(answer)])]
        return True, [*_rows("extreme input", _show_given(given)), *shown, *_rows("looks like", [BOUNDED])]
    reason = "the exponentials leave the range of numbers; stay with logarithms"
    return False, _rows("but here", _show_given(given)) + _rows("it gives", [show(answer), reason])


BOUNDED = "a clamp, or a small number inside a logarithm, bounds the answer; logsigmoid needs neither"


def _bound(exercise: Exercise, function: Callable[..., Any]) -> str | None:
    """BOUNDED, where most answers are right, and at the strain it is another finite number."""
    if not _strained(exercise, function)[0]:
        return None
    drawn = samples(exercise.inputs)
    right = [complain(exercise, function, given, SINGLE) is None for given in drawn]
    return BOUNDED if 2 * sum(right) > len(drawn) else None


def _is_finite(answer: Any) -> bool:
    parts = [_tensor(part) for part in (answer if isinstance(answer, tuple) else [answer])]
    return all(part is not None and bool(part.isfinite().all()) for part in parts)


def _lost_digits(exercise: Exercise, function: Callable[..., Any], given: Given) -> list[str]:
    """Lines on where the digits went, of an answer that is right to those of float32: this is no mistake.

    If it is exact as soon as torch makes float64 of Python's numbers, that was it.
    """
    usual = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with silence():
            exact = complain(exercise, function, given) is None
    finally:
        torch.set_default_dtype(usual)
    made = "torch.tensor(0.1) and torch.zeros(2) make float32; say dtype=torch.float64"
    other = "float32, a small number added, or a difference of nearly equal ones costs the others"
    return _rows("digits", [f"about seven are right: {made if exact else other}"])


_UNDECIDED = ": not right yet.\n  It answers the same question differently each time."


def complain(
    exercise: Exercise, function: Callable[..., Any], given: Given, within: float | None = None
) -> list[str] | None:
    """What is wrong with the answer to one input, as lines of text; None if it is right.

    Args:
        within: the largest error allowed, if it is another than the exercise's.
    """
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
    if not misfits and agrees(answer, expected, exercise.within if within is None else within):
        return None
    digits = 5 if misfits else _telling_digits(answer, expected)
    shown = _rows("expected", [show(expected, digits)]) + _rows("yours", [show(answer, digits)])
    return shown + _rows("but", misfits)


def recognise(exercise: Exercise, function: Callable[..., Any]) -> str | None:
    """The name of the known mistake that answers as `function` does, on every one of many inputs.

    Exactly, or if there is none, to the digits of float32.
    """
    drawn = samples(exercise.inputs)
    answers = [_outcome(function, given) for given in drawn]
    for within in (exercise.within, max(exercise.within, SINGLE)):
        for name, mistake in exercise.mistakes.items():
            theirs = (_outcome(mistake, given) for given in drawn)
            if all(agrees(a, b, within) for a, b in zip(answers, theirs)):
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
    """Same structure, same shape, and every number within `within * (1 + |expected|)`."""
    if isinstance(expected, tuple):
        alike = isinstance(answer, (tuple, list)) and len(answer) == len(expected)
        return alike and all(agrees(a, b, within) for a, b in zip(answer, expected))
    if callable(expected):
        return answer is expected
    if expected is None or isinstance(expected, (str, bool, dict, list)):
        return type(answer) is type(expected) and answer == expected
    left, right = _tensor(answer), _tensor(expected)
    if left is None or right is None or left.shape != right.shape:
        return False
    same = (left == right) | (left.isnan() & right.isnan())  # infinities; a mistake's NaN is recognised
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


def show(value: Any, digits: int = 5) -> str:
    """A value as a student would write it: `[0, -1.5]` rather than a tensor's repr."""
    if isinstance(value, Tensor):
        return show(value.detach().tolist(), digits)
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(show(entry, digits) for entry in value) + "]"
    if isinstance(value, float):
        return f"{value:.{digits}g}" if math.isfinite(value) else str(value)
    if callable(value):
        return getattr(value, "__name__", type(value).__name__)  # its repr has an address, never the same
    return repr(value)[:300]


def _telling_digits(answer: Any, expected: Any) -> int:
    """As few as show that the two differ."""
    return next((d for d in range(5, 17) if show(answer, d) != show(expected, d)), 17)


def _show_given(given: Given) -> list[str]:
    return [f"{name} = {show(value)}" for name, value in given.items()]


def _rows(label: str, entries: list[str]) -> list[str]:
    """Entries under one another, the label beside the first."""
    return [f"  {label if place == 0 else '':<15} {entry}" for place, entry in enumerate(entries)]
