"""What was handed in, as cells of code: a notebook of any format or a script; and the names a cell needs."""

from __future__ import annotations

import ast
import dis
import json
import re
from collections.abc import Iterator
from pathlib import Path
from types import CodeType
from typing import Any

from . import given
from .exercises import CHAPTERS

Notebook = dict[str, Any]
MARKER = re.compile(r"^# (?:%%.*|In ?\[[\d ]*\]:)$\n?", re.MULTILINE)  # how exported notebooks begin a cell
DEFINITION = re.compile(r"^(?=(?:def|async def|class|import|from)\b)", re.MULTILINE)
COMPILED = {"mode": "exec", "flags": ast.PyCF_ALLOW_TOP_LEVEL_AWAIT, "dont_inherit": True}


def read(path: Path) -> Notebook:
    """A notebook as it lies on disk; one of the format before 2015 as Jupyter converts it (the library for
    this takes as long to load as torch); a script as the notebook that it might be.

    Raises:
        ValueError: it is neither.
    """
    if path.suffix.lower() == ".py":
        return _script(path.read_text(encoding="utf-8-sig", errors="replace"))
    try:
        text = path.read_bytes().decode("utf-8-sig")
        notebook = json.loads(text)
        if "worksheets" in notebook:
            import nbformat

            notebook = nbformat.reads(json.dumps(notebook), as_version=4)
        code_cells(notebook)  # raises where a cell is of no known form
        if isinstance(notebook["metadata"], dict):
            return notebook
    except Exception:  # damaged files fail in many ways, nested ones by recursion
        pass
    raise ValueError("this file is no notebook; open it in Jupyter and save it again")


def _script(text: str) -> Notebook:
    """Cells where the script marks them; otherwise one for each statement, so that what fails costs only
    itself."""
    markers = list(MARKER.finditer(text))
    starts = [0, *(marker.end() for marker in markers)]
    ends = [*(marker.start() for marker in markers), len(text)]
    if not markers:
        try:
            places = [_offset(text, statement) for statement in ast.parse(text).body]
        except (SyntaxError, ValueError, RecursionError):
            places = [match.start() for match in DEFINITION.finditer(text)]
        starts = sorted({0, *places})
        ends = [*starts[1:], len(text)]
    cells = []
    for start, end in zip(starts, ends):
        metadata = {"line": text.count("\n", 0, start) + 1}
        cells.append({"cell_type": "code", "source": text[start:end], "metadata": metadata})
    return {"cells": cells, "metadata": {"script": True}}


def _offset(text: str, statement: ast.stmt) -> int:
    """Where a statement begins, with its decorators."""
    line = min([statement.lineno, *(node.lineno for node in getattr(statement, "decorator_list", []))])
    return sum(len(row) for row in text.split("\n")[: line - 1]) + line - 1


def code_cells(notebook: Notebook) -> list[tuple[str, str]]:
    """(place, code) of each code cell: cell 3 is In [3] of a notebook that was run from the top."""
    codes = [cell for cell in notebook["cells"] if cell.get("cell_type") == "code"]
    lines = (cell.get("metadata", {}).get("line") for cell in codes)
    places = (f"cell {k}" if line is None else f"line {line}" for k, line in enumerate(lines, start=1))
    return [(place, source(cell)) for place, cell in zip(places, codes)]


def source(cell: dict[str, Any]) -> str:
    """A cell's text, which may be a list of lines; IPython allows an indented first line."""
    return "".join(cell.get("source", "")).replace("\r\n", "\n").lstrip("\n").rstrip()


