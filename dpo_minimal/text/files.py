"""Files of rows, each with its place: JSON, JSON lines, CSV or TSV, gzipped or not.

README.md, "Files and rows", lists what is read. What is not is known by its first bytes, and answered with
the line that converts it.

But: which columns a row must have is data.py's business.
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
import re
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from reprlib import repr as short
from typing import Any

from ..validation import InputError

Located = tuple[str, Callable[[], Any]]  # "FILE, row 3", and what parses the row


class Row:
    """A row's columns and its place, for messages; what was read of it, and what was found in it."""

    def __init__(self, place: str, columns: Any):
        self.place = place
        if not isinstance(columns, dict):
            raise InputError(f"{place}: must be an object with named fields, got {kind_of(columns)}.")
        self.columns = columns
        self.read: set[str] = set()  # of the columns
        self.unread: set[str] = set()  # parts of columns that were read: "'name' of messages"
        self.findings: dict[str, str] = {}  # name of a finding -> what to add to the place, mostly nothing
        self.repeats_prompt = False  # all completions

    def error(self, field: str, problem: str) -> InputError:
        return InputError(f"{self.place}, field {short(field)}: {problem}.")

    def get(self, field: str) -> Any:
        """A column that must be there. Raises InputError where it is not."""
        if field not in self.columns:
            raise self.error(field, f"is missing; the fields there are {listed(self.columns)}")
        return self.peek(field)

    def peek(self, field: str) -> Any:
        """A column, None where it is not there."""
        self.read.add(field)
        return self.columns.get(field)

    def note_unread(self, part: dict[str, Any], names: tuple[str, ...], whole: str) -> None:
        """Note what a part of a column holds beyond `names`."""
        if len(part) > len(names):
            others = (name for name in part if name not in names and not is_empty(part[name]))
            self.unread.update(f"{name} of {whole}" for name in others)

    def text(self, field: str, value: Any, part: str = "") -> str:
        """`value`, all of a field or the named part of it, as a string that can be encoded."""
        if not isinstance(value, str):
            raise self.error(field, f"{part}must be text, got {kind_of(value)}")
        try:
            value.encode()
        except UnicodeEncodeError:
            raise self.error(field, f"{part}holds half of a surrogate pair; write the character") from None
        return value


def is_empty(value: Any) -> bool:
    """Whether nothing stands in a column: null, an empty text, list or object, or a data frame's NaN."""
    nothing = value is None or (isinstance(value, (str, list, dict)) and not value)
    return nothing or (isinstance(value, float) and value != value)


def kind_of(value: Any) -> str:
    """What a value of JSON is, in words."""
    if isinstance(value, float) and value != value:
        return "NaN"
    if isinstance(value, dict) and value:
        return f"an object with the fields {listed(value)}"
    names = {type(None): "null", dict: "an object", list: "a list", bool: "true or false", str: "text"}
    return names.get(type(value), "a number")


