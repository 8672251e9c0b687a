"""From one source to two notebooks: `python -m notebooks.build`.

A source is a text file in jupytext's percent format. Three things in it are ours:
- lines between `### BEGIN SOLUTION` and `### END SOLUTION` stand in the solved notebook only; the student
  finds `raise NotImplementedError` there;
- a cell tagged `answer` stands in the solved notebook only;
- a cell tagged `outcome`, what happened after a prediction, is folded in the student's notebook, below a cell
  in which the prediction can be written down.
Before the set-up, the student's notebook gets a cell that installs the course where it is missing.
Below the first cell that names a result such as [D3.4], its derivation can be opened.

The student's notebook has no outputs. The solved one is executed when its code has changed, and its outputs
are kept. What a source has not changed is left alone. The tables of notebooks/README.md are read off the
sources too.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from nbformat import NotebookNode

from dpo_minimal.text.runs import write_atomically
from dpo_minimal.validation import InputError

from . import given, lecture, syllabus
from .stubs import solution, stub

FOLDER = Path(__file__).parent
QUESTION = "**Predict before you run.**"
PREDICTION = "**My prediction:** *(double-click here and write it down)*"
OPEN = "What happened? Open this after you have predicted, and run the cell above."
SECONDS = 600  # no cell takes longer, unless something hangs
# `%pip` raises nothing when it fails, so whether the course is there is asked again.
INSTALL = """\
# Fetches the course where it is missing, as on Colab; elsewhere it does nothing.
from importlib import invalidate_caches, util

if not util.find_spec("dpo_course"):
    %pip install -q "{requirement}"
    invalidate_caches()
if not util.find_spec("dpo_course"):
    raise ImportError("The course could not be installed. Pip's message above says why; ask your teacher.")"""


def sources() -> list[Path]:
    """The sources of all notebooks, in the order of the course."""
    return sorted((FOLDER / "source").glob("[0-9]*.py"))


def chosen(numbers: list[str]) -> list[Path]:
    """The sources of the notebooks with these numbers, in the order of the course; all, if there are none.

    Raises:
        InputError: there is no such notebook.
    """
    known = {source.stem.split("_")[0].lstrip("0"): source for source in sources()}
    if unknown := set(numbers) - set(known):
        raise InputError(f"no notebook {', '.join(sorted(unknown))}; there are {', '.join(known)}.")
    return [source for number, source in known.items() if not numbers or number in numbers]


def student_path(source: Path) -> Path:
    """Where the student's notebook stands."""
    return FOLDER / f"{source.stem}.ipynb"


def solved_path(source: Path) -> Path:
    """Where the solved notebook stands."""
    return FOLDER / "solutions" / f"{source.stem}.ipynb"


# ----------------------------------------------------------------------------- from text to notebooks


def student_notebook(source: Path) -> NotebookNode:
    """The notebook with stubs, without outputs."""
    return _notebook(source, stub, solved=False)


def marked_notebook(source: Path) -> NotebookNode:
    """The student's notebook with its solutions between their markers, for software that makes the stubs."""
    return _notebook(source, str, solved=False)


def solved_notebook(source: Path) -> NotebookNode:
    """The notebook with solutions, not executed yet."""
    return _notebook(source, solution, solved=True)


def _notebook(source: Path, code: Callable[[str], str], *, solved: bool) -> NotebookNode:
    written = jupytext.reads(source.read_text(encoding="utf-8"), fmt="py:percent")
    derived, cells = where_to_derive(written.cells), []
    for place, cell in enumerate(written.cells):
        name, tags = f"{source.stem}-{place}", cell.metadata.get("tags", [])
        if not solved and "setup" in tags:
            cells.append(to_install(name))
        if solved or "answer" not in tags:
            cells.append(_cell(cell, name, code, solved=solved))
        if not solved and QUESTION in cell.source:
            cells.append(to_write_in(name))
        if derived[place]:
            cells.append(derivations(derived[place], name))
    metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
        "course": {"chapter": source.stem.split("_")[0].lstrip("0")},
    }
    return nbformat.v4.new_notebook(cells=cells, metadata=metadata)


def _cell(cell: NotebookNode, name: str, code: Callable[[str], str], *, solved: bool) -> NotebookNode:
    text = cell.source
    tags = list(cell.metadata.get("tags", []))
    metadata = {"tags": tags} if tags else {}
    if cell.cell_type == "markdown":
        if "outcome" in tags and not solved:
            text = folded(OPEN, text)
        return nbformat.v4.new_markdown_cell(text, metadata=metadata, id=name)
    return nbformat.v4.new_code_cell(code(text), metadata=metadata, id=name)