def chapters_of(path: Path, notebook: Notebook) -> list[str]:
    """Which notebooks of the course this is: by its metadata, by its file's name, or by the functions that it
    defines. Only a script can be several.

    Raises:
        ValueError: none.
    """
    course = notebook["metadata"].get("course")
    told = str(course.get("chapter")) if isinstance(course, dict) else None
    if told in CHAPTERS:
        return [told]
    code = "\n".join(code for _, code in code_cells(notebook))
    by_functions = list(dict.fromkeys(number.split(".")[0] for number in defined(code)))
    named = next((chapter for chapter in CHAPTERS if given.stem(chapter) in path.stem), None)
    if named is None and (number := re.match(r"0*(\d+)", path.stem)) and number[1] in CHAPTERS:
        named = number[1]
    if "script" in notebook["metadata"]:
        found = by_functions or [named]
    else:
        found = [named] if named else by_functions[:1]
    if not found or found == [None]:
        raise ValueError(
            "this is none of the course's notebooks: the file's name should begin with its number, or its "
            "functions should have the exercises' names"
        )
    return found


def defined(code: str) -> list[str]:
    """The numbers of the exercises whose functions this code defines."""
    functions = set(re.findall(r"^(?:async )?def (\w+)", code, re.MULTILINE))
    return [number for number, task in given.all_tasks().items() if task.function in functions]


def rewritten(code: str) -> str:
    """IPython's own syntax as Python. Where IPython is not installed, its lines do nothing."""
    try:
        from IPython.core.inputtransformer2 import TransformerManager
    except ImportError:
        return re.sub(r"^([ \t]*)(?:[%!?].*|.*\?[ \t]*)$", r"\1pass", code, flags=re.MULTILINE)
    return TransformerManager().transform_cell(code)


def program(code: str, name: str) -> CodeType:
    """A cell, compiled; what is not Python as it stands goes through IPython's own rewriting."""
    try:
        return compile(code, f"<{name}>", **COMPILED)
    except SyntaxError:
        return compile(rewritten(code), f"<{name}>", **COMPILED)


# ------------------------------------------------------------------------------- demonstrations in need


def names(code: str) -> tuple[set[str], set[str]]:
    """(needed, bound): names that a cell takes from cells before it, also inside its functions, and names
    that it gives to those after it. None of code that is no Python."""
    try:
        whole = program(code, "cell")
    except Exception:  # of damaged code in many ways
        return set(), set()
    needed, bound = set(), set()
    for step in dis.get_instructions(whole):  # in the order in which they are executed, by and large
        if step.opname in ("STORE_NAME", "STORE_GLOBAL"):
            bound.add(step.argval)
        elif step.opname == "LOAD_NAME" and step.argval not in bound:
            needed.add(step.argval)
    for inner in _functions(whole):
        steps = list(dis.get_instructions(inner))
        bound |= {step.argval for step in steps if step.opname == "STORE_GLOBAL"}
        local = {step.argval for step in steps if step.opname == "STORE_NAME"}  # a class's own
        loads = {step.argval for step in steps if step.opname in ("LOAD_GLOBAL", "LOAD_NAME")}
        needed |= loads - local - bound
    return {name for name in needed if not name.startswith("__")}, bound


def _functions(whole: CodeType) -> Iterator[CodeType]:
    for constant in whole.co_consts:
        if isinstance(constant, CodeType):
            yield constant
            yield from _functions(constant)


def cells_to_run(notebook: Notebook, chapters: list[str]) -> list[tuple[str, str]]:
    """(place, code) of a submission's cells without the course's own demonstrations, which take seconds each.

    But if any other cell needs a name from a demonstration, all demonstrations are run up to that one, as in
    Jupyter: the nearest one that binds the name before the cell, or else the first one after it.
    """
    own = {digest for chapter in chapters for digest in given.of_chapter(chapter).demonstrations}
    cells = [(place, code) for place, code in code_cells(notebook) if code]
    shown = [given.digest(code) in own for _, code in cells]
    needed, bound = zip(*(names(code) for _, code in cells)) if cells else ((), ())
    last = -1
    for here, wanted in enumerate(needed):
        for name in () if shown[here] else wanted:
            binders = [place for place, names_there in enumerate(bound) if name in names_there]
            before = [place for place in binders if place < here]
            binder = max(before) if before else min(binders, default=-1)
            if binder >= 0 and shown[binder]:
                last = max(last, binder)
    return [cell for place, cell in enumerate(cells) if place <= last or not shown[place]]
