"""Preference files become checked rows of plain text: prompt, chosen, rejected.

README.md lists the kinds of rows, the forms that each may have, and the templates that turn instructions and
chat messages into text. A template is part of the data: every log-probability depends on it.

But: no tokens (batches.py); a row is checked as text only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from ..validation import InputError
from .audit import text_findings
from .files import Located, Row, read_rows


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
    places: list[str]  # "FILE, row 3" (JSON) or "FILE, line 3" (JSON lines) of each row, for messages
    skipped: list[str]  # one sentence for each bad row that was left out
    field: str  # the column that the completions are from
    findings: dict[str, list[str]]  # what the texts alone show (`audit.text_findings`): name -> places


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
            is left; most rows repeat their prompt.
    """
    return _dataset(str(path), read_rows(path), kind, skip_bad_rows)


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
    dataset = Dataset([], [], [], "", {})
    for place, read in located:
        try:
            row = Row(place, read())
            parsed, field = _PARSERS[kind](row)
            if dataset.rows and field != dataset.field:
                raise row.error(field, f"earlier rows have {dataset.field!r} there; make all rows alike")
        except InputError as error:
            if not skip_bad_rows:
                raise
            dataset.skipped.append(str(error))
            continue
        dataset.rows.append(parsed)
        dataset.places.append(place)
        for finding in text_findings(parsed.prompt, completions_of(parsed)):
            dataset.findings.setdefault(finding, []).append(place)
        dataset = dataset._replace(field=field)
    if not dataset.rows:
        bad = dataset.skipped
        remedy = f"all {len(bad)} are bad ({bad[0][:-1]})" if bad else "add some"
        raise InputError(f"{name}: no row is left; {remedy}.")
    _refuse_repeated_prompts(name, dataset.rows)
    return dataset


def _refuse_repeated_prompts(name: str, rows: list[Any]) -> None:
    """Refuse a file in which most completions begin with their prompt, as exports of whole transcripts do.

    A single row may do so by chance. The file is not repaired: only its owner knows where the answers begin.
    """
    prompted = [row for row in rows if row.prompt.strip()]
    repeating = sum(map(_repeats_prompt, prompted))
    if repeating > len(prompted) / 2:
        raise InputError(
            f"{name}: in {repeating} of {len(prompted)} rows the completions start with the prompt, which "
            "would be read twice; cut it off them, or delete the field 'prompt' if they are transcripts."
        )


def _repeats_prompt(row: Any) -> bool:
    prompt = row.prompt.strip()
    return all(text.lstrip().startswith((prompt, f"Human: {prompt}")) for text in completions_of(row))


# ---------------------------------------------------------------------------------------------- one row

_SPEAKERS = {"user": "Human", "assistant": "Assistant", "system": "System"}
_TURN = "\n\nAssistant:"


def _answer(row: Row, field: str, value: Any) -> str:
    text = row.text(field, value)
    if not text.strip():
        raise row.error(field, "is empty; give a completion or delete the row")
    return text


def _messages(row: Row, field: str, values: Any) -> list[tuple[str, str]]:
    """Chat messages as (role, content)."""
    if not isinstance(values, list) or not values:
        raise row.error(field, "must be a list of at least one message")
    result = []
    for number, message in enumerate(values, start=1):
        if not isinstance(message, dict) or not {"role", "content"} <= set(message):
            raise row.error(field, f"message {number} must be an object with a role and a content")
        role = row.text(field, message["role"], f"the role of message {number} ")
        if role not in _SPEAKERS:
            raise row.error(field, f"the role of message {number} is none of {', '.join(_SPEAKERS)}")
        result.append((role, row.text(field, message["content"], f"the content of message {number} ")))
    return result


def _render(messages: list[tuple[str, str]]) -> str:
    return "".join(f"\n\n{_SPEAKERS[role]}: {content}" for role, content in messages)


def _texts(row: Row, *answers: tuple[str, Any]) -> list[str]:
    """The prompt and the completions, given as (field, value), of a row that has a prompt."""
    prompt = row.columns.get("prompt")
    if isinstance(prompt, list) or any(isinstance(value, list) for _, value in answers):
        return _chat(row, *answers)
    if "prompt" in row.columns or "instruction" not in row.columns:
        prompt = row.text("prompt", row.get("prompt"))
    else:
        given = row.columns.get("input")
        prompt = f"### Instruction:\n{row.text('instruction', row.get('instruction'))}\n\n"
        prompt += "" if given in (None, "") else f"### Input:\n{row.text('input', given)}\n\n"
        prompt += "### Response:\n"
    return [prompt, *(_answer(row, field, value) for field, value in answers)]


