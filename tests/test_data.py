"""Preference files: what each format becomes, character by character, and one sentence for whatever is bad.

Golden values here are texts, not log-probabilities: the templates with all their whitespace, no end-of-text
(batches.py adds it), nothing stripped. They are written out by hand.
"""

import gzip
import json
import tempfile
from itertools import permutations, takewhile
from pathlib import Path

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from planting import CAUGHT, plant

from dpo_minimal.text import data, files, forms, messages
from dpo_minimal.text.data import (
    KINDS,
    Demonstration,
    LabelledCompletion,
    PreferencePair,
    Ranking,
    dataset_from_rows,
    load_dataset,
    load_preferences,
)
from dpo_minimal.validation import InputError

SHARED = Path(__file__).parents[2] / "shared"
PAIR = {"prompt": "The film was", "chosen": " good.", "rejected": " bad."}
OTHER = {"prompt": "It is", "chosen": " a joy.", "rejected": " a bore."}


def user(content) -> dict:
    return {"role": "user", "content": content}


def assistant(content) -> dict:
    return {"role": "assistant", "content": content}


def one(kind, row):
    """The only row of a data set in memory."""
    (parsed,) = dataset_from_rows([row], "toy", kind).rows
    return parsed


def sentence(call, *named) -> str:
    """The message of the InputError that `call` raises: one sentence that names everything in `named`."""
    with pytest.raises(InputError) as caught:
        call()
    message = str(caught.value)
    assert message.endswith(".") and ". " not in message and "\n" not in message, message
    message.encode()  # so it can be printed
    for part in named:
        assert part in message, message
    return message


def repeats(pair) -> bool:
    """Whether both completions may begin with the prompt."""
    prompt = pair.prompt.strip()
    return bool(prompt) and all(prompt in text for text in pair[1:])


def written(folder, name: str, content) -> Path:
    """A file of these bytes, or of these rows as JSON lines."""
    path = Path(folder) / name
    rows = content if isinstance(content, bytes) else "\n".join(map(json.dumps, content)).encode()
    path.write_bytes(rows)
    return path


# ------------------------------------------------------------------------------------- what a row becomes

HUMAN_AND_TURN = "\n\nHuman: Hi\n\nAssistant:"
TALK = [user("Hi"), assistant("Yes?"), user("Bye")]
TALKED = "\n\nHuman: Hi\n\nAssistant: Yes?\n\nHuman: Bye\n\nAssistant:"

