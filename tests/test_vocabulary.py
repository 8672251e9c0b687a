"""Vocabularies that come with a model, against a slow reading of Hugging Face's files by their rule."""

import itertools
import json
import random
from collections.abc import Sequence
from pathlib import Path

import pytest
import regex
from hypothesis import given
from hypothesis import strategies as st
from planting import CAUGHT, plant

from dpo_minimal.text import vocabulary as module
from dpo_minimal.text.tokenizer import (
    TOKENIZER_FILE,
    Tokenizer,
    gpt2_tokenizer,
    load_tokenizer,
    save_tokenizer,
)
from dpo_minimal.validation import InputError

CACHE = Path(__file__).parents[2] / "shared" / "tiktoken"
END = "<|endoftext|>"
# GPT-2's cut into words as Hugging Face writes it.
WORDS = regex.compile(r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")


def byte_letters() -> dict[int, str]:
    """The letter of each byte: itself where Latin-1 prints it, else the next free one from U+0100 on."""
    letters, free = {}, 0x100
    for value in range(256):
        if 0x21 <= value <= 0x7E or (0xA1 <= value <= 0xFF and value != 0xAD):
            letters[value] = chr(value)
        else:
            letters[value], free = chr(free), free + 1
    return letters


LETTERS = byte_letters()
ALPHABET = [LETTERS[value] for value in range(256)]
Pair = tuple[str, str]
FORMS = ("older", "texts", "pairs")


def by_the_rule(ids: dict[str, int], merges: list[Pair], text: str) -> list[int]:
    """In each word, again and again, the pair that comes first in merges.txt, of several the left one."""
    ranks, found = {pair: rank for rank, pair in enumerate(merges)}, []
    for word in WORDS.findall(text):
        parts = [LETTERS[value] for value in word.encode("utf-8")]
        while known := [
            (ranks[pair], place) for place, pair in enumerate(itertools.pairwise(parts)) if pair in ranks
        ]:
            _, place = min(known)
            parts[place : place + 2] = ["".join(parts[place : place + 2])]
        found += [ids[part] for part in parts]
    return found


def write(
    folder: Path, ids: dict[str, int], merges: list[Pair], form: str = "older", **files: object
) -> Path:
    """vocab.json and merges.txt, or one tokenizer.json; and other JSON files by their names."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.iterdir():
        path.unlink()
    if form == "older":
        (folder / "vocab.json").write_text(json.dumps(ids), encoding="utf-8")
        lines = ["#version: 0.2", *(f"{left} {right}" for left, right in merges), ""]
        (folder / "merges.txt").write_text("\n".join(lines), encoding="utf-8")
    else:
        rows = [f"{left} {right}" for left, right in merges] if form == "texts" else merges
        files = {"tokenizer": whole(ids, rows)} | files
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    return folder


def whole(ids: dict[str, int], merges: list, **changes: object) -> dict:
    """A tokenizer.json; a change such as model__dropout=0.1 alters one of its fields."""
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    part = [{"Sequence": {"id": "A", "type_id": 0}}]
    content = {
        "version": "1.0",
        "added_tokens": [{"id": ids[END], "content": END, **flags}] if END in ids else [],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True,
        },
        "post_processor": {  # as transformers 5 writes it
            "type": "TemplateProcessing", "single": part, "pair": part, "special_tokens": {},
        },
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": "",
            "end_of_word_suffix": "", "fuse_unk": False, "vocab": ids, "merges": merges,
        },
    }  # fmt: skip
    for name, value in changes.items():
        field, _, part = name.partition("__")
        content[field] = content[field] | {part: value} if part else value
    return content


MERGES = [("l", "o"), ("lo", "w"), ("Ġ", "low"), ("e", "r"), ("Ã", "©"), ("w", "e")]  # é is two bytes
PLAIN = {name: number for number, name in enumerate([*ALPHABET, *("".join(pair) for pair in MERGES), END])}
TEXT = "low lower  slow café\nالكتاب 12 🎬 it's"


def read(folder: Path) -> Tokenizer:
    return load_tokenizer(folder)


def refused(folder: Path, *named: object) -> None:
    with pytest.raises(InputError) as caught:
        load_tokenizer(folder)
    message = str(caught.value)
    assert message.endswith(".") and "\n" not in message and ". " not in message, message
    assert len(message.replace(str(folder), "")) < 400, message
    for part in (folder, *named):
        assert str(part) in message, (part, message)


# ---------------------------------------------------------------------------------------------- the same ids


@st.composite
def vocabularies(draw) -> tuple[dict[str, int], list[Pair]]:
    """Merges in any order over few letters, several of one token, tokens that no merge makes, ids anyhow."""
    rng = random.Random(draw(st.integers(0, 10**6)))
    names, merges = ["a", "b", "Ġ"], []
    for _ in range(draw(st.integers(0, 40))):
        pair = rng.choice(names), rng.choice(names)
        if len("".join(pair)) <= 7 and pair not in merges:
            merges.append(pair)
            names += ["".join(pair)] * ("".join(pair) not in names)
    if draw(st.booleans()):
        rng.shuffle(merges)
    unmade = {"".join(rng.choices("ab", k=4)), "<s>"}
    listed = [*ALPHABET, *sorted({*names, *unmade} - {*ALPHABET}), END]
    if draw(st.booleans()):
        rng.shuffle(listed)
    return {name: number for number, name in enumerate(listed)}, merges


def check_vocabulary(
    folder: Path, ids: dict[str, int], merges: list[Pair], texts: list[str], forms: Sequence[str] = FORMS
) -> None:
    for form in forms:
        tokenizer = read(write(folder, ids, merges, form))
        assert (tokenizer.vocab_size, tokenizer.eot) == (len(ids), ids[END])
        for text in texts:
            assert tokenizer.encode(text) == by_the_rule(ids, merges, text)
            assert tokenizer.decode([tokenizer.eot, *tokenizer.encode(text)]) == text


@given(
    vocabularies(), st.lists(st.text("aabb a", max_size=40) | st.text(max_size=12), min_size=1, max_size=8)
)
def test_any_vocabulary_gives_the_ids_of_the_rule(tmp_path_factory, vocabulary, texts):
    check_vocabulary(tmp_path_factory.getbasetemp() / "any", *vocabulary, texts)


TRAPS = {  # merges over which tiktoken, told every token at its first rank, gives other ids
    "two merges of a token, the first never used": [("a", "b"), ("a", "bb"), ("ab", "b"), ("b", "b")],
    "a token that its own bytes do not become": [("b", "b"), ("ab", "b"), ("a", "b"), ("b", "a")],
    "a part that is made after the whole": [("ab", "ab"), ("b", "a"), ("a", "b")],
}


def check_traps(tmp_path: Path) -> None:
    texts = ["".join(random.Random(seed).choices("ab", k=9)) for seed in range(60)] + ["ab", "abb", "abab"]
    for merges in TRAPS.values():
        names = [*ALPHABET, *dict.fromkeys(part for pair in merges for part in (*pair, "".join(pair)))]
        ids = {name: number for number, name in enumerate(dict.fromkeys([*names, "aab", END]))}
        check_vocabulary(tmp_path / "trap", ids, merges, texts)


def test_traps_of_telling_tiktoken(tmp_path):
    check_traps(tmp_path)


def check_moved_ids(tmp_path: Path) -> None:
    """End-of-text first, ids backwards, and special tokens between: what a text is stays what it is."""
    for names in ([END, "<s>", *list(PLAIN)[:-1]], list(PLAIN)[::-1], [*ALPHABET, END, *list(PLAIN)[256:-1]]):
        ids = {name: number for number, name in enumerate(names)}
        check_vocabulary(tmp_path / "moved", ids, MERGES, [TEXT, f"<s>{END}"])


def test_ids_in_any_order(tmp_path):
    check_moved_ids(tmp_path)


@pytest.mark.filterwarnings("ignore")  # of another project
def test_live_comparison_with_hugging_face(tmp_path):
    """Their class reads the same files, and every text gets the same ids."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    moved = {name: number for number, name in enumerate([END, "<s>", *reversed(list(PLAIN)[:-1])])}
    for form, ids in itertools.product(FORMS, (PLAIN, moved)):
        folder = write(tmp_path, ids, MERGES, form)
        theirs, ours = transformers.GPT2TokenizerFast.from_pretrained(folder), read(folder)
        assert theirs.eos_token_id == ours.eot
        rare = "lowe\u0301r\u00a0low\u3000\u200blow's'll \t\n x"
        for text in (TEXT, TEXT[::-1], rare, " ".join(map(chr, range(700)))):
            assert ours.encode(text) == theirs(text)["input_ids"]


@pytest.mark.slow
def test_gpt_2s_own_files_are_gpt_2s_vocabulary(tmp_path, monkeypatch):
    """What tiktoken fetches are Hugging Face's vocab.json and merges.txt, so the fingerprint is the same."""
    if not CACHE.is_dir():
        pytest.skip("GPT-2's vocabulary lies in shared/tiktoken beside the project, which is not there")
    merges, ids = sorted(CACHE.iterdir(), key=lambda path: path.stat().st_size)
    (tmp_path / "vocab.json").write_bytes(ids.read_bytes())
    (tmp_path / "merges.txt").write_bytes(merges.read_bytes())
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(CACHE))
    own = read(tmp_path)
    assert (own.kind, own.fingerprint) == ("hugging-face", gpt2_tokenizer().fingerprint)
    assert own.encode("hello world") == [31373, 995]