def listed(names: Any, most: int = 6) -> str:
    """The first few of names, quoted."""
    names = list(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(map(short, names[:most])) + more or "none"


def read_rows(path: str | Path) -> Iterator[Located]:
    """The rows of a file, each with its place and a function that parses it or says what is wrong with it.

    Lines end at a line feed only: a text may hold other characters that some tools take for line ends.

    Raises:
        InputError: the file is missing, unreadable, damaged, empty, or of another format. A row that is not
            JSON or not UTF-8 raises when it is parsed.
    """
    data = read_bytes(path)
    start = data[:LOOK].lstrip() or data.lstrip()
    if not start:
        raise InputError(f"{path}: is empty; add rows.")
    if start[:1] == b"[":
        yield from _rows_of_list(path, _parse(str(path), data))
        return
    if separator := _separator(path, start):
        yield from _rows_of_table(path, data, separator)
        return
    if start[:1] == b"{" and (objects := _objects(path, data)):
        rows = _rows_of_object(path, objects[0]) if len(objects) == 1 else objects
        if rows is not None or b"\n" in data.strip():
            yield from _rows_of_list(path, objects if rows is None else rows)
            return
    yield from _rows_of_lines(path, data)


LOOK = 100_000  # bytes in which the first line is looked for


# ---------------------------------------------------------------------------------------------------- bytes

# What a file begins with, what it then is, and the command that leads to rows.
_PANDAS = (
    "python -c \"import pandas; pandas.read_{}('{}').to_json('rows.jsonl', orient='records', lines=True)\""
)
_OTHER = {
    b"PAR1": ("a Parquet file", _PANDAS.format("parquet", "{}")),
    b"ARROW1": ("an Arrow (Feather) file", _PANDAS.format("feather", "{}")),
    b"\xff\xff\xff\xff": (
        "an Arrow stream",
        "python -c \"import datasets; datasets.Dataset.from_file('{}').to_json('rows.jsonl')\"",
    ),
    b"PK\x03\x04": ("a zip archive (or a spreadsheet)", "unzip {}"),
    b"\xd0\xcf\x11\xe0": ("a spreadsheet", _PANDAS.format("excel", "{}")),
    b"\x28\xb5\x2f\xfd": ("compressed by zstd", "zstd -d {} -o rows.jsonl"),
    b"BZh": ("compressed by bzip2", "bzip2 -dk {}"),
    b"\xfd7zXZ": ("compressed by xz", "xz -dk {}"),
    b"SQLite format 3": ("a SQLite database", "sqlite3 -json {} 'select * from NAME' > rows.json"),
    b"\x80": ("a pickle, which may run code when it is opened", _PANDAS.format("pickle", "{}")),
    b"version https://git-lfs": ("a pointer of Git LFS and not the file itself", "git lfs pull"),
    b"<": ("a web page and not the file itself", "curl -L -O ADDRESS_OF_THE_FILE"),
    b"\xff\xfe": ("UTF-16 text and not UTF-8", "iconv -f utf-16 -t utf-8 {} > rows.jsonl"),
    b"\xfe\xff": ("UTF-16 text and not UTF-8", "iconv -f utf-16 -t utf-8 {} > rows.jsonl"),
}  # fmt: skip

# A gzip may always unpack to this many bytes, and beyond it to so many times its own size; text that people
# write shrinks by less than twenty times, a bomb by a thousand.
_UNPACKED, _RATIO = 2**26, 100


def read_bytes(path: str | Path) -> bytes:
    """All of a file, unpacked and without a byte-order mark. Raises InputError for what is none."""
    path = Path(path)
    try:
        special = path.exists() and not (path.is_file() or path.is_dir())
        data = b"" if special else path.read_bytes()
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; a name counts from the folder that you are in.") from None
    except IsADirectoryError:
        raise InputError(f"{path}: is a folder; name a file in it.") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}).") from None
    except ValueError:
        raise InputError(f"{short(str(path))}: is not a name that a file can have.") from None
    if special:
        raise InputError(f"{path}: is no ordinary file; copy its content into one.")
    if data[:2] == b"\x1f\x8b":
        data = _unzipped(path, data)
    start = data[:LOOK].lstrip()
    for magic, (what, remedy) in _OTHER.items():
        if start.startswith(magic):
            raise InputError(f"{path}: is {what}; run `{remedy.replace('{}', str(path))}`.")
    return data.removeprefix(b"\xef\xbb\xbf")


def _unzipped(path: Path, data: bytes) -> bytes:
    most, parts, left = max(_UNPACKED, _RATIO * len(data)), [], data
    damaged = InputError(f"{path}: is a truncated or damaged gzip file; copy it again.")
    while left:  # members, one after another
        member = zlib.decompressobj(wbits=31)
        try:
            parts.append(member.decompress(left, most))
        except zlib.error:
            raise damaged from None
        most -= len(parts[-1])
        if most <= 0 and not member.eof:
            reason = f"unpacks to more than {_RATIO} times its size, as no text does"
            raise InputError(f"{path}: {reason}; unpack it yourself.")
        if not member.eof:
            raise damaged
        left = member.unused_data
    return b"".join(parts)


