"""Preference files become checked rows of plain text: prompt, chosen, rejected.

README.md lists the kinds of rows, and the forms that each may have; forms.py reads a single row.

But: no tokens (batches.py); a row is checked as text only.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from ..validation import InputError
from .audit import text_findings
from .files import Located, Row, is_empty, listed, read_rows
from .forms import LABELS, completion_of, form_of, label_of, pair_of, ranking_of
from .messages import template_of


class PreferencePair(NamedTuple):
    """A prompt, the completion that was preferred, and the other one [D2.1]."""

    prompt: str
    chosen: str
    rejected: str


class Ranking(NamedTuple):
    """A prompt and at least two responses, best first."""

    prompt: str
    responses: tuple[str, ...]


class LabelledCompletion(NamedTuple):
    """A prompt and one completion that was found good (True) or bad (False)."""

    prompt: str
    completion: str
    label: bool


class Demonstration(NamedTuple):
    """A prompt and a completion to imitate."""

    prompt: str
    completion: str


NOUNS = {
    PreferencePair: "preference pairs",
    Ranking: "rankings",
    LabelledCompletion: "labelled completions",
    Demonstration: "demonstrations",
}


def completions_of(row: Any) -> tuple[str, ...]:
    """The texts of a row of any kind that follow its prompt."""
    if (kind := type(row)) not in NOUNS:
        raise InputError(f"a row is a {kind.__name__}; load rows with load_dataset or dataset_from_rows.")
    return getattr(row, "responses", tuple(text for text in row[1:] if isinstance(text, str)))


class Dataset(NamedTuple):
    """Checked rows and where they come from."""

    rows: list[Any]  # all of one of the four types above
    places: list[str]  # "FILE, row 3" (JSON) or "FILE, line 3" (lines) of each row, for messages
    skipped: list[str]  # one sentence for each bad row that was left out
    field: str  # the column that the completions are from
    findings: dict[str, list[str]]  # what the texts alone show: names of audit.py -> places
    read: list[str]  # the columns that were read of some row
    unread: list[str]  # those with something in them that were not, and unread parts of messages

    def columns(self) -> str:
        """Which columns were read and which not, in a line."""
        unread = f"; not read: {listed(self.unread, 12)}" if self.unread else ""
        return f"columns read: {listed(self.read, 12)}{unread}; completions from {self.field!r}."


def load_preferences(path: str | Path) -> list[PreferencePair]:
    """Read a file of preference pairs in any of the forms of README.md [D2.1].

    Raises InputError naming file, row and field.
    """
    return load_dataset(path, "preferences").rows


def load_dataset(path: str | Path, kind: str, *, skip_bad_rows: bool = False) -> Dataset:
    """Read a file of rows of one kind.

    Args:
        path: JSON, JSON lines, CSV or TSV, gzipped or not.
        kind: one of `KINDS`.
        skip_bad_rows: leave out and list bad rows instead of stopping at the first.
    Raises:
        InputError: the file cannot be read or is damaged; a row is bad (naming file, row and field); no row
            is left; most rows repeat their prompt.
    """
    return _dataset(str(path), read_rows(path), kind, skip_bad_rows)


def has_labels(path: str | Path) -> bool:
    """Whether a file holds labelled completions and no pairs, by its first row that can be read."""
    for place, parse in read_rows(path):
        with contextlib.suppress(InputError):  # a bad row, which `load_dataset` names
            row = Row(place, parse())
            return form_of(row) is None and not row.columns.keys().isdisjoint(LABELS)
    return False


def dataset_from_rows(
    rows: Iterable[dict[str, Any]], name: str, kind: str, *, skip_bad_rows: bool = False
) -> Dataset:
    """The same checks on rows that are in memory; messages use `name` as the file.

    >>> row = {"prompt": [{"role": "user", "content": "Hi"}], "chosen": "Hello!", "rejected": "What?"}
    >>> dataset_from_rows([row], "greetings", "preferences").rows
    [PreferencePair(prompt='\\n\\nHuman: Hi\\n\\nAssistant:', chosen=' Hello!', rejected=' What?')]
    """
    located = ((f"{name}, row {number}", lambda row=row: row) for number, row in enumerate(rows, start=1))
    return _dataset(name, located, kind, skip_bad_rows)


def _dataset(name: str, located: Iterable[Located], kind: str, skip_bad_rows: bool) -> Dataset:
    if kind not in KINDS:
        raise InputError(f"kind {kind!r}: choose one of {', '.join(KINDS)}.")
    rows, places, skipped, field, template, left_out = [], [], [], "", "", 0
    findings: dict[str, list[str]] = {}
    read, filled = {}, {}  # as ordered sets
    prompted = repeating = 0
    for place, parse in located:
        try:
            row = Row(place, parse())
            parsed, taken = _PARSERS[kind](row)
            if rows and taken != field:
                raise row.error(taken, f"earlier rows have {field!r} there; make all rows alike")
        except InputError as error:
            if not skip_bad_rows:
                raise
            skipped.append(str(error))
            continue
        read |= dict.fromkeys(name for name in row.columns if name in row.read)
        filled |= dict.fromkeys(name for name, value in row.columns.items() if not is_empty(value))
        filled |= dict.fromkeys(row.unread)
        found = row.findings
        if parsed is not None:
            rows.append(parsed)
            places.append(place)
            field = taken
            prompted += bool(parsed.prompt.strip())
            repeating += row.repeats_prompt
            found = found | dict(text_findings(parsed.prompt, completions_of(parsed)))
            shape = template_of(parsed.prompt) if parsed.prompt else template
            template = template or shape
            if shape != template:
                found["mixed"] = f" ({shape}, not {template})"
        else:
            left_out += 1
        for finding, detail in found.items():
            findings.setdefault(finding, []).append(place + detail)
    if not rows:
        remedy = f"all {len(skipped)} are bad ({skipped[0][:-1]})" if skipped else "add some"
        remedy = f"all {left_out} are labelled bad; add good ones" if left_out else remedy
        raise InputError(f"{name}: no row is left; {remedy}.")
    if repeating > prompted / 2:  # a single row may do so by chance; only its owner knows where answers begin
        raise InputError(
            f"{name}: in {repeating} of {prompted} rows the completions start with the prompt, which "
            "would be read twice; cut it off them, or delete the field 'prompt' if they are transcripts."
        )
    if kind == "labels" and len({row.label for row in rows}) == 1:
        findings["one_class"] = places
    unread = [name for name in filled if name not in read]
    return Dataset(rows, places, skipped, field, findings, list(read), unread)


# ------------------------------------------------------------------------------------------------ kinds


def _preference(row: Row) -> tuple[PreferencePair, str]:
    (prompt, chosen, rejected), field = pair_of(row)
    if chosen == rejected:
        raise row.error("rejected", "is the same as chosen, which leaves nothing to prefer; delete the row")
    return PreferencePair(prompt, chosen, rejected), field


def _ranking(row: Row) -> tuple[Ranking, str]:
    (prompt, *responses), field = ranking_of(row)
    return Ranking(prompt, tuple(responses)), field


def _label(row: Row) -> tuple[LabelledCompletion, str]:
    (prompt, completion), label, field = label_of(row)
    return LabelledCompletion(prompt, completion, label), field


def _demonstration(row: Row) -> tuple[Demonstration | None, str]:
    """What there is to imitate: the best of several completions, and nothing that is labelled bad."""
    if form_of(row):
        (prompt, chosen, _), field = pair_of(row)
    elif {"responses", "answers"} & row.columns.keys():
        (prompt, chosen, *_), field = ranking_of(row)
    elif not row.columns.keys().isdisjoint(LABELS):
        (prompt, chosen), good, field = label_of(row)
        if not good:
            row.findings["labelled_bad"] = ""
            return None, field
    else:
        (prompt, chosen), field = completion_of(row)
    return Demonstration(prompt, chosen), field


_PARSERS: dict[str, Callable[[Row], tuple[Any, str]]] = {
    "preferences": _preference,
    "rankings": _ranking,
    "labels": _label,
    "demonstrations": _demonstration,
}
KINDS = tuple(_PARSERS)
