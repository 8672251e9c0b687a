"""The forms in which people bring rows: each read as its README says, or refused with what leads on.

The rows are our own; the forms are those of public data sets and tools.
"""

import gzip
import json
import pickle
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from planting import CAUGHT, plant

from dpo_minimal.text import audit, data, files, forms, messages
from dpo_minimal.text.audit import FINDINGS
from dpo_minimal.text.data import (
    Demonstration,
    LabelledCompletion,
    PreferencePair,
    Ranking,
    dataset_from_rows,
    load_dataset,
)
from dpo_minimal.validation import InputError

README = Path(forms.__file__).with_name("README.md").read_text(encoding="utf-8")
ASKED = "\n\nHuman: Which?\n\nAssistant:"
PAIR = PreferencePair("Which?", " This.", " That.")
ANSWERS = {"chosen": " This.", "rejected": " That."}
NAN = float("nan")
TURN = "\n\nAssistant: x"


def read(row, kind="preferences"):
    """The only row of a data set."""
    return dataset_from_rows([row], "toy", kind).rows[0]


def refused(call, *named) -> str:
    """The one sentence, of 400 characters at most, that `call` raises, and that names all of `named`."""
    with pytest.raises(InputError) as caught:
        call()
    message = str(caught.value)
    assert message.endswith(".") and "\n" not in message and len(message) <= 400, message
    for part in named:
        assert part in message, message
    return message


def said(**turns) -> list[dict]:
    return [{"role": role, "content": content} for role, content in turns.items()]


# ---------------------------------------------------------------------------------- forms

