"""What the course itself wrote in a notebook: its demonstrations, and of each exercise the text and the stub.

The grader, the template and the pytest plugin need it where the package is installed without the notebooks.
`python -m notebooks.build` writes it from the sources, one file a notebook, in `given/`.
"""

from __future__ import annotations

import functools
import hashlib
import json
from pathlib import Path
from typing import NamedTuple

from .exercises import CHAPTERS

FOLDER = Path(__file__).parent / "given"


class Task(NamedTuple):
    """An exercise as a student finds it.

    Fields: title; text, what is asked; function, the name that the answer has; stub, its code; needs, the
    code of the demonstrations that an answer builds on; solution, the digest of the published one, empty
    where it is so short that many will write the same.
    """

    title: str
    text: str
    function: str
    stub: str
    needs: str
    solution: str


class Given(NamedTuple):
    """One notebook: its title, its set-up cell, digests of its demonstrations, its exercises by number."""

    title: str
    setup: str
    demonstrations: list[str]
    tasks: dict[str, Task]


@functools.cache
def of_chapter(chapter: str) -> Given:
    """What the course wrote in this notebook."""
    data = json.loads(path(chapter).read_text(encoding="utf-8"))
    return Given(**data | {"tasks": {number: Task(**task) for number, task in data["tasks"].items()}})


def path(chapter: str) -> Path:
    """Where the data of a notebook lie."""
    return FOLDER / f"{stem(chapter)}.json"


def stem(chapter: str) -> str:
    """The notebook's file name without its ending, such as 03_dpo."""
    return f"{chapter:0>2}_{CHAPTERS[chapter]}"


def all_tasks() -> dict[str, Task]:
    """Every exercise, in the order of the course."""
    return {number: task for chapter in CHAPTERS for number, task in of_chapter(chapter).tasks.items()}


def digest(code: str) -> str:
    """A short name of this very code, spaces at its ends aside."""
    return hashlib.sha256(code.strip().encode("utf-8", "backslashreplace")).hexdigest()[:16]