def folded(summary: str, text: str) -> str:
    """Prose that a click opens. Between empty lines, Jupyter, VS Code, Colab and GitHub read Markdown."""
    return f"<details><summary>{summary}</summary>\n\n{text}\n\n</details>"


def to_write_in(name: str) -> NotebookNode:
    """The cell below a question, for the student's prediction."""
    metadata = {"tags": ["prediction"]}
    return nbformat.v4.new_markdown_cell(PREDICTION, metadata=metadata, id=f"{name}-prediction")


def to_install(name: str) -> NotebookNode:
    """The cell before the set-up, which fetches what is missing where somebody opens the notebook alone."""
    metadata = {"tags": ["install"]}
    text = INSTALL.format(requirement=syllabus.requirement())
    return nbformat.v4.new_code_cell(text, metadata=metadata, id=f"{name}-install")


def where_to_derive(cells: list[NotebookNode]) -> list[list[str]]:
    """For each cell of a source, the tags such as D3.4 that are derived below it: those that it names first.

    The header lists what a notebook uses; what only the header names is derived below the header. Cells that
    a student's copy lacks do not count.
    """
    named = [
        re.findall(r"\[(D\d+\.\d+)\]", cell.source)
        if cell.cell_type == "markdown" and "answer" not in cell.metadata.get("tags", [])
        else []
        for cell in cells
    ]
    first: dict[str, int] = {}
    for place, tags in [*enumerate(named[1:], start=1), (0, named[0])]:
        for tag in tags:
            first.setdefault(tag, place)
    return [[tag for tag in dict.fromkeys(tags) if first[tag] == place] for place, tags in enumerate(named)]


def derivations(tags: list[str], name: str) -> NotebookNode:
    """The cell from which these results' derivations open. Raises ValueError for a tag that no document has.

    They stand in the notebook because no link from a notebook leads everywhere: JupyterLab opens no file
    outside the folder where it was started, GitHub no relative link, and a notebook alone has no other file.
    """
    sections = syllabus.sections()
    if unknown := [tag for tag in tags if tag not in sections]:
        raise ValueError(f"the derivations have no section {', '.join(unknown)}.")
    parts = []
    for tag in tags:
        text = syllabus.without_code(sections[tag].text)
        text = re.sub(r"\[([^\]]+)\]\((?!http)[^)\s]*\)", r"\1", text)  # links to files of the repository
        parts.append(folded(f"Derivation of {tag}: {sections[tag].title}", text))
    metadata = {"tags": ["derivation"]}
    return nbformat.v4.new_markdown_cell("\n\n".join(parts), metadata=metadata, id=f"{name}-derivation")


# ------------------------------------------------------------------------------------- files and runs


def same_cells(left: NotebookNode, right: NotebookNode) -> bool:
    """The same cells and metadata, outputs aside."""
    return _without_outputs(left) == _without_outputs(right)


def _without_outputs(notebook: NotebookNode) -> object:
    cells = [(cell.id, cell.cell_type, cell.source, cell.metadata) for cell in notebook.cells]
    return cells, notebook.metadata


def is_stale(path: Path, wanted: NotebookNode) -> bool:
    """Whether the file is missing or differs from its source."""
    return not path.exists() or not same_cells(nbformat.read(path, as_version=4), wanted)


def write(notebook: NotebookNode, path: Path) -> None:
    """Write a notebook, whole or not at all."""
    text = nbformat.writes(notebook, version=nbformat.NO_CONVERT, indent=1) + "\n"
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def execute(notebook: NotebookNode, folder: Path) -> float:
    """Run all cells in place, with the folder as working directory; return the seconds it took.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell raised.
    """
    start = time.perf_counter()
    # What is written must not depend on ipywidgets. And the tensors are small: threads that wait for one
    # another are slower than one, and ten times so where something else runs beside them.
    surroundings = os.environ | {"COURSE_STATIC": "1", "OMP_NUM_THREADS": "1"}
    resources = {"metadata": {"path": str(folder)}}
    client = NotebookClient(notebook, timeout=SECONDS, resources=resources, record_timing=False)
    language = dict(notebook.metadata["language_info"])
    client.execute(env=surroundings)
    notebook.metadata["language_info"] = language  # not the version of whoever ran it
    return time.perf_counter() - start


