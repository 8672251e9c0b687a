"""One submitted notebook or script, examined in a process of its own; `grade.py` starts it and watches the
clock.

    python -m dpo_course.examine FILE REPORT [SKIPPED ...]

The submission's cells are executed one by one, whatever they raise: the set-up, the exercises, the checks and
what the student added or changed, but of the course's own demonstrations only those that these need. `check`
judges as it does in the notebook, where it is called. At the end every exercise is judged that was not
found right before. REPORT gets one JSON line when an item begins and one for each verdict, so whoever reads
it knows what was going on when this process died. Items named SKIPPED are left out.

Cells mean what they mean in Jupyter, `await` and IPython's own syntax included, but magics and commands do
nothing, except `%time` and its like, which run the Python that they are given.

But: this is no sandbox. It survives accidents, not malice; grade strangers' code in a container.
"""

from __future__ import annotations

import asyncio
import difflib
import io
import json
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import given
from .cells import Notebook, cells_to_run, chapters_of, code_cells, program, read, source
from .exercises import of_chapter

if TYPE_CHECKING:
    from .checks import Verdict

MEMORY = 8 << 30  # bytes of data a submission may hold, where the system can limit that
FILES = 100 << 20  # bytes of any file it may write
Tell = Callable[..., None]


def examine(path: Path, report: Path, skipped: set[str]) -> None:
    """Execute and judge one submission; what is found goes to the report, line by line."""
    with report.open("a", encoding="utf-8", buffering=1) as lines:

        def tell(**record: Any) -> None:
            lines.write(json.dumps(record) + "\n")

        tell(begin="reading")
        notebook = read(path)
        chapters = chapters_of(path, notebook)
        from . import checks, own_work  # load torch, which a file that is no notebook need not wait for

        session, answers = Session(), Answers(chapters, skipped, tell)
        kept, checks.check = checks.check, answers.check
        library = own_work.Library()
        try:
            for place, code in cells_to_run(notebook, chapters):
                if place not in skipped:
                    tell(begin=place)
                    answers.place = place
                    try:
                        session.execute(code, place)
                    except BaseException as error:  # exit() too
                        if not answers.required(error):
                            tell(item=place, error=told(error))
                    if overwritten := library.restore():
                        tell(item=place, remark=f"overwrites {', '.join(overwritten)}: restored")
                    answers.look_at(session.namespace)
        finally:
            checks.check = kept
        answers.conclude(notebook, session.namespace)
        tell(begin="end")


class Session:
    """The namespace of a kernel, and the shell that `get_ipython()` gives there: of its methods only those
    for magics that run Python do anything."""

    def __init__(self) -> None:
        self.namespace = {"__name__": "__main__", "get_ipython": lambda: self, "display": self.display}

    def execute(self, code: str, name: str) -> None:
        """Run a cell."""
        if (awaiting := eval(program(code, name), self.namespace)) is not None:  # of a cell with an `await`
            asyncio.run(awaiting)

    def run_cell_magic(self, name: str, line: str, code: str) -> None:
        if name in ("time", "capture", "prun"):  # not timeit, which keeps its variables to itself
            self.execute(code, f"%{name}")

    def run_line_magic(self, name: str, line: str) -> None:
        self.run_cell_magic(name, "", line)

    def __getattr__(self, name: str) -> Any:
        return lambda *_, **__: []  # lines of output


