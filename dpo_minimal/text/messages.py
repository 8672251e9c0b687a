"""Chat messages, and what else stands before an answer, become text: the templates of README.md.

A template is part of the data: every log-probability depends on it.

But: which columns hold messages is forms.py's business.
"""

from __future__ import annotations

import re
from bisect import bisect
from reprlib import repr as short
from typing import Any

from .files import Row, is_empty, kind_of

Messages = list[tuple[str, str]]  # (speaker, content)

TURN, RESPONSE = "\n\nAssistant:", "### Response:\n"  # where the prompt of a chat, of an instruction ends
_SPEAKERS = {
    "user": "Human", "human": "Human", "assistant": "Assistant", "gpt": "Assistant", "model": "Assistant",
    "bot": "Assistant", "system": "System", "developer": "System",
}  # fmt: skip
ASSISTANT = "Assistant"

# Columns, and parts of a message, that belong to the prompt and that no template here can show.
UNSHOWN = {
    "tools", "functions", "tool_calls", "function_call", "documents", "image", "images", "audio", "audios",
    "video", "videos",
}  # fmt: skip


def is_chat(value: Any) -> bool:
    """Whether a value is messages, or one message, and not text."""
    return isinstance(value, (list, dict))


def messages_of(row: Row, field: str, value: Any) -> Messages:
    """A list of {role, content} or {from, value}; one message for a list of one; or an object of messages.

    Raises InputError: anything else, an unknown role, content that is not text.
    """
    if isinstance(value, dict) and isinstance(value.get("messages"), list):  # of OpenAI's preference rows
        refuse_unshown(row, value, field)
        value = value["messages"]
    values = [value] if isinstance(value, dict) else value
    if not isinstance(values, list) or not values:
        raise row.error(field, f"must be a list of at least one message, got {kind_of(value)}")
    return [_message(row, field, number, message) for number, message in enumerate(values, start=1)]


def _message(row: Row, field: str, number: int, message: Any) -> tuple[str, str]:
    names = ("from", "value") if isinstance(message, dict) and "from" in message else ("role", "content")
    if not isinstance(message, dict) or not set(names) <= set(message):
        got = f"but part {number} is {kind_of(message)}; texts in a list need a row each"
        raise row.error(field, f"must be text, or messages with a role and a content, {got}")
    refuse_unshown(row, message, f"{field}, message {number}")
    row.note_unread(message, names, "messages")
    role = row.text(field, message[names[0]], f"the role of message {number} ")
    if role.strip().lower() not in _SPEAKERS:
        remedy = "write what it says into a message of the user, or leave the row out"
        raise row.error(
            field, f"the role of message {number}, {short(role)}, is none of {', '.join(_SPEAKERS)}; {remedy}"
        )
    content = message[names[1]]
    if isinstance(content, list):
        content = "".join(_part(row, field, number, part) for part in content)
    return _SPEAKERS[role.strip().lower()], row.text(field, content, f"the content of message {number} ")


def _part(row: Row, field: str, number: int, part: Any) -> str:
    """One of the parts of a message's content, {type: text, text}."""
    if not isinstance(part, dict) or not isinstance(part.get("text"), str):
        what = short(part["type"]) if isinstance(part, dict) and "type" in part else kind_of(part)
        raise row.error(field, f"message {number} has a part that is no text but {what}; leave the row out")
    return part["text"]


def refuse_unshown(row: Row, columns: dict[str, Any], field: str = "") -> None:
    """Raise InputError for what belongs to the prompt and would be lost."""
    for name in columns:
        if name in UNSHOWN and not is_empty(columns[name]):
            what = f"{name if field else 'it'} belongs to the prompt, and no template shows it"
            remedy = "write it into the prompt as text, or delete it where the answers do not depend on it"
            raise row.error(field or name, f"{what}; {remedy}")


def rendered(messages: Messages) -> str:
    """Each message after two line ends and its speaker."""
    return "".join(f"\n\n{speaker}: {content}" for speaker, content in messages)


def template_of(prompt: str) -> str:
    """Which template a prompt ends as."""
    return "chat" if prompt.endswith(TURN) else "instruction" if prompt.endswith(RESPONSE) else "text"


def shared_turns(answers: list[Messages]) -> int:
    """How many messages all answers begin with, each going on with the assistant's; of a single answer, all
    but the assistant's last and what follows it."""
    count = 0
    while all(len(answer) > count + 1 and answer[count] == answers[0][count] for answer in answers):
        count += 1
    while count and any(answer[count][0] != ASSISTANT for answer in answers):
        count -= 1
    return count


def holds(talk: Messages, part: Messages) -> bool:
    """Whether a talk begins with a part of it, at once or after its system's message, or ends with it."""
    last = max(0, len(talk) - len(part))
    return any(talk[first : first + len(part)] == part for first in (0, 1, last))


def shared_text(texts: list[str]) -> int:
    """How many characters of transcripts are shared up to the last turn of the assistant; 0 where none is."""
    ends = [turn.end() for turn in re.finditer(TURN, texts[0])]
    parted = bisect(ends, False, key=lambda end: not all(text.startswith(texts[0][:end]) for text in texts))
    return ends[parted - 1] if parted else 0


def preceding(row: Row, used: str | None) -> tuple[Messages, Messages]:
    """What other columns put before the prompt: a system's text and a context; earlier turns.

    Args: used: the column that is the prompt itself.
    Returns: (at most one message of the system, turns).
    """
    refuse_unshown(row, row.columns)
    texts: list[str] = []
    turns: Messages = []
    for name in (name for name in PRECEDING if name in row.columns and name != used):
        value, history = row.peek(name), name == "history"
        if is_empty(value):
            continue
        listed = value if isinstance(value, list) else [value]
        if not history and all(isinstance(part, str) for part in listed):
            texts.append(row.text(name, "\n\n".join(listed)))
        elif history and all(isinstance(part, list) and len(part) == 2 for part in listed):
            both = zip(("Human", ASSISTANT) * len(listed), (text for pair in listed for text in pair))
            turns += [(who, row.text(name, text, "a turn ")) for who, text in both]
        elif all(isinstance(part, dict) for part in listed):
            turns += messages_of(row, name, value)
        else:
            what = "pairs of a question and its answer" if history else "text"
            raise row.error(name, f"must be {what}, or messages, but part 1 is {kind_of(listed[0])}")
    return [("System", "\n\n".join(dict.fromkeys(texts)))] if texts else [], turns


PRECEDING = ("system", "system_prompt", "system_message", "context", "history")


def instruction(before: Messages, asked: str, given: str) -> str:
    """The prompt of an instruction with its input, after what precedes it."""
    headings = {"Human": "### Instruction:\n", ASSISTANT: RESPONSE, "System": ""}
    parts = [headings[speaker] + content for speaker, content in [*before, ("Human", asked)]]
    parts += [f"### Input:\n{given}"] if given else []
    return "\n\n".join([*parts, RESPONSE])
