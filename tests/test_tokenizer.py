"""Three vocabularies, one door: ids and back, merges against a naive reading of the rule, one file."""

import functools
import json
import random
import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest
import regex
import requests
import tiktoken.load
from hypothesis import given
from hypothesis import strategies as st
from planting import CAUGHT, plant

from dpo_minimal.text import tokenizer as module
from dpo_minimal.text.bpe_training import learn_merges
from dpo_minimal.text.reviews import demonstrations
from dpo_minimal.text.tokenizer import (
    GPT2_PATTERN,
    TOKENIZER_FILE,
    Tokenizer,
    byte_tokenizer,
    gpt2_tokenizer,
    load_tokenizer,
    save_tokenizer,
    train_bpe,
)
from dpo_minimal.text.vocabulary import Vocabulary
from dpo_minimal.validation import InputError

CACHE = Path(__file__).parents[2] / "shared" / "tiktoken"
TEXT = "\n".join(row["prompt"] + row["completion"] for row in demonstrations(300, seed=0))
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
# Few letters, so that pairs repeat, overlap (aaa) and tie; signs that the pattern treats apart; é, two bytes.
narrow_texts = st.text("aaab  \n'sé1.", max_size=60)


@pytest.fixture
def gpt2(monkeypatch) -> Tokenizer:
    if not CACHE.is_dir():
        pytest.skip("GPT-2's vocabulary lies in shared/tiktoken beside the project, which is not there")
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(CACHE))
    return gpt2_tokenizer()


def one_sentence(error: InputError, *named: str) -> None:
    message = str(error)
    assert message.endswith(".") and "\n" not in message and ". " not in message, message
    for part in named:
        assert part in message, message


# --------------------------------------------------------------------------------------------- ids and back