FORMS = {
    "names of the answers": (
        {"question": "Which?", "chosen_response": " This.", "rejected_response": " That."},
        PAIR,
    ),
    "human_ref_A is better": (
        {"history": "Which?", "human_ref_A": " This.", "human_ref_B": " That.", "labels": 1},
        PAIR,
    ),
    "human_ref_B is better": (
        {"history": "Which?", "human_ref_A": " That.", "human_ref_B": " This.", "labels": "0"},
        PAIR,
    ),
    "response_1 is better": (
        {
            "prompt": "Which?",
            "response_0": " That.",
            "response_1": " This.",
            "better_response_id": 1,
            "safer_response_id": 0,
        },
        PAIR,
    ),
    "model_b won": (
        {"prompt": "Which?", "response_a": " That.", "response_b": " This.", "winner": "model_b"},
        PAIR,
    ),
    "preferred_output": (
        {
            "input": {"messages": said(user="Which?"), "tools": [], "parallel_tool_calls": True},
            "preferred_output": said(assistant="This."),
            "non_preferred_output": said(assistant="That."),
        },
        PreferencePair(ASKED, " This.", " That."),
    ),
    "conversations of from and value": (
        {
            "conversations": [{"from": "human", "value": "Which?"}],
            "chosen": {"from": "gpt", "value": "This."},
            "rejected": {"from": "gpt", "value": "That."},
        },
        PreferencePair(ASKED, " This.", " That."),
    ),
    "messages that ask": (
        {"messages": said(user="Which?"), "chosen": "This.", "rejected": "That."},
        PreferencePair(ASKED, " This.", " That."),
    ),
    "messages that repeat the chosen answer": (
        {
            "messages": said(user="Which?", assistant="This."),
            "chosen": said(user="Which?", assistant="This."),
            "rejected": said(user="Which?", assistant="That."),
        },
        PreferencePair(ASKED, " This.", " That."),
    ),
    "roles in capitals": (
        {
            "chosen": said(Human="Which?", Assistant="This."),
            "rejected": said(Human="Which?", Assistant="That."),
        },
        PreferencePair(ASKED, " This.", " That."),
    ),
    "a system's text before a text": (
        {"system": "Be brief.", "question": "Which?", **ANSWERS},
        PreferencePair("Be brief.\n\nWhich?", " This.", " That."),
    ),
    "a system's text in two columns": (
        {"system": "Be brief.", "system_prompt": "Be brief.", "question": "Which?", **ANSWERS},
        PreferencePair("Be brief.\n\nWhich?", " This.", " That."),
    ),
    "an empty system's text": ({"system": "", "question": "Which?", **ANSWERS}, PAIR),
    "a context before a text": (
        {"context": ["One.", "Two."], "prompt": "Which?", **ANSWERS},
        PreferencePair("One.\n\nTwo.\n\nWhich?", " This.", " That."),
    ),
    "a context that is the prompt": ({"context": "Which?", **ANSWERS}, PAIR),
    "a system's text before messages": (
        {"system_prompt": "Be brief.", "prompt": said(user="Which?"), "chosen": "This.", "rejected": "That."},
        PreferencePair(f"\n\nSystem: Be brief.{ASKED}", " This.", " That."),
    ),
    "a system's text before transcripts": (
        {"system": "Be brief.", "chosen": f"{ASKED} This.", "rejected": f"{ASKED} That."},
        PreferencePair(f"\n\nSystem: Be brief.{ASKED}", " This.", " That."),
    ),
    "a history before an instruction": (
        {"instruction": "Which?", "input": "", "system": "Be brief.", "history": [["Hi", "Yes?"]], **ANSWERS},
        PreferencePair(
            "Be brief.\n\n### Instruction:\nHi\n\n### Response:\nYes?\n\n### Instruction:\nWhich?\n\n"
            "### Response:\n",
            " This.",
            " That.",
        ),
    ),
    "a history before a text": (
        {"prompt": "Which?", "history": [["Hi", "Yes?"]], "chosen": "This.", "rejected": "That."},
        PreferencePair(f"\n\nHuman: Hi\n\nAssistant: Yes?{ASKED}", " This.", " That."),
    ),
    "a history of messages": (
        {
            "prompt": "Which?",
            "history": said(user="Hi", assistant="Yes?"),
            "chosen": "This.",
            "rejected": "That.",
        },
        PreferencePair(f"\n\nHuman: Hi\n\nAssistant: Yes?{ASKED}", " This.", " That."),
    ),
    "answers with their ranks": (
        {
            "prompt": "Which?",
            "answers": [{"answer": " That.", "rank": 2.0}, {"answer": " This.", "rank": 1.0}],
        },
        Ranking("Which?", (" This.", " That.")),
    ),
    "ranks as in a competition": (
        {"prompt": "Which?", "responses": ["d", "a", "b", "c"], "ranking": [4, 1, 2, 2]},
        Ranking("Which?", ("a", "b", "d")),
    ),
    "kto_tag": (
        {"instruction": "Which?", "input": "", "output": "This.", "kto_tag": True},
        LabelledCompletion("### Instruction:\nWhich?\n\n### Response:\n", "This.", True),
    ),
    "a label of a talk": (
        {"messages": said(user="Which?", assistant="This."), "label": False},
        LabelledCompletion(ASKED, " This.", False),
    ),
    "a conversation": (
        {"conversations": [{"from": "human", "value": "Which?"}, {"from": "gpt", "value": "This."}]},
        Demonstration(ASKED, " This."),
    ),
    "an answer to a question": (
        {"question": "Which?", "answer": " This."},
        Demonstration("Which?", " This."),
    ),
    "conversation_b won": (
        {
            "model_a": "x",
            "winner": "model_b",
            "conversation_a": said(user="Which?", assistant="That."),
            "conversation_b": said(user="Which?", assistant="This."),
        },
        PreferencePair(ASKED, " This.", " That."),
    ),
    "messages and a rejected text": (
        {
            "messages": said(system="Be brief.", user="Which?", assistant="This."),
            "rejected_response": "That.",
        },
        PreferencePair(f"\n\nSystem: Be brief.{ASKED}", " This.", " That."),
    ),
    "messages and rejected messages": (
        {
            "messages": said(user="Which?", assistant="This."),
            "rejected_messages": said(user="Which?", assistant="That."),
        },
        PreferencePair(ASKED, " This.", " That."),
    ),
    "a response and a rejected one": (
        {"query": "Which?", "response": " This.", "rejected_response": " That."},
        PAIR,
    ),
    "a response beside chosen": ({"prompt": "Which?", "response": " This.", **ANSWERS}, PAIR),
    "one conversation": (
        {"conversation": said(user="Which?", assistant="This."), "language": "English"},
        Demonstration(ASKED, " This."),
    ),
    "a system's text that the messages repeat": (
        {
            "system": "Be brief.",
            "prompt": said(system="Be brief.", user="Which?"),
            "chosen": "This.",
            "rejected": "That.",
        },
        PreferencePair(f"\n\nSystem: Be brief.{ASKED}", " This.", " That."),
    ),
    "a system's text that the transcripts repeat": (
        {
            "system": "Be brief.",
            "chosen": f"\n\nSystem: Be brief.{ASKED} This.",
            "rejected": f"\n\nSystem: Be brief.{ASKED} That.",
        },
        PreferencePair(f"\n\nSystem: Be brief.{ASKED}", " This.", " That."),
    ),
    "a history that the messages repeat": (
        {
            "history": [["Hi", "Yes?"]],
            "prompt": "Which?",
            "chosen": said(user="Hi", assistant="Yes?") + said(user="Which?", assistant="This."),
            "rejected": said(user="Hi", assistant="Yes?") + said(user="Which?", assistant="That."),
        },
        PreferencePair(f"\n\nHuman: Hi\n\nAssistant: Yes?{ASKED}", " This.", " That."),
    ),
    "a history before a text to imitate": (
        {"text": "This.", "history": [["Hi", "Yes?"]]},
        Demonstration("\n\nHuman: Hi\n\nAssistant: Yes?", "This."),
    ),
    "a text with a space after messages": (
        {"prompt": said(user="Which?"), **ANSWERS},
        PreferencePair(ASKED, " This.", " That."),
    ),
    "a text beside a talk": (
        {"chosen": said(user="Which?", assistant="This."), "rejected": "That."},
        PreferencePair(ASKED, " This.", " That."),
    ),
    "nothing, as data frames write it": (
        {"prompt": NAN, "question": "Which?", "system": NAN, "history": NAN, "images": NAN, **ANSWERS},
        PreferencePair(ASKED, " This.", " That."),
    ),
    "an input of nothing": (
        {"instruction": "Which?", "input": NAN, "output": "This."},
        Demonstration("### Instruction:\nWhich?\n\n### Response:\n", "This."),
    ),
    "an empty prompt beside a question": ({"prompt": "", "question": "Which?", **ANSWERS}, PAIR),
    "messages that nobody can read beside a prompt": (
        {"prompt": "Which?", "messages": [{"role": "tool", "content": "x"}], **ANSWERS},
        PAIR,
    ),
    "a label of a data frame": (
        {"prompt": "Which?", "completion": " This.", "label": "1.0"},
        LabelledCompletion("Which?", " This.", True),
    ),
    "the best of a ranking": (
        {"prompt": "Which?", "responses": [" That.", " This."], "ranking": [2, 1], "_": 0},
        Ranking("Which?", (" This.", " That.")),
    ),
}
KIND_OF = {
    PreferencePair: "preferences",
    Ranking: "rankings",
    LabelledCompletion: "labels",
    Demonstration: "demonstrations",
}


