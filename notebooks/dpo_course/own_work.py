"""What an answer may not do: overwrite what other code uses, or hand over a result of the library's.

But: this finds habits, not tricks. An answer that wants to hide either of the two can.
"""

from __future__ import annotations

import builtins
import functools
import math
import operator
import sys
from collections.abc import Callable, Iterator
from types import FrameType, ModuleType
from typing import Any

import torch
from torch import Tensor

from dpo_minimal.bench.checks import copy
from dpo_minimal.bench.exercises import Exercise, Given, samples

OURS = ("dpo_minimal.", "dpo_course.")
DRAWS = 3  # enough that a part of an answer does not equal the whole by chance


class Library:
    """The functions and classes of torch and of this package, as they were when this was made."""

    def __init__(self) -> None:
        packages = [
            module for name, module in list(sys.modules.items()) if name.split(".")[0] == "dpo_minimal"
        ]
        places = [builtins, math, torch, Tensor, torch.linalg, torch.special, torch.autograd]
        kept = ((place, _functions(place)) for place in [*places, torch.nn.functional, *packages])
        self._kept = [(place, functions) for place, functions in kept if functions]

    def restore(self) -> list[str]:
        """Put back what was overwritten; return its names, such as `torch.sigmoid`."""
        found = []
        for place, functions in self._kept:
            try:  # the quick way, for this is asked after each call of an answer
                if operator.attrgetter("__name__", *functions)(place)[1:] == tuple(functions.values()):
                    continue
            except AttributeError:  # one was deleted
                pass
            for name, function in list(functions.items()):
                new = getattr(place, name, None)
                if _is_torchs(new, name):  # which wraps some of its own, when it loads its compiler
                    functions[name] = new
                elif new is not function:
                    setattr(place, name, function)
                    found.append(f"{place.__name__}.{name}")
        return found


def _is_torchs(function: Any, name: str) -> bool:
    """Whether torch itself has made this function for this name."""
    module = getattr(function, "__module__", None)
    return getattr(function, "__name__", "") == name and str(module).startswith("torch")


def _functions(place: Any) -> dict[str, Any]:
    """The public functions and classes of a module or class, by name, of those that are always the same
    object."""
    names = list(vars(place)) if isinstance(place, ModuleType) else dir(place)  # a class inherits some
    names = [name for name in names if name != "Storage"]  # torch's is another with another default dtype
    found = {name: getattr(place, name, None) for name in names if not name.startswith("_")}
    return {
        name: value
        for name, value in found.items()
        if callable(value) and getattr(place, name) is value and name.isidentifier()
    }


def guarded(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, which raises RuntimeError if it has overwritten a name of the library; that name is
    restored before anybody else uses it."""
    if not callable(function):
        return function
    library = Library()

    @functools.wraps(function, updated=())
    def call(*arguments: Any) -> Any:
        try:
            answer = function(*arguments)
        finally:
            overwritten = library.restore()
        if overwritten:
            raise RuntimeError(f"it overwrites {', '.join(overwritten)}, which other code uses too")
        return answer

    return call


def lender(exercise: Exercise, function: Callable[..., Any]) -> str | None:
    """The library's function that does the work: its result, on the exercise's own inputs, is the answer.

    Whatever name it is called by. An answer may build on the library: on another function, or on the same
    one with inputs that it has worked out. None for all these.
    """
    names = [_lender(function, given) for given in samples(exercise.inputs)[:DRAWS]]
    return names[0] if names and all(names) else None


def _lender(function: Callable[..., Any], given: Given) -> str | None:
    """The same for one input."""
    arguments = copy(given)
    own = [table for value in given.values() for table in _tables(value)]
    depth, results = 0, []

    def watch(frame: FrameType, event: str, result: Any) -> None:
        nonlocal depth
        if event not in ("call", "return") or not frame.f_globals.get("__name__", "").startswith(OURS):
            return
        if event == "return":
            depth -= 1
            if depth == 0 and results[-1][0]:
                results[-1] = (results[-1][0], frame.f_code.co_name, list(_tables(result)))
        else:
            if depth == 0:
                tables = list(_tables(list(frame.f_locals.values())))
                results.append((bool(tables) and all(map(_among(own), tables)), "", []))
            depth += 1

    before = sys.getprofile()
    sys.setprofile(watch)
    try:
        answer = function(*arguments.values())
    finally:
        sys.setprofile(before)
    wanted = list(_tables(answer))
    for is_own, name, tables in results:
        if is_own and wanted and all(map(_among(tables), wanted)):
            return name
    return None


def _tables(value: Any) -> Iterator[Tensor]:
    """The numbers in a value, each tensor as one row of float64; nothing of flags, counts and texts."""
    if isinstance(value, Tensor):
        if value.is_floating_point() and value.numel():
            yield value.detach().flatten().double()
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from _tables(part)
    elif isinstance(value, dict):
        yield from _tables(list(value.values()))


def _among(tables: list[Tensor]) -> Callable[[Tensor], bool]:
    """Whether a table is one of these, up to its sign and the rounding of float32."""

    def found(table: Tensor) -> bool:
        return any(
            table.shape == other.shape
            and (torch.allclose(table, other, 1e-5, 1e-6) or torch.allclose(-table, other, 1e-5, 1e-6))
            for other in tables
        )

    return found
