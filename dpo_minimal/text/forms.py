"""What a row becomes, by the columns that it has: a prompt and its completions, as texts.

README.md, "Files and rows", lists the forms. What all completions of a row begin with, turn by turn, belongs
to its prompt, in whatever form they are written: so the same talk always has the same numbers.

But: what rows of a file must have in common is data.py's business; the templates are messages.py's.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from .files import EMPTY, Row, listed
from .messages import (
    ASSISTANT,
    TURN,
    Messages,
    instruction,
    is_chat,
    messages_of,
    preceding,
    rendered,
    shared_text,
    shared_turns,
)

PROMPTS = ("prompt", "instruction", "question", "query", "conversations", "messages", "input", "context")
Answers = list[tuple[str, Any]]  # (field, value) of each completion


class Form(NamedTuple):
    """The columns of two completions, the better one first, or else the column that says which it is."""

    first: str
    second: str
    better: str = ""
    values: tuple[str, str] = ("", "")  # of that column, where the first is better, and where the second is
    prompts: tuple[str, ...] = PROMPTS  # columns of which the first one there is the prompt


PAIRS = (
    Form("chosen", "rejected"),
    Form("chosen_response", "rejected_response"),
    Form("preferred_output", "non_preferred_output"),
    Form("human_ref_A", "human_ref_B", "labels", ("1", "0"), ("history",)),
    Form("response_0", "response_1", "better_response_id", ("0", "1")),
    Form("response_0", "response_1", "safer_response_id", ("0", "1")),
    Form("response_a", "response_b", "winner", ("model_a", "model_b")),
)
COMPLETIONS = ("completion", "output", "response", "answer")
LABELS = ("label", "kto_tag")
TALKS = ("messages", "conversations")  # of which the last message is the completion
_SCORES = ("score_{}", "{}_score", "{}-rating", "{}_rating", "rating_{}", "{}_reward", "reward_{}")

_RANKINGS, _LABELS = ("rankings", "dpo --loss-type plackett_luce"), ("labels", "dpo --loss-type kto")
_READERS = {"ranking": _RANKINGS, "answers": _RANKINGS, "label": _LABELS, "kto_tag": _LABELS}


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
        for sign, (kind, command) in _READERS.items():
            if sign in row.columns:
                raise row.error(
                    "chosen",
                    f"is missing, as this is a row of {kind}; `{command}` or `audit --kind {kind}` reads it",
                )
        raise row.error(
            "chosen", f"is missing; the fields there are {listed(row.columns)}; name the better completion "
            "'chosen' and the other one 'rejected'",
        )  # fmt: skip
    names, field = [form.first, form.second], form.first
    if form.better:
        field = f"{form.first} or {form.second}"
        value = _plain(row.get(form.better))
        if value not in form.values:
            raise row.error(
                form.better, f"must be {' or '.join(form.values)}, which names the better completion; a tie "
                "is none, so delete the row or leave such rows out with --skip-bad-rows",
            )  # fmt: skip
        names = names[:: 1 if value == form.values[0] else -1]
    texts = texts_of(row, [(name, row.get(name)) for name in names], form.prompts)
    _compare_scores(row, *names)
    return texts, field


def _compare_scores(row: Row, *names: str) -> None:
    """Find a pair that goes against its own scores, where a row has them."""
    for pattern in _SCORES:
        columns = [pattern.format(name.rsplit("_", 1)[-1]) for name in names]
        if row.columns.keys() >= set(columns):
            scores = [_number(row.peek(column)) for column in columns]
            if None not in scores and scores[0] <= scores[1]:
                row.findings["tied_scores" if scores[0] == scores[1] else "against_scores"] = ""


def ranking_of(row: Row) -> tuple[list[str], str]:
    """([prompt, responses, best first], name of their column); of those that share a rank, the first."""
    if form_of(row) and not {"responses", "answers"} & row.columns.keys():
        raise row.error("responses", "is missing; this row is a pair of chosen and rejected, no ranking")
    field = "responses" if "responses" in row.columns or "answers" not in row.columns else "answers"
    responses = row.get(field)
    if not isinstance(responses, list) or len(responses) < 2:
        raise row.error(field, "must be a list of at least two texts")
    if field == "answers":  # objects of an answer and its rank
        if not all(isinstance(part, dict) and {"answer", "rank"} <= part.keys() for part in responses):
            raise row.error(field, "must be objects with an answer and its rank")
        row.unread.update(
            f"{name} of answers" for part in responses for name in part.keys() - {"answer", "rank"}
        )
        ranks, responses = ([part[name] for part in responses] for name in ("rank", "answer"))
    else:
        ranks = row.get("ranking")
    numbers = [_number(rank) for rank in ranks] if isinstance(ranks, list) else []
    below = [1 + sum(other < rank for other in numbers) for rank in numbers if None not in numbers]
    distinct = sorted({*numbers} - {None})
    if len(numbers) != len(responses) or (numbers != below and distinct != list(range(1, len(distinct) + 1))):
        raise row.error(
            "ranking", f"must give each of {len(responses)} responses its rank, 1 for the best (where 0 is, "
            "add 1 to each); tied responses share one",
        )  # fmt: skip
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
        raise row.error(name, "must be true (good) or false (bad)")
    texts, field = completion_of(row)
    return texts, label in ("1", "true"), field


def completion_of(row: Row) -> tuple[list[str], str]:
    """([prompt, completion], name of its column) of a row with one completion, or of a whole talk."""
    field = next((name for name in (*COMPLETIONS, *TALKS, "text") if name in row.columns), COMPLETIONS[0])
    value = row.get(field)
    if field in TALKS:
        if messages_of(row, field, value)[-1][0] != ASSISTANT:
            raise row.error(field, "must end with a message of the assistant")
        return texts_of(row, [(field, value)], ()), field
    if field == "text":
        before, _ = preceding(row, None)
        _check_answer(row, field, row.text(field, value))
        return ["".join(f"{text}\n\n" for text in before), value], field
    return texts_of(row, [(field, value)]), field


def _plain(value: Any) -> str:
    """1, 1.0, True, "1" and " True" as "1" or "true", however a file writes them."""
    if isinstance(value, (bool, int, float)):
        return str(int(value)) if value in (0, 1) else ""
    return value.strip().lower() if isinstance(value, str) else ""


def _number(value: Any) -> float | None:
    try:
        return None if isinstance(value, bool) or value in EMPTY else float(value)
    except (TypeError, ValueError, OverflowError):
        return None


# ----------------------------------------------------------------------------------------- prompt and answers


def texts_of(row: Row, answers: Answers, prompts: tuple[str, ...] = PROMPTS) -> list[str]:
    """The prompt of a row, and its completions.

    Args: prompts: columns of which the first one there is the prompt; none of them: whole transcripts.
    """
    column = _prompt_column(row, answers, prompts)
    if column is None and len(answers) == 1 and prompts:
        row.get(PROMPTS[0])  # says that it is missing
    value = None if column is None else row.peek(column)
    before, turns = preceding(row, column)
    chat = any(is_chat(answer) for _, answer in answers)
    if column == "instruction":
        value, given = row.text(column, value), row.peek("input")
        given = "" if given in EMPTY else row.text("input", given)
        if not chat:
            prompt = instruction(before, turns or [], value, given)
            return _finished(row, "", prompt, answers, [row.text(*answer) for answer in answers])
        value += f"\n\n{given}" if given else ""
    if chat or is_chat(value) or (column is not None and turns is not None):
        ahead = [("System", "\n\n".join(before))] if before else []
        return _talk(row, column, value, [*ahead, *(turns or [])], answers)
    texts = [row.text(*answer) for answer in answers]
    if column is None:
        prompt = rendered([*(("System", text) for text in before), *(turns or [])])
        start = shared_text(texts)
        if not start:
            raise row.error(
                answers[0][0], f"shares no {TURN!r} with {answers[-1][0]} where the prompt could end; add a "
                "field 'prompt'",
            )  # fmt: skip
        return _finished(row, prompt, texts[0][:start], answers, [text[start:] for text in texts])
    return _finished(row, "".join(f"{text}\n\n" for text in before), row.text(column, value), answers, texts)


def _prompt_column(row: Row, answers: Answers, prompts: tuple[str, ...]) -> str | None:
    """The first column that is a prompt; a talk that ends with an answer is none, as it repeats one."""
    taken = {field for field, _ in answers}
    there = [name for name in prompts if name in row.columns and name not in taken]
    for name in TALKS:
        value = row.columns.get(name)
        if name in there and not (
            value and is_chat(value) and messages_of(row, name, value)[-1][0] != ASSISTANT
        ):
            there.remove(name)
    filled = (name for name in there if row.columns[name] is not None)
    return next(filled, there[0] if there else None)


def _finished(row: Row, ahead: str, prompt: str, answers: Answers, texts: list[str]) -> list[str]:
    """Prompt and completions, what these share moved to the prompt; all of it checked."""
    _note_repeats(row, prompt, texts)
    if len(texts) > 1 and "repeats_prompt" not in row.findings:
        start = shared_text(texts)
        prompt, texts = prompt + texts[0][:start], [text[start:] for text in texts]
    for (field, _), text in zip(answers, texts):
        _check_answer(row, field, text)
    return [ahead + prompt, *texts]


def _note_repeats(row: Row, prompt: str, texts: list[str]) -> None:
    """Note whether completions begin with the prompt: all of them, as in exports of transcripts, or some."""
    prompt = prompt.strip()
    if not prompt:
        return
    word = prompt[-1].isalnum()  # "It rained" does not repeat "I"
    repeats = [
        any(text.startswith(start) and not (word and text[len(start) : len(start) + 1].isalnum())
            for start in (prompt, f"Human: {prompt}"))
        for text in map(str.lstrip, texts)
    ]  # fmt: skip
    row.repeats_prompt = all(repeats)
    if any(repeats):
        row.findings["repeats_prompt"] = ""


def _talk(row: Row, column: str | None, value: Any, ahead: Messages, answers: Answers) -> list[str]:
    """The same where the prompt or an answer is messages."""
    talks = [
        [(ASSISTANT, row.text(field, answer))] if isinstance(answer, str) else messages_of(row, field, answer)
        for field, answer in answers
    ]
    if column is None:
        prompt = []
    elif is_chat(value):
        prompt = messages_of(row, column, value)
    else:
        prompt = [("Human", row.text(column, value))]
        system = [message for message in talks[0][:1] if message[0] == "System"]
        if all(talk[: len(system) + 1] == system + prompt for talk in talks):
            prompt = system + prompt
    if prompt and prompt[-1][0] == ASSISTANT:
        raise row.error(column, "ends with a message of the assistant, where the completion should begin")
    talks = [talk[len(prompt) :] if talk[: len(prompt)] == prompt else talk for talk in talks]
    for (field, _), talk in zip(answers, talks):
        if prompt and (not talk or talk[0][0] != ASSISTANT):
            raise row.error(field, "must go on with a message of the assistant where the prompt ends")
    start = shared_turns(talks)
    for (field, _), talk in zip(answers, talks):
        if not talk[start:] or talk[start][0] != ASSISTANT:
            raise row.error(field, "must have a message of the assistant where the prompt ends")
        _check_answer(row, field, talk[start][1])
    before = [*ahead, *prompt, *talks[0][:start]]
    if not before and len(answers) > 1:
        raise row.error(answers[0][0], "begins with an answer, as no prompt is there; add a field 'prompt'")
    texts = [rendered(talk[start:]).removeprefix(TURN) for talk in talks]
    _note_repeats(row, rendered(before) + TURN, texts)
    return [rendered(before) + TURN, *texts]


def _check_answer(row: Row, field: str, text: str) -> None:
    if not text.strip():
        raise row.error(field, "is empty; give a completion or delete the row")