GOLDEN = {
    # texts as they stand: nothing is stripped and no space is added
    "texts": ("preferences", PAIR, PreferencePair("The film was", " good.", " bad.")),
    "whitespace is kept": (
        "preferences",
        {"prompt": " p \n", "chosen": "c\n", "rejected": "\tr "},
        PreferencePair(" p \n", "c\n", "\tr "),
    ),
    "an empty prompt": (
        "preferences",
        {"prompt": "", "chosen": "c", "rejected": "r"},
        PreferencePair("", "c", "r"),
    ),
    "further columns": (
        "preferences",
        PAIR | {"score": None, "id": {"a": [1]}},
        PreferencePair(*PAIR.values()),
    ),
    "prompt before instruction": ("preferences", PAIR | {"instruction": 3}, PreferencePair(*PAIR.values())),
    # a blank line after each heading's text, a line feed after the last colon
    "instruction and input": (
        "preferences",
        {"instruction": "Add.", "input": "1, 2", "chosen": "3", "rejected": "4"},
        PreferencePair("### Instruction:\nAdd.\n\n### Input:\n1, 2\n\n### Response:\n", "3", "4"),
    ),
    **{
        f"no input, {name}": (
            "preferences",
            {"instruction": "Add.", "chosen": "3", "rejected": "4", **given},
            PreferencePair("### Instruction:\nAdd.\n\n### Response:\n", "3", "4"),
        )
        for name, given in (("absent", {}), ("empty", {"input": ""}), ("null", {"input": None}))
    },
    # chat: two line feeds before a speaker, the prompt ends at a colon, the completion starts with a space
    "messages": (
        "preferences",
        {"prompt": [user("Hi")], "chosen": [assistant("Hello")], "rejected": [assistant("What")]},
        PreferencePair(HUMAN_AND_TURN, " Hello", " What"),
    ),
    "messages with a system's": (
        "preferences",
        {
            "prompt": [{"role": "system", "content": "Be kind."}, user("Hi")],
            "chosen": [assistant("Hello")],
            "rejected": [assistant("What")],
        },
        PreferencePair("\n\nSystem: Be kind.\n\nHuman: Hi\n\nAssistant:", " Hello", " What"),
    ),
    "messages of several turns": (
        "preferences",
        {"prompt": TALK, "chosen": [assistant("a"), user("b"), assistant("c")], "rejected": [assistant("d")]},
        PreferencePair(TALKED, " a\n\nHuman: b\n\nAssistant: c", " d"),
    ),
    "messages that repeat the prompt": (
        "preferences",
        {"prompt": TALK, "chosen": [*TALK, assistant("a")], "rejected": [*TALK, assistant("b")]},
        PreferencePair(TALKED, " a", " b"),
    ),
    "messages that begin with a prompt given as text": (
        "preferences",
        {"prompt": "Hi", "chosen": [user("Hi"), assistant("a")], "rejected": [user("Hi"), assistant("b")]},
        PreferencePair(HUMAN_AND_TURN, " a", " b"),
    ),
    "texts that answer messages": (
        "preferences",
        {"prompt": [user("Hi")], "chosen": "Hello", "rejected": "What"},
        PreferencePair(HUMAN_AND_TURN, " Hello", " What"),
    ),
    # whole transcripts: the prompt ends with the last "\n\nAssistant:" that both have
    "transcripts": (
        "preferences",
        {"chosen": TALKED + " See you.", "rejected": TALKED + " Stay."},
        PreferencePair(TALKED, " See you.", " Stay."),
    ),
    "transcripts, one of which goes on": (
        "preferences",
        {
            "chosen": HUMAN_AND_TURN + " Yes",
            "rejected": HUMAN_AND_TURN + " Yes\n\nHuman: Bye\n\nAssistant: x",
        },
        PreferencePair(HUMAN_AND_TURN, " Yes", " Yes\n\nHuman: Bye\n\nAssistant: x"),
    ),
    "transcripts that part in the human's words": (
        "preferences",
        {"chosen": HUMAN_AND_TURN + " a\n\nHuman: b\n\nAssistant: c", "rejected": HUMAN_AND_TURN + " d"},
        PreferencePair(HUMAN_AND_TURN, " a\n\nHuman: b\n\nAssistant: c", " d"),
    ),
    "transcripts as messages": (
        "preferences",
        {"chosen": [*TALK, assistant("See you.")], "rejected": [*TALK, assistant("Stay.")]},
        PreferencePair(TALKED, " See you.", " Stay."),
    ),
    # a rank a response: the first text here is the worst
    "ranking": (
        "rankings",
        {"prompt": "p", "responses": ["c", "a", "b"], "ranking": [3, 1, 2]},
        Ranking("p", ("a", "b", "c")),
    ),
    "ranking after messages": (
        "rankings",
        {"prompt": [user("Hi")], "responses": ["x", [assistant("y")]], "ranking": [2, 1]},
        Ranking(HUMAN_AND_TURN, (" y", " x")),
    ),
    "ranking after an instruction": (
        "rankings",
        {"instruction": "Add.", "responses": ["x", "y"], "ranking": [1, 2]},
        Ranking("### Instruction:\nAdd.\n\n### Response:\n", ("x", "y")),
    ),
    **{
        f"label {label}": (
            "labels",
            {"prompt": "p", "completion": " c", "label": label},
            LabelledCompletion("p", " c", bool(label)),
        )
        for label in (True, False, 1, 0)
    },
    "label of messages": (
        "labels",
        {"prompt": [user("Hi")], "completion": [assistant("Hello")], "label": False},
        LabelledCompletion(HUMAN_AND_TURN, " Hello", False),
    ),
    "tied ranks": (
        "rankings",
        {"prompt": "p", "responses": ["c", "a", "b", "d"], "ranking": [3, 1, 1.0, 3]},
        Ranking("p", ("a", "c")),
    ),
    "content in parts": (
        "preferences",
        {
            "prompt": [user([{"type": "text", "text": "H"}, {"type": "text", "text": "i"}])],
            "chosen": "a",
            "rejected": "b",
        },
        PreferencePair(HUMAN_AND_TURN, " a", " b"),
    ),
    "messages after a prompt given as text": (
        "preferences",
        {"prompt": "Hi", "chosen": [assistant("a")], "rejected": assistant("b")},
        PreferencePair(HUMAN_AND_TURN, " a", " b"),
    ),
    "messages after an instruction": (
        "preferences",
        {"instruction": "Hi", "input": "you", "chosen": [assistant("a")], "rejected": [assistant("b")]},
        PreferencePair("\n\nHuman: Hi\n\nyou\n\nAssistant:", " a", " b"),
    ),
    "a label as text": (
        "labels",
        {"prompt": "p", "completion": " c", "label": " False"},
        LabelledCompletion("p", " c", False),
    ),
    "demonstration": ("demonstrations", {"prompt": "p", "completion": " c"}, Demonstration("p", " c")),
    "demonstration of messages": (
        "demonstrations",
        {"prompt": [user("Hi")], "completion": [assistant("Hello")]},
        Demonstration(HUMAN_AND_TURN, " Hello"),
    ),
    "demonstration of an instruction": (
        "demonstrations",
        {"instruction": "Add.", "input": "1, 2", "output": "3"},
        Demonstration("### Instruction:\nAdd.\n\n### Input:\n1, 2\n\n### Response:\n", "3"),
    ),
    "demonstration of a whole chat": (
        "demonstrations",
        {"messages": [*TALK, assistant("See you.")]},
        Demonstration(TALKED, " See you."),
    ),
    "demonstration of a text": ("demonstrations", {"text": " A film. "}, Demonstration("", " A film. ")),
    "demonstration of a pair": ("demonstrations", PAIR, Demonstration("The film was", " good.")),
    "demonstration of transcripts": (
        "demonstrations",
        {"chosen": TALKED + " See you.", "rejected": TALKED + " Stay."},
        Demonstration(TALKED, " See you."),
    ),
    "chosen before output": (
        "demonstrations",
        {"instruction": "Add.", "output": "3", "chosen": "4", "rejected": "5", "text": "6"},
        Demonstration("### Instruction:\nAdd.\n\n### Response:\n", "4"),
    ),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_what_a_row_becomes(name):
    """Every format of the module's docstring, against texts written by hand; the row itself is not altered.
    Fails if a template changes by one space, a completion is stripped, or columns are mixed up."""
    kind, row, expected = GOLDEN[name]
    before = json.dumps(row)
    parsed = one(kind, row)
    assert parsed == expected and type(parsed) is type(expected)
    assert json.dumps(row) == before
    if kind == "labels":
        assert type(parsed.label) is bool


@pytest.mark.parametrize(
    "name, field",
    [
        ("demonstration", "completion"),
        ("chosen before output", "chosen"),
        ("demonstration of a pair", "chosen"),
        ("demonstration of a whole chat", "messages"),
        ("demonstration of a text", "text"),
        ("ranking", "responses"),
        ("texts", "chosen"),
    ],
)
def test_the_data_set_says_which_column_it_took(name, field):
    """Fails if a user who trains on "output" is told "chosen"."""
    kind, row, _ = GOLDEN[name]
    assert dataset_from_rows([row], "toy", kind).field == field


@pytest.mark.parametrize("count", [2, 3, 4])
def test_the_best_response_comes_first_in_every_order(count):
    """However a file orders K responses, rank 1 comes first and rank K last.
    Fails if a ranking is read as a list of positions (its inverse), which agree for two responses only."""
    names = [f"rank {rank}" for rank in range(1, count + 1)]
    for ranks in permutations(range(1, count + 1)):
        row = {"prompt": "p", "responses": [names[rank - 1] for rank in ranks], "ranking": list(ranks)}
        assert one("rankings", row).responses == tuple(names)


# ---------------------------------------------------------------------------------------------- containers


def as_columns(rows, **options) -> bytes:
    return json.dumps({name: [row[name] for row in rows] for name in rows[0]}, **options).encode()


def as_lines(rows, end="\n", **options) -> bytes:
    return "".join(json.dumps(row, **options) + end for row in rows).encode()


CONTAINERS = {
    "list": lambda rows: json.dumps(rows).encode(),
    "list set out, with a byte-order mark": lambda rows: (
        b"\xef\xbb\xbf" + json.dumps(rows, indent=1).encode()
    ),
    "lines": as_lines,
    "lines in plain UTF-8": lambda rows: as_lines(rows, ensure_ascii=False),
    "lines of Windows": lambda rows: b"\xef\xbb\xbf" + as_lines(rows, end="\r\n", ensure_ascii=False),
    "lines without a last end": lambda rows: as_lines(rows).rstrip(b"\n"),
    "columns": as_columns,
    "columns set out": lambda rows: as_columns(rows, indent=2, ensure_ascii=False),
}
CONTAINERS |= {
    f"{name}, gzipped": lambda rows, w=writer: gzip.compress(w(rows), 1)
    for name, writer in CONTAINERS.items()
}

ODD = 'a \n\r\t\v\f\0\x1c\x85\u2028\u2029\ufeff"\\/é字🙂'
texts = st.text(st.sampled_from(ODD) | st.characters(codec="utf-8"), max_size=8)
answers = texts.filter(str.strip)


@st.composite
def pairs(draw) -> dict:
    row = {"prompt": draw(texts), "chosen": draw(answers), "rejected": draw(answers)}
    assume(row["chosen"] != row["rejected"])
    return row


@given(rows=st.lists(pairs(), min_size=1, max_size=4), container=st.sampled_from(sorted(CONTAINERS)))
@example(
    rows=[{"prompt": "a" + ODD, "chosen": "b" + ODD, "rejected": "c" + ODD}] * 2,
    container="lines in plain UTF-8",
)
def test_rows_come_back_from_every_container(rows, container):
    """Write rows, read them: the same texts in the same order, each with its place, whatever they hold.
    Fails if a text's U+2028, U+0085 or form feed ends a line, a byte-order mark stays, or columns mix."""
    expected = [PreferencePair(**row) for row in rows]
    assume(not any(repeats(pair) for pair in expected))  # most of them would be refused, as below
    with tempfile.TemporaryDirectory() as folder:
        path = written(folder, "pairs.data", CONTAINERS[container](rows))
        dataset = load_dataset(path, "preferences")
        assert load_preferences(str(path)) == dataset.rows
    unit = "line" if "lines" in container else "row"
    assert dataset.rows == expected and dataset.skipped == []
    assert dataset.places == [f"{path}, {unit} {number}" for number in range(1, len(rows) + 1)]


@given(
    beginning=st.lists(
        st.sampled_from(["\n\nHuman: q", "\n\nAssistant: a", "\n\nAssistant:", " \n"]), max_size=4
    ),
    ends=st.tuples(
        *2 * [st.lists(st.sampled_from(["\n\nHuman: q", "\n\nAssistant:", " a", "b"]), max_size=4)]
    ),
)
def test_transcripts_are_split_without_loss(beginning, ends):
    """Prompt and completion make up the transcript; the prompt is a common beginning that ends with the last
    common "\\n\\nAssistant:", found here by comparing character by character.
    Fails if the split is taken from one transcript alone, or a character is lost or doubled."""
    turn = "\n\nAssistant:"
    chosen, rejected = ("".join([*beginning, turn, *end]) for end in ends)
    common = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(chosen, rejected)))
    end = chosen[:common].rindex(turn) + len(turn)
    assume(chosen != rejected and chosen[end:].strip() and rejected[end:].strip())
    pair = one("preferences", {"chosen": chosen, "rejected": rejected})
    assert pair == (chosen[:end], chosen[end:], rejected[end:])


