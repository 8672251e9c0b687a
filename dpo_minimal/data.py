"""Preference files become checked rows of plain text: prompt, chosen, rejected.

Files are JSON or JSON lines in UTF-8, gzipped or not. What a row may look like:

    preferences     {prompt, chosen, rejected}, texts or chat messages
                    {chosen, rejected}, whole transcripts with a common beginning, texts or chat messages
                    {instruction, input (may be absent or empty), chosen, rejected}
    rankings        {prompt, responses: [...], ranking: [...]}: one rank a response, 1 is best, no ties
    labels          {prompt, completion, label}: true (good) or false (bad), for KTO
    demonstrations  {prompt, completion}, {instruction, input, output}, {text}, {messages}, or a row of
                    preferences, of which the chosen completion is taken

A JSON file holds a list of rows, or one object of equally long columns. Further columns are ignored.

Templates, exactly, because every log-probability depends on them. Texts are taken as they stand; no space is
added or removed. An instruction becomes "### Instruction:\\n...\\n\\n### Input:\\n...\\n\\n### Response:\\n",
without the input's two lines where there is none. Chat messages become "\\n\\nHuman: ...",
"\\n\\nAssistant: ..." and "\\n\\nSystem: ..."; the prompt ends with "\\n\\nAssistant:" and the completion
starts with a space.

But: no tokens (batches.py); a row is checked as text only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from .files import read_rows
from .validation import InputError

KINDS = ("preferences", "rankings", "labels", "demonstrations")


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


class Dataset(NamedTuple):
    """Checked rows and where they come from.

    Fields:
        rows: all of one of the four types above.
        places: "FILE, row 3" (JSON) or "FILE, line 3" (JSON lines) of each row, for messages.
        skipped: one sentence for each bad row that was left out.
        field: which column the completions are from.
    """

    rows: list[Any]
    places: list[str]
    skipped: list[str]
    field: str


def load_preferences(path: str | Path) -> list[PreferencePair]:
    """Read a file of preference pairs in any of this module's formats [D2.1].

    Raises InputError naming file, row and field.
    """
    return load_dataset(path, "preferences").rows


def load_dataset(path: str | Path, kind: str, *, skip_bad_rows: bool = False) -> Dataset:
    """Read a file of rows of one kind.

    Args:
        path: JSON or JSON lines, gzipped or not.
        kind: one of `KINDS`.
        skip_bad_rows: leave out and list bad rows instead of stopping at the first.
    Raises:
        InputError: the file cannot be read or is damaged; a row is bad (naming file, row and field); no row
            is left.
    """
    return _dataset(str(path), read_rows(path), kind, skip_bad_rows)


def dataset_from_rows(
    rows: Iterable[dict[str, Any]], name: str, kind: str, *, skip_bad_rows: bool = False
) -> Dataset:
    """The same checks on rows that are in memory; `name` stands where messages name a file."""
    located = ((f"{name}, row {number}", lambda row=row: row) for number, row in enumerate(rows, start=1))
    return _dataset(name, located, kind, skip_bad_rows)


def _dataset(
    name: str, located: Iterator[tuple[str, Callable[[], Any]]], kind: str, skip_bad_rows: bool
) -> Dataset:
    if kind not in KINDS:
        raise InputError(f"kind {kind!r}: choose one of {', '.join(KINDS)}.")
    rows, places, skipped, fields = [], [], [], []
    for place, read in located:
        try:
            row, field = _PARSERS[kind](_Row(place, read()))
        except InputError as error:
            if not skip_bad_rows:
                raise
            skipped.append(str(error))
            continue
        if fields and field != fields[0]:
            raise InputError(
                f"{place}, field {field!r}: earlier rows have {fields[0]!r} there; make all rows alike."
            )
        rows.append(row)
        places.append(place)
        fields.append(field)
    if not rows:
        raise InputError(
            f"{name}: no row is left" + (f" of {len(skipped)}" if skipped else "") + "; add some."
        )
    return Dataset(rows, places, skipped, fields[0])


# ---------------------------------------------------------------------------------------------- one row


class _Row:
    """A row's columns, which knows where it stands when something is wrong with it."""

    def __init__(self, place: str, columns: Any):
        self.place = place
        if not isinstance(columns, dict):
            raise InputError(f"{place}: must be an object with named fields, got {_type(columns)}.")
        self.columns = columns

    def __contains__(self, field: str) -> bool:
        return field in self.columns

    def error(self, field: str, problem: str) -> InputError:
        return InputError(f"{self.place}, field {field!r}: {problem}.")

    def get(self, field: str) -> Any:
        if field not in self.columns:
            there = ", ".join(map(repr, self.columns)) or "none"
            raise self.error(field, f"is missing; the fields there are {there}")
        return self.columns[field]

    def text(self, field: str, value: Any = None) -> str:
        """A string that can be encoded; `value`, if given, is a part of the field."""
        value = self.get(field) if value is None else value
        if not isinstance(value, str):
            raise self.error(field, f"must be text, got {_type(value)}")
        try:
            value.encode()
        except UnicodeEncodeError:
            raise self.error(field, "holds half of a surrogate pair; write the character itself") from None
        return value

    def answer(self, field: str, text: str) -> str:
        if not text.strip():
            raise self.error(field, "is empty; give a completion or delete the row")
        return text

    def messages(self, field: str) -> list[tuple[str, str]]:
        """Chat messages as (role, content)."""
        result = []
        for message in self.get(field):
            if not isinstance(message, dict) or not {"role", "content"} <= set(message):
                raise self.error(field, "each message needs a role and a content")
            if message["role"] not in _SPEAKERS:
                raise self.error(field, f"role {message['role']!r} is none of {', '.join(_SPEAKERS)}")
            result.append((message["role"], self.text(field, message["content"])))
        if not result:
            raise self.error(field, "holds no message")
        return result


