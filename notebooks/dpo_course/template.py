"""A file of stubs to answer without a notebook: `python -m dpo_course.template 3`."""

from __future__ import annotations

import argparse
import ast
import re
import textwrap
from pathlib import Path

from dpo_minimal.text.runs import write_atomically

from . import cells, given
from .exercises import CHAPTERS

HEAD = '''"""{titles}

Replace each `raise NotImplementedError` by your answer, and check your answers as often as you like:

    pytest --student {name}

Equations are those of Rafailov et al. (2023); sections such as D3.4 are in derivations.md.
"""
'''


def template(chapters: list[str], name: str = "answers.py") -> str:
    """The file: imports, and of each exercise the text, the stub and what a demonstration defines for it."""
    parts = [given.of_chapter(chapter) for chapter in chapters]
    titles = "\n".join(f"Notebook {n}: {part.title}." for n, part in zip(chapters, parts))
    blocks = [
        block
        for part in parts
        for number, task in part.tasks.items()
        for block in ((task.needs,) if task.needs else ()) + (_stub(number, task),)
    ]
    code = "\n\n\n".join(dict.fromkeys(blocks))  # two may need the same
    return HEAD.format(titles=titles, name=name) + f"\n{_imports(parts, code)}\n\n\n{code}\n"


def _imports(parts: list[given.Given], code: str) -> str:
    """The set-ups' imports without those that only demonstrations use."""
    lines = [
        ast.unparse(statement)
        for part in parts
        for statement in ast.parse(part.setup).body
        if isinstance(statement, ast.Import | ast.ImportFrom)
    ]
    words = {*re.findall(r"\w+", code), "torch", "F", "dpo"}
    used = [line for line in lines if cells.names(line)[1] & words]
    return "\n".join(sorted(dict.fromkeys(used), key=lambda line: line.startswith("from")))


def _stub(number: str, task: given.Task) -> str:
    """The stub with what is asked in its docstring."""
    function = next(node for node in ast.parse(task.stub).body if isinstance(node, ast.FunctionDef))
    first = function.body[0].lineno - 1
    head, body = task.stub.split("\n")[:first], task.stub.split("\n")[function.body[0].end_lineno :]
    paragraphs = [textwrap.fill(part, 100) for part in re.split(r"\n\s*\n", _plain(task.text))]
    text = [ast.get_docstring(function), f"Exercise {number}: {task.title}.", *paragraphs]
    raw = "r" if any("\\" in part for part in text) else ""
    docstring = f'{raw}"""' + "\n\n".join(text) + '\n"""'
    return "\n".join([*head, textwrap.indent(docstring, "    "), *body])


def _plain(markdown: str) -> str:
    """Markdown as it reads in a docstring: tags without their brackets."""
    return re.sub(r"\[(D\d+\.\d+)\]", r"\1", markdown).replace('"""', "'''")


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m dpo_course.template",
        description="Write a file of stubs for the course's exercises, to answer without a notebook. "
        "`pytest --student answers.py` checks it.",
    )
    parser.add_argument("notebooks", nargs="*", metavar="N", help="notebooks, such as 3 4 (all)")
    parser.add_argument("--output", type=Path, default=Path("answers.py"), help="the file (answers.py)")
    parser.add_argument("--force", action="store_true", help="replace the file if it exists")
    options = parser.parse_args(arguments)
    if unknown := [number for number in options.notebooks if number not in CHAPTERS]:
        parser.error(f"no notebook {', '.join(unknown)}; there are {', '.join(CHAPTERS)}.")
    if options.output.suffix != ".py":
        parser.error(f"--output {options.output}: the name must end in .py.")
    if options.output.exists() and not options.force:
        parser.error(f"{options.output} exists; --force replaces it, --output gives another name.")
    text = template([c for c in CHAPTERS if c in options.notebooks] or list(CHAPTERS), options.output.name)
    write_atomically(options.output, lambda temporary: temporary.write_text(text, encoding="utf-8"))
    print(f"{options.output}: now answer, and run pytest --student {options.output}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
