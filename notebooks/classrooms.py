"""The course as a class gets it: `python -m notebooks.classrooms students FOLDER`.

    students   notebooks and a README: no solutions, no sources, no grader
    nbgrader   an nbgrader course: nbgrader_config.py, and source/ with an assignment for each notebook
    otter      a master notebook for each `otter assign`

All are made from notebooks/source, so exercises, checks and points are the same everywhere.

But: the installed package dpo_course holds, for each exercise, what decides whether an answer is right. It is
no copy of the solution, but whoever reads it can answer with it.
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import nbformat
from dpo_course.exercises import of_chapter
from nbformat import NotebookNode

from dpo_minimal.bench.exercises import Exercise
from dpo_minimal.validation import InputError

from . import build, syllabus
from .stubs import SOLUTION, STUB

Files = dict[str, str]  # path within the folder -> text
CELL_SECONDS = 120  # demonstrations take some seconds each; an endless loop should not hold up a class

STUDENTS = """\
# From preferences to Direct Preference Optimization

In a fresh virtual environment (Python 3.11 or later), in this folder:

```sh
pip install "{requirement}"
jupyter lab
```

Open a notebook and run it cell by cell. Stop at "Predict before you run", and write your prediction down. Replace each `raise NotImplementedError` by your answer; the check below it answers back. Hand in the notebook under the name that it has.

{table}
"""  # noqa: E501

NBGRADER = """\
# `nbgrader generate_assignment 03_dpo` makes the students' notebook in release/ and records its points.
c = get_config()  # defined by nbgrader
c.CourseDirectory.course_id = "dpo"
c.ClearSolutions.code_stub = {{"python": "{stub}"}}
c.Execute.timeout = {seconds}  # of one cell
"""

OTTER = """\
# ASSIGNMENT CONFIG
name: {name}
requirements: ["{requirement}"]
tests:
    ok_format: false
export_cell:
    pdf: false"""
# Otter's prompt is `...`, which would return nothing; this one says that there is no answer yet.
OTTER_SOLUTION = '''\
{indent}# BEGIN SOLUTION NO PROMPT
{solution}{indent}# END SOLUTION
{indent}"""  # BEGIN PROMPT
{indent}{stub}
{indent}"""  # END PROMPT
'''


# ------------------------------------------------------------------------------------------ for students


def students(sources: list[Path]) -> Files:
    """The set for students."""
    files = {f"{source.stem}.ipynb": _text(build.student_notebook(source)) for source in sources}
    table = syllabus.syllabus_table(sources, lambda title, source: f"[{title}]({source.stem}.ipynb)")
    return {"README.md": STUDENTS.format(requirement=syllabus.requirement(), table=table), **files}


# ----------------------------------------------------------------------------------- for other graders


def _exercises(notebook: NotebookNode) -> Iterator[tuple[NotebookNode, NotebookNode, Exercise]]:
    """Each exercise with the cell that answers it and the one that checks it."""
    known = of_chapter(notebook.metadata["course"]["chapter"])
    answers, checks = (
        [cell for cell in notebook.cells if tag in cell.metadata.get("tags", [])]
        for tag in ("exercise", "check")
    )
    for answer, check in zip(answers, checks, strict=True):
        number = re.match(r'check\("([\d.]+)"', check.source)[1]
        yield answer, check, known[number]


def nbgrader(sources: list[Path]) -> Files:
    """An nbgrader course, whose release nbgrader makes."""
    config = NBGRADER.format(stub=STUB, seconds=CELL_SECONDS)
    notebooks = {f"source/{s.stem}/{s.stem}.ipynb": _text(nbgrader_notebook(s)) for s in sources}
    return {"nbgrader_config.py": config, **notebooks}


def nbgrader_notebook(source: Path) -> NotebookNode:
    """The instructor's version. A check that raises gets no points, so it has to raise without an answer."""
    notebook = build.marked_notebook(source)
    for cell in notebook.cells:
        for tag in {"install", "setup"} & set(cell.metadata.get("tags", [])):
            _grading(cell, tag, locked=True)
    for answer, check, exercise in _exercises(notebook):  # known by names: a number may change
        _grading(answer, f"answer-{exercise.function}", solution=True)
        _grading(check, f"check-{exercise.function}", locked=True, grade=True, points=exercise.points)
        check.metadata.tags.append("raises-exception")  # with this, "Run All" goes on after it
        check.source = (  # imported, because a student's own variable may be called check
            "from dpo_course.checks import check\n\n"
            f'check("{exercise.number}", {exercise.function}).require()'
        )
    return notebook