class Answers:
    """The functions that a submission gives as answers, by definition or to `check`, and their verdicts."""

    def __init__(self, chapters: list[str], skipped: set[str], tell: Tell) -> None:
        self.exercises = {n: each for chapter in chapters for n, each in of_chapter(chapter).items()}
        self.skipped, self.tell, self.place = skipped, tell, ""
        self.found: dict[str, list[Callable[..., Any]]] = {number: [] for number in self.exercises}
        self.named: list[Callable[..., Any]] = []  # those that had an exercise's name
        self.right: dict[str, Verdict] = {}  # of the last answer found
        self.last = ""  # the message of the last check

    def look_at(self, namespace: dict[str, Any]) -> None:
        """Note what is defined by now under the exercises' names."""
        for number, exercise in self.exercises.items():
            value = namespace.get(exercise.function)
            if is_own(value):
                self._note(number, value)
                self.named.append(value)

    def _note(self, number: str, function: Callable[..., Any]) -> None:
        if not any(function is other for other in self.found[number][-1:]):
            self.found[number].append(function)
            self.right.pop(number, None)

    def check(self, number: str | float, function: Callable[..., Any]) -> Verdict:
        """In place of the course's `check`: a right answer is right by the names as they are now, which a
        later cell may change."""
        from .checks import Verdict, find_exercise, judge

        number = find_exercise(number).number
        if number in self.skipped:
            return Verdict("wrong", f"{number}: not judged again.")
        self.tell(begin=number)
        verdict = judge(number, function)
        self.tell(begin=self.place)
        self.last = verdict.message
        if number in self.found and is_own(function):
            self._note(number, function)
            if verdict.passed:
                self.right[number] = verdict
        return verdict

    def required(self, error: BaseException) -> bool:
        """Whether this is how `check(...).require()` says that an answer is not right."""
        return isinstance(error, AssertionError) and error.args == (self.last,)

    def conclude(self, notebook: Notebook, namespace: dict[str, Any]) -> None:
        """Judge what has not been found right, and tell every verdict, and what is odd about an answer."""
        functions = {exercise.function for exercise in self.exercises.values()}
        own = {name: value for name, value in namespace.items() if name not in functions and is_own(value)}
        copied = _copied(notebook)
        for number, exercise in self.exercises.items():
            if number in self.skipped:
                continue
            self.tell(begin=number)
            verdict = self._verdict(number)
            if found := self.found[number]:
                remark = self._of_found(found, own)
            else:
                remark = of_missing(number, exercise.function, notebook, list(own))
            if remark != NEWER:
                self.tell(item=number, remark=remark, copied=number in copied, **verdict)
            elif "script" not in notebook["metadata"]:  # a script may hold any of the exercises
                self.tell(item=number, remark=remark)

    def _verdict(self, number: str) -> dict[str, Any]:
        """On the last definition that is answered: a copy of the stub takes nothing away."""
        from .checks import judge

        if not (found := self.found[number]):
            return {"status": "missing", "mistake": None, "message": ""}
        try:
            while (verdict := self.right.get(number) or judge(number, found[-1])).status == "not solved yet":
                if len(found) == 1:
                    break
                found.pop()
        except BaseException as error:
            return {"status": "wrong", "mistake": told(error), "message": told(error)}
        return {"status": verdict.status, "mistake": verdict.mistake, "message": verdict.message}

    def _of_found(self, found: list[Callable[..., Any]], own: dict[str, Any]) -> str | None:
        """What is odd about an answer that is there more than once, or under another name."""
        if not any(found[-1] is function for function in self.named):
            names = [name for name, value in own.items() if value is found[-1]]
            return f"is answered by {f'`{names[0]}`' if names else 'a function'} that was given to the check"
        return "is defined twice: the last one counts" if len(found) > 1 else None


# ------------------------------------------------------------------------------------- odd submissions

RENAMED = "is not there: the cell was deleted or the function renamed"
NEWER = "is not in this copy of the notebook"


def of_missing(number: str, function: str, notebook: Notebook, own: list[str]) -> str | None:
    """What is odd where there is no answer; None where an error has told it."""
    cells = [(cell.get("cell_type"), source(cell)) for cell in notebook["cells"]]
    kinds = [kind for kind, text in cells if f"def {function}(" in text]
    if kinds:
        return None if "code" in kinds else "is not there: its cell is no code cell, and so is not run"
    if alike := " and ".join(f"`{name}`" for name in difflib.get_close_matches(function, own, cutoff=0.5)):
        return f"{RENAMED}; there is {alike}"
    asked = re.compile(rf"Exercise {re.escape(number)}(?!\d)|\bcheck\(\s*[\"']?{re.escape(number)}(?!\d)")
    return RENAMED if any(asked.search(text) for _, text in cells) else NEWER


def _copied(notebook: Notebook) -> set[str]:
    """The exercises whose published solution stands here to the letter."""
    published = {task.solution: number for number, task in given.all_tasks().items() if task.solution}
    return {
        published[digest] for _, code in code_cells(notebook) if (digest := given.digest(code)) in published
    }


def told(error: BaseException) -> str:
    """An error as a remark that any file can hold."""
    try:
        text = f"{type(error).__name__}: {error}"[:200]
    except Exception:  # raised by its own __str__
        text = type(error).__name__
    return text.encode("utf-8", "backslashreplace").decode()


def is_own(value: Any) -> bool:
    """A function of the student's: not a result that has taken its name, nor the package's own."""
    return callable(value) and not str(getattr(value, "__module__", "")).startswith("dpo_minimal")


# ---------------------------------------------------------------------------------------- the process


class _Nowhere(io.TextIOBase):
    """Where a submission's prints go: a gigabyte of them is as quick as none."""

    def write(self, text: str) -> int:
        return len(text)


def _limit_resources() -> None:
    """Bounds that the system enforces, where it has them."""
    try:
        import resource
    except ImportError:  # not on Windows
        return
    for kind, bound in ((resource.RLIMIT_DATA, MEMORY), (resource.RLIMIT_FSIZE, FILES)):
        hard = resource.getrlimit(kind)[1]
        resource.setrlimit(kind, (bound if hard == resource.RLIM_INFINITY else min(bound, hard), hard))


if __name__ == "__main__":
    submission, report, *skipped = sys.argv[1:]
    sys.argv[1:] = []
    sys.path.append(str(Path(submission).parent))  # a student's own modules, after everybody else's
    sys.dont_write_bytecode = True
    sys.stdout = sys.stderr = _Nowhere()
    _limit_resources()
    try:
        examine(Path(submission), Path(report), set(skipped))
    except BaseException as error:
        with Path(report).open("a", encoding="utf-8") as lines:
            lines.write(json.dumps({"failed": told(error)}) + "\n")
    os._exit(0)  # whatever threads the submission left running
