"""Training logs of preference optimisation, as they are written: one record type for all of them.

Read are `metrics.jsonl` of this package, with `config.json` beside it; TRL's `trainer_state.json`; the text
of a console with TRL's dictionaries (or those of the paper's authors' code) among other lines; and CSV. Names
become TRL's: `loss`, `rewards/chosen`, `logps/chosen`, ... Evaluations are kept apart, by their data sets.

But: what a log says about the run is doctor.py's business.
"""

from __future__ import annotations

import contextlib
import csv
import io
import itertools
import json
import math
import re
from collections.abc import Iterable, Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any, NamedTuple

from ..text.files import listed, read_bytes
from ..validation import InputError
from ..zoo import TRL

CONFIG_FILE = "config.json"
Row = dict[str, Any]  # numbers as the file writes them, by the file's names
_SIDES = ("chosen", "rejected")
_ALIASES = {
    "lr": "learning_rate", "gradient_norm": "grad_norm", "global_step": "step", "counters/updates": "step",
    "rewards/accuracy": "rewards/accuracies", "rewards/margin": "rewards/margins",
    **{f"{name}{side}": f"reference_logps/{side}" for side in _SIDES
       for name in ("ref_logps/", "logps/ref_", "logps/reference_")},
}  # fmt: skip
_CORE = (
    "loss", "step", "epoch", "grad_norm", "learning_rate", "rewards/margins", "rewards/accuracies", *_ALIASES,
    *(f"{name}/{side}" for side in _SIDES for name in ("rewards", "logps", "logits", "reference_logps")),
)  # fmt: skip
_NAME = re.compile(
    r"(?:(?P<part>train|eval)[/_](?:(?P<data>.+?)_)?)?"
    rf"(?P<core>{'|'.join(map(re.escape, _CORE))}|(?:dpo|kl|samples)/\w+)"
)
_AUTHORS = re.compile(r"(?P<name>rewards|logps)_(?P<part>train|eval)/(?P<rest>\w+)|loss/(?P<only>train|eval)")
WANTED = ("rewards/chosen", "rewards/margins", "rewards/accuracies", "logps/chosen")
_NUMBER = r"[-+]?(?:\d[\d_]*\.?\d*(?:[eE][-+]?\d+)?|nan|NaN|inf|Infinity)"
_ENTRY = re.compile(rf"""['"]([\w./ -]+)['"]\s*:\s*(?:tensor\()?['"]?({_NUMBER})['"]?\)?\s*(?=[,}}])""")
_PIECE = re.compile(r"\{[^{}]*\}|\|\s*(\d+)/(\d+)\s*\[")  # a dictionary, or how far a progress bar is
_LOSS = re.compile(r"""['"](?:eval_(?:\w+_)?)?loss(?:/train|/eval)?['"]\s*:""")
_ARGUMENT = re.compile(  # as TRL's DPOConfig prints itself, and as YAML, JSON and command lines have it
    r"""(?:--|(?<![\w.-])['"]?)(?:pref_)?(beta|loss_type|loss|dtype|torch_dtype|learning_rate)['"]?"""
    r"""(?:\s*[=:]\s*|(?<=--beta)\s+)\[?['"]?([\w.+-]+)['"]?(\s*,\s*['"]\w+['"]\s*\])?"""
)
_LOOK = 500  # records whose digits are counted


class Record(NamedTuple):
    """Numbers logged together: means over the training steps since the record before, or over a data set."""

    step: int | None  # the last optimizer step in them; None where the file does not say
    values: dict[str, float]  # null is nan
    place: str  # "step 12", or "record 3"

    def of(self, name: str) -> float:
        """A number; nan where it is missing."""
        return self.values.get(name, math.nan)


class Log(NamedTuple):
    """A training log.

    Fields:
        training: records of training, in order.
        evaluations: data set ("" for the only one) -> its records, in order.
        settings: what the file, or config.json beside it, says of the run, such as beta and loss_type.
        ours: whether this package wrote it: in float32, and loss and rewards of the same rows.
        digits: name -> (decimals, significant digits) with which its numbers are written.
        note: what was left out; "" if nothing was.
    """

    training: list[Record]
    evaluations: dict[str, list[Record]]
    settings: dict[str, Any]
    ours: bool
    digits: dict[str, tuple[int, int]]
    note: str

    def rounding(self, name: str, value: float) -> float:
        """By how much writing may have moved a number: half a unit of the last place that its column has.

        A number that happens to end in zeros is written with fewer places, so the column's longest count.
        """
        decimals, digits = self.digits.get(name, (17, 17))
        size = math.floor(math.log10(abs(value))) if value and math.isfinite(value) else -decimals
        return 0.5 * 10.0 ** max(-decimals, size + 1 - digits)


