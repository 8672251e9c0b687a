"""One submitted notebook, examined in a process of its own; `grade.py` starts it and watches the clock.

    python -m dpo_course.examine NOTEBOOK REPORT [SKIPPED ...]

The submission's cells are executed one by one, whatever they raise; then every exercise of the notebook is
judged. What the course itself wrote (demonstrations, checks) is not run: only the set-up, the exercises and
what the student added. REPORT gets one JSON line when an item begins and one when an exercise is judged, so
whoever reads it knows what was going on when this process died. Items named SKIPPED are left out.

Cells mean what they mean in Jupyter, `await` and IPython's own syntax included, but magics and commands do
nothing, except `%time` and its like, which run the Python that they are given.

But: this is no sandbox. It survives accidents, not malice; grade strangers' code in a container.
"""

from __future__ import annotations

import ast
import asyncio
import difflib
import io
import json
import os
import re
import sys
from pathlib import Path
from typing import Any

from .exercises import CHAPTERS, of_chapter

FOLDER = Path(__file__).parent.parent
MEMORY = 8 << 30  # bytes of data a submission may hold, where the system can limit that
FILES = 100 << 20  # bytes of any file it may write


def examine(path: Path, report: Path, skipped: set[str]) -> None:
    """Execute and judge one notebook; what is found goes to the report, line by line."""
    with report.open("a", encoding="utf-8", buffering=1) as lines:

        def tell(**record: Any) -> None:
            lines.write(json.dumps(record) + "\n")

        tell(begin="reading")
        notebook = read(path)
        chapter = chapter_of(path, notebook)
        exercises, session = of_chapter(chapter), Session()
        answers: dict[str, list[Any]] = {exercise.function: [] for exercise in exercises.values()}
        for place, code in cells_to_run(notebook, chapter):
            item = f"cell {place}"
            if item not in skipped:
                tell(begin=item)
                try:
                    session.execute(code, item)
                except BaseException as error:  # exit() too
                    tell(item=item, error=_told(error))
                for name, found in answers.items():
                    value = session.namespace.get(name)
                    if _is_own(value) and not (found and found[-1] is value):
                        found.append(value)
        for number, exercise in exercises.items():
            if number not in skipped:
                tell(begin=number)
                verdict = _judged(number, found := answers[exercise.function])
                own = [n for n, value in session.namespace.items() if n not in answers and _is_own(value)]
                tell(item=number, remark=_remark(exercise.function, found, notebook, own), **verdict)
        tell(begin="end")


def read(path: Path) -> dict[str, Any]:
    """A notebook as it lies on disk; one of the format before 2015 as Jupyter converts it. (The library for
    this takes as long to load as torch.)

    Raises:
        ValueError: it is none.
    """
    data = path.read_bytes()
    try:
        notebook = json.loads(data.decode("utf-8-sig"))
        if "worksheets" in notebook:
            import nbformat

            notebook = nbformat.reads(json.dumps(notebook), as_version=4)
        code_cells(notebook)  # raises where a cell is of no known form
        if isinstance(notebook["metadata"], dict):
            return notebook
    except Exception:  # damaged files fail in many ways, nested ones by recursion
        pass
    raise ValueError("this file is no notebook; open it in Jupyter and save it again")


def chapter_of(path: Path, notebook: dict[str, Any]) -> str:
    """Which notebook of the course this is: by its metadata, or by the number its file name begins with.

    Raises:
        ValueError: by neither.
    """
    course, number = notebook["metadata"].get("course"), re.match(r"0*(\d+)", path.stem)
    told = str(course.get("chapter")) if isinstance(course, dict) else None
    for chapter in (told, number and number[1]):
        if chapter in CHAPTERS:
            return chapter
    raise ValueError("this is none of the course's notebooks: the file's name should begin with its number")


def cells_to_run(notebook: dict[str, Any], chapter: str) -> list[tuple[int, str]]:
    """The code of a submission but for the course's own demonstrations and checks, each cell with its place
    among the code cells: 3 is In [3] of a notebook that was run from the top."""
    (student,) = FOLDER.glob(f"{chapter:0>2}_*.ipynb")
    given = {
        code
        for path in (student, FOLDER / "solutions" / student.name)
        for tags, code in code_cells(read(path))
        if not {"setup", "exercise"} & set(tags)
    }
    cells = enumerate(code_cells(notebook), start=1)
    return [(place, code) for place, (_, code) in cells if code and code not in given]