def _decoded(place: str, data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        line = f", line {data[: error.start].count(10) + 1}" if b"\n" in data.strip() else ""
        raise InputError(f"{place}{line}: is not UTF-8 text; save the file as UTF-8.") from None


def _parse(place: str, data: bytes) -> Any:
    """One row, or a whole file, of which a message then also names the line."""
    text = _decoded(place, data)
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = f", line {error.lineno}" if "\n" in text.strip() else ""
        raise InputError(f"{place}{line}: is not JSON ({error.msg}, column {error.colno}).") from None
    except RecursionError:
        raise InputError(f"{place}: is nested too deeply to be a row.") from None
    except ValueError:  # Python's limit on the digits of an integer
        raise InputError(f"{place}: holds a number with too many digits; write it as text.") from None


# ---------------------------------------------------------------------------------------------------- rows


def _rows_of_lines(path: str | Path, data: bytes) -> Iterator[Located]:
    for number, line in enumerate(io.BytesIO(data), start=1):
        if line.strip():
            place = f"{path}, line {number}"
            yield place, partial(_parse, place, line.rstrip())


def _rows_of_list(path: str | Path, rows: list[Any]) -> Iterator[Located]:
    if not rows:
        raise InputError(f"{path}: holds an empty list; add rows.")
    for number, row in enumerate(rows, start=1):
        yield f"{path}, row {number}", lambda row=row: row


def _separator(path: str | Path, start: bytes) -> str:
    """What separates the cells of a table's first line; "" where the file is no table."""
    if start[:1] == b"{":
        return ""
    header = start.partition(b"\n")[0].decode("utf-8", errors="replace").strip()
    cells = {mark: [cell.strip(' "').lower() for cell in header.split(mark)] for mark in "\t,;|"}
    for mark, names in cells.items():
        if len(names) > 1 and not set(names).isdisjoint(_NAMES):
            return mark
    return {".csv": ",", ".tsv": "\t"}.get(Path(str(path).removesuffix(".gz")).suffix.lower(), "")


_NAMES = {
    "prompt", "instruction", "question", "chosen", "rejected", "completion", "output", "winner", "loser",
}  # fmt: skip


def read_cells(path: str | Path, data: bytes, separator: str) -> Iterator[tuple[str, list[str]]]:
    """The lines of a table with their places, empty ones left out; cells that hold separators or line ends
    stand in quotes. Raises InputError for what is not UTF-8 or not CSV."""
    _decoded(str(path), data)  # says where it is not UTF-8
    csv.field_size_limit(2**24)
    text = io.TextIOWrapper(io.BytesIO(data), "utf-8", newline="")  # StringIO: four bytes a letter
    reader = csv.reader(text, delimiter=separator, strict=True)
    try:
        for cells in reader:
            if any(cells):
                yield f"{path}, line {reader.line_num}", cells
    except csv.Error as error:
        problem = f"{error}; quote a cell that holds quotes, and double them".replace("\t", "a tab")
        raise InputError(f"{path}, line {reader.line_num}: is not valid CSV ({problem}).") from None


def _rows_of_table(path: str | Path, data: bytes, separator: str) -> Iterator[Located]:
    """Lines of cells under a line of names."""
    names: list[str] = []
    for place, cells in read_cells(path, data, separator):
        if names:
            yield place, partial(_row_of_cells, place, names, cells)
            continue
        names = [cell.strip() for cell in cells]
        if len(set(names)) < len(names):
            raise InputError(f"{path}: names a column twice in {listed(names)}; keep one.")


def _row_of_cells(place: str, names: list[str], cells: list[str]) -> dict[str, str]:
    if len(cells) != len(names):
        found = f"{len(cells)} cells where the first line names {len(names)}"
        raise InputError(f"{place}: has {found}; put cells that hold a separator or a line end into quotes.")
    return dict(zip(names, cells))


def _objects(path: str | Path, data: bytes) -> list[Any]:
    """The objects of a file that is not one object a line: a single one, or several set out over lines."""
    first, _, others = data.lstrip().partition(b"\n")
    if others.strip():
        with contextlib.suppress(InputError):
            _parse("", first)
            return []  # lines, which are parsed one by one
    try:
        text, decoder = data.decode(), json.JSONDecoder()
        found, place = [], _BLANK.match(text).end()
        while place < len(text):
            content, place = decoder.raw_decode(text, place)
            found.append(content)
            place = _BLANK.match(text, place).end()
        return found
    except (ValueError, RecursionError):
        if first.strip() == b"{":
            _parse(str(path), data)  # says what is wrong, and where
        return []


_BLANK = re.compile(r"[ \t\r\n]*")


def _rows_of_object(path: str | Path, content: Any) -> list[Any] | None:
    """The rows of one object that holds many; None where it is a row itself."""
    names, values = list(content), list(content.values())
    columns, rows = content.get("columns"), content.get("data")
    if isinstance(rows, list) and isinstance(columns, list) and set(names) <= {"columns", "data", "index"}:
        if any(not isinstance(row, list) or len(row) != len(columns) for row in rows):
            raise InputError(f"{path}, field 'data': must be lists of one value for each of 'columns'.")
        return [dict(zip(map(str, columns), row)) for row in rows]  # of pandas, orient="split"
    if isinstance(rows, list) and set(names) == {"schema", "data"}:  # orient="table"
        return rows
    rows = content.get("rows")
    if isinstance(rows, list) and all(isinstance(row, dict) and "row_idx" in row for row in rows):
        if any(row.get("truncated_cells") for row in rows):
            raise InputError(f"{path}, field 'rows': has cells that were cut; download the data set itself.")
        return [row.get("row") for row in rows]  # of the viewer of a hub
    if all(isinstance(value, dict) and value for value in values):
        if all(name.isdigit() for name in names):  # orient="index"
            return values
        if "".join(values[0]).isdigit() and all(value.keys() == values[0].keys() for value in values):
            return _rows_of_columns(path, {name: [*value.values()] for name, value in content.items()})
    if not all(isinstance(value, list) for value in values):
        return None
    first = [value[0] for value in values if value]
    if not first or not all(isinstance(value, dict) for value in first):
        return _rows_of_columns(path, content)
    if any({"role", "from"} & set(value) for value in first):
        return None  # chat messages, which belong to a single row
    if len(names) > 1:
        line = f"import json; json.dump(json.load(open('{path}'))['{names[0][:40]}'], open('rows.json', 'w'))"
        raise InputError(f'{path}: holds splits, {listed(names, 3)}; take one by `python -c "{line}"`.')
    return values[0]


def _rows_of_columns(path: str | Path, columns: dict[str, Any]) -> list[Any]:
    (first, length), *others = ((name, len(values)) for name, values in columns.items())
    for name, other in others:
        if other != length:
            lengths = f"has {other} entries where {short(first)} has {length}"
            raise InputError(f"{path}, field {short(name)}: {lengths}; make the columns equally long.")
    return [dict(zip(columns, row)) for row in zip(*columns.values())]