# ------------------------------------------------------------------------------------- end-of-text and others


@pytest.mark.parametrize("files, eot", [
    ({}, 262),
    ({"config": {"eos_token_id": 0}}, 262),  # an ordinary word, as the default 50256 often is
    ({"config": {"eos_token_id": 263}}, 262),
    ({"tokenizer_config": {"eos_token": "</s>"}}, 263),
    ({"special_tokens_map": {"eos_token": {"content": "</s>"}}}, 263),
    ({"special_tokens_map": {"eos_token": END}, "tokenizer_config": {"eos_token": "</s>"}}, 263),
    ({"tokenizer_config": {"eos_token": "<|end|>"}, "added_tokens": {"<pad>": 264, "<|end|>": 265}}, 265),
    ({"tokenizer_config": {"eos_token": "<e>", "added_tokens_decoder": {"264": {"content": "<e>"}}}}, 264),
])  # fmt: skip
def test_end_of_text_is_where_the_tokenizer_has_it(tmp_path, files, eot):
    tokenizer = read(write(tmp_path, PLAIN | {"</s>": 263}, MERGES, **files))
    assert tokenizer.eot == eot and tokenizer.vocab_size == max(264, eot + 1)
    assert tokenizer.token_text(eot).endswith(">") and tokenizer.decode([eot]) == ""