@given(
    before=st.lists(st.tuples(st.sampled_from(["user", "assistant", "system"]), texts), max_size=3),
    last=texts,
    answers=st.tuples(answers, answers),
)
def test_three_ways_to_write_a_chat_agree(before, last, answers):
    """A chat with its prompt apart, with a prompt that is repeated, and as one text: the same pair of texts.
    Fails if the two renderings differ by a space."""
    assume(answers[0] != answers[1] and not any("\n\nAssistant:" in text for text in answers))
    prompt = [{"role": role, "content": content} for role, content in before] + [user(last)]
    chosen, rejected = ([assistant(answer)] for answer in answers)
    apart = one("preferences", {"prompt": prompt, "chosen": chosen, "rejected": rejected})
    assert apart == one(
        "preferences", {"prompt": prompt, "chosen": prompt + chosen, "rejected": prompt + rejected}
    )
    assert apart == one("preferences", {"chosen": prompt + chosen, "rejected": prompt + rejected})
    whole = {"chosen": apart.prompt + apart.chosen, "rejected": apart.prompt + apart.rejected}
    assert apart == one("preferences", whole)


def test_blank_lines_count_as_lines(tmp_path):
    """Fails if the place is the number of the row where an editor shows the number of the line."""
    path = written(tmp_path, "gaps.jsonl", b"\n" + as_lines([PAIR]) + b" \r\n\n" + as_lines([OTHER]))
    assert [place.rpartition(", ")[2] for place in load_dataset(path, "preferences").places] == [
        "line 2",
        "line 5",
    ]


