"""What a row becomes, by the columns that it has: a prompt and its completions, as texts.

README.md, "Files and rows", lists the forms. What all completions of a row begin with, turn by turn, belongs
to its prompt, in whatever form they are written: so the same talk always has the same numbers.

But: what rows of a file must have in common is data.py's business; the templates are messages.py's.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from reprlib import repr as short
from typing import Any, NamedTuple

from ..validation import InputError
from .files import Row, is_empty, kind_of, listed
from .messages import (
    ASSISTANT,
    TURN,
    Messages,
    holds,
    instruction,
    is_chat,
    messages_of,
    preceding,
    rendered,
    shared_text,
    shared_turns,
)

TALKS = ("messages", "conversations", "conversation")  # of which the last message is the completion
PROMPTS = ("prompt", "instruction", "question", "query", *TALKS, "input", "context")
Answers = list[tuple[str, Any]]  # (field, value) of each completion


class Form(NamedTuple):
    """The columns of two completions, the better one first, or else the column that says which it is."""

    first: str
    second: str
    better: str = ""
    values: tuple[str, str] = ("", "")  # of that column, where the first is better, and where the second is
    prompts: tuple[str, ...] = PROMPTS  # columns of which the first filled one is the prompt


PAIRS = (
    Form("chosen", "rejected"),
    Form("chosen_response", "rejected_response"),
    Form("preferred_output", "non_preferred_output"),
    Form("response", "rejected_response"),
    Form("messages", "rejected_response"),
    Form("messages", "rejected_messages"),
    Form("human_ref_A", "human_ref_B", "labels", ("1", "0"), ("history",)),
    Form("response_0", "response_1", "better_response_id", ("0", "1")),
    Form("response_0", "response_1", "safer_response_id", ("0", "1")),
    Form("response_a", "response_b", "winner", ("model_a", "model_b")),
    Form("conversation_a", "conversation_b", "winner", ("model_a", "model_b")),
)
COMPLETIONS = ("completion", "output", "response", "answer")
LABELS = ("label", "kto_tag")
_SCORES = ("score_{}", "{}_score", "{}-rating", "{}_rating", "rating_{}", "{}_reward", "reward_{}")

_SIDE = re.compile("chosen|rejected|[01abAB]$")  # what of a column's name the names of its scores repeat

_READ = ", as this is a row of {0}; `dpo --loss-type {1}` or `audit --kind {0}` reads it"
_READERS = dict.fromkeys(("ranking", "answers"), _READ.format("rankings", "plackett_luce"))
_READERS |= dict.fromkeys(LABELS, _READ.format("labels", "kto"))


def form_of(row: Row) -> Form | None:
    """The form of a pair that a row has."""
    for form in PAIRS:
        if {form.first, form.second, form.better or form.first} <= row.columns.keys():
            return form
    return PAIRS[0] if "chosen" in row.columns else None


def pair_of(row: Row) -> tuple[list[str], str]:
    """([prompt, chosen, rejected], name of the columns) of a row of two completions."""
    form = form_of(row)
    if form is None:
        there = f"; the fields there are {listed(row.columns)}"
        remedy = f"{there}; name the better completion 'chosen' and the other one 'rejected'"
        readers = (_READERS[name] for name in _READERS if name in row.columns)
        raise row.error("chosen", f"is missing{next(readers, remedy)}")
    names, field = [form.first, form.second], form.first
    if form.better:
        field = f"{form.first} or {form.second}"
        value = _plain(row.get(form.better))
        if value not in form.values:
            tie = "a tie is none, so delete the row or leave such rows out with --skip-bad-rows"
            names = " or ".join(form.values)
            raise row.error(form.better, f"must be {names}, which names the better completion; {tie}")
        names = names[:: 1 if value == form.values[0] else -1]
    texts = texts_of(row, [(name, row.get(name)) for name in names], form.prompts)
    _compare_scores(row, *names)
    return texts, field


def _compare_scores(row: Row, better: str, worse: str) -> None:
    """Find a pair that goes against its own scores, where a row has them."""
    sides = _SIDE.search(better), _SIDE.search(worse)
    for pattern in _SCORES if all(sides) else ():
        columns = [pattern.format(side[0]) for side in sides]
        if row.columns.keys() >= {*columns}:
            scores = [_number(row.peek(column)) for column in columns]
            if None not in scores and scores[0] <= scores[1]:
                row.findings["tied_scores" if scores[0] == scores[1] else "against_scores"] = ""


def ranking_of(row: Row) -> tuple[list[str], str]:
    """([prompt, responses, best first], name of their column); of those that share a rank, the first."""
    if form_of(row) and not {"responses", "answers"} & row.columns.keys():
        pair = "a pair of chosen and rejected, which the other losses and `audit --kind preferences` read"
        raise row.error("responses", f"is missing; this is {pair}")
    field = "responses" if "responses" in row.columns or "answers" not in row.columns else "answers"
    responses = row.get(field)
    if not isinstance(responses, list) or len(responses) < 2:
        raise row.error(field, "must be a list of at least two texts")
    if field == "answers":  # objects of an answer and its rank
        if not all(isinstance(part, dict) and {"answer", "rank"} <= part.keys() for part in responses):
            got = kind_of(responses[0])
            raise row.error(field, f"must be objects with an answer and its rank, but the first is {got}")
        for part in responses:
            row.note_unread(part, ("answer", "rank"), field)
        ranks, responses = ([part[name] for part in responses] for name in ("rank", "answer"))
    else:
        ranks = row.get("ranking")
    numbers = [_number(rank) for rank in ranks] if isinstance(ranks, list) else []
    known = sorted(rank for rank in numbers if rank is not None)
    distinct = sorted({*known})
    dense = distinct == list(range(1, len(distinct) + 1))
    skipping = known == [1 + bisect_left(known, rank) for rank in known]  # 1, 2, 2, 4, as in a competition
    if not len(known) == len(numbers) == len(responses) or not (dense or skipping):
        best = "1 for the best (where 0 is, add 1 to each); tied responses share one"
        raise row.error("ranking", f"must give each of {len(responses)} responses its rank, {best}")
    if len(distinct) < 2:
        raise row.error("ranking", "gives all responses the same rank; delete the row")
    prompt, *texts = texts_of(row, [(field, response) for response in responses])
    if len(set(texts)) < len(texts):
        raise row.error(field, "lists the same text twice; delete one")
    if len(distinct) < len(texts):
        row.findings["tied"] = ""
    return [prompt, *(texts[numbers.index(rank)] for rank in distinct)], field


def label_of(row: Row) -> tuple[list[str], bool, str]:
    """([prompt, completion], is it good?, name of its column)."""
    name = next((name for name in LABELS if name in row.columns), LABELS[0])
    label = _plain(row.get(name))
    if label not in ("1", "0", "true", "false"):
        raise row.error(name, f"must be true (good) or false (bad), got {short(row.columns[name])}")
    texts, field = completion_of(row)
    return texts, label in ("1", "true"), field


def completion_of(row: Row) -> tuple[list[str], str]:
    """([prompt, completion], name of its column) of a row with one completion, or of a whole talk."""
    field = next((name for name in (*COMPLETIONS, *TALKS, "text") if name in row.columns), COMPLETIONS[0])
    value = row.get(field)
    if field in TALKS:
        if messages_of(row, field, value)[-1][0] != ASSISTANT:
            raise row.error(field, "must end with a message of the assistant; cut off what follows its last")
        return texts_of(row, [(field, value)], ()), field
    if field == "text":
        system, turns = preceding(row, None)
        before = "".join(f"{text}\n\n" for _, text in system) + rendered(turns)
        return _finished(row, before, "", [(field, value)], [row.text(field, value)]), field
    return texts_of(row, [(field, value)]), field


def _plain(value: Any) -> str:
    """1, 1.0, True, "1.0" and " True" as "1" or "true", however a file writes them."""
    if isinstance(value, (bool, int, float)):
        return str(int(value)) if value in (0, 1) else ""
    return value.strip().lower().removesuffix(".0") if isinstance(value, str) else ""


def _number(value: Any) -> float | None:
    try:
        return None if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        return None


# ----------------------------------------------------------------------------------------- prompt and answers


def texts_of(row: Row, answers: Answers, prompts: tuple[str, ...] = PROMPTS) -> list[str]:
    """The prompt of a row, and its completions.

    Args: prompts: columns of which the first filled one is the prompt; none of them: whole transcripts.
    """
    column = _prompt_column(row, answers, prompts)
    if column is None and len(answers) == 1 and prompts:
        row.get(PROMPTS[0])  # says that it is missing
    value = None if column is None else row.peek(column)
    system, turns = preceding(row, column)
    chat = any(is_chat(answer) for _, answer in answers)
    if column == "instruction":
        value, given = row.text(column, value), row.peek("input")
        given = "" if is_empty(given) else row.text("input", given)
        if not chat:
            prompt = instruction(system + turns, value, given)
            return _finished(row, "", prompt, answers, [row.text(*answer) for answer in answers])
        value += f"\n\n{given}" if given else ""
    if chat or is_chat(value) or (column and (turns or "history" in row.columns.keys() - {column})):
        return _talk(row, column, value, system, turns, answers)
    texts = [row.text(*answer) for answer in answers]
    if column is not None:
        ahead = "".join(f"{text}\n\n" for _, text in system)
        return _finished(row, ahead, row.text(column, value), answers, texts)
    if not shared_text(texts):
        raise _no_prompt(row, answers, repr(TURN))
    ahead = rendered(system + turns)
    return _finished(row, "" if texts[0].startswith(ahead) else ahead, "", answers, texts)


def _prompt_column(row: Row, answers: Answers, prompts: tuple[str, ...]) -> str | None:
    """The first filled column that is a prompt, or else the first; a talk that ends with an answer is none,
    as it repeats one."""
    taken = {field for field, _ in answers}
    there = [name for name in prompts if name in row.columns and name not in taken]
    for name in there:
        value = row.columns[name]
        asks = name not in TALKS or (is_chat(value) and messages_of(row, name, value)[-1][0] != ASSISTANT)
        if not is_empty(value) and asks:
            return name
    return next((name for name in there if name not in TALKS), None)


def _no_prompt(row: Row, answers: Answers, what: str) -> InputError:
    there = f"the fields there are {listed(row.columns)}"
    problem = f"begins with no {what} that all completions share, where the prompt could end"
    return row.error(answers[0][0], f"{problem}; add a field 'prompt' ({there})")


def _finished(row: Row, ahead: str, prompt: str, answers: Answers, texts: list[str]) -> list[str]:
    """Prompt and completions, what these share moved to the prompt; all of it checked."""
    _note_repeats(row, prompt, texts)
    if len(texts) > 1 and "repeats_prompt" not in row.findings:
        start = shared_text(texts)
        prompt, texts = prompt + texts[0][:start], [text[start:] for text in texts]
    for (field, _), text in zip(answers, texts):
        if not text.strip():
            raise row.error(field, "is empty; give a completion or delete the row")
    return [ahead + prompt, *texts]


def _note_repeats(row: Row, prompt: str, texts: list[str]) -> None:
    """Note whether completions begin with the prompt, or are transcripts that hold it: all, or some."""
    prompt = prompt.strip()
    word = prompt[-1:].isalnum()  # "It rained" does not repeat "I"
    repeats = [
        (text.startswith(prompt) and not (word and text[len(prompt) : len(prompt) + 1].isalnum()))
        or (text.startswith(("Human: ", "System: ")) and prompt in text)
        for text in map(str.lstrip, texts)
        if prompt
    ]
    row.repeats_prompt = bool(repeats) and all(repeats)
    if any(repeats):
        row.findings["repeats_prompt"] = ""


def _talk(
    row: Row, column: str | None, value: Any, system: Messages, turns: Messages, answers: Answers
) -> list[str]:
    """The same where the prompt or an answer is messages. Args: system, turns: of other columns."""
    talks = [
        [(ASSISTANT, row.text(field, answer).removeprefix(" "))]
        if isinstance(answer, str)
        else messages_of(row, field, answer)
        for field, answer in answers
    ]
    prompt = _asked(row, column, value)
    whole = [talk for talk in talks if talk[0][0] != ASSISTANT]
    if whole and not prompt:  # an answer alone stands for the last one of the talk beside it
        asked = whole[0][: shared_turns(whole)]
        whole = talks = [talk if talk[0][0] != ASSISTANT else asked + talk for talk in talks]
    shared = talks[0][: shared_turns(talks)]
    if len(whole) == len(talks) and holds(shared, prompt):
        turns = [] if holds(shared, turns + prompt) else turns
        prompt = []
    talks = [talk[len(prompt) :] if talk[: len(prompt)] == prompt else talk for talk in talks]
    for (field, _), talk in zip(answers, talks):
        if prompt and (prompt[-1][0] == ASSISTANT or not talk or talk[0][0] != ASSISTANT):
            whole = f"delete {column!r} where the completions are whole talks"
            where = f"where {column!r} ends with one of the user"
            raise row.error(field, f"must go on with a message of the assistant {where}; {whole}")
    start = shared_turns(talks)
    before = [*turns, *prompt, *talks[0][:start]]
    if any(talk[start][0] != ASSISTANT for talk in talks) or (len(talks) > 1 and not system + before):
        raise _no_prompt(row, answers, "message")
    ahead = rendered([] if before[:1] == system else system)  # which a talk may repeat
    texts = [rendered(talk[start:]).removeprefix(TURN) for talk in talks]
    return _finished(row, ahead, rendered(before) + TURN, answers, texts)


def _asked(row: Row, column: str | None, value: Any) -> Messages:
    """The messages of a prompt; a text is the user's."""
    if is_empty(value) and not is_chat(value):
        return []
    if is_chat(value):
        return messages_of(row, column, value)
    text = row.text(column, value)
    if text.lstrip().startswith(("Human: ", "System: ")) or text.rstrip().endswith(TURN):
        raise row.error(column, "is a transcript, and the rest are messages; write both in the same way")
    return [("Human", text)]
