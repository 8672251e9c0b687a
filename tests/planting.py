"""Plant a bug: replace a function's code by that of its source with one piece altered."""

import inspect
import textwrap

import pytest

from dpo_minimal.validation import InputError

# An assertion, Hypothesis's group of several, "did not raise", or a check of the package's own. Any other
# exception would mean that the mutant or the call of its guard is broken.
CAUGHT = (AssertionError, ExceptionGroup, pytest.fail.Exception, InputError)


def plant(monkeypatch, function, right: str, wrong: str) -> None:
    """Alter a piece of a function in place until the test ends, so that every importer sees the mistake.

    Of a decorated function, what the decorator wraps is altered.
    """
    function = inspect.unwrap(function)
    source = textwrap.dedent(inspect.getsource(function))
    assert source.count(right) >= 1, f"{function.__qualname__} no longer contains {right!r}"
    namespace = dict(function.__globals__)
    exec(
        compile("from __future__ import annotations\n" + source.replace(right, wrong), "mutant", "exec"),
        namespace,
    )
    monkeypatch.setattr(function, "__code__", inspect.unwrap(namespace[function.__name__]).__code__)