@pytest.mark.parametrize("row", [GOLDEN["transcripts as messages"][1], GOLDEN["messages"][1]])
def test_one_line_of_messages_is_a_row_and_not_columns(tmp_path, row):
    """A row of chat messages looks like columns, because its fields are lists of equal length.
    Fails if it is taken for them; the same messages in true columns are two rows."""
    assert load_preferences(written(tmp_path, "chat.jsonl", [row])) == [one("preferences", row)]
    columns = {name: [value, value] for name, value in row.items()}
    path = written(tmp_path, "columns.json", json.dumps(columns).encode())
    assert load_preferences(path) == [one("preferences", row)] * 2


# ------------------------------------------------------------------------------------------------ bad rows


def altered(kind, **changes) -> dict:
    """A good row of this kind with some fields changed, or deleted by an ellipsis."""
    good = {
        "preferences": PAIR,
        "rankings": {"prompt": "p", "responses": ["a", "b", "c"], "ranking": [2, 1, 3]},
        "labels": {"prompt": "p", "completion": "c", "label": True},
        "demonstrations": {"prompt": "p", "completion": "c"},
    }[kind]
    return {name: value for name, value in (good | changes).items() if value is not ...}


CHAT = {"prompt": [user("Hi")], "chosen": [assistant("a")], "rejected": [assistant("b")]}
TASK = {"instruction": "i", "chosen": "a", "rejected": "b"}
P, R, L, D = KINDS
BAD_ROWS = {
    # name: (kind, row, field, words of the message)
    "missing column": (P, altered(P, rejected=...), "rejected", ["missing", "'prompt', 'chosen'"]),
    "no fields": (P, {}, "chosen", ["missing", "none"]),
    "no prompt": (L, altered(L, prompt=...), "prompt", ["missing", "'completion', 'label'"]),
    "a row of rankings": (P, altered(R), "chosen", ["rankings"]),
    "a row of labels": (P, altered(L), "chosen", ["labels"]),
    "a pair for a ranking": (R, altered(P), "responses", ["missing", "pair of chosen and rejected"]),
    "a list": (P, [1], None, ["object", "a list"]),
    "a text": (P, "row", None, ["object", "text"]),
    "null": (P, None, None, ["object", "null"]),
    "prompt a number": (P, altered(P, prompt=3), "prompt", ["text", "a number"]),
    "prompt null": (P, altered(P, prompt=None), "prompt", ["text", "null"]),
    "chosen null": (P, altered(P, chosen=None), "chosen", ["text", "null"]),
    "chosen NaN": (P, altered(P, chosen=float("nan")), "chosen", ["text", "NaN"]),
    "rejected true": (P, altered(P, rejected=True), "rejected", ["text", "true or false"]),
    "rejected an object": (P, altered(P, rejected={}), "rejected", ["text", "an object"]),
    "empty chosen": (P, altered(P, chosen=""), "chosen", ["empty"]),
    "rejected of whitespace": (P, altered(P, rejected=" \n\t\u2028"), "rejected", ["empty"]),
    "identical": (P, altered(P, rejected=" good."), "rejected", ["same as chosen", "delete the row"]),
    "lone surrogate": (P, altered(P, chosen="\ud83d"), "chosen", ["surrogate"]),
    "lone surrogate in a prompt": (P, altered(P, prompt="a\udc00"), "prompt", ["surrogate"]),
    "lone surrogate in a name": (P, {"\ud800": 1}, "chosen", ["missing"]),
    "input a number": (P, TASK | {"input": 0}, "input", ["text"]),
    "instruction null": (P, TASK | {"instruction": None}, "instruction", ["null"]),
    "transcripts without a turn": (P, altered(P, prompt=...), "chosen", ["Assistant", "'prompt'"]),
    "transcripts of two talks": (
        P, {"chosen": "\n\nHuman: a\n\nAssistant: x", "rejected": "\n\nHuman: b\n\nAssistant: x"}, "chosen",
        ["Assistant", "'prompt'"],
    ),
    "transcript without an answer": (
        P, {"chosen": TALKED + " a", "rejected": TALKED}, "rejected", ["empty"],
    ),
    "identical transcripts": (P, {"chosen": TALKED + " a", "rejected": TALKED + " a"}, "rejected", ["same"]),
    "transcript null": (P, {"chosen": None, "rejected": TALKED}, "chosen", ["text", "null"]),
    "content null": (P, CHAT | {"chosen": [assistant(None)]}, "chosen", ["content of message 1", "null"]),
    "content in parts, one an image": (
        P, CHAT | {"prompt": [user([{"type": "image_url", "image_url": "x"}])]}, "prompt",
        ["message 1", "'image_url'"],
    ),
    "content a lone surrogate": (P, CHAT | {"prompt": [user("\ud800")]}, "prompt", ["surrogate"]),
    "content empty": (P, CHAT | {"rejected": [assistant(" ")]}, "rejected", ["empty"]),
    "no messages": (P, CHAT | {"prompt": []}, "prompt", ["message"]),
    "no answering messages": (P, CHAT | {"chosen": []}, "chosen", ["message"]),
    "answer null": (P, CHAT | {"chosen": None}, "chosen", ["message"]),
    "message a text": (P, CHAT | {"chosen": ["Hello"]}, "chosen", ["part 1", "role"]),
    "message without a role": (P, CHAT | {"prompt": [user("a"), {"content": "b"}]}, "prompt", ["part 2"]),
    "message of a tool": (
        P, CHAT | {"prompt": [{"role": "tool", "content": "b"}]}, "prompt",
        ["message 1", "'tool'", "leave the row out"],
    ),
    "role a list": (P, CHAT | {"prompt": [{"role": [], "content": "b"}]}, "prompt", ["message 1", "a list"]),
    "answered by the user": (P, CHAT | {"chosen": [user("b")]}, "chosen", ["assistant"]),
    "only the prompt": (P, CHAT | {"chosen": CHAT["prompt"]}, "chosen", ["assistant"]),
    "prompt ends with an answer": (
        P, CHAT | {"prompt": [user("a"), assistant("b")]}, "chosen", ["'prompt' ends", "delete"],
    ),
    "messages after another prompt": (
        P, CHAT | {"prompt": "Ho", "chosen": [user("Hi"), assistant("a")]}, "chosen", ["assistant", "prompt"],
    ),
    "all responses tied": (R, altered(R, ranking=[1, 1, 1]), "ranking", ["same rank"]),
    "ranks from 0": (R, altered(R, ranking=[0, 1, 2]), "ranking", ["each of 3", "add 1"]),
    "too few ranks": (R, altered(R, ranking=[1, 2]), "ranking", ["each of 3"]),
    "too many ranks": (R, altered(R, ranking=[1, 2, 3, 4]), "ranking", ["each of 3"]),
    "rank true": (R, altered(R, ranking=[True, 2, 3]), "ranking", ["each of 3"]),
    "rank a fraction": (R, altered(R, ranking=[1.5, 2, 3]), "ranking", ["each of 3"]),
    "ranking null": (R, altered(R, ranking=None), "ranking", ["each of 3"]),
    "one response": (R, altered(R, responses=["a"], ranking=[1]), "responses", ["two"]),
    "responses a text": (R, altered(R, responses="ab", ranking=[1, 2]), "responses", ["list"]),
    "a response null": (R, altered(R, responses=["a", None, "c"]), "responses", ["text", "null"]),
    "a response empty": (R, altered(R, responses=["a", "", "c"]), "responses", ["empty"]),
    "a response twice": (R, altered(R, responses=["a", "b", "a"]), "responses", ["twice"]),
    "label a text": (L, altered(L, label="yes"), "label", ["true (good)"]),
    "label a half": (L, altered(L, label=0.5), "label", ["true (good)"]),
    "label 2": (L, altered(L, label=2), "label", ["true (good)"]),
    "label null": (L, altered(L, label=None), "label", ["true (good)"]),
    "label a list": (L, altered(L, label=[1]), "label", ["true (good)"]),
    "label NaN": (L, altered(L, label=float("nan")), "label", ["true (good)"]),
    "label missing": (L, altered(L, label=...), "label", ["missing"]),
    "completion empty": (L, altered(L, completion=""), "completion", ["empty"]),
    "nothing to imitate": (D, {"prompt": "p"}, "completion", ["missing", "'prompt'"]),
    "output null": (D, {"instruction": "i", "output": None}, "output", ["text", "null"]),
    "text empty": (D, {"text": "\n"}, "text", ["empty"]),
    "text a list": (D, {"text": ["a"]}, "text", ["text", "a list"]),
    "messages null": (D, {"messages": None}, "messages", ["list"]),
    "messages an object": (D, {"messages": {}}, "messages", ["messages with"]),
    "messages end with the user": (D, {"messages": TALK}, "messages", ["assistant"]),
    "last message empty": (D, {"messages": [user("a"), assistant("")]}, "messages", ["empty"]),
    "pair without rejected": (D, altered(P, rejected=...), "rejected", ["missing"]),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_ROWS)
