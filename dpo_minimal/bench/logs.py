"""Training logs of preference optimisation, as they are written: one record type for all of them.

Read are `metrics.jsonl` of this package, with `config.json` beside it; TRL's `trainer_state.json`; the text
of a console with TRL's dictionaries (or those of the paper's authors' code) among other lines; and CSV. Names
become TRL's: `loss`, `rewards/chosen`, `logps/chosen`, ... Evaluations are kept apart, by their data sets.

But: what a log says about the run is doctor.py's business.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import re
from collections.abc import Iterable, Iterator
from decimal import Decimal
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from ..text.files import listed, read_bytes, read_cells
from ..validation import InputError
from ..zoo import TRL

CONFIG_FILE = "config.json"
WANTED = ("rewards/chosen", "rewards/margins", "rewards/accuracies", "logps/chosen")  # one beside the loss
Row = dict[str, Any]  # by the file's own names
_ALIASES = {
    "lr": "learning_rate", "gradient_norm": "grad_norm", "global_step": "step", "counters/updates": "step",
    "rewards/accuracy": "rewards/accuracies", "rewards/margin": "rewards/margins",
    **{f"{name}{side}": f"reference_logps/{side}" for side in ("chosen", "rejected")
       for name in ("ref_logps/", "logps/ref_", "logps/reference_")},
}  # fmt: skip
_NAME = re.compile(
    r"(?:(train|eval)[/_](?:(.+?)_)?)?(loss|step|epoch|grad_norm|learning_rate|rewards/(?:margins|accuracies)"
    r"|(?:rewards|logps|logits|reference_logps)/(?:chosen|rejected)|(?:dpo|kl|samples)/\w+|"
    rf"{'|'.join(_ALIASES)})"
)
_NUMBER = r"[-+]?(?:\d+\.?\d*(?:[eE][-+]?\d+)?|nan|NaN|inf|Infinity)"
_ENTRY = re.compile(rf"""['"]([\w./ -]+)['"]\s*:\s*(?:tensor\()?['"]?({_NUMBER})['"]?\)?\s*(?=[,}}])""")
_PIECE = re.compile(r"\{[^{}]*\}|\|\s*(\d+)/\d+\s*\[")  # a dictionary, or how far a progress bar is
_LOSS = re.compile(r"""['"](?:(?:eval_(?:\w+_)?)?loss|loss/train|loss/eval|train_runtime)['"]\s*:""")
_ARGUMENT = re.compile(  # as TRL's DPOConfig prints itself, and as YAML, JSON and command lines have it
    r"""(?:--|(?<![\w.-])['"]?)(?:pref_)?(beta|loss_type|loss|dtype|torch_dtype|learning_rate)['"]?"""
    r"""(?:\s*[=:]\s*|(?<=--beta)\s+)\[?['"]?([\w.+-]+)['"]?(\s*,\s*['"]\w+['"]\s*\])?"""
)
_LOOK = 500  # records at either end whose digits are counted


class Record(NamedTuple):
    """Numbers logged together: means over the training steps since the record before, or over a data set."""

    values: dict[str, float]  # null is nan; `step` is the last optimizer step in them
    place: str  # "step 12", or "record 3" where steps are not known

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
    settings: Row
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
    rows, settings, note = _rows_of(path, read_bytes(path))
    training: list[Record] = []
    evaluations: dict[str, list[Record]] = {}
    found: dict[str, None] = {}
    for number, row in enumerate(rows, start=1):
        found |= dict.fromkeys(row)
        for data, record in _records_of(row, number):
            (training if data is None else evaluations.setdefault(data, [])).append(record)
    everything = [*training, *itertools.chain(*evaluations.values())]
    if not any("loss" in r.values and not r.values.keys().isdisjoint(WANTED) for r in everything):
        columns = f"the columns there are {listed(found)}" if found else "no record was found there"
        wanted = f"loss and one of {', '.join(WANTED)}"
        raise InputError(f"{path}: is no log of preference training, with {wanted}; {columns}.")
    for (before, after), name in itertools.product(itertools.pairwise(training), ("step", "epoch")):
        if after.of(name) < before.of(name):
            fall = f"{name} falls from {before.of(name):g} to {after.of(name):g} at {after.place}"
            raise InputError(f"{path}: holds several runs, as {fall}; give each a file of its own.")
    ours = any("dpo/ties" in record.values for record in everything)
    if ours and (beside := path.with_name(CONFIG_FILE)).is_file():
        content = _parsed(read_bytes(beside))
        if not isinstance(content, dict) or not isinstance(content.get("options"), dict):
            raise InputError(f"{beside}: is not the {CONFIG_FILE} of a run; copy it again, or take it away.")
        settings = _settings(content["options"].items())
    return Log(training, evaluations, settings, ours, _digits(everything), note)


# -------------------------------------------------------------------------------------------------- formats


def _rows_of(path: Path, data: bytes) -> tuple[Iterable[Row], Row, str]:
    """Rows, settings, and a note on what was left out."""
    if (content := _parsed(data)) is not None:
        rows = content.get("log_history", [content]) if isinstance(content, dict) else content
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise InputError(f"{path}: holds no list of records; name TRL's trainer_state.json.")
        return rows, {}, ""
    lines = data.strip().splitlines() or [b""]
    if len(lines) > 1 and isinstance(_parsed(lines[0]), dict):
        parsed = [_parsed(line) if line.strip() else {} for line in lines]
        if bad := [number for number, row in enumerate(parsed, start=1) if not isinstance(row, dict)]:
            if bad[0] < len(lines):
                raise InputError(f"{path}, line {bad[0]}: is no JSON object; copy the file again.")
            return parsed[:-1], {}, f"line {bad[0]}, the last, is cut off and was left out"
        return parsed, {}, ""
    if re.match(rb"""\{\s*"|\[\s*(\{|$)""", data.strip()):
        raise InputError(f"{path}: is JSON that is cut off or garbled; copy the file again.")
    try:
        header, text = lines[0].decode(), data.decode()
    except UnicodeDecodeError:
        raise InputError(f"{path}: is not UTF-8; save the log as text in UTF-8.") from None
    separator = max(",;\t", key=header.count)
    if any(_name_of(name.strip('" ')) for name in header.split(separator)):
        return _table(read_cells(path, data, separator)), {}, ""
    start = found.start() if (found := _LOSS.search(text)) else 0
    given = (("several" if more else value, name) for name, value, more in _ARGUMENT.findall(text[:start]))
    return _console(path, text), _settings((name, value) for value, name in given), ""


def _parsed(data: bytes) -> Any:
    """The object or list that this is in JSON, NaN and Infinity included; None where it is none."""
    with contextlib.suppress(ValueError, RecursionError):
        content = json.loads(data)
        return content if isinstance(content, dict | list) else None
    return None


def _table(cells: Iterator[tuple[str, list[str]]]) -> Iterator[Row]:
    _, names = next(cells)
    for place, line in cells:
        row = dict(zip(names, line))
        if len(line) != len(names):
            raise InputError(
                f"{place}: has {len(line)} cells where the header has {len(names)}; write it again."
            )
        for name, cell in row.items():
            if _name_of(name) and cell.strip() and not re.fullmatch(_NUMBER, cell.strip()):
                raise InputError(f"{place}: {name} is {cell[:40]!r}, which is no number; write it again.")
        yield row


def _console(path: Path, text: str) -> Iterator[Row]:
    """The dictionaries in a text, each of training with the step of the first progress bar after it: the bar
    before it may be late, but writing a dictionary draws it anew."""
    row: Row = {}
    for piece in _PIECE.finditer(text):
        if piece[1] is not None and "loss" in row:
            row.setdefault("step", piece[1])
        elif _LOSS.search(piece[0]):
            yield from [row] * bool(row)
            row = dict(_ENTRY.findall(piece[0]))
            if not any(_LOSS.match(f"'{name}':") for name in row):
                line = text.count("\n", 0, piece.start()) + 1
                raise InputError(f"{path}, line {line}: the loss is no number; copy the file again.")
    yield from [row] * bool(row)


def _settings(found: Iterable[tuple[str, Any]]) -> Row:
    """Numbers as such, and TRL's names of losses as ours; without what nobody gave."""
    settings: Row = {}
    for name, value in found:
        name = {"loss": "loss_type", "torch_dtype": "dtype"}.get(name, name)
        try:
            settings[name] = float(value)
        except (ValueError, TypeError):
            if isinstance(value, str) and name not in ("beta", "learning_rate"):
                settings[name] = TRL.get(value, value) if name == "loss_type" else value
    return settings


# -------------------------------------------------------------------------------------------------- records


@lru_cache
def _name_of(name: str) -> tuple[str | None, str] | None:
    """(data set, None of training; TRL's name) of a written name; None where it is not known."""
    name = re.sub(
        r"^(rewards|logps|loss)[_/](train|eval)(?=/|$)", r"\2_\1", name.strip()
    )  # the authors' order
    if found := _NAME.fullmatch(name):
        return (found[2] or "") if found[1] == "eval" else None, _ALIASES.get(found[3], found[3])
    return None


def _records_of(row: Row, number: int) -> Iterator[tuple[str | None, Record]]:
    """The records of a row, by their data sets. What has no prefix belongs to the evaluation if there is no
    training in the row; the summary at the end is no step."""
    parts: dict[str | None, dict[str, float]] = {}
    for name, value in row.items() if "train_runtime" not in row else ():
        if (known := _name_of(name)) and not isinstance(value, bool | list | dict):
            with contextlib.suppress(ValueError):
                parts.setdefault(known[0], {})[known[1]] = math.nan if value is None else float(value)
    bare = parts.get(None, {})
    shared = {name: bare.pop(name) for name in ("step", "epoch") if name in bare}
    if "loss" not in bare and any(name.startswith(("kl/", "samples/")) for name in bare):
        parts.setdefault("", {}).update(parts.pop(None))
    step = shared.get("step", math.nan)
    place = f"step {step:g}" if math.isfinite(step) else f"record {number}"
    yield from ((data, Record(shared | values, place)) for data, values in parts.items() if values)


def _digits(records: list[Record]) -> dict[str, tuple[int, int]]:
    """Name -> the most decimals and the most significant digits among its first and last numbers."""
    most: dict[str, tuple[int, int]] = {}
    for record in [*records[:_LOOK], *records[-_LOOK:]]:
        for name, value in record.values.items():
            decimals, digits = most.get(name, (0, 1))
            if math.isfinite(value):
                _, figures, exponent = Decimal(repr(value)).normalize().as_tuple()
                decimals, digits = max(decimals, -exponent), max(digits, len(figures))
            most[name] = decimals, digits
    return most