@pytest.mark.parametrize("name", FORMS)
def test_a_form_is_read(name):
    """Fails if a form is refused, the worse answer is taken for the better, or part of a prompt is lost."""
    row, expected = FORMS[name]
    assert read(row, KIND_OF[type(expected)]) == expected


@pytest.mark.parametrize("name", FORMS)
def test_the_best_answer_of_every_form_can_be_imitated(name):
    """Fails if sft refuses what dpo reads, or imitates another answer than the best."""
    row, expected = FORMS[name]
    if getattr(expected, "label", True) is False:
        refused(lambda: read(row, "demonstrations"), "labelled bad")
        return
    best = data.completions_of(expected)[0]
    assert read(row, "demonstrations") == Demonstration(expected.prompt, best)


def test_the_table_names_every_form():
    """The README's table and the code know the same columns.
    Fails if a form is added to one of them only."""
    table = README[README.index("| kind | columns") : README.index("A row that fits several")]
    shown = set(re.findall(r"`(\w+)`", table))
    known = {name for form in forms.PAIRS for name in (form.first, form.second, form.better) if name}
    known |= {"history", "responses", "ranking", "answers", "text"}
    assert shown == known | {*forms.COMPLETIONS, *forms.LABELS, *forms.TALKS}
    for form in forms.PAIRS:
        if form.better:
            line = next(line for line in table.splitlines() if f"`{form.better}`" in line)
            assert all(value in line for value in form.values), form
    prose = README[README.index("A row that fits several") : README.index("## Templates")]
    named = set(re.findall(r"`(\w+)`", prose))
    assert {*forms.PROMPTS, *messages.PRECEDING, *messages.UNSHOWN} == named - {
        "score_chosen",
        "chosen_rating",
    }
    roles = " ".join(re.findall(r"\(([a-z, ]+)\)", README[README.index("- Chat messages") :][:400]))
    assert set(roles.replace(",", "").split()) == set(messages._SPEAKERS)


def test_a_talk_has_the_same_numbers_with_and_without_its_prompt_column():
    """The prompt as a text, the first or last message, those of the user or all; the answers as whole talks,
    as what is left of them, or as texts; two or three of them.
    Fails if the human's later turns are scored where the first one stands in a column of its own."""
    talk = said(user="Hi", assistant="Yes?") + said(user="Which?")
    row = {"chosen": [*talk, *said(assistant="This.")], "rejected": [*talk, *said(assistant="That.")]}
    whole = read(row)
    assert whole == PreferencePair(f"\n\nHuman: Hi\n\nAssistant: Yes?{ASKED}", " This.", " That.")
    system = said(system="Be brief.")
    for prompt in ("Hi", "Which?", talk[:1], talk[2:], talk, ""):
        assert read({"prompt": prompt, **row}) == whole
        three = {"responses": [*row.values(), [*talk, *said(assistant="No.")]], "ranking": [1, 2, 3]}
        assert read({"prompt": prompt, **three}, "rankings") == (whole.prompt, (" This.", " That.", " No."))
    for rest in (" Yes?\n\nHuman: Which?\n\nAssistant:", "Yes?\n\nHuman: Which?\n\nAssistant:"):
        assert read({"prompt": talk[:1], "chosen": f"{rest} This.", "rejected": f"{rest} That."}) == whole
    longer = {name: system + answer for name, answer in row.items()}
    for prompt in ({}, {"prompt": "Hi"}, {"prompt": talk}, {"prompt": talk[2:]}, {"prompt": system + talk}):
        assert read(prompt | longer) == whole._replace(prompt=f"\n\nSystem: Be brief.{whole.prompt}")
    told = {"system": "Be brief.", "system_message": "One."}
    assert read({**told, **row}).prompt == f"\n\nSystem: Be brief.\n\nOne.{whole.prompt}"
    texts = {name: f"{whole.prompt}{answer}" for name, answer in zip(row, whole[1:])}
    assert read(texts) == whole and read({**told, **texts}) == read({**told, **row})
    for cut in (len("\n\nHuman: Hi\n\nAssistant:"), len(whole.prompt)):
        apart = {name: text[cut:] for name, text in texts.items()}
        assert read({"prompt": whole.prompt[:cut], **apart}) == whole
    assert read({"prompt": "Hi", "completion": row["chosen"]}, "demonstrations") == (whole.prompt, " This.")