def test_end_of_text_of_config_where_the_vocabulary_names_none(tmp_path):
    ids = {name.replace(END, "<eos>"): number for name, number in PLAIN.items()}
    assert read(write(tmp_path, ids, MERGES, config={"eos_token_id": 262})).eot == 262
    for config in ({}, {"eos_token_id": 5}, {"eos_token_id": 263}, {"eos_token_id": [262]}):
        refused(write(tmp_path, ids, MERGES, config=config), "end-of-text", "eos_token")
    word = {"eos_token": "low"}  # an ordinary word would end a completion inside a text
    refused(write(tmp_path, PLAIN, MERGES, tokenizer_config=word), "'low'", "ordinary word")


def test_merges_that_were_cut_are_told(tmp_path, capsys):
    """A merges.txt cut at the end of a line is whole to the eye, and gives other ids. Fails if it is read
    without a word, or a vocabulary with nothing but special tokens beside its merges is doubted."""
    read(write(tmp_path, PLAIN | {"<pad>": 263, "[CLS]": 264}, MERGES))
    assert capsys.readouterr().err == ""
    read(write(tmp_path, PLAIN, MERGES[:4]))
    assert "2 tokens of its vocabulary, such as 'we'" in capsys.readouterr().err


def test_added_tokens_are_plain_text_and_leave_no_ids_behind(tmp_path):
    added = [{"id": 263, "content": "<pad>", "special": True}, {"id": 262, "content": END, "special": False}]
    for files in (
        {"tokenizer": whole(PLAIN, MERGES, added_tokens=added)},
        {"added_tokens": {"<pad>": 263}},
        {"tokenizer_config": {"added_tokens_decoder": {str(row["id"]): row for row in added}}},
    ):
        tokenizer = read(write(tmp_path, PLAIN, MERGES, **files))
        assert tokenizer.vocab_size == 263
        assert tokenizer.encode("<pad>") == [PLAIN[letter] for letter in "<pad>"]
    words = [*added, {"id": 264, "content": "low low", "special": False}]
    for files in (
        {"tokenizer": whole(PLAIN, MERGES, added_tokens=words)},
        {"tokenizer_config": {"added_tokens_decoder": {str(row["id"]): row for row in words}}},
    ):
        refused(write(tmp_path, PLAIN, MERGES, **files), "low low", "special")


