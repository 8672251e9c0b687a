"""`pytest --student answers.py`: the course's checks as tests, one for each exercise that the file defines.

pytest loads this wherever the package is installed, so nothing is imported before the option is used.
"""

from __future__ import annotations

import importlib.util
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.getgroup("dpo_course").addoption(
        "--student",
        metavar="FILE.py",
        help="check these answers to the course's exercises, and collect nothing else unless paths are given",
    )


def pytest_configure(config: pytest.Config) -> None:
    if (name := config.getoption("--student")) is None:
        return
    path = (config.invocation_params.dir / name).resolve()
    if path.suffix != ".py" or not path.is_file():
        told = "give a Python file; python -m dpo_course.template writes one"
        raise pytest.UsageError(f"--student {name}: {told}.")
    given = config.args_source is pytest.Config.ArgsSource.ARGS  # not what the configuration says
    config.args[:] = [*(config.args if given else ()), str(path)]
    config.pluginmanager.register(_Collector(path))


class _Collector:
    """Collects the student's file, and keeps others, such as doctest's collector, away from it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @pytest.hookimpl(wrapper=True)
    def pytest_collect_file(self, file_path: Path, parent: pytest.Collector) -> Iterator[Any]:
        others = yield
        if file_path.resolve() == self.path:
            return [_File.from_parent(parent, path=file_path)]
        return others


class _File(pytest.File):
    """The student's file."""

    def collect(self) -> Iterator[pytest.Item]:
        from . import given
        from .examine import is_own

        module = _imported(self.path)
        for number, task in given.all_tasks().items():
            if is_own(function := getattr(module, task.function, None)):
                name = f"{number} {task.function}"
                yield _Exercise.from_parent(self, name=name, number=number, function=function)


def _imported(path: Path) -> ModuleType:
    """The module in this file; what it raises becomes a sentence with the line."""
    spec = importlib.util.spec_from_file_location("student", path)
    module = sys.modules["student"] = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(path.parent))  # as `python answers.py` does
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if frame.filename == str(path)]
        place = lines[-1] if lines else getattr(error, "lineno", None)
        told = error.msg if isinstance(error, SyntaxError) else error
        raise pytest.Collector.CollectError(
            f"{path.name}, line {place}: {type(error).__name__}: {told}"
        ) from None
    finally:
        sys.path.remove(str(path.parent))
    return module


class _Exercise(pytest.Item):
    """One exercise."""

    def __init__(self, *, number: str, function: Any, **options: Any) -> None:
        super().__init__(**options)
        self.number, self.function = number, function

    def runtest(self) -> None:
        from .checks import judge

        verdict = judge(self.number, self.function)
        if verdict.status == "not solved yet":
            raise pytest.skip.Exception("not solved yet", _use_item_location=True)  # the student's line
        verdict.require()

    def repr_failure(self, excinfo: pytest.ExceptionInfo[BaseException]) -> str:
        return str(excinfo.value)

    def reportinfo(self) -> tuple[Path, int, str]:
        line = getattr(getattr(self.function, "__code__", None), "co_firstlineno", 1)
        return self.path, line - 1, f"Exercise {self.name}"  # of its own form: pytest splits names at dots
