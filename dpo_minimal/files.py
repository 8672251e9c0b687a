"""JSON and JSON lines, gzipped or not, as located rows.

But: what a row must hold is data.py's business.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from .validation import InputError

Located = tuple[str, Callable[[], Any]]  # "FILE, row 3", and what parses the row


def read_rows(path: str | Path) -> Iterator[Located]:
    """The rows of a file, each with its place and a function that parses it or says what is wrong with it.

    A list of rows and an object of columns are JSON; anything else is one row a line. Lines end at a line
    feed only: a text may hold other characters that some tools take for line ends.

    Raises:
        InputError: the file is missing, unreadable, a truncated gzip, empty, or JSON that is neither rows nor
            columns. A row that is not JSON or not UTF-8 raises when it is parsed.
    """
    data = _read_bytes(Path(path))
    if not data.strip():
        raise InputError(f"{path}: is empty; add rows.")
    if data.lstrip()[:1] == b"[":
        yield from _rows_of_list(path, _parse(str(path), data))
        return
    first, _, rest = data.lstrip().partition(b"\n")
    if not rest.strip() or first.strip() == b"{":  # one object, on one line or set out over many
        content = _parse(str(path), data)
        if isinstance(content, dict) and content and all(isinstance(v, list) for v in content.values()):
            yield from _rows_of_columns(path, content)
            return
        if first.strip() == b"{":
            raise InputError(f"{path}: is one object but not of columns; put rows into a list or on lines.")
    for number, line in enumerate(data.split(b"\n"), start=1):
        if line.strip():
            place = f"{path}, line {number}"
            yield place, lambda place=place, line=line: _parse(place, line)


def _rows_of_list(path: str | Path, rows: list[Any]) -> Iterator[Located]:
    if not rows:
        raise InputError(f"{path}: holds an empty list; add rows.")
    for number, row in enumerate(rows, start=1):
        yield f"{path}, row {number}", lambda row=row: row


def _rows_of_columns(path: str | Path, columns: dict[str, list[Any]]) -> Iterator[Located]:
    (first, length), *others = ((name, len(values)) for name, values in columns.items())
    for name, other in others:
        if other != length:
            raise InputError(
                f"{path}, field {name!r}: has {other} entries where {first!r} has {length}; make the columns "
                "equally long."
            )
    yield from _rows_of_list(path, [dict(zip(columns, row)) for row in zip(*columns.values())])


def _read_bytes(path: Path) -> bytes:
    try:
        data = path.read_bytes()
        if data[:2] == b"\x1f\x8b":
            data = gzip.decompress(data)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file.") from None
    except IsADirectoryError:
        raise InputError(f"{path}: is a folder; name a file in it.") from None
    except (EOFError, zlib.error, gzip.BadGzipFile):
        raise InputError(f"{path}: is a truncated or damaged gzip file; copy it again.") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}).") from None
    return data.removeprefix(b"\xef\xbb\xbf")


def _parse(place: str, data: bytes) -> Any:
    def refuse(word: str) -> None:
        raise InputError(f"{place}: holds {word}, which is not JSON; write null or a number.")

    try:
        return json.loads(data.decode(), parse_constant=refuse)
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        where = place if b"\n" not in data.strip() else f"{place}, line {line}"
        raise InputError(f"{where}: is not UTF-8 text; save the file as UTF-8.") from None
    except json.JSONDecodeError as error:
        where = place if b"\n" not in data.strip() else f"{place}, line {error.lineno}"
        raise InputError(f"{where}: is not JSON ({error.msg}, column {error.colno}).") from None
    except RecursionError:
        raise InputError(f"{place}: is nested too deeply to be a row.") from None