# ------------------------------------------------------------------------------------------ what is refused

OTHERS = {  # field: a value of another kind of tokenizer, and what the sentence names
    "model__type": ("WordPiece", "Unigram", "WordLevel"),
    "model__dropout": (0.1,),
    "model__byte_fallback": (True,),
    "model__ignore_merges": (True,),
    "model__continuing_subword_prefix": ("##",),
    "model__end_of_word_suffix": ("</w>",),
    "normalizer": ({"type": "NFKC"}, {"type": "Sequence", "normalizers": [{"type": "NFD"}] * 99}),
    "pre_tokenizer": (None, {"type": "Metaspace"}, {"type": "Sequence", "pretokenizers": []}),
    "pre_tokenizer__add_prefix_space": (True,),
    "pre_tokenizer__use_regex": (False,),
    "post_processor": ({"type": "RobertaProcessing", "cls": ["<s>", 0]},),
    "post_processor__special_tokens": ({"<s>": {"ids": [0]}},),
}


@pytest.mark.parametrize("field", OTHERS)
def test_other_kinds_are_named(tmp_path, field):
    for value in OTHERS[field]:
        files = {"tokenizer": whole(PLAIN, MERGES, **{field: value})}
        named = value["type"] if isinstance(value, dict) and field == "normalizer" else ""
        refused(write(tmp_path, PLAIN, MERGES, **files), field.partition("__")[0], "byte-level BPE", named)
    for name in ("add_prefix_space", "add_bos_token"):
        refused(write(tmp_path, PLAIN, MERGES, tokenizer_config={name: True}), name)


def without(*names: str) -> dict[str, int]:
    return {name: number for number, name in enumerate(name for name in PLAIN if name not in names)}


DAMAGED = {
    "a byte without a token": (without("!"), MERGES, "'!'"),
    "a merge of unknown parts": (PLAIN, [*MERGES, ("x", "yz")], "no tokens"),
    "a merge to no token": (PLAIN, [*MERGES, ("x", "y")], "'xy'"),
    "a merge of three": (PLAIN, [*MERGES, ("x", "y z")], "cannot be read"),
    "a merge of one": (PLAIN, [*MERGES, ("xy", "")], "no tokens"),
    "an id twice": (PLAIN | {"<s>": 0}, MERGES, "ids 0 to 263"),
    "an id left out": (PLAIN | {"<s>": 264}, MERGES, "ids 0 to 263"),
    "an id below 0": (PLAIN | {"<s>": -1}, MERGES, "ids 0 to 263"),
    "an id that is a text": (PLAIN | {"<s>": "263"}, MERGES, "263"),
    "an id of terabytes": (PLAIN | {"<s>": 10**15}, MERGES, "ids 0 to 263"),
    "a long name": (PLAIN, [*MERGES, ("x" * 9999, "y")], "no tokens"),
}


@pytest.mark.parametrize("form", ["older", "texts"])
@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_vocabularies_are_refused(tmp_path, case, form):
    ids, merges, named = DAMAGED[case]
    refused(write(tmp_path, ids, merges, form), named)