REFUSED = {
    # what: (row, kind, words of the sentence)
    "tools": (
        {"prompt": "p", "tools": [{"name": "f"}], **ANSWERS},
        ["'tools'", "belongs to the prompt", "delete"],
    ),
    "an image": ({"prompt": "p", "image": "cat.png", **ANSWERS}, ["'image'", "belongs to the prompt"]),
    "tools of an input": (
        {
            "input": {"messages": said(user="p"), "tools": [{}]},
            "preferred_output": "a",
            "non_preferred_output": "b",
        },
        ["'input'", "tools", "belongs to the prompt"],
    ),
    "a call of a tool": (
        {
            "prompt": "p",
            "chosen": [{"role": "assistant", "content": "", "tool_calls": [{"id": 1}]}],
            "rejected": "b",
        },
        ["message 1", "tool_calls"],
    ),
    "a history of texts": (
        {"prompt": "p", "history": ["q", "a"], **ANSWERS},
        ["'history'", "pairs", "part 1"],
    ),
    "a history as one text": ({"prompt": "p", "history": "User: q", **ANSWERS}, ["'history'", "pairs"]),
    "a context of pairs": (
        {"prompt": "p", "context": [["Title", "Text"]], **ANSWERS},
        ["'context'", "must be text", "a list"],
    ),
    "a transcript before messages": (
        {"prompt": ASKED, "chosen": said(assistant="a"), "rejected": said(assistant="b")},
        ["'prompt'", "transcript", "same way"],
    ),
    "a transcript of the user before messages": (
        {"prompt": "Human: Which?", "chosen": said(assistant="a"), "rejected": said(assistant="b")},
        ["'prompt'", "transcript"],
    ),
    "talks that another prompt begins": (
        {"prompt": "p", "chosen": said(user="q", assistant="a"), "rejected": said(user="q", assistant="b")},
        ["'chosen'", "delete 'prompt'"],
    ),
    "talks that share nothing": (
        {"chosen": said(user="q", assistant="a"), "rejected": said(user="p", assistant="b"), "asked": "p"},
        ["'chosen'", "share", "'prompt'", "'asked'"],
    ),
    "a prompt of another name": ({"asked": "p", "chosen": "a", "rejected": "b"}, ["'prompt'", "'asked'"]),
    "a video": ({"prompt": "p", "videos": ["v.mp4"], **ANSWERS}, ["'videos'", "belongs to the prompt"]),
    "a history of numbers": ({"prompt": "p", "history": [[1, 2]], **ANSWERS}, ["'history'", "a number"]),
    "lists of answers": ({"prompt": "p", "chosen": ["a"], "rejected": ["b", "c"]}, ["a row each"]),
    "answers in objects": (
        {"prompt": "p", "chosen": {"answer": "a", "score": 1}, "rejected": "b"},
        ["'chosen'", "'answer', 'score'"],
    ),
    "names of its own": (
        {"question": "p", "pos_answer": "a", "neg_answer": "b"},
        ["'pos_answer', 'neg_answer'", "name the better"],
    ),
    "a tie": (
        {"prompt": "p", "response_a": "a", "response_b": "b", "winner": "tie"},
        ["'winner'", "tie", "--skip-bad-rows"],
    ),
    "an unknown better one": (
        {"prompt": "p", "response_0": "a", "response_1": "b", "better_response_id": 2},
        ["'better_response_id'", "0 or 1"],
    ),
    "answers without a rank": ({"prompt": "p", "answers": ["a", "b"]}, ["`dpo --loss-type plackett_luce`"]),
    "labels": ({"instruction": "p", "output": "a", "kto_tag": 1}, ["`dpo --loss-type kto`"]),
    "no prompt at all": (
        {"chosen": said(assistant="a"), "rejected": said(assistant="b")},
        ["'chosen'", "'prompt'"],
    ),
    "a name of ten thousand letters": ({"x" * 10_000: 1}, ["xxx"]),
    "a thousand columns": ({f"column {n}": 1 for n in range(1000)}, ["994 more"]),
    "a role of ten thousand letters": (
        {"prompt": [{"role": "r" * 10_000, "content": "b"}], **ANSWERS},
        ["rrr"],
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_says_what_is_there(name):
    """Fails if the sentence does not name the field, what it holds, and what to do."""
    row, words = REFUSED[name]
    refused(lambda: read(row), "toy, row 1", *words)


# ---------------------------------------------------------------------------------- what was read


def test_the_columns_that_were_read_are_said():
    """Fails if a column with something in it is left out in silence, or an empty one is reported."""
    row = {"prompt": said(user="p"), "chosen": "a", "rejected": "b", "id": 7, "note": "", "score_chosen": 1}
    row["prompt"][0]["name"] = "Kim"
    dataset = dataset_from_rows([row, row | {"note": "x"}], "toy", "preferences")
    assert dataset.read == ["prompt", "chosen", "rejected"]
    assert set(dataset.unread) == {"id", "score_chosen", "note", "name of messages"}
    assert "columns read: 'prompt', 'chosen', 'rejected'; not read: 'id'" in dataset.columns()
    empty = {"role": "user", "content": "p", "name": None, "tool_calls": []}
    assert dataset_from_rows([SOUND | {"prompt": [empty]}], "toy", "preferences").unread == []
    taken = dataset_from_rows(
        [{"instruction": "i", "output": "o", "chosen": "c", "rejected": "r"}], "toy", "demonstrations"
    )
    assert "not read: 'output'" in taken.columns() and "from 'chosen'" in taken.columns()


def test_nobody_imitates_what_is_labelled_bad():
    """Fails if a completion with the label false is among the demonstrations, or goes uncounted."""
    rows = [{"prompt": "p", "completion": str(n), "label": n % 3 == 0} for n in range(6)]
    dataset = dataset_from_rows(rows, "toy", "demonstrations")
    assert [row.completion for row in dataset.rows] == ["0", "3"]
    assert dataset.findings["labelled_bad"] == [f"toy, row {n}" for n in (2, 3, 5, 6)]
    refused(lambda: dataset_from_rows(rows[1:2], "toy", "demonstrations"), "all 1 are labelled bad")


# ---------------------------------------------------------------------------------- findings

SOUND = {"prompt": "Which? ", "chosen": "This.", "rejected": "That."}
FOUND = {
    # a change of a sound row: the findings, no more and no fewer
    "nothing": ({}, []),
    "glued": ({"prompt": "Which"}, ["glued"]),
    "glued after a colon": ({"prompt": "Assistant:"}, ["glued"]),
    "not glued in Chinese": ({"prompt": "哪个", "chosen": "这个", "rejected": "那个"}, []),
    "Latin letters in Chinese": ({"prompt": "哪个？", "chosen": "Python是", "rejected": "3个"}, []),
    "not glued in Thai": ({"prompt": "อันไหน", "chosen": "อันนี้", "rejected": "อันนั้น"}, []),
    "glued in Arabic": ({"prompt": "أيهما؟", "chosen": "هذا", "rejected": "ذاك"}, ["glued"]),
    "glued in Korean": ({"prompt": "어느 것?", "chosen": "이것", "rejected": "저것"}, ["glued"]),
    "inside a bracket": ({"prompt": "f(", "chosen": "x)", "rejected": "y)"}, []),
    "after a tag": ({"prompt": "Which? <answer>"}, []),
    "not glued by a line end": ({"prompt": "Which?\n"}, []),
    "one answer repeats the prompt": ({"chosen": "Which? This."}, ["repeats_prompt"]),
    "an answer that begins with the letters of the prompt": ({"prompt": "T "}, []),
    "a turn of the human": ({"chosen": "This.\n\nHuman: And?\n\nAssistant: So."}, ["human_turn"]),
    "a turn of the human in a template": (
        {"rejected": "That.<|im_end|>\n<|im_start|>user\nAnd?"},
        ["human_turn", "template_marks"],
    ),
    "a turn of the human with three marks": ({"rejected": "That.### Human: And?"}, ["human_turn"]),
    "a turn of the human after a header": (
        {"rejected": "That.<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nAnd?"},
        ["human_turn", "template_marks"],
    ),
    "a user in a list of settings": ({"chosen": "Settings:\nUser: Kim\nGroup: staff"}, []),
    "the end of a turn": ({"chosen": "This.<|im_end|>", "rejected": "That.<|im_end|>"}, ["template_marks"]),
    "an instruction mark": ({"prompt": "[INST] Which? [/INST] "}, ["template_marks"]),
    "the end of a sentence": ({"chosen": "This.</s>"}, ["template_marks"]),
    "text struck out": ({"chosen": "It costs <s>9</s> 8, <s class='old'>7</s> 6."}, []),
    "pipes of a language": ({"chosen": "xs |> map <| f |> g"}, []),
    "a JSON answer": ({"chosen": '{"value": 3, "from": "2020"}'}, []),
    "messages as JSON, what is said first": (
        {"chosen": '[{"content": "This.", "role": "assistant"}]'},
        ["json_messages"],
    ),
    "the end of a text": ({"chosen": "This.<|endoftext|>"}, ["literal_end_of_text"]),
    "messages as text": ({"prompt": "[{'role': 'user', 'content': 'Which?'}]\n"}, ["json_messages"]),
    "messages as JSON": ({"chosen": '[{"from": "gpt", "value": "This."}]'}, ["json_messages"]),
    "white space alone": ({"chosen": " This. ", "rejected": "This.\n"}, ["white_space"]),
    "the lower score": ({"score_chosen": 1, "score_rejected": 2}, ["against_scores"]),
    "the lower score as text": ({"chosen_score": "9", "rejected_score": "10"}, ["against_scores"]),
    "the lower score of two responses": (
        {
            "prompt": "p ",
            "chosen": ...,
            "rejected": ...,
            "chosen_response": "a",
            "rejected_response": "b",
            "chosen_score": 1,
            "rejected_score": 2,
            "response_score": 3,
        },
        ["against_scores"],
    ),
    "the same rating": ({"chosen-rating": 3, "rejected-rating": 3.0}, ["tied_scores"]),
    "the higher score": ({"score_chosen": 2, "score_rejected": 1}, []),
    "a score of one": ({"score_chosen": 2, "score_rejected": None}, []),
    "no prompt": ({"prompt": ""}, ["empty_prompt"]),
    "code with angles": ({"chosen": "a <b> c < d | e > f"}, []),
}


@pytest.mark.parametrize("name", FOUND)
def test_what_is_odd_is_found(name):
    """Exactly the findings that a row gives, each with its place. Fails if one is missed or imagined."""
    change, expected = FOUND[name]
    row = {name: value for name, value in (SOUND | change).items() if value is not ...}
    found = dataset_from_rows([row], "toy", "preferences").findings
    assert sorted(found) == expected
    assert all(place.startswith("toy, row 1") for places in found.values() for place in places)
    assert set(found) <= set(FINDINGS)


def test_glued_texts_come_with_an_example():
    (place,) = dataset_from_rows([SOUND | {"prompt": "Name a colour"}], "toy", "preferences").findings[
        "glued"
    ]
    assert "'" in place and "colour' + 'This.'" in place


def test_rows_of_different_templates_are_found():
    """Fails if a column that only some rows have changes their template unsaid, or an empty prompt counts."""
    asked = {"instruction": "Which?", "chosen": "a", "rejected": "b"}
    rows = [SOUND | {"prompt": ""}, SOUND, SOUND | {"history": [["Hi", "Yes?"]]}, asked, SOUND]
    findings = dataset_from_rows(rows, "toy", "preferences").findings
    assert findings.get("mixed") == ["toy, row 3 (chat, not text)", "toy, row 4 (instruction, not text)"]
    assert "mixed" not in dataset_from_rows(rows[2:3] * 2, "toy", "preferences").findings


@pytest.mark.parametrize("text", [" ", "\n", "\n ", '"role" ', "</s> ", TURN])
def test_long_rows_cost_no_more_than_their_length(text):
    """Models that degenerate write such texts. 40,000 repetitions take 0.1 s; what looks for something
    from each place to the end takes 2 to 30 s. Fails if a pattern or a search is quadratic."""
    begin = time.process_time()
    row = {"prompt": "p ", "chosen": f"{{{text * 40_000} a", "rejected": f"{text * 40_000} b"}
    assert read(row).rejected.endswith(" b")
    assert read({"chosen": f"{TURN}a{row['chosen']}", "rejected": f"{TURN}b{row['chosen']}"}).prompt
    assert time.process_time() - begin < 1


@pytest.mark.parametrize(("label", "found"), [(True, True), (False, True), (None, False)])
def test_labels_of_one_kind_are_found(label, found):
    rows = [
        {"prompt": "p ", "completion": "c", "label": n == 0 if label is None else label} for n in range(3)
    ]
    assert ("one_class" in dataset_from_rows(rows, "toy", "labels").findings) == found


@pytest.mark.parametrize("ranks", [[1, None, 2], [1, "none", 2], [1, True, 2]])
def test_every_response_needs_a_rank(ranks):
    """Fails if a response without a rank is left out as if it were tied."""
    row = {"prompt": "p ", "responses": ["a", "b", "c"], "ranking": ranks}
    refused(lambda: read(row, "rankings"), "'ranking'", "each of 3")


def test_a_tied_response_is_left_out_and_said():
    row = {"prompt": "p ", "responses": ["a", "b", "c"], "ranking": [1, 2, 2]}
    dataset = dataset_from_rows([row], "toy", "rankings")
    assert dataset.rows == [Ranking("p ", ("a", "b"))] and dataset.findings == {"tied": ["toy, row 1"]}


def test_sft_and_dpo_judge_a_repeated_prompt_alike():
    """Fails if one command refuses what the other trains on. Where all answers repeat it, both refuse."""
    some = [SOUND | {"chosen": f"Which? {n}"} for n in range(4)]
    for kind in ("preferences", "demonstrations"):
        assert len(dataset_from_rows(some, "toy", kind).findings["repeats_prompt"]) == 4
        every = [row | {"rejected": "Which? No."} for row in some]
        refused(lambda kind=kind, every=every: dataset_from_rows(every, "toy", kind), "4 of 4 rows", "twice")
    short = [{"prompt": "I", "completion": "It rained."}] * 3
    assert len(dataset_from_rows(short, "toy", "demonstrations").rows) == 3


# ---------------------------------------------------------------------------------- files

ROWS = [{"prompt": f"p{n} ", "chosen": 'a "b", c\nd', "rejected": "é\t;"} for n in range(3)]


def frame(orient: str) -> object:
    """What pandas' to_json writes."""
    names, index = list(ROWS[0]), [str(n) for n in range(len(ROWS))]
    return {
        "records": ROWS,
        "columns": {name: {i: row[name] for i, row in zip(index, ROWS)} for name in names},
        "index": dict(zip(index, ROWS)),
        "split": {"columns": names, "index": [0, 1, 2], "data": [list(row.values()) for row in ROWS]},
        "table": {"schema": {"fields": []}, "data": [{"index": n, **row} for n, row in enumerate(ROWS)]},
    }[orient]


def table(mark: str) -> str:
    cells = [list(ROWS[0]), *(list(row.values()) for row in ROWS)]
    quoted = [['"' + cell.replace('"', '""') + '"' for cell in line] for line in cells]
    return "\r\n".join(mark.join(line) for line in quoted) + "\r\n"


SPREAD = (
    '{"prompt": ["p0 ", "p1 ", "p2 "],\n'
    + json.dumps({k: [r[k] for r in ROWS] for k in ("chosen", "rejected")})[1:]
)
CONTENTS = {
    **{
        f"pandas, {orient}": json.dumps(frame(orient))
        for orient in ("records", "columns", "index", "split", "table")
    },
    **{f"table of {mark!r}": table(mark) for mark in ",;\t|"},
    "a single split": json.dumps({"train": ROWS}),
    "a hub's viewer": json.dumps(
        {
            "features": [{"name": name} for name in ROWS[0]],
            "rows": [{"row_idx": n, "row": row, "truncated_cells": []} for n, row in enumerate(ROWS)],
            "partial": False,
        }
    ),
    "objects set out over lines": "\n".join(json.dumps(row, indent=2) for row in ROWS),
    "objects without line ends": "".join(map(json.dumps, ROWS)),
    "columns whose first line is no brace": SPREAD,
}


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("name", CONTENTS)
def test_a_file_is_read(tmp_path, name, zipped):
    """The same rows from every file. Fails if a quote, a line end in a cell or an orientation is misread."""
    content = CONTENTS[name].encode()
    path = tmp_path / "rows.dat"
    path.write_bytes(gzip.compress(content) if zipped else content)
    assert load_dataset(path, "preferences").rows == [PreferencePair(**row) for row in ROWS]


def test_one_row_set_out_over_lines(tmp_path):
    path = tmp_path / "row.json"
    path.write_text(json.dumps(ROWS[0], indent=1))
    assert load_dataset(path, "preferences").rows == [PreferencePair(**ROWS[0])]


def test_one_row_of_lists(tmp_path):
    """Fails if a talk beside an empty list is taken for columns of unequal length."""
    path = tmp_path / "row.json"
    path.write_text(json.dumps({"messages": said(user="Which?", assistant="This."), "tools": []}))
    assert load_dataset(path, "demonstrations").rows == [Demonstration(ASKED, " This.")]


def test_cut_cells_of_a_viewer_are_refused(tmp_path):
    path = tmp_path / "rows.json"
    viewed = {"row_idx": 0, "row": ROWS[0], "truncated_cells": ["chosen"]}
    path.write_text(json.dumps({"features": [], "rows": [viewed]}))
    refused(lambda: load_dataset(path, "preferences"), "'rows'", "cut", "download")


def test_a_table_of_one_column(tmp_path):
    path = tmp_path / "texts.csv"
    path.write_text("text\na\nb\n")
    assert load_dataset(path, "demonstrations").rows == [Demonstration("", "a"), Demonstration("", "b")]


@pytest.mark.parametrize("empty", [False, True])
def test_several_splits_are_refused_with_the_line_that_takes_one(tmp_path, empty):
    """The line that is given is run here. Fails if it does not make a file that is read."""
    path = tmp_path / "splits.json"
    path.write_text(json.dumps({"train": ROWS, "test": [] if empty else ROWS[:1]}))
    message = refused(lambda: load_dataset(path, "preferences"), "'train', 'test'", "python -c")
    code = re.search(r'python -c "(.*)"', message)[1]
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
    assert len(load_dataset(tmp_path / "rows.json", "preferences").rows) == 3


@pytest.mark.parametrize("magic", files._OTHER)
def test_other_formats_are_known_by_their_first_bytes(tmp_path, magic):
    """Fails if a Parquet file is "not UTF-8 text", or the remedy does not name the file."""
    path = tmp_path / "rows.bin"
    path.write_bytes(magic + b"\x15\x04" * 50)
    what, remedy = files._OTHER[magic]
    refused(lambda: load_dataset(path, "preferences"), what, remedy.replace("{}", str(path)))


@pytest.mark.parametrize(
    ("content", "what"), [(b"\n<!doctype html>", "a web page"), (pickle.dumps(ROWS, protocol=5), "a pickle")]
)
def test_other_formats_as_tools_write_them(tmp_path, content, what):
    path = tmp_path / "rows.bin"
    path.write_bytes(content)
    refused(lambda: load_dataset(path, "preferences"), what)


def test_the_readme_names_the_other_formats():
    sentence = README[README.index("Other formats (") :].partition(")")[0].lower()
    for what in (
        "parquet",
        "arrow",
        "zip",
        "spreadsheet",
        "xz",
        "bzip2",
        "zstd",
        "sqlite",
        "pickle",
        "utf-16",
    ):
        assert what in sentence and any(what in known.lower() for known, _ in files._OTHER.values())


def test_a_bad_cell_of_a_table_is_named(tmp_path):
    path = tmp_path / "pairs.csv"
    path.write_text('prompt,chosen,rejected\n"a\nb",c,d\ne,f\n')
    refused(lambda: load_dataset(path, "preferences"), f"{path}, line 4", "2 cells", "3")
    kept = load_dataset(path, "preferences", skip_bad_rows=True)
    assert kept.rows == [PreferencePair("a\nb", "c", "d")] and kept.places == [f"{path}, line 3"]
    path.write_text('prompt\tchosen\trejected\n"a" b\tc\td\n')
    refused(lambda: load_dataset(path, "preferences"), f"{path}, line 2", "a tab", "double")
    path.write_text("prompt,chosen,chosen\na,b,c\n")
    refused(lambda: load_dataset(path, "preferences"), "twice")


def test_a_gzip_that_unpacks_to_far_more_is_refused(tmp_path, monkeypatch):
    """Fails if a bomb is unpacked: no more than the limit is ever held."""
    monkeypatch.setattr(files, "_UNPACKED", 10_000)
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(gzip.compress(b" " * 10**6))
    refused(lambda: load_dataset(path, "preferences"), "100 times its size")
    path.write_bytes(gzip.compress(b"\n".join(json.dumps(row).encode() for row in ROWS * 30)))
    assert len(load_dataset(path, "preferences").rows) == 90
    path.write_bytes(b"".join(gzip.compress(json.dumps(row).encode() + b"\n") for row in ROWS))
    assert len(load_dataset(path, "preferences").rows) == 3  # members, one after the other


def test_what_is_no_ordinary_file_is_refused():
    refused(lambda: load_dataset("/dev/zero", "preferences"), "/dev/zero")
    refused(lambda: load_dataset("a\0b", "preferences"), "name that a file can have")


# ---------------------------------------------------------------------------------- planted bugs

MUTANTS = {
    "the other answer is the better": (
        forms.pair_of,
        "value == form.values[0]",
        "value != form.values[0]",
        test_a_form_is_read,
        "model_b won",
    ),
    "bad completions imitated": (
        data._demonstration,
        "if not good",
        "if False",
        test_nobody_imitates_what_is_labelled_bad,
    ),
    "turns that are shared stay": (
        messages.shared_turns,
        "while all(",
        "while False and all(",
        test_a_talk_has_the_same_numbers_with_and_without_its_prompt_column,
    ),
    "a system's text taken for a turn": (
        messages.preceding,
        'name == "history"',
        'name == "system"',
        test_a_form_is_read,
        "a system's text before a text",
    ),
    "only a prompt that talks begin with is taken off": (
        messages.holds,
        "in (0, 1, last)",
        "in (0,)",
        test_a_talk_has_the_same_numbers_with_and_without_its_prompt_column,
    ),
    "templates not compared": (
        data._dataset,
        "shape != template",
        "False",
        test_rows_of_different_templates_are_found,
    ),
    "tools read over": (
        messages.refuse_unshown,
        "and not is_empty",
        "and is_empty",
        test_what_is_refused_says_what_is_there,
        "tools",
    ),
    "ties among the inversions": (
        forms._compare_scores,
        "scores[0] == scores[1]",
        "False",
        test_what_is_odd_is_found,
        "the same rating",
    ),
    "scores compared as texts": (
        forms._compare_scores,
        "_number(row.peek(column))",
        "str(row.peek(column))",
        test_what_is_odd_is_found,
        "the lower score as text",
    ),
    "marks of completions alone": (
        audit.text_findings,
        "map(_MARK.search, texts)",
        "map(_MARK.search, completions)",
        test_what_is_odd_is_found,
        "an instruction mark",
    ),
    "CJK glued": (
        audit._glued,
        "not _UNSPACED.search(left + right)",
        "True",
        test_what_is_odd_is_found,
        "not glued in Chinese",
    ),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_planted_bug_is_caught(monkeypatch, name):
    """The guard passes as things stand and fails with the bug."""
    function, right, wrong, guard, *arguments = MUTANTS[name]
    plant(monkeypatch, function, right, wrong)
    with pytest.raises(CAUGHT):
        guard(*arguments)