def test_a_bad_row_is_named_or_skipped(tmp_path, name):
    """Between two good rows, a bad one is refused with its file, place and field; with skip_bad_rows it alone
    is left out, and listed with the same sentence. The file may be JSON lines, a list, or rows in memory.
    Fails if a bad row passes, ends in another exception, or takes a good one with it."""
    kind, bad, field, words = BAD_ROWS[name]
    good = altered(kind) if field not in ("messages", "text", "output") else {field: "a"}
    good = {"output": good | {"prompt": "p"}, "messages": {"messages": [assistant("a")]}}.get(field, good)
    good = altered(P) if name == "pair without rejected" else good
    rows = [good, bad, good]
    lines, listed = tmp_path / "rows.jsonl", tmp_path / "rows.json"
    lines.write_bytes(as_lines(rows))
    listed.write_bytes(json.dumps(rows, indent=1).encode())
    for place, call in (
        (f"{lines}, line", lambda **options: load_dataset(lines, kind, **options)),
        (f"{listed}, row", lambda **options: load_dataset(listed, kind, **options)),
        ("memory, row", lambda **options: dataset_from_rows(rows, "memory", kind, **options)),
    ):
        message = sentence(call, *words)
        assert message.startswith(f"{place} 2, field {field!r}: " if field else f"{place} 2: ")
        dataset = call(skip_bad_rows=True)
        assert dataset.rows == dataset_from_rows([good, good], "good", kind).rows
        assert dataset.places == [f"{place} 1", f"{place} 3"] and dataset.skipped == [message]