@pytest.mark.parametrize("content", [
    [], 7, {"model": []}, {"model": {"type": "BPE"}}, {"model": {"vocab": [], "merges": []}},
    {"model": {"vocab": PLAIN, "merges": 3}}, {"model": {"vocab": PLAIN, "merges": [7]}},
    {"model": {"vocab": PLAIN, "merges": [[["l"], "o"]]}}, {"added_tokens": 3}, {"added_tokens": ["<s>"]},
    {"added_tokens": [{"content": "<s>"}]}, {"added_tokens": [{"content": {}, "id": 3}]}, {"normalizer": 3},
], ids=str)  # fmt: skip
def test_a_tokenizer_json_of_another_shape_is_refused(tmp_path, content):
    if isinstance(content, dict):
        content = whole(PLAIN, MERGES) | content
    refused(write(tmp_path, PLAIN, MERGES, tokenizer=content), "again" if content else "JSON")


def test_missing_files_and_other_kinds_of_files(tmp_path):
    refused(tmp_path, "no tokenizer", "vocab.json and merges.txt")
    for name, kind in (("vocab.txt", "WordPiece"), ("spiece.model", "SentencePiece")):
        (tmp_path / name).touch()
        refused(tmp_path, name, kind)
        (tmp_path / name).unlink()
    write(tmp_path, PLAIN, MERGES)
    (tmp_path / "merges.txt").write_bytes(b"l o\xff")
    refused(tmp_path, "cannot be read")
    (tmp_path / "merges.txt").unlink()
    refused(tmp_path, "merges.txt")


# ---------------------------------------------------------------------------------------------- kept in a run


def check_kept(tmp_path: Path) -> None:
    names = list(PLAIN)
    random.Random(0).shuffle(names)
    moved = {name: number for number, name in enumerate(["<s>", *names])}
    for number, (ids, merges) in enumerate([(PLAIN, MERGES), (PLAIN, MERGES[::-1]), (moved, MERGES)]):
        tokenizer = read(write(tmp_path / "hf", ids, merges))
        save_tokenizer(tokenizer, tmp_path / str(number))
        assert [path.name for path in (tmp_path / str(number)).iterdir()] == [TOKENIZER_FILE]
        back = load_tokenizer(tmp_path / str(number))
        for name in ("kind", "vocab_size", "eot", "fingerprint", "vocabulary"):
            assert getattr(back, name) == getattr(tokenizer, name), name
        assert back.encode(TEXT) == tokenizer.encode(TEXT) and back.decode(back.encode(TEXT)) == TEXT
    prints = [json.loads((tmp_path / str(n) / TOKENIZER_FILE).read_text())["fingerprint"] for n in range(3)]
    assert len(set(prints)) == 3  # the order of the merges counts, and the ids


def test_saved_and_loaded_is_the_same(tmp_path):
    check_kept(tmp_path)


@pytest.mark.parametrize("field, value", [
    ("tokens", ["!"]), ("tokens", 7), ("tokens", None), ("order", [0]), ("order", "x"), ("eot", 5),
    ("eot", None), ("kind", "bpe"), ("fingerprint", ""),
])  # fmt: skip
def test_an_altered_file_is_refused(tmp_path, field, value):
    save_tokenizer(read(write(tmp_path / "hf", PLAIN, MERGES)), tmp_path)
    content = json.loads((tmp_path / TOKENIZER_FILE).read_text())
    (tmp_path / TOKENIZER_FILE).write_text(json.dumps(content | {field: value}))
    refused(tmp_path, TOKENIZER_FILE, "field")


# ------------------------------------------------------------------------------------------------ mutants

MUTANTS = {
    "every merge's token at its own rank": (
        module._vocabulary, "_last_merge(name, ranks) for name in made",
        "min(r for pair, r in ranks.items() if ''.join(pair) == name) for name in made", check_traps,
    ),
    "ids taken for ranks": (
        Tokenizer.__init__, "None if order == sorted(order) else order", "None", check_moved_ids,
    ),
    "the order of merges forgotten by the fingerprint": (
        load_tokenizer.__globals__["_fingerprint"], "json.dumps([eot, order])", "''", check_kept,
    ),
    "tokens told that no text comes to": (
        module._vocabulary, "if last[name] < math.inf", "", check_traps,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTANTS)
def test_planted_bugs_are_caught(monkeypatch, tmp_path, name):
    function, right, wrong, guard = MUTANTS[name]
    plant(monkeypatch, function, right, wrong)
    with pytest.raises(CAUGHT):
        guard(tmp_path)
