"""One submitted notebook, examined in a process of its own; `grade.py` starts it and watches the clock.

    python -m notebooks.examine NOTEBOOK REPORT [SKIPPED ...]

The submission's cells are executed one by one, whatever they raise; then every exercise of the notebook is
judged. What the course itself wrote (demonstrations, checks) is not run: only the set-up, the exercises and
what the student added. REPORT gets one JSON line when an item begins and one when an exercise is judged, so
whoever reads it knows what was going on when this process died. Items named SKIPPED are left out.

But: this is no sandbox. It survives accidents, not malice; grade strangers' code in a container.
"""

from __future__ import annotations

import io
import json
import os
import re
import sys
from pathlib import Path
from typing import Any

from .exercises import CHAPTERS, of_chapter

FOLDER = Path(__file__).parent
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
        namespace: dict[str, Any] = {"__name__": "__main__"}
        for place, code in cells_to_run(notebook, chapter):
            item = f"cell {place}"
            if item not in skipped:
                tell(begin=item)
                if error := _run(code, item, namespace):
                    tell(item=item, error=error)
        for number, exercise in of_chapter(chapter).items():
            if number not in skipped:
                tell(begin=number)
                tell(item=number, **_judged(number, namespace.get(exercise.function)))
        tell(begin="end")


def read(path: Path) -> dict[str, Any]:
    """A notebook as it lies on disk. (The library for this format takes as long to load as torch.)

    Raises:
        ValueError: it is none, or one of the format before 2015.
    """
    try:
        notebook = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(notebook["cells"], list) and isinstance(notebook["metadata"], dict):
            return notebook
    except (ValueError, KeyError, TypeError):
        pass
    raise ValueError("this file is no notebook; open it in Jupyter and save it again")


def chapter_of(path: Path, notebook: dict[str, Any]) -> str:
    """Which notebook of the course this is: by its metadata, or by the number its file name begins with.

    Raises:
        ValueError: by neither.
    """
    number = re.match(r"0*(\d+)", path.stem)
    chapter = str(notebook["metadata"].get("course", {}).get("chapter", number and number[1]))
    if chapter not in CHAPTERS:
        raise ValueError(
            "this is none of the course's notebooks: the file's name should begin with its number"
        )
    return chapter


def cells_to_run(notebook: dict[str, Any], chapter: str) -> list[tuple[int, str]]:
    """The code of a submission but for the course's own demonstrations and checks, each cell with its place
    among the code cells: 3 is In [3] of a notebook that was run from the top."""
    (student,) = FOLDER.glob(f"0{chapter}_*.ipynb")
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
    cells = [cell for cell in notebook["cells"] if cell.get("cell_type") == "code"]
    return [(cell.get("metadata", {}).get("tags", []), "".join(cell["source"]).strip()) for cell in cells]


def _run(code: str, name: str, namespace: dict[str, Any]) -> str | None:
    """Execute one cell; the error it raised, or None."""
    python = "\n".join(line for line in code.split("\n") if not line.lstrip().startswith(("%", "!")))
    try:
        exec(compile(python, f"<{name}>", "exec"), namespace)
    except BaseException as error:  # exit() too
        return f"{type(error).__name__}: {error}"[:200]
    return None


def _judged(number: str, function: Any) -> dict[str, Any]:
    if function is None:
        return {"status": "missing", "mistake": None}
    from .checks import judge  # loads torch, which a file that is no notebook need not wait for

    try:
        verdict = judge(number, function)
    except BaseException as error:
        return {"status": "wrong", "mistake": f"{type(error).__name__}: {error}"[:200]}
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
            lines.write(json.dumps({"failed": f"{type(error).__name__}: {error}"[:200]}) + "\n")
    os._exit(0)  # whatever threads the submission left running