def read_log(path: str | Path) -> Log:
    """Read a training log in any of the formats above.

    Raises InputError: no such file; none of the formats, cut off or garbled; several runs in one file; not
    of preferences (the message names the columns found and those wanted). Only the last JSON line may be cut
    off, as a run that was killed leaves it: it is left out, with a note.
    """
    path = Path(path)
    try:
        text = read_bytes(path).decode()
    except UnicodeDecodeError:
        raise InputError(f"{path}: is not UTF-8; save the log as text in UTF-8.") from None
    rows, settings, note = _rows_of(path, text)
    training: list[Record] = []
    evaluations: dict[str, list[Record]] = {}
    found: dict[str, None] = {}
    for number, row in enumerate(rows, start=1):
        found |= dict.fromkeys(row)
        if "train_runtime" in row:  # the summary at the end is no step
            continue
        for data, record in _split(row, number):
            (training if data is None else evaluations.setdefault(data, [])).append(record)
    everything = [*training, *itertools.chain(*evaluations.values())]
    if not any("loss" in r.values and not r.values.keys().isdisjoint(WANTED) for r in everything):
        columns = f"the columns there are {listed(found)}" if found else "no record was found there"
        raise InputError(
            f"{path}: is no log of preference training, with loss and one of {', '.join(WANTED)}; {columns}."
        )
    _refuse_several_runs(path, training)
    ours = any("dpo/ties" in record.values for record in everything)
    if ours and (beside := path.with_name(CONFIG_FILE)).is_file():
        settings = _options_of(beside)
    return Log(training, evaluations, settings, ours, _digits(everything), note)


def _refuse_several_runs(path: Path, training: list[Record]) -> None:
    for name in ("step", "epoch"):
        pairs = itertools.pairwise(record for record in training if name in record.values)
        for before, after in pairs:
            if after.values[name] < before.values[name]:
                raise InputError(
                    f"{path}: holds several runs, as {name} falls from {before.values[name]:g} to "
                    f"{after.values[name]:g} at {after.place}; give each run a file of its own."
                )


# -------------------------------------------------------------------------------------------------- formats


def _rows_of(path: Path, text: str) -> tuple[Iterable[Row], dict[str, Any], str]:
    """Rows, settings, and a note on what was left out."""
    text = text.strip().replace("\r", "\n")
    if (content := _parsed(text)) is not None:
        rows = content.get("log_history", [content]) if isinstance(content, dict) else content
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise InputError(f"{path}: holds no list of records; name TRL's trainer_state.json.")
        return rows, {}, ""
    if text.startswith('{"') and "\n" in text and _parsed(text.partition("\n")[0]) is not None:
        return _json_lines(path, text)
    if re.match(r"\{\s*\"|\[\s*\{\s*\"", text):
        raise InputError(f"{path}: is JSON that is cut off or garbled; copy the file again.")
    first = text.partition("\n")[0]
    separator = max(",;\t", key=first.count)
    if any(map(_name_of, first.split(separator))):
        return _table(path, text, separator), {}, ""
    return list(_console(path, text)), _arguments(text), ""


def _parsed(text: str) -> Any:
    """The object or list that a text of JSON is, NaN and Infinity included; None where it is none."""
    try:
        content = json.loads(text) if text[:1] in ("{", "[") else None
    except (ValueError, RecursionError):
        return None
    return content if isinstance(content, dict | list) else None


def _json_lines(path: Path, text: str) -> tuple[list[Row], dict[str, Any], str]:
    lines, rows = text.split("\n"), []
    for number, line in enumerate(lines, start=1):
        row = _parsed(line)
        if isinstance(row, dict):
            rows.append(row)
        elif number == len(lines):
            return rows, {}, f"line {number}, the last, is cut off and was left out"
        elif line.strip():
            raise InputError(f"{path}, line {number}: is no JSON object; copy the file again.")
    return rows, {}, ""


def _table(path: Path, text: str, separator: str) -> Iterator[Row]:
    try:
        names, *lines = csv.reader(io.StringIO(text), delimiter=separator, strict=True)
    except csv.Error as error:
        raise InputError(f"{path}: is no CSV ({error}); write it again.") from None
    for number, cells in enumerate(lines, start=2):
        if len(cells) != len(names):
            raise InputError(
                f"{path}, row {number}: has {len(cells)} cells, but the header {len(names)}; write it again."
            )
        row = {name: cell for name, cell in zip(names, cells) if cell.strip()}
        for name, cell in row.items():
            if _name_of(name) is not None and not re.fullmatch(_NUMBER, cell.strip()):
                raise InputError(f"{path}, row {number}: {name} is {cell[:40]!r}, no number; write it again.")
        yield row