BAD_LINES = {
    "cut off": (b'{"prompt": "a', ["not JSON", "column 12"]),
    "two rows": (as_lines([PAIR, PAIR], end=" "), ["not JSON", "Extra data"]),
    "not JSON": (b"prompt and chosen", ["not JSON", "column 1"]),
    "not UTF-8": ('{"prompt": "é"}'.encode("latin-1"), ["UTF-8"]),
    "nested too deeply": (b'{"a":' * 100_000, ["nested"]),
    "too many digits": (b'{"a": ' + b"1" * 5000 + b"}", ["digits"]),
    "a number": (b"1.5", ["object", "a number"]),
    "a literal surrogate": (b'{"prompt": "\xed\xa0\x80"}', ["UTF-8"]),
}


@pytest.mark.parametrize("name", BAD_LINES)
def test_a_damaged_line_is_named_or_skipped(tmp_path, name):
    """Fails if a line that cannot be parsed ends the reading of the others, or is named by another number."""
    bad, words = BAD_LINES[name]
    path = written(tmp_path, "rows.jsonl", as_lines([PAIR]) + b"\n" + bad + b"\n" + as_lines([OTHER]))
    message = sentence(lambda: load_dataset(path, P), f"{path}, line 3", *words)
    dataset = load_dataset(path, P, skip_bad_rows=True)
    assert dataset.rows == [PreferencePair(**PAIR), PreferencePair(**OTHER)] and dataset.skipped == [message]
    if name == "two rows":  # which are a file of two rows where they stand alone
        return
    alone = written(tmp_path, "alone.jsonl", bad)
    sentence(lambda: load_dataset(alone, P), str(alone), *words)


def test_not_a_number_matters_only_where_it_is_read(tmp_path):
    """Data frames write NaN, which strict JSON lacks: in a further column it is as good as anything.
    Fails if such a file is refused, or NaN becomes the text "nan"."""
    path = written(tmp_path, "frame.jsonl", [PAIR | {"score": float("nan")}])
    assert b"NaN" in path.read_bytes() and load_preferences(path) == [PreferencePair(**PAIR)]
    path = written(tmp_path, "bad.json", b'[{"prompt": NaN, "chosen": "a", "rejected": "b"}]')
    sentence(lambda: load_preferences(path), f"{path}, row 1, field 'prompt'", "NaN")


def test_rows_of_two_kinds(tmp_path):
    """Demonstrations of which some are outputs and some completions: the second sort is refused or left out.
    Fails if "completions from 'output'" is said of rows that are not."""
    path = written(
        tmp_path, "mixed.jsonl", [{"text": "a"}, {"prompt": "p", "completion": "c"}, {"text": "b"}]
    )
    message = sentence(
        lambda: load_dataset(path, D), f"{path}, line 2, field 'completion'", "'text'", "alike"
    )
    dataset = load_dataset(path, D, skip_bad_rows=True)
    assert dataset.rows == [Demonstration("", "a"), Demonstration("", "b")] and dataset.skipped == [message]
    assert dataset.field == "text"


def test_all_rows_bad(tmp_path):
    """Fails if skipping every row leaves an empty data set, or the count or the first reason is not said."""
    path = written(tmp_path, "bad.jsonl", [altered(P, chosen=""), altered(P, rejected=3)])
    call = lambda: load_dataset(path, P, skip_bad_rows=True)  # noqa: E731
    sentence(call, "no row is left", "all 2 are bad", f"{path}, line 1, field 'chosen'")
    sentence(lambda: dataset_from_rows([], "nothing", P), "nothing", "no row")


@pytest.mark.parametrize("kind", ["preference", "", "sft"])
def test_unknown_kind(kind):
    """Fails if a misspelt kind ends in a KeyError or the remedy does not list the right ones."""
    sentence(lambda: dataset_from_rows([PAIR], "toy", kind), repr(kind), *KINDS)


# ----------------------------------------------------------------------------------------------- bad files