def check_round_trip(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert all(0 <= token < tokenizer.vocab_size and token != tokenizer.eot for token in ids)
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode([tokenizer.eot, *ids, tokenizer.eot]) == text


@given(texts | narrow_texts)
def test_any_text_comes_back(text):
    check_round_trip(byte_tokenizer(), text)
    check_round_trip(train_bpe(TEXT, 300), text)
    assert byte_tokenizer().encode(text) == list(text.encode("utf-8"))


@pytest.mark.parametrize("text", ["<|endoftext|>", "a<|endoftext|>b", "", " ", "\r\n \x00 🎬"])
def test_special_looking_text_is_plain_text(text, gpt2):
    for tokenizer in (byte_tokenizer(), train_bpe(TEXT, 300), gpt2):
        check_round_trip(tokenizer, text)


def test_gpt2_is_the_released_one(gpt2):
    """ids as OpenAI's README of tiktoken prints them for "hello world"."""
    assert (gpt2.kind, gpt2.vocab_size, gpt2.eot) == ("gpt2", 50257, 50256)
    assert gpt2.encode("hello world") == [31373, 995]
    assert tiktoken.get_encoding("gpt2")._pat_str == GPT2_PATTERN


def test_broken_bytes_become_the_replacement_character():
    assert byte_tokenizer().decode([0xC3]) == "\ufffd"  # the first half of é


def test_a_token_fits_on_a_line_of_a_table():
    tokenizer = train_bpe("a\n\n\n" * 9, 258)
    shown = {token: tokenizer.token_text(token) for token in (ord("a"), ord("\n"), 0xC3, 256, tokenizer.eot)}
    assert shown == {97: "a", 10: r"\n", 0xC3: r"\xc3", 256: r"\n\n", 257: "<|endoftext|>"}


@pytest.mark.parametrize("token", [-1, 257, 10**6])
def test_ids_outside_the_vocabulary_are_refused(token):
    for call in (lambda: byte_tokenizer().decode([65, token]), lambda: byte_tokenizer().token_text(token)):
        with pytest.raises(InputError) as caught:
            call()
        one_sentence(caught.value, str(token), "257")


def test_text_that_has_no_bytes_is_refused():
    for call in (byte_tokenizer().encode, lambda text: train_bpe(text, 258)):
        with pytest.raises(InputError) as caught:
            call("ab\ud800 ab ab")
        one_sentence(caught.value, "character 2", "U+D800")


def test_a_very_long_run_of_spaces_is_refused():
    """Some 700,000 white-space characters before a letter make tiktoken's regular expressions panic."""
    assert len(byte_tokenizer().encode(" " * 100_000 + "x")) == 100_001
    with pytest.raises(InputError) as caught:
        byte_tokenizer().encode("\n" * 100_001 + "x")
    one_sentence(caught.value, "100000")


# ------------------------------------------------------------------------------------------------- training


def naive_merge(ids: list[int], pair: tuple[int, int], new: int) -> list[int]:
    for place in range(len(ids)):
        if tuple(ids[place : place + 2]) == pair:
            return [*ids[:place], new, *naive_merge(ids[place + 2 :], pair, new)]
    return ids


def naive_training(text: str, most: int) -> list[tuple[int, int]]:
    """The rule as it is stated: count all pairs anew, take the most frequent, of those the smallest ids."""
    words = [list(word.encode("utf-8")) for word in regex.findall(GPT2_PATTERN, text)]
    merges = []
    while len(merges) < most:
        counts = Counter(pair for word in words for pair in pairwise(word))
        if not counts or max(counts.values()) < 2:
            break
        pair = min(counts, key=lambda pair: (-counts[pair], pair))
        words = [naive_merge(word, pair, 256 + len(merges)) for word in words]
        merges.append(pair)
    return merges


def naive_encoding(text: str, merges: list[tuple[int, int]]) -> list[int]:
    """Each word by itself; each merge in turn, wherever it applies."""
    ids = []
    for word in regex.findall(GPT2_PATTERN, text):
        parts = list(word.encode("utf-8"))
        for number, pair in enumerate(merges):
            parts = naive_merge(parts, pair, 256 + number)
        ids += parts
    return ids


@given(narrow_texts, narrow_texts)
def test_training_and_encoding_against_the_rule(training, text):
    """tiktoken knows a merge by its bytes, the rule by its two parts; and it applies the lowest rank first
    instead of rank after rank. Of a trained vocabulary both say the same."""
    merges = naive_training(training, 60)
    tokenizer = train_bpe(training, 257 + len(merges))
    assert learn_merges(module._count_words(training), 60) == merges
    assert tokenizer.vocab_size == 257 + len(merges) and tokenizer.eot == 256 + len(merges)
    for sample in (training, text, text.replace(" ", "")):
        assert tokenizer.encode(sample) == naive_encoding(sample, merges)


@functools.cache
def reviews_by_the_rule():
    return naive_encoding(TEXT, naive_training(TEXT[:6000], 120))


def test_training_and_encoding_of_reviews():
    assert train_bpe(TEXT[:6000], 377).encode(TEXT) == reviews_by_the_rule()


def test_long_words_are_encoded_by_the_same_rule():
    """tiktoken has a second algorithm for words of more than some hundred bytes."""
    word = "".join(random.Random(0).choices("aab", k=600))
    merges = naive_training(word, 30)
    assert len(merges) == 30 and train_bpe(word, 287).encode(word) == naive_encoding(word, merges)


def test_the_length_of_a_word_does_not_count():
    """A merge costs what it has places: 200 merges of one word of 4,000 letters are little more than 20."""

    def lines_run(most: int) -> int:
        count = 0

        def trace(*_):
            nonlocal count
            count += 1
            return trace

        sys.settrace(trace)
        try:
            learn_merges(word, most)
        finally:
            sys.settrace(None)
        return count

    word = Counter({bytes(random.Random(0).choices(b"abcdefgh", k=4000)): 1})
    assert lines_run(200) < 3 * lines_run(20)


@given(
    st.lists(st.sampled_from(["low", "lower", "wol", "aaa", "ab", "ba"]), min_size=2, max_size=30),
    st.randoms(),
)
def test_order_of_words_does_not_matter(words, rng):
    """Same counts, same vocabulary: ties do not go to whoever was seen first."""
    shuffled = rng.sample(words, len(words))
    size = 257 + len(naive_training("\n".join(words), 20))
    first, second = train_bpe("\n".join(words), size), train_bpe("\n".join(shuffled), size)
    assert first.fingerprint == second.fingerprint


def test_a_larger_vocabulary_continues_the_smaller_and_needs_fewer_ids():
    tokenizers = [train_bpe(TEXT, size) for size in (257, 300, 400, 500)]
    lengths = [len(tokenizer.encode(TEXT)) for tokenizer in tokenizers]
    assert lengths == sorted(lengths, reverse=True) and lengths[-1] < 0.5 * lengths[0]
    for smaller, larger in pairwise(tokenizers):
        ids = range(smaller.eot)
        assert [smaller.token_text(token) for token in ids] == [larger.token_text(token) for token in ids]


def test_too_small_a_text_says_how_many_it_can_give():
    text = "low lower lowest low"
    with pytest.raises(InputError) as caught:
        train_bpe(text, 300)
    possible = 257 + len(naive_training(text, 99))
    one_sentence(caught.value, "300 ids", f"at most {possible},")
    assert train_bpe(text, possible).vocab_size == possible
    with pytest.raises(InputError):
        train_bpe(text, possible + 1)


@pytest.mark.parametrize("size", [256, 0, -1, True, 300.0])
def test_vocab_size_must_hold_the_bytes_and_end_of_text(size):
    with pytest.raises(InputError) as caught:
        train_bpe(TEXT, size)
    one_sentence(caught.value, "vocab_size", "257")


# --------------------------------------------------------------------------------------------------- files


def test_saved_and_loaded_is_the_same(tmp_path, gpt2):
    for number, tokenizer in enumerate((byte_tokenizer(), train_bpe(TEXT, 300), gpt2)):
        folder = tmp_path / str(number)
        folder.mkdir()
        save_tokenizer(tokenizer, folder)
        loaded = load_tokenizer(folder)
        assert [path.name for path in folder.iterdir()] == [TOKENIZER_FILE]
        assert (loaded.kind, loaded.vocab_size, loaded.eot) == (
            tokenizer.kind,
            tokenizer.vocab_size,
            tokenizer.eot,
        )
        assert loaded.fingerprint == tokenizer.fingerprint and loaded.encode(TEXT) == tokenizer.encode(TEXT)


def test_fingerprints_tell_vocabularies_apart():
    """Even those that joined give the same bytes: tokens "ab", "cab" against "abc", "ab"."""
    different = [
        module._fingerprint(Vocabulary(tokens, eot, order))
        for tokens in ([b"ab", b"cab"], [b"abc", b"ab"], [b"ab"], [b"cab", b"ab"], [b"cab", b"a", b"b"])
        for eot, order in ((0, [1]), (1, [0]), (1, [2, 0]), (1, [0, 2]))
    ]
    assert len(set(different)) == len(different)
    trained = [train_bpe(text, 300).fingerprint for text in (TEXT, TEXT[::-1], TEXT)]
    assert trained[0] == trained[2] != trained[1]


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> tuple[Path, bytes, str]:
    """A folder with a trained vocabulary, the file's bytes, its fingerprint."""
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer = train_bpe(TEXT, 262)
    save_tokenizer(tokenizer, folder)
    return folder, (folder / TOKENIZER_FILE).read_bytes(), tokenizer.fingerprint


@given(st.data())
def test_a_damaged_file_is_refused_or_harmless(saved, data):
    """Cut it anywhere, or alter any byte: an error that names the file, or (in white space) the same."""
    folder, content, fingerprint = saved
    place = data.draw(st.integers(0, len(content) - 1))
    damaged = bytearray(content)
    if data.draw(st.booleans()):
        damaged = damaged[:place]
    else:
        damaged[place] ^= data.draw(st.integers(1, 255))
    (folder / TOKENIZER_FILE).write_bytes(damaged)
    try:
        loaded = load_tokenizer(folder)
    except InputError as error:
        assert str(folder / TOKENIZER_FILE) in str(error) and "\n" not in str(error)
    else:
        assert loaded.fingerprint == fingerprint and loaded.vocab_size == 262


def b64(*tokens: bytes) -> list[str]:
    return [module.base64.b64encode(token).decode() for token in tokens]


ALTERED = {
    "kind": {"kind": "unigram"},
    "kind of another type": {"kind": ["bpe"]},
    "fingerprint": {"fingerprint": "0" * 64},
    "fingerprint left out": {"fingerprint": None},
    "pattern": {"pattern": r"\S+"},
    "merged_tokens": {"merged_tokens": "low"},
    "merged_tokens: not base64": {"merged_tokens": [*b64(b"lo"), "l*="]},
    "merged_tokens: no text": {"merged_tokens": [7]},
    "merged_tokens: a number": {"merged_tokens": 7},
    "merged_tokens of bytes": {"kind": "bytes"},
    "fingerprint: another row": {"merged_tokens": b64(b"lo", b"low")},
    "fingerprint: a row twice": {"merged_tokens": b64(b"lo", b"lo")},
    "fingerprint: one byte": {"merged_tokens": b64(b"l")},
    "eot of another kind": {"kind": "hugging-face"},
    "version": {"version": 2},
}


@pytest.mark.parametrize("case", ALTERED)
def test_an_altered_field_is_named(saved, case):
    folder, content, _ = saved
    altered = {**json.loads(content), **ALTERED[case]}
    altered = {field: value for field, value in altered.items() if value is not None}
    (folder / TOKENIZER_FILE).write_text(json.dumps(altered), encoding="utf-8")
    with pytest.raises(InputError) as caught:
        load_tokenizer(folder)
    one_sentence(caught.value, TOKENIZER_FILE, f'"{case.partition(":")[0].partition(" ")[0]}"')


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"7", b'"bpe"', b"{", b"\xff{}", b"[" * 100_000, b"{}\n{}"], ids=repr
)
def test_a_file_that_is_no_object_is_refused(tmp_path, content):
    (tmp_path / TOKENIZER_FILE).write_bytes(content)
    with pytest.raises(InputError) as caught:
        load_tokenizer(tmp_path)
    one_sentence(caught.value, str(tmp_path / TOKENIZER_FILE))


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(InputError) as caught:
        load_tokenizer(tmp_path / "nowhere")
    one_sentence(caught.value, str(tmp_path / "nowhere"), "vocab.json")