def _grading(cell: NotebookNode, grade_id: str, **settings: object) -> None:
    """Write nbgrader's metadata; what is not said is false."""
    cell.metadata["nbgrader"] = {
        "schema_version": 3, "grade_id": grade_id, "grade": False, "locked": False, "solution": False,
        "task": False, **settings,
    }  # fmt: skip


def otter(sources: list[Path]) -> Files:
    """A master notebook for each notebook."""
    return {f"{source.stem}.ipynb": _text(otter_notebook(source)) for source in sources}


def otter_notebook(source: Path) -> NotebookNode:
    """The notebook that `otter assign` reads: raw cells around each exercise, and a test that raises.

    Otter's own check cell is left out, because the course's own stands there.
    """
    notebook = build.marked_notebook(source)
    blocks = {}
    for answer, _, exercise in _exercises(notebook):
        answer.source = SOLUTION.sub(_for_otter, answer.source).rstrip("\n")
        blocks[answer.id] = list(_question(answer, exercise))
    config = OTTER.format(name=source.stem, requirement=syllabus.requirement())
    cells = [nbformat.v4.new_raw_cell(config, id=f"{source.stem}-config")]
    for cell in notebook.cells:
        cells += blocks.get(cell.id, [cell])
    notebook.cells = cells
    return notebook


def _for_otter(match: re.Match) -> str:
    return OTTER_SOLUTION.format(indent=match[1], solution=match[2], stub=STUB)


def _question(answer: NotebookNode, exercise: Exercise) -> Iterator[NotebookNode]:
    """An exercise between Otter's raw cells."""
    name = exercise.function
    question = f"# BEGIN QUESTION\nname: {name}\npoints: {exercise.points}\ncheck_cell: false"
    test = (
        f"def test_{name}({name}):\n"
        "    from dpo_course.checks import judge\n\n"
        f'    judge("{exercise.number}", {name}).require()'
    )

    def raw(text: str, place: str) -> NotebookNode:
        return nbformat.v4.new_raw_cell(text, id=f"{answer.id}-{place}")

    yield raw(question, "question")
    yield raw("# BEGIN SOLUTION", "solution")
    yield answer
    yield raw("# END SOLUTION", "solution-end")
    yield raw("# BEGIN TESTS", "tests")
    yield nbformat.v4.new_code_cell(test, id=f"{answer.id}-test")
    yield raw("# END TESTS", "tests-end")
    yield raw("# END QUESTION", "question-end")


# ------------------------------------------------------------------------------------------------ files


VERSIONS = {"students": students, "nbgrader": nbgrader, "otter": otter}


def _text(notebook: NotebookNode) -> str:
    return nbformat.writes(notebook, version=nbformat.NO_CONVERT, indent=1) + "\n"


def write(files: Files, folder: Path) -> None:
    """Write the files into a folder that is new or empty; all of them or none.

    Raises:
        InputError: the folder holds something, is none, or cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            raise InputError(f"{folder}: is not empty; name a new folder.")
        with tempfile.TemporaryDirectory(dir=folder) as temporary:
            for name, text in files.items():
                path = Path(temporary, name)
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(text, encoding="utf-8")
            for path in sorted(Path(temporary).iterdir()):
                path.rename(folder / path.name)
    except OSError as error:
        raise InputError(f"{folder}: cannot be written ({error.strerror}); name another folder.") from None


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m notebooks.classrooms",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("version", choices=VERSIONS, help="for whom")
    parser.add_argument("folder", type=Path, help="where to; a new folder or an empty one")
    parser.add_argument("numbers", nargs="*", help="notebooks to take, such as 3 5; all, unless given")
    options = parser.parse_args(arguments)
    try:
        sources = build.chosen(options.numbers)
        write(VERSIONS[options.version](sources), options.folder)
    except InputError as error:
        parser.error(str(error))
    print(f"{options.folder}: {', '.join(source.stem for source in sources)}")
    if "YOUR_NAME" in syllabus.repository():
        told = (
            "set Repository in pyproject.toml: links and the cell that installs the course lead nowhere yet"
        )
        print(f"{syllabus.repository()} is no address; {told}.", file=sys.stderr)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