def code_cells(notebook: dict[str, Any]) -> list[tuple[list[str], str]]:
    """(tags, code) of each code cell."""
    cells = [(cell, cell.get("metadata", {}).get("tags", []), _source(cell)) for cell in notebook["cells"]]
    return [(tags, code) for cell, tags, code in cells if cell.get("cell_type") == "code"]


def _source(cell: dict[str, Any]) -> str:
    """A cell's text, which may be a list of lines; IPython allows an indented first line."""
    return "".join(cell.get("source", "")).replace("\r\n", "\n").lstrip("\n").rstrip()


class Session:
    """The namespace of a kernel, and the shell that `get_ipython()` gives there: of its methods only those
    for magics that run Python do anything."""

    def __init__(self) -> None:
        self.namespace = {"__name__": "__main__", "get_ipython": lambda: self, "display": self.display}

    def execute(self, code: str, name: str) -> None:
        """Run a cell; what is not Python as it stands goes through IPython's own rewriting."""
        options = {"mode": "exec", "flags": ast.PyCF_ALLOW_TOP_LEVEL_AWAIT, "dont_inherit": True}
        try:
            program = compile(code, f"<{name}>", **options)
        except SyntaxError:
            from IPython.core.inputtransformer2 import TransformerManager

            program = compile(TransformerManager().transform_cell(code), f"<{name}>", **options)
        if (awaiting := eval(program, self.namespace)) is not None:  # what a cell with an `await` gives
            asyncio.run(awaiting)

    def run_cell_magic(self, name: str, line: str, code: str) -> None:
        if name in ("time", "capture", "prun"):  # not timeit, which keeps its variables to itself
            self.execute(code, f"%{name}")

    def run_line_magic(self, name: str, line: str) -> None:
        self.run_cell_magic(name, "", line)

    def __getattr__(self, name: str) -> Any:
        return lambda *_, **__: []  # lines of output


def _told(error: BaseException) -> str:
    """An error as a remark that any file can hold."""
    try:
        text = f"{type(error).__name__}: {error}"[:200]
    except Exception:  # raised by its own __str__
        text = type(error).__name__
    return text.encode("utf-8", "backslashreplace").decode()


def _is_own(value: Any) -> bool:
    """A function of the student's: not a result that has taken its name, nor the package's own."""
    return callable(value) and not str(getattr(value, "__module__", "")).startswith("dpo_minimal")


def _remark(function: str, found: list[Any], notebook: dict[str, Any], own: list[str]) -> str | None:
    """What is odd about an answer that is there more than once, or not at all and no error has told why."""
    if found:
        return "is defined twice: the last one counts" if len(found) > 1 else None
    kinds = [cell.get("cell_type") for cell in notebook["cells"] if f"def {function}(" in _source(cell)]
    if kinds:
        return None if "code" in kinds else "is not there: its cell is no code cell, and so is not run"
    alike = " and ".join(f"`{name}`" for name in difflib.get_close_matches(function, own, cutoff=0.5))
    told = "is not there: the cell was deleted or the function renamed"
    return f"{told}; there is {alike}" if alike else told


def _judged(number: str, found: list[Any]) -> dict[str, Any]:
    """The verdict on the last definition that is answered: a copy of the stub takes nothing away."""
    if not found:
        return {"status": "missing", "mistake": None}
    from .checks import judge  # loads torch, which a file that is no notebook need not wait for

    try:
        while (verdict := judge(number, found[-1])).status == "not solved yet" and len(found) > 1:
            found.pop()
    except BaseException as error:
        return {"status": "wrong", "mistake": _told(error)}
    return {"status": verdict.status, "mistake": verdict.mistake}


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
    notebook, report, *skipped = sys.argv[1:]
    sys.argv[1:] = []
    sys.stdout = sys.stderr = _Nowhere()
    _limit_resources()
    try:
        examine(Path(notebook), Path(report), set(skipped))
    except BaseException as error:
        with Path(report).open("a", encoding="utf-8") as lines:
            lines.write(json.dumps({"failed": _told(error)}) + "\n")
    os._exit(0)  # whatever threads the submission left running