GZIPPED = gzip.compress(as_lines([PAIR] * 100))
DEFLATE_DAMAGED = GZIPPED[:30] + bytes(byte ^ 255 for byte in GZIPPED[30:40]) + GZIPPED[40:]
WRONG_SUM = GZIPPED[:-8] + bytes([GZIPPED[-8] ^ 1]) + GZIPPED[-7:]
BAD_FILES = {
    "empty": (b"", ["empty"]),
    "whitespace": (b" \r\n\n", ["empty"]),
    "only a byte-order mark": (b"\xef\xbb\xbf", ["empty"]),
    "empty, gzipped": (gzip.compress(b""), ["empty"]),
    "empty list": (b"[ ]", ["empty list"]),
    "empty columns": (b'{"prompt": [], "chosen": [], "rejected": []}', ["empty list"]),
    "unequal columns": (
        b'{"prompt": ["a", "b"], "chosen": ["c", "d"], "rejected": ["e"]}',
        ["field 'rejected'", "1 entries", "2", "equally long"],
    ),
    "list cut off": (json.dumps([PAIR, OTHER], indent=1).encode()[:-9], ["line 10", "not JSON"]),
    "columns cut off": (as_columns([PAIR, OTHER])[:-9], ["not JSON"]),
    "list not UTF-8": (json.dumps([PAIR], indent=1).encode() + b"\n\xff", ["line 8", "UTF-8"]),
    "list nested too deeply": (b"[" * 100_000, ["nested"]),
    "in UTF-16": (json.dumps([PAIR]).encode("utf-16"), ["UTF-8"]),
    "gzip cut off": (GZIPPED[:-20], ["gzip"]),
    "gzip cut off in its head": (GZIPPED[:5], ["gzip"]),
    "gzip cut off after its magic": (GZIPPED[:2], ["gzip"]),
    "gzip without its sum": (GZIPPED[:-8], ["gzip"]),
    "gzip with a wrong sum": (WRONG_SUM, ["gzip"]),
    "gzip with altered bytes": (DEFLATE_DAMAGED, ["gzip"]),
    "gzip with bytes behind": (GZIPPED + b"{}", ["gzip"]),
}


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_file_is_named(tmp_path, name, skip):
    """What is wrong with a whole file cannot be skipped.
    Fails if half a file is read as if it were all, or another exception than InputError comes through."""
    content, words = BAD_FILES[name]
    path = written(tmp_path, "file.json", content)
    sentence(lambda: load_dataset(path, P, skip_bad_rows=skip), str(path), *words)


COLUMNS = "prompt chosen rejected instruction input output completion label responses ranking messages text"
names = st.sampled_from([*COLUMNS.split(), "role", "content"])
leaves = (
    st.none() | st.booleans() | st.integers(0, 3) | st.floats() | st.sampled_from(["", "a", "user", "\ud800"])
)
anything = st.recursive(
    leaves,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=4),
    max_leaves=12,
)


@given(row=st.dictionaries(names, anything, max_size=6), kind=st.sampled_from(KINDS))
@settings(max_examples=150)
def test_any_row_is_read_or_refused(row, kind):
    """Whatever JSON stands in the columns, there are rows of text or one sentence, never another exception.
    Fails if a null, a list or an object reaches code that takes it for text."""
    try:
        parsed = one(kind, row)
    except InputError as error:
        assert str(error).endswith(".") and "\n" not in str(error)
        return
    for text in (parsed.prompt, *getattr(parsed, "responses", parsed[1:])):
        assert isinstance(text, str | bool)


@given(
    content=st.binary(max_size=12) | st.text('[]{}"ab:,1\n ', max_size=12).map(str.encode),
    zipped=st.booleans(),
)
@settings(max_examples=100)
def test_any_bytes_are_refused(content, zipped):
    """A dozen bytes hold no row. Fails if some of them pass, or end in another exception than InputError."""
    with tempfile.TemporaryDirectory() as folder:
        path = written(folder, "any", gzip.compress(content) if zipped else content)
        sentence(lambda: load_dataset(path, P), str(path))


def test_no_file(tmp_path):
    """Fails if a path that cannot be read ends in an OSError."""
    sentence(lambda: load_preferences(tmp_path / "none.json"), str(tmp_path / "none.json"), "no such file")
    sentence(lambda: load_preferences(tmp_path), str(tmp_path), "folder")
    inside = written(tmp_path, "file.json", [PAIR]) / "inside.json"
    sentence(lambda: load_preferences(inside), str(inside), "cannot be read")


# -------------------------------------------------------------------------------------- prompts read twice

REPEATED = {
    "transcripts": (P, {"prompt": TALKED, "chosen": TALKED + " a", "rejected": TALKED + " b"}),
    "transcripts without their first line feeds": (
        P, {"prompt": TALKED.strip(), "chosen": TALKED + " a", "rejected": TALKED + " b"},
    ),
    "the question within transcripts": (
        P, {"prompt": "Hi", "chosen": HUMAN_AND_TURN + " a", "rejected": HUMAN_AND_TURN + " b"},
    ),
    "texts": (P, {"prompt": "Q: one?\nA:", "chosen": "Q: one?\nA: 1", "rejected": "Q: one?\nA: 2"}),
    "text transcripts after messages": (
        P, {"prompt": [user("Hi")], "chosen": HUMAN_AND_TURN + " a", "rejected": HUMAN_AND_TURN + " b"},
    ),
    "responses": (R, {"prompt": "Say:", "responses": ["Say: a", "Say: b"], "ranking": [1, 2]}),
    "labelled": (L, {"prompt": "Say:", "completion": "Say: a", "label": True}),
    "demonstrated": (D, {"prompt": "Say:", "completion": "Say: a"}),
}  # fmt: skip


@pytest.mark.parametrize("name", REPEATED)
@pytest.mark.parametrize("skip", [False, True])
def test_a_file_whose_completions_repeat_the_prompt_is_refused(name, skip):
    """Whole transcripts beside their prompt would give the model each prompt twice, in silence. One row in
    two may be chance: the texts are then right as they stand. Fails if the prompt is doubled in most rows,
    or if a single such row spoils a file."""
    kind, row = REPEATED[name]
    good = altered(kind)
    rows = [row, good, row]
    sentence(
        lambda: dataset_from_rows(rows, "export", kind, skip_bad_rows=skip), "export: in 2 of 3 rows", "twice"
    )
    kept = dataset_from_rows([row, good], "chance", kind).rows
    assert len(kept) == 2 and kept[0] == data._PARSERS[kind](files.Row("row", row))[0]