def test_a_missing_folder_is_made_and_one_that_cannot_be_is_named(tmp_path):
    save_tokenizer(byte_tokenizer(), tmp_path / "new" / "model")
    assert load_tokenizer(tmp_path / "new" / "model").kind == "bytes"
    with pytest.raises(InputError) as caught:
        save_tokenizer(byte_tokenizer(), tmp_path / "new" / "model" / TOKENIZER_FILE)
    one_sentence(caught.value, TOKENIZER_FILE, "another folder")


def test_gpt2_file_holds_its_name_and_fingerprint_only(tmp_path, gpt2):
    save_tokenizer(gpt2, tmp_path)
    path = tmp_path / TOKENIZER_FILE
    assert json.loads(path.read_text()) == {"kind": "gpt2", "fingerprint": gpt2.fingerprint}
    path.write_text(json.dumps({"kind": "gpt2", "fingerprint": byte_tokenizer().fingerprint}))
    with pytest.raises(InputError) as caught:
        load_tokenizer(tmp_path)
    one_sentence(caught.value, '"fingerprint"')


@pytest.mark.parametrize(
    "failure",
    [requests.exceptions.ConnectionError("no route"), PermissionError("no"), b"<html>blocked</html>"],
)
def test_without_network_and_cache_it_says_what_to_do(tmp_path, monkeypatch, failure):
    """Also where a proxy answers every request with a page of its own."""

    def read_file(address):
        if isinstance(failure, bytes):
            return failure
        raise failure

    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(tiktoken.load, "read_file", read_file)
    monkeypatch.setattr(tiktoken.registry, "ENCODINGS", {})
    with pytest.raises(InputError) as caught:
        gpt2_tokenizer()
    one_sentence(caught.value, "TIKTOKEN_CACHE_DIR", "connect to the network once")
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------------------------ mutants

