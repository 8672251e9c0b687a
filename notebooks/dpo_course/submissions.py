"""Who handed in what: students' folders, single files, zips, and the names that learning platforms give.

ada/03_dpo.ipynb                                              a folder for each student
ada_03_dpo.ipynb  ada.zip  answers_ada.py                     or a file for each
Ada Byron_12345_assignsubmission_file_/03_dpo.ipynb           Moodle, in folders or without
byronada_LATE_12345_678_03_dpo-1.ipynb                        Canvas
Week 3_ada_attempt_2026-11-28-10-00-00_03_dpo.ipynb           Blackboard
"""

from __future__ import annotations

import re
import zipfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from . import cells
from .exercises import CHAPTERS

KINDS = (".ipynb", ".py", ".zip")
OURS = {"solutions", "source", "dpo_course", "dpo_minimal", "tests", "site-packages", "__MACOSX"}
LARGEST = 1 << 30  # bytes that a zip may hold
PLATFORMS = (  # name, number if there is one, and the file's own name if it is part of this one
    re.compile(r"(?P<name>.+)_(?P<id>\d+)_assignsubmission_[a-z]+_(?P<file>.*)"),  # Moodle
    re.compile(r".+_(?P<name>[^_]+)_attempt_(?P<id>)\d{4}(?:-\d\d){5}(?:_(?P<file>.*)|\.txt)?"),  # Blackboard
    re.compile(r"(?P<name>[^_]+)(?:_LATE)?_(?P<id>\d+)_\d+_(?P<file>.+)"),  # Canvas
)
STEMS = "|".join([*(f"0*{chapter}_{name}" for chapter, name in CHAPTERS.items()), "answers"])
COURSE = re.compile(rf"(?:^|(?<=[\W_]))(?:{STEMS})(?=$|[\W_])")
COPY = re.compile(r"[\W_]*(?:\(?\d+\)?|copy\d*)?[\W_]*", re.IGNORECASE)  # -1, (2), -Copy1


class Submission(NamedTuple):
    """What one student handed in: the files to grade, and what the teacher should know."""

    student: str
    files: list[Path]
    remarks: list[str]


def submissions(folder: Path, unpacked: Path) -> list[Submission]:
    """Every student's submission, in order.

    A student is a folder just below `folder`, or a file in it; platforms' names are taken apart. All files
    that tell no student apart, such as `03_dpo.ipynb`, belong to one, who is called as the folder is.

    Args:
        unpacked: an empty folder, for what is in zips.
    """
    entries = sorted(path for path in folder.iterdir() if _can_be_read(path))
    owners = [(path, *_owner(path, folder)) for path in entries]
    owners = [owner for owner in owners if owner[1]]
    numbers: dict[str, set[str]] = {}
    for _, name, number in owners:
        numbers.setdefault(name, set()).add(number)
    belongings: dict[str, list[Path]] = {}
    for path, name, number in owners:
        told = f"{name} ({number})" if len(numbers[name]) > 1 else name  # namesakes
        belongings.setdefault(told, []).append(path)
    return [submission(name, paths, unpacked / str(n)) for n, (name, paths) in enumerate(belongings.items())]


def submission(student: str, paths: list[Path], unpacked: Path) -> Submission:
    """The submission of one student, out of folders and files.

    Of the course's own files, in folders with the names that they have in the project, nothing counts.
    """
    remarks: list[str] = []
    found = [(file, inside) for path in paths for file, inside in _files(path, unpacked, remarks)]
    own = [file for file, inside in found if not OURS & set(inside.parts[:-1])]
    scripts = [file for file in own if file.suffix.lower() == ".py"]
    answers = [file for file in scripts if _defines_any(file)]
    files = [file for file in own if file.suffix.lower() == ".ipynb"] + answers
    if not files:
        files = [path for path in scripts if path.stem != "__init__"]  # to tell what its functions are named
    if not files and found:
        folders = sorted({part for _, inside in found for part in inside.parts[:-1] if part in OURS})
        remarks.append(f"only files in {' and '.join(folders)}, which are the course's own, were handed in")
    elif not files and not remarks:
        remarks.append("no notebook, no script and no zip of them was handed in")
    return Submission(student, files, remarks)


def _owner(path: Path, folder: Path) -> tuple[str, str]:
    """(student, the platform's number for them); no student for a file that nobody would hand in."""
    for pattern in PLATFORMS:
        if match := pattern.fullmatch(path.name):
            return match["name"].strip(), match["id"]
    if path.is_dir():
        return path.name, ""
    if path.suffix.lower() not in KINDS:
        return "", ""
    before, course, after = _parted(path.stem)
    if not course:
        return path.stem, ""
    name = before.strip(" _-.") or ("" if COPY.fullmatch(after) else after.strip(" _-."))
    return name or folder.resolve().name, ""


def _parted(stem: str) -> tuple[str, str, str]:
    """A file's name before, in and after the name that the course gave to the file."""
    match = COURSE.search(stem)
    return (stem[: match.start()], match[0], stem[match.end() :]) if match else (stem, "", "")


def _can_be_read(path: Path) -> bool:
    """Whether this is a folder or a file; reading a pipe or a device would not end."""
    return not _is_hidden(path.name) and (path.is_dir() or path.is_file())


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name == "__MACOSX"


def _files(
    path: Path, unpacked: Path, remarks: list[str], depth: int = 0
) -> Iterator[tuple[Path, PurePosixPath]]:
    """Notebooks and scripts, also those in zips, each with its path within what was handed in."""
    if path.is_dir():
        for file in sorted(path.rglob("*")):
            inside = PurePosixPath(file.relative_to(path).as_posix())
            if file.is_file() and not any(map(_is_hidden, inside.parts)):
                found = _files(file, unpacked, remarks, depth)
                yield from ((each, inside.parent / within) for each, within in found)
    elif path.suffix.lower() == ".zip":
        place = unpacked / str(len(list(unpacked.glob("*"))))
        try:
            if depth == 2:
                raise ValueError("it is a zip in a zip in a zip")
            unpack(path, place, KINDS)
            yield from _files(place, unpacked, remarks, depth + 1)
        except (OSError, zipfile.BadZipFile, NotImplementedError, RuntimeError, ValueError) as error:
            remarks.append(f"{path.name} cannot be unpacked: {error}"[:200])
    elif path.suffix.lower() in KINDS:
        yield path, PurePosixPath(path.name)


def unpack(path: Path, folder: Path, kinds: tuple[str, ...] = ("",)) -> None:
    """Unpack what has these endings. Raises ValueError if it is too large, and what `zipfile` raises."""
    folder.mkdir(parents=True)
    with zipfile.ZipFile(path) as archive:
        members = [m for m in archive.infolist() if m.filename.lower().endswith(kinds)]
        if sum(member.file_size for member in members) > LARGEST:
            raise ValueError(f"it holds more than {LARGEST >> 20} MB")
        for member in members:
            archive.extract(member, folder)  # which leads to no place outside the folder


def _defines_any(path: Path) -> bool:
    """Whether a script defines the function of an exercise."""
    try:
        return bool(cells.defined(path.read_text(encoding="utf-8", errors="replace")))
    except OSError:
        return False