def _console(path: Path, text: str) -> Iterator[Row]:
    """The dictionaries in a text, each of training with the step of the first progress bar after it: the bar
    before it may be late, but writing a dictionary draws it anew."""
    row: Row = {}
    for piece in _PIECE.finditer(text):
        if piece[1] is not None:
            if "loss" in row:
                row.setdefault("step", piece[1])
        elif _LOSS.search(piece[0]) or "train_runtime" in piece[0]:
            if row:
                yield row
            row = dict(_ENTRY.findall(piece[0]))
            if _LOSS.search(piece[0]) and not any(_LOSS.match(f"'{name}':") for name in row):
                line = text.count("\n", 0, piece.start()) + 1
                raise InputError(f"{path}, line {line}: the loss is no number; copy the file again.")
    if row:
        yield row


def _arguments(text: str) -> Row:
    """Settings that a console prints before the first dictionary of numbers."""
    before = text[: found.start()] if (found := _LOSS.search(text)) else ""
    names = {"loss": "loss_type", "torch_dtype": "dtype"}
    found = _ARGUMENT.findall(before)
    return _settings({names.get(name, name): "several" if more else value for name, value, more in found})


def _options_of(path: Path) -> Row:
    content = _parsed(read_bytes(path).decode(errors="replace"))
    options = content.get("options") if isinstance(content, dict) else None
    if not isinstance(options, dict):
        raise InputError(f"{path}: is not the {CONFIG_FILE} of a run; copy it again, or take it away.")
    return _settings(options)


def _settings(found: Row) -> Row:
    """Numbers as such, TRL's losses by our names; without what is not given, or no number as it must be."""
    settings = {}
    for name, value in found.items():
        with contextlib.suppress(ValueError, TypeError):
            settings[name] = float(value)
            continue
        if isinstance(value, str) and name not in ("beta", "learning_rate"):
            settings[name] = TRL.get(value, value) if name == "loss_type" else value
    return settings


# -------------------------------------------------------------------------------------------------- records


def _name_of(name: str) -> tuple[str | None, str] | None:
    """(data set, None of training; TRL's name) of a written name; None where it is not known."""
    if found := _AUTHORS.fullmatch(name.strip()):
        part, core = found["part"] or found["only"], f"{found['name']}/{found['rest']}"
        return ("" if part == "eval" else None), "loss" if found["only"] else core
    if found := _NAME.fullmatch(name.strip()):
        data = (found["data"] or "") if found["part"] == "eval" else None
        return data, _ALIASES.get(found["core"], found["core"])
    return None


def _split(row: Row, number: int) -> Iterator[tuple[str | None, Record]]:
    """The records of a row, with their data sets. What has no prefix belongs to the evaluation if there is no
    training in the row."""
    parts: dict[str | None, dict[str, float]] = {}
    for written, value in row.items():
        known = _name_of(written)
        if known is None or isinstance(value, bool | list | dict):
            continue
        with_number = math.nan if value is None else value
        try:
            parts.setdefault(known[0], {})[known[1]] = float(with_number)
        except (ValueError, OverflowError):
            continue
    shared = {name: parts[None].pop(name) for name in ("step", "epoch") if name in parts.get(None, {})}
    if "loss" not in parts.get(None, {}) and len(parts) > 1:
        for name, value in parts.pop(None, {}).items():
            for data in parts:
                parts[data].setdefault(name, value)
    for data, values in parts.items():
        if values:
            step = shared.get("step", math.nan)
            place = f"step {step:g}" if math.isfinite(step) else f"record {number}"
            yield data, Record(int(step) if math.isfinite(step) else None, shared | values, place)


def _digits(records: list[Record]) -> dict[str, tuple[int, int]]:
    """Name -> the most decimals and the most significant digits among its first numbers."""
    most: dict[str, tuple[int, int]] = {}
    for record in [*records[:_LOOK], *records[-_LOOK:]]:
        for name, value in record.values.items():
            decimals, digits = most.get(name, (0, 1))
            if math.isfinite(value):
                _, figures, exponent = Decimal(repr(value)).normalize().as_tuple()
                decimals, digits = max(decimals, -exponent), max(digits, len(figures))
            most[name] = decimals, digits
    return most