def test_only_one_completion_begins_like_the_prompt():
    """Fails if the check looks at the chosen completion alone, or at rows without a prompt."""
    half = {"prompt": "The", "chosen": "The end.", "rejected": "No."}
    assert one(P, half) == PreferencePair(**half)
    assert one(P, {"prompt": " ", "chosen": " a", "rejected": " b"}) == (" ", " a", " b")
    assert one(D, {"text": "a"}) == Demonstration("", "a")


# ----------------------------------------------------------------------------------------------- real data


def shared_file(name: str) -> Path:
    path = SHARED / "data" / name
    if not path.is_file():
        pytest.skip(f"no {name} beside the repository")
    return path


def test_real_instruction_preferences():
    """900 rows, of which 6 have identical answers: refused, or left out and listed. As demonstrations the
    same rows give all 900 "chosen", and it is said that "output" is not read.
    Fails if the count, the templates or the order change."""
    path = shared_file("instruction_preferences.json")
    raw = json.loads(path.read_text(encoding="utf-8"))
    same = [number for number, row in enumerate(raw, start=1) if row["chosen"] == row["rejected"]]
    first = sentence(lambda: load_preferences(path), f"{path}, row {same[0]}, field 'rejected'")
    dataset = load_dataset(path, P, skip_bad_rows=True)
    assert len(raw) == 900 and len(same) == 6 and len(dataset.rows) == 894 and dataset.skipped[0] == first
    assert [text.partition(", field")[0] for text in dataset.skipped] == [f"{path}, row {n}" for n in same]
    kept = [row for row in raw if row["chosen"] != row["rejected"]]
    demonstrations = load_dataset(path, D)
    assert (demonstrations.field, demonstrations.unread) == ("chosen", ["output"])
    assert len(demonstrations.rows) == 900
    for row, pair in zip(kept, dataset.rows):
        assert (pair.chosen, pair.rejected) == (row["chosen"], row["rejected"])
        middle = f"### Input:\n{row['input']}\n\n" if row["input"] else ""
        assert pair.prompt == f"### Instruction:\n{row['instruction']}\n\n{middle}### Response:\n"
    assert [row.completion for row in demonstrations.rows] == [row["chosen"] for row in raw]


def test_real_rows_in_every_container(tmp_path):
    """Fails if a container changes real texts."""
    raw = json.loads(shared_file("instruction_preferences.json").read_text(encoding="utf-8"))
    rows = [row for row in raw if row["chosen"] != row["rejected"]]
    expected = dataset_from_rows(rows, "memory", P).rows
    for container, writer in CONTAINERS.items():
        assert load_preferences(written(tmp_path, container, writer(rows))) == expected


def test_real_tables_are_refused():
    """A table without names of columns. Fails if it is read as anything, or what was read is not shown."""
    path = shared_file("movie_reviews.tsv")
    sentence(lambda: load_dataset(path, D), f"{path}, line 2, field 'completion'", "there are '1'")


# ------------------------------------------------------------------------------------------- planted bugs


def bad_row(name):
    with tempfile.TemporaryDirectory() as folder:
        test_a_bad_row_is_named_or_skipped(Path(folder), name)


def bad_file(name):
    with tempfile.TemporaryDirectory() as folder:
        test_a_bad_file_is_named(Path(folder), name, False)


MUTANTS = {
    "prompt split from the chosen transcript alone": (
        messages.shared_text, "for text in texts)", "for text in texts[:1])",
        test_what_a_row_becomes, "transcripts that part in the human's words",
    ),
    "rejected sliced one character late": (
        forms._finished, "[text[start:] for text in texts]", "[text[start + 1 :] for text in texts]",
        test_what_a_row_becomes, "transcripts",
    ),
    "ranking read as positions": (
        forms.ranking_of, "numbers.index(rank)] for rank in distinct", "int(rank) - 1] for rank in numbers",
        test_the_best_response_comes_first_in_every_order, 3,
    ),
    "lines split at other line ends": (
        files._rows_of_lines, "io.BytesIO(data)", "map(str.encode, data.decode().splitlines())",
        test_rows_come_back_from_every_container,
    ),
    "completions stripped": (
        forms._finished, "*texts]", "*map(str.strip, texts)]", test_what_a_row_becomes, "whitespace is kept",
    ),
    "no space before a chat's answer": (
        forms._talk, "removeprefix(TURN)", 'removeprefix(TURN + " ")', test_what_a_row_becomes, "messages",
    ),
    "a tied response kept": (
        forms.ranking_of, "for rank in distinct", "for rank in numbers",
        test_what_a_row_becomes, "tied ranks",
    ),
    "identical answers accepted": (
        data._preference, "chosen == rejected", "False", bad_row, "identical",
    ),
    "any truth accepted": (
        forms.label_of, 'label not in ("1", "0", "true", "false")', "not label", bad_row, "label a text",
    ),
    "columns cut to the shortest": (
        files._rows_of_columns, "other != length", "other > length", bad_file, "unequal columns",
    ),
    "skipped rows not listed": (
        data._dataset, "skipped.append(str(error))", "pass", bad_row, "empty chosen",
    ),
    "prompt doubled": (
        forms._note_repeats, "text.startswith(prompt)", "text == prompt",
        test_a_file_whose_completions_repeat_the_prompt_is_refused, "texts", False,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTANTS)
def test_planted_bug_is_caught(monkeypatch, name):
    """The guard passes as things stand and fails with the bug."""
    function, right, wrong, guard, *arguments = MUTANTS[name]
    plant(monkeypatch, function, right, wrong)
    with pytest.raises(CAUGHT):
        guard(*arguments)