REVIEWS = test_training_and_encoding_of_reviews
LEARN = learn_merges
MUTANTS = {
    "ties go to the highest ids": (
        LEARN, "heapq.heappop(heap)", "heap.pop(heap.index(min(heap, key=lambda e: (e[0], -e[1][0]))))",
        REVIEWS,
    ),
    "outdated counts are used": (
        LEARN, "counts[pair] != -negative_count", "counts[pair] < 2", REVIEWS,
    ),
    "words are counted, not occurrences": (LEARN, "changes[new, neighbour] += count",
                                           "changes[new, neighbour] += 1", REVIEWS),
    "a pair that has changed is merged": (LEARN, "(symbols[place], symbols[other]) != pair",
                                          "symbols[place] != pair[0]", REVIEWS),
    "a fingerprint without lengths": (
        module._fingerprint, 'len(part).to_bytes(8, "big") + part', "part",
        test_fingerprints_tell_vocabularies_apart,
    ),
    "surrogates are replaced in silence": (
        module._check_characters, 'text.encode("utf-8")', "pass", test_text_that_has_no_bytes_is_refused,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTANTS)
def test_planted_bugs_are_caught(monkeypatch, name):
    function, right, wrong, guard = MUTANTS[name]
    plant(monkeypatch, function, right, wrong)
    with pytest.raises(CAUGHT):
        guard()