def _type(value: Any) -> str:
    names = {type(None): "null", dict: "an object", list: "a list", bool: "true or false", str: "text"}
    return names.get(type(value), "a number")


_SPEAKERS = {"user": "Human", "assistant": "Assistant", "system": "System"}
_TURN = "\n\nAssistant:"


def _render(messages: list[tuple[str, str]]) -> str:
    return "".join(f"\n\n{_SPEAKERS[role]}: {content}" for role, content in messages)


def _prompt(row: _Row) -> str:
    """The prompt of a row that has one: text, chat messages, or an instruction."""
    if "prompt" in row:
        if isinstance(row.get("prompt"), list):
            return _render(row.messages("prompt")) + _TURN
        return row.text("prompt")
    instruction = row.text("instruction")
    given = row.text("input") if row.columns.get("input") else ""
    return (
        f"### Instruction:\n{instruction}\n\n"
        + (f"### Input:\n{given}\n\n" if given else "")
        + "### Response:\n"
    )


def _completion(row: _Row, field: str) -> str:
    """A completion in a row with a prompt; of chat messages, what follows the prompt's."""
    if not isinstance(row.get(field), list):
        if isinstance(row.columns.get("prompt"), list):
            raise row.error(field, "must be a list of messages, as the prompt is")
        return row.answer(field, row.text(field))
    messages = row.messages(field)
    if isinstance(row.columns.get("prompt"), list):
        before = row.messages("prompt")
        if messages[: len(before)] == before:
            messages = messages[len(before) :]
    elif "prompt" in row:
        raise row.error(field, "must be text, as the prompt is")
    if not messages or messages[0][0] != "assistant":
        raise row.error(field, "must go on with a message of the assistant")
    row.answer(field, messages[0][1])
    return _render(messages).removeprefix(_TURN)


def _preference(row: _Row) -> tuple[PreferencePair, str]:
    if "chosen" not in row and "responses" in row:
        raise row.error("chosen", "is missing; this is a ranking, for --loss-type plackett_luce")
    if "chosen" not in row and "label" in row:
        raise row.error("chosen", "is missing; this is a labelled completion, which has no pair")
    chosen, rejected = row.get("chosen"), row.get("rejected")
    if "prompt" in row or "instruction" in row:
        pair = PreferencePair(_prompt(row), _completion(row, "chosen"), _completion(row, "rejected"))
    elif isinstance(chosen, list) and isinstance(rejected, list):
        pair = _split(row, _render(row.messages("chosen")), _render(row.messages("rejected")))
    else:
        pair = _split(row, row.text("chosen"), row.text("rejected"))
    if pair.chosen == pair.rejected:
        raise row.error(
            "rejected", "is the same as chosen; delete the row or leave such rows out with --skip-bad-rows"
        )
    return pair, "chosen"


def _split(row: _Row, chosen: str, rejected: str) -> PreferencePair:
    """Two transcripts: the prompt ends with the last turn of the assistant that both share."""
    common = next(
        (i for i, (a, b) in enumerate(zip(chosen, rejected)) if a != b), min(len(chosen), len(rejected))
    )
    end = chosen.rfind(_TURN, 0, common) + len(_TURN)
    if end < len(_TURN):
        raise row.error(
            "chosen", f"shares no {_TURN!r} with rejected where the prompt could end; add a field 'prompt'"
        )
    answers = (row.answer(field, text[end:]) for field, text in (("chosen", chosen), ("rejected", rejected)))
    return PreferencePair(chosen[:end], *answers)


def _ranking(row: _Row) -> tuple[Ranking, str]:
    responses, ranks = row.get("responses"), row.get("ranking")
    if not isinstance(responses, list) or len(responses) < 2:
        raise row.error("responses", "must be a list of at least two texts")
    texts = [row.answer("responses", row.text("responses", text)) for text in responses]
    if len(set(texts)) < len(texts):
        raise row.error("responses", "lists the same text twice; delete one")
    counted = list(range(1, len(texts) + 1))
    whole = isinstance(ranks, list) and all(type(rank) is int for rank in ranks)
    if not whole or sorted(ranks) != counted:
        raise row.error(
            "ranking", f"must give each response its rank, {counted} in some order, 1 for the best, no ties"
        )
    best_first = tuple(text for _, text in sorted(zip(ranks, texts, strict=True)))
    return Ranking(_prompt(row), best_first), "responses"


def _label(row: _Row) -> tuple[LabelledCompletion, str]:
    label = row.get("label")
    if not isinstance(label, bool) and label not in (0, 1):
        raise row.error("label", "must be true (good) or false (bad)")
    return LabelledCompletion(_prompt(row), _completion(row, "completion"), bool(label)), "completion"


def _demonstration(row: _Row) -> tuple[Demonstration, str]:
    if "completion" in row:
        return Demonstration(_prompt(row), _completion(row, "completion")), "completion"
    if "chosen" in row and "output" not in row:
        pair, _ = _preference(row)
        return Demonstration(pair.prompt, pair.chosen), "chosen"
    if "messages" in row:
        before, last = _render(row.messages("messages")[:-1]), row.messages("messages")[-1]
        if last[0] != "assistant":
            raise row.error("messages", "must end with a message of the assistant")
        return Demonstration(before + _TURN, " " + row.answer("messages", last[1])), "messages"
    if "output" in row:
        return Demonstration(_prompt(row), _completion(row, "output")), "output"
    return Demonstration("", row.answer("text", row.text("text"))), "text"


_PARSERS = {
    "preferences": _preference,
    "rankings": _ranking,
    "labels": _label,
    "demonstrations": _demonstration,
}