def _chat(row: Row, *answers: tuple[str, Any]) -> list[str]:
    """The same where the prompt or an answer is a list of messages."""
    prompt = row.get("prompt")
    if isinstance(prompt, list):
        before = _messages(row, "prompt", prompt)
    else:  # it must then be seen that this text is the message of the user, so the answers must repeat it
        before = [("user", row.text("prompt", prompt))]
    if before[-1][0] == "assistant":
        raise row.error("prompt", "ends with a message of the assistant, where the completion should begin")
    texts = [_render(before) + _TURN]
    for field, value in answers:
        text = isinstance(value, str)
        messages = [("assistant", row.text(field, value))] if text else _messages(row, field, value)
        if messages[: len(before)] == before:
            messages = messages[len(before) :]
        elif isinstance(prompt, str):
            raise row.error(field, "must be text, as the prompt is, or messages that begin with the prompt")
        if not messages or messages[0][0] != "assistant":
            raise row.error(field, "must have a message of the assistant where the prompt ends")
        _answer(row, field, messages[0][1])
        texts.append(_render(messages).removeprefix(_TURN))
    return texts


def _split(row: Row, chosen: str, rejected: str) -> list[str]:
    """Two transcripts: the prompt ends with the last turn of the assistant that both share."""
    turn = chosen.rfind(_TURN)
    while turn >= 0 and not rejected.startswith(chosen[: turn + len(_TURN)]):
        turn = chosen.rfind(_TURN, 0, turn)
    if turn < 0:
        raise row.error(
            "chosen", f"shares no {_TURN!r} with rejected where the prompt could end; add a field 'prompt'"
        )
    end = turn + len(_TURN)
    return [chosen[:end], _answer(row, "chosen", chosen[end:]), _answer(row, "rejected", rejected[end:])]


def _preference(row: Row) -> tuple[PreferencePair, str]:
    readers = {"ranking": "`dpo --loss-type plackett_luce`", "label": "`audit --kind labels`"}
    for sign, reader in readers.items():
        if sign in row.columns and "chosen" not in row.columns:
            raise row.error("chosen", f"is missing; this is a row of {sign}s, which {reader} reads")
    answers = [(field, row.get(field)) for field in ("chosen", "rejected")]
    if {"prompt", "instruction"} & set(row.columns):
        pair = PreferencePair(*_texts(row, *answers))
    else:
        read = (_render(_messages(row, *a)) if isinstance(a[1], list) else row.text(*a) for a in answers)
        pair = PreferencePair(*_split(row, *read))
    if pair.chosen == pair.rejected:
        raise row.error("rejected", "is the same as chosen, which leaves nothing to prefer; delete the row")
    return pair, "chosen"


def _ranking(row: Row) -> tuple[Ranking, str]:
    if "chosen" in row.columns and "responses" not in row.columns:
        raise row.error("responses", "is missing; this row is a pair of chosen and rejected, no ranking")
    responses, ranks = row.get("responses"), row.get("ranking")
    if not isinstance(responses, list) or len(responses) < 2:
        raise row.error("responses", "must be a list of at least two texts")
    prompt, *texts = _texts(row, *(("responses", response) for response in responses))
    if len(set(texts)) < len(texts):
        raise row.error("responses", "lists the same text twice; delete one")
    counted = list(range(1, len(texts) + 1))
    whole = isinstance(ranks, list) and all(type(rank) is int for rank in ranks)
    if not whole or sorted(ranks) != counted:
        raise row.error(
            "ranking", f"must give each response its rank, {counted} in some order, 1 for the best, no ties"
        )
    return Ranking(prompt, tuple(text for _, text in sorted(zip(ranks, texts)))), "responses"


def _label(row: Row) -> tuple[LabelledCompletion, str]:
    label = row.get("label")
    if label not in (0, 1):  # false and true are equal to them
        raise row.error("label", "must be true (good) or false (bad)")
    return LabelledCompletion(*_texts(row, ("completion", row.get("completion"))), bool(label)), "completion"


def _demonstration(row: Row) -> tuple[Demonstration, str]:
    names = ("completion", "output", "chosen", "messages", "text")
    field = next((name for name in names if name in row.columns), "completion")
    value = row.get(field)
    if field == "chosen":
        pair, _ = _preference(row)
        return Demonstration(pair.prompt, pair.chosen), field
    if field == "messages":
        *before, (role, content) = _messages(row, field, value)
        if role != "assistant":
            raise row.error(field, "must end with a message of the assistant")
        return Demonstration(_render(before) + _TURN, " " + _answer(row, field, content)), field
    if field == "text":
        return Demonstration("", _answer(row, field, value)), field
    return Demonstration(*_texts(row, (field, value))), field


_PARSERS: dict[str, Callable[[Row], tuple[Any, str]]] = {
    "preferences": _preference,
    "rankings": _ranking,
    "labels": _label,
    "demonstrations": _demonstration,
}
KINDS = tuple(_PARSERS)