def take_outputs(notebook: NotebookNode, path: Path) -> bool:
    """Give the notebook the outputs of the file, if that has the same code; return whether it has."""
    if not path.exists():
        return False
    kept, wanted = (
        [cell for cell in cells if cell.cell_type == "code"]
        for cells in (nbformat.read(path, as_version=4).cells, notebook.cells)
    )
    if [cell.source for cell in kept] != [cell.source for cell in wanted]:
        return False
    for cell, old in zip(wanted, kept):
        cell.outputs, cell.execution_count = old.outputs, old.execution_count
    return True


def build(source: Path, *, force: bool = False) -> str:
    """Bring both notebooks of a source and the package's data up to date; return what was done, for people.

    Args:
        force: execute the solved one even if its code is the same, as after a change of the library. The old
            one stays until the new one is whole.
    """
    done = []
    student, solved = student_notebook(source), solved_notebook(source)
    if is_stale(student_path(source), student):
        write(student, student_path(source))
        done.append("student's written")
    if force or is_stale(solved_path(source), solved):
        if not force and take_outputs(solved, solved_path(source)):
            done.append("solved written, its code unchanged")
        else:
            seconds = execute(solved, solved_path(source).parent)
            done.append(f"solved executed in {seconds:.0f} s")
        write(solved, solved_path(source))
    if given.is_stale(source):
        given.write(source)
        done.append("package data written")
    return ", ".join(done) or "up to date"


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        if options.lecture:
            lecture.write_lecture(options.lecture, options.numbers)
            print(f"{options.lecture}: written; a browser opens it, without a network")
            return 0
        wanted = chosen(options.numbers)
        if options.slides:
            return _write_slides(options.slides, wanted)
    except InputError as error:
        parser.error(str(error))
    stale = 0
    for source in wanted:
        if options.check:
            late = is_stale(student_path(source), student_notebook(source))
            late |= is_stale(solved_path(source), solved_notebook(source)) or given.is_stale(source)
            stale += late
            print(f"{source.stem}: {'stale; run python -m notebooks.build' if late else 'up to date'}")
            continue
        try:
            print(f"{source.stem}: {build(source, force=options.force)}", flush=True)
        except CellExecutionError as error:
            print(
                f"{source.stem}: a cell failed, the solved notebook is as it was.\n{error}", file=sys.stderr
            )
            stale += 1
    stale += not _readme_up_to_date(write_it=not options.check)
    return 1 if stale else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m notebooks.build", description=__doc__.split("\n")[0])
    parser.add_argument(
        "numbers",
        nargs="*",
        help="notebooks, such as 3 5, or with --lecture chapters; all, unless given (chapters 0 to 9)",
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--check", action="store_true", help="build nothing; fail if a notebook is stale")
    what.add_argument("--force", action="store_true", help="execute again what is up to date")
    what.add_argument(
        "--lecture",
        nargs="?",
        const=Path("lecture.html"),
        type=Path,
        metavar="FILE",
        help="write the derivations as one page, their code behind a switch, to FILE (lecture.html)",
    )
    what.add_argument(
        "--slides",
        nargs="?",
        const=Path("slides"),
        type=Path,
        metavar="FOLDER",
        help="write slides of each solved notebook, without its solutions, into FOLDER (slides)",
    )
    return parser


def _write_slides(folder: Path, wanted: list[Path]) -> int:
    """Slides of the solved notebooks; those of a stale one would show what is no longer so."""
    stale = [source for source in wanted if is_stale(solved_path(source), solved_notebook(source))]
    fresh = {s.stem: nbformat.read(solved_path(s), as_version=4) for s in wanted if s not in stale}
    for path in lecture.write_slides(folder, fresh):
        print(f"{path}: written; a browser opens it, without a network")
    for source in stale:
        print(f"{source.stem}: stale; run python -m notebooks.build first", file=sys.stderr)
    return 1 if stale else 0


def _readme_up_to_date(*, write_it: bool) -> bool:
    """Whether README.md's tables are those of the sources; writing makes them so."""
    readme = syllabus.README.read_text(encoding="utf-8")
    wanted = syllabus.filled_in(readme, sources())
    if readme != wanted:
        if not write_it:
            print("README.md: stale; run python -m notebooks.build")
            return False
        write_atomically(syllabus.README, lambda temporary: temporary.write_text(wanted, encoding="utf-8"))
        print("README.md: its tables written")
    return True


if __name__ == "__main__":
    raise SystemExit(main())
