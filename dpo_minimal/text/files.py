"""JSON and JSON lines, gzipped or not, as located rows.

But: which columns a row must have is data.py's business.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ..validation import InputError

Located = tuple[str, Callable[[], Any]]  # "FILE, row 3", and what parses the row


class Row:
    """A row's columns and its place, for messages."""

    def __init__(self, place: str, columns: Any):
        self.place = place
        if not isinstance(columns, dict):
            raise InputError(f"{place}: must be an object with named fields, got {_type(columns)}.")
        self.columns = columns

    def error(self, field: str, problem: str) -> InputError:
        return InputError(f"{self.place}, field {field!r}: {problem}.")

    def get(self, field: str) -> Any:
        if field not in self.columns:
            there = ", ".join(map(repr, self.columns)) or "none"
            raise self.error(field, f"is missing; the fields there are {there}")
        return self.columns[field]

    def text(self, field: str, value: Any, part: str = "") -> str:
        """`value`, all of a field or the named part of it, as a string that can be encoded."""
        if not isinstance(value, str):
            raise self.error(field, f"{part}must be text, got {_type(value)}")
        try:
            value.encode()
        except UnicodeEncodeError:
            raise self.error(field, f"{part}holds half of a surrogate pair; write the character") from None
        return value


def _type(value: Any) -> str:
    if isinstance(value, float) and value != value:
        return "NaN"  # what data frames write where there is nothing
    names = {type(None): "null", dict: "an object", list: "a list", bool: "true or false", str: "text"}
    return names.get(type(value), "a number")


def read_rows(path: str | Path) -> Iterator[Located]:
    """The rows of a file, each with its place and a function that parses it or says what is wrong with it.

    A list of rows and an object of columns are JSON; anything else is one row a line. Lines end at a line
    feed only: a text may hold other characters that some tools take for line ends.

    Raises:
        InputError: the file is missing, unreadable, a truncated gzip, empty, or JSON that is neither rows nor
            columns. A row that is not JSON or not UTF-8 raises when it is parsed.
    """
    data = _read_bytes(Path(path))
    start = data.lstrip()
    if not start:
        raise InputError(f"{path}: is empty; add rows.")
    if start[:1] == b"[":
        yield from _rows_of_list(path, _parse(str(path), data))
        return
    first, _, rest = start.partition(b"\n")
    spread = first.strip() == b"{"  # one object, set out over many lines
    if spread or (not rest.strip() and start[:1] == b"{"):
        content = _parse(str(path), data)
        if _is_columns(content):
            yield from _rows_of_columns(path, content)
            return
        if spread:
            raise InputError(f"{path}: is one object but not of columns; put rows into a list or on lines.")
    for number, line in enumerate(data.split(b"\n"), start=1):
        if line.strip():
            place = f"{path}, line {number}"
            yield place, lambda place=place, line=line: _parse(place, line)


def _is_columns(content: dict[str, Any]) -> bool:
    """Lists only, and none of chat messages: those belong to a single row."""
    return bool(content) and all(
        isinstance(values, list) and not (values and isinstance(values[0], dict) and "role" in values[0])
        for values in content.values()
    )


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
        raise InputError(f"{path}: no such file; a name counts from the folder that you are in.") from None
    except IsADirectoryError:
        raise InputError(f"{path}: is a folder; name a file in it.") from None
    except (EOFError, zlib.error, gzip.BadGzipFile):
        raise InputError(f"{path}: is a truncated or damaged gzip file; copy it again.") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}).") from None
    return data.removeprefix(b"\xef\xbb\xbf")


def _parse(place: str, data: bytes) -> Any:
    """One row, or a whole file, of which a message then also names the line."""
    several = b"\n" in data.strip()
    try:
        return json.loads(data.decode())
    except UnicodeDecodeError as error:
        line = f", line {data[: error.start].count(10) + 1}" if several else ""
        raise InputError(f"{place}{line}: is not UTF-8 text; save the file as UTF-8.") from None
    except json.JSONDecodeError as error:
        line = f", line {error.lineno}" if several else ""
        raise InputError(f"{place}{line}: is not JSON ({error.msg}, column {error.colno}).") from None
    except RecursionError:
        raise InputError(f"{place}: is nested too deeply to be a row.") from None
    except ValueError:  # Python's limit on the digits of an integer
        raise InputError(f"{place}: holds a number with too many digits; write it as text.") from None
