"""What the installed package knows of the notebooks, written from their sources: see dpo_course/given.py."""

from __future__ import annotations

import ast
import itertools
import json
import re
from pathlib import Path

import jupytext
from dpo_course import given
from dpo_course.cells import names

from dpo_minimal.text.runs import write_atomically

from . import syllabus
from .stubs import solution, stub

HEADING = re.compile(r"^### Exercise ([\d.]+): (.*)\n\n((?s:.*))", re.MULTILINE)


def data(source: Path) -> str:
    """The JSON of one notebook."""
    tasks, demonstrations, setup, prose = {}, [], "", ""
    for cell in jupytext.reads(source.read_text(encoding="utf-8"), fmt="py:percent").cells:
        tags = cell.metadata.get("tags", [])
        if cell.cell_type == "markdown":
            prose = cell.source
        elif "setup" in tags:
            setup = cell.source
        elif "exercise" in tags:
            number, title, text = HEADING.search(prose).groups()
            asked, solved = stub(cell.source), solution(cell.source)
            tasks[number] = {
                "title": title,
                "text": text,
                "function": re.search(r"^def (\w+)", asked, re.MULTILINE)[1],
                "stub": asked,
                "needs": needed(names(solved)[0] | shown(f"{title} {text}", demonstrations), demonstrations),
                "solution": given.digest(solved) if is_long(solved) else "",
            }
        elif not {"check", "install"} & set(tags):
            demonstrations.append(cell.source)
    written = {
        "title": syllabus.header(source).title,
        "setup": setup,
        "demonstrations": [given.digest(code) for code in demonstrations],
        "tasks": tasks,
    }
    return json.dumps(written, indent=1, ensure_ascii=False) + "\n"


def needed(wanted: set[str], before: list[str]) -> str:
    """Those statements of earlier cells which bind these names, directly or by way of others."""
    statements = [(cell, statement) for cell in before for statement in ast.parse(cell).body]
    chosen = []
    for cell, statement in reversed(statements):
        text = ast.get_source_segment(cell, statement)
        takes, gives = names(text)
        if gives & wanted:
            chosen.append(text)
            wanted = (wanted - gives) | takes
    return "\n\n\n".join(reversed(chosen))


def shown(text: str, demonstrations: list[str]) -> set[str]:
    """The demonstrations' functions that a text speaks of: exhibit A is `exhibit_a`."""
    words = re.findall(r"\w+", text.lower())
    spoken = {"_".join(pair) for pair in itertools.pairwise(words)} | {word for word in words if "_" in word}
    return spoken & set(re.findall(r"^def (\w+)", "\n".join(demonstrations), re.MULTILINE))


def is_long(solution: str) -> bool:
    """Whether the same code, to the letter, is unlikely to be written twice: two lines or more below the
    docstring."""
    function = next(node for node in ast.parse(solution).body if isinstance(node, ast.FunctionDef))
    first = function.body[bool(ast.get_docstring(function))]
    return function.end_lineno - first.lineno >= 1


def path(source: Path) -> Path:
    """Where the data of a source are kept."""
    return given.FOLDER / f"{source.stem}.json"


def is_stale(source: Path) -> bool:
    """Whether they are missing or differ from the source."""
    return not path(source).exists() or path(source).read_text(encoding="utf-8") != data(source)


def write(source: Path) -> None:
    """Write them, whole or not at all."""
    text = data(source)
    path(source).parent.mkdir(exist_ok=True)
    write_atomically(path(source), lambda temporary: temporary.write_text(text, encoding="utf-8"))
