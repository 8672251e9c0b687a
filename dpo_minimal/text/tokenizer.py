"""Text to token ids and back, through tiktoken: raw bytes, a BPE trained here, GPT-2's, or a model's own.

Byte-pair encoding (BPE) starts from the 256 bytes, so that any text can be written, and has a list of merges
in order of rank: wherever the two parts of a merge stand side by side in a word, they become one token. Raw
bytes are the BPE without merges. End-of-text is the last id, but for a model's own vocabulary.

    bytes   ids 0-255 the bytes                         256 end-of-text       no file, no training
    bpe     ids 0-255 the bytes, 256, 257, ... merges   last  end-of-text       learnt from a text in seconds
    gpt2    OpenAI's 50,256                             50256 end-of-text       for GPT-2's released weights
    hugging-face   what vocabulary.py reads in a model's folder

But: no chat templates, no special tokens beside end-of-text, and text that looks like a special token is
plain text. Who ends a completion with end-of-text is batches.py.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from reprlib import repr as short
from typing import Any

import tiktoken

from ..validation import InputError, check_count
from .bpe_training import learn_merges
from .runs import read_json_object, write_json
from .vocabulary import BYTES, END_OF_TEXT, Vocabulary, read_vocabulary

TOKENIZER_FILE = "tiktoken.json"
TOKENIZERS = ("bytes", "bpe", "gpt2")
HUGGING_FACE = "hugging-face"  # the kind of a vocabulary that came with a model

# GPT-2's rule for cutting text into words before any merge, as tiktoken writes it: a contraction's ending;
# letters, digits or other signs, each with at most one space before them; or white space. No merge crosses
# a border, and the pieces joined are the text.
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"

_LONGEST_SPACE = 100_000  # tiktoken's regular expression engine panics from some 700,000 on


class Tokenizer:
    """A vocabulary: text to ids and back.

    Example:
        >>> tokenizer = byte_tokenizer()
        >>> tokenizer.encode("Hé!")
        [72, 195, 169, 33]
        >>> tokenizer.decode([72, 195, 169, 33, tokenizer.eot])
        'Hé!'
    """

    def __init__(self, kind: str, vocabulary: Vocabulary):
        self.kind = kind  # one of `TOKENIZERS`, or `HUGGING_FACE`
        self.vocabulary = vocabulary
        self.vocab_size = len(vocabulary.tokens)  # number of ids, end-of-text included
        self.eot = vocabulary.eot  # the id of end-of-text; `encode` never yields it
        # tiktoken wants ids in the order of the merges; where they are not, it gives places in that order.
        order = vocabulary.order
        self._id_of_rank = None if order == sorted(order) else order
        ranks = order if self._id_of_rank is None else range(len(order))
        self._encoding = tiktoken.Encoding(
            kind,
            pat_str=GPT2_PATTERN,
            mergeable_ranks={vocabulary.tokens[i]: rank for i, rank in zip(order, ranks, strict=True)},
            special_tokens={},
        )

    def __repr__(self) -> str:
        return f"Tokenizer(kind={self.kind!r}, vocab_size={self.vocab_size})"

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the vocabulary, in hexadecimal: where it is equal, every text gets the same ids."""
        return _fingerprint(self.vocabulary)

    def encode(self, text: str) -> list[int]:
        """Text to ids, never end-of-text: batches.py appends it where a completion ends.

        Raises InputError: a lone surrogate, for which UTF-8 has no bytes; more than 100,000 spaces in a row.
        """
        _check_characters(text)
        if len(text) > _LONGEST_SPACE and any(len(run) > _LONGEST_SPACE for run in re.findall(r"\s+", text)):
            raise InputError(
                f"text: more than {_LONGEST_SPACE} spaces in a row cannot be encoded; shorten it."
            )
        return self._ids(self._encoding.encode_ordinary(text))

    def _ids(self, ranks: list[int]) -> list[int]:
        """What tiktoken gives, as ids."""
        return ranks if self._id_of_rank is None else [self._id_of_rank[rank] for rank in ranks]

    def decode(self, ids: Sequence[int]) -> str:
        """Ids to text. End-of-text ids are dropped; bytes that are not UTF-8 become U+FFFD.

        Raises InputError: an id outside the vocabulary.
        """
        return self._bytes(token for token in ids if token != self.eot).decode("utf-8", errors="replace")

    def token_text(self, token: int) -> str:
        r"""One token, as a table can show it on one line: a part of a character as \xe2, a line end as \n.

        Raises InputError: an id outside the vocabulary.
        """
        text = self._bytes([token]).decode("utf-8", errors="backslashreplace")
        return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)

    def _bytes(self, ids: Iterable[int]) -> bytes:
        ids = list(ids)
        for token in ids:
            if not 0 <= token < self.vocab_size:
                raise InputError(
                    f"token id {token} is outside the vocabulary of {self.vocab_size}; use the tokenizer "
                    "that the model was trained with."
                )
        return b"".join(self.vocabulary.tokens[token] for token in ids)


def byte_tokenizer() -> Tokenizer:
    """The 256 bytes and end-of-text: 257 ids, no file needed. A letter of English is one id.

    Example:
        >>> byte_tokenizer()
        Tokenizer(kind='bytes', vocab_size=257)
    """
    return Tokenizer("bytes", _in_order(BYTES))


def gpt2_tokenizer() -> Tokenizer:
    """GPT-2's own vocabulary, which tiktoken fetches once and then keeps in a folder.

    Raises InputError: there is neither a network nor a folder that holds tiktoken's two files.
    """
    try:
        ranks = tiktoken.get_encoding("gpt2")._mergeable_ranks
    except (OSError, ValueError) as error:  # OSError of requests: no network; ValueError: a bad download
        raise InputError(
            f"GPT-2's vocabulary: tiktoken could not fetch it ({type(error).__name__}); connect to the "
            "network once, or point TIKTOKEN_CACHE_DIR at a folder that holds tiktoken's files."
        ) from None
    return Tokenizer("gpt2", _in_order(sorted(ranks, key=ranks.__getitem__)))


def _in_order(tokens: list[bytes]) -> Vocabulary:
    """Of tokens in the order of their merges, the bytes first; end-of-text is added as the last."""
    last = len(tokens)
    return Vocabulary([*tokens, END_OF_TEXT.encode()], last, list(range(last)))


def _fingerprint(vocabulary: Vocabulary) -> str:
    tokens, eot, order = vocabulary
    last, header = len(tokens) - 1, GPT2_PATTERN
    if eot != last or order != list(range(last)):
        header += json.dumps([eot, order])
    digest = hashlib.sha256()
    for part in (header.encode("utf-8"), *tokens):
        digest.update(len(part).to_bytes(8, "big") + part)  # with its length: "ab", "c" is not "a", "bc"
    return digest.hexdigest()


def _check_characters(text: str) -> None:
    try:
        text.encode("utf-8")  # tiktoken would put U+FFFD in place of a surrogate and say nothing
    except UnicodeEncodeError as error:
        raise InputError(
            f"text: character {error.start} is the lone surrogate U+{ord(text[error.start]):04X}, which "
            "stands for no character; remove it."
        ) from None


# ---------------------------------------------------------------------------------------------- training


def train_bpe(text: str, vocab_size: int, *, at_most: bool = False) -> Tokenizer:
    """Learn merges from a text: again and again, the most frequent pair of neighbours becomes one token.

    The text is cut into words by GPT-2's pattern. Among pairs that are equally frequent the one with the
    smallest ids (left, then right) goes first, so the result depends on the text alone. A pair that
    occurs only once is no pattern and is not merged.

    Args:
        text: what to learn from; several documents are joined by line ends.
        vocab_size: ids in all: 256 bytes, the merges, and end-of-text; at least 257.
        at_most: take fewer where the text has too few pairs that repeat.
    Returns: a tokenizer of kind "bpe".
    Raises InputError: a lone surrogate; too few pairs that repeat, and how many ids the text can give.

    Example:
        >>> tokenizer = train_bpe("low lower lowest low", 260)
        >>> [tokenizer.token_text(token) for token in tokenizer.encode("lower slow")]
        ['low', 'e', 'r', ' ', 's', 'low']
    """
    check_count("vocab_size", vocab_size, minimum=257)
    _check_characters(text)
    merges = learn_merges(_count_words(text), vocab_size - 257)
    if len(merges) < vocab_size - 257 and not at_most:
        raise InputError(
            f"{vocab_size} ids are more than the text has pairs for; ask for at most "
            f"{257 + len(merges)}, or give more text."
        )
    tokens = list(BYTES)
    for left, right in merges:
        tokens.append(tokens[left] + tokens[right])
    return Tokenizer("bpe", _in_order(tokens))


def make_tokenizer(kind: str, texts: Iterable[str], vocab_size: int, *, at_most: bool = False) -> Tokenizer:
    """One of `TOKENIZERS`; the texts and the number of ids are for a BPE, as in `train_bpe`."""
    if kind == "bpe":
        return train_bpe("\n".join(texts), vocab_size, at_most=at_most)
    return gpt2_tokenizer() if kind == "gpt2" else byte_tokenizer()


def _count_words(text: str) -> Counter[bytes]:
    import regex  # comes with tiktoken; only training needs it, and it takes as long to import as tiktoken

    words = regex.finditer(GPT2_PATTERN, text)  # one by one: a list of all would take gigabytes
    return Counter(word.group().encode("utf-8") for word in words)


# ----------------------------------------------------------------------------------------------- one file


def save_tokenizer(tokenizer: Tokenizer, folder: str | Path) -> None:
    """Write folder/tiktoken.json. Of GPT-2's vocabulary it holds the name and the fingerprint only.

    Raises InputError where the folder, made if it is missing, cannot be written.
    """
    content: dict[str, object] = {"kind": tokenizer.kind, "fingerprint": tokenizer.fingerprint}
    if tokenizer.kind != "gpt2":
        tokens, eot, order = tokenizer.vocabulary
        own = tokenizer.kind == HUGGING_FACE
        written = [base64.b64encode(token).decode("ascii") for token in (tokens if own else tokens[256:eot])]
        content["pattern"] = GPT2_PATTERN
        content |= {"tokens": written, "eot": eot, "order": order} if own else {"merged_tokens": written}
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        write_json(Path(folder) / TOKENIZER_FILE, content)
    except OSError as error:
        raise InputError(f"{folder}: cannot be written ({error}); name another folder.") from None


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """The vocabulary of a folder: tiktoken.json, checked to be whole and unaltered, or Hugging Face's files.

    Raises:
        InputError: there is none, a file is damaged or altered (the sentence names the field) or of another
            kind, or GPT-2's vocabulary cannot be fetched.
    """
    path = Path(folder) / TOKENIZER_FILE
    if not path.exists():
        return Tokenizer(HUGGING_FACE, read_vocabulary(Path(folder)))
    content = read_json_object(path)
    kind = content.get("kind")
    if kind not in (*TOKENIZERS, HUGGING_FACE):
        raise InputError(
            f'{path}: field "kind" is {short(kind)}, which is unknown; save the tokenizer again.'
        )
    more = {"gpt2": set(), HUGGING_FACE: {"pattern", "tokens", "eot", "order"}}
    fields = {"kind", "fingerprint"} | more.get(kind, {"pattern", "merged_tokens"})
    for field in sorted(fields ^ set(content)):
        what = "is missing" if field in fields else f"is not one of a {kind} vocabulary"
        raise InputError(f'{path}: field "{field}" {what}; save the tokenizer again.')
    if content.get("pattern", GPT2_PATTERN) != GPT2_PATTERN:
        raise InputError(f'{path}: field "pattern" is not GPT-2\'s, the only one known here; restore it.')
    vocabulary = gpt2_tokenizer().vocabulary if kind == "gpt2" else _stored(path, kind, content)
    if content["fingerprint"] != _fingerprint(vocabulary):
        raise InputError(
            f'{path}: field "fingerprint" does not fit the vocabulary, so the file was altered; restore the '
            "file that was saved with the model."
        )
    return Tokenizer(kind, vocabulary)


def _stored(path: Path, kind: str, content: dict[str, Any]) -> Vocabulary:
    """What a file holds; that it is what was saved, the fingerprint says."""
    field = "tokens" if kind == HUGGING_FACE else "merged_tokens"
    try:
        tokens = [base64.b64decode(row, validate=True) for row in content[field]]
    except (TypeError, ValueError):
        tokens = None
    if tokens is None or (kind == "bytes" and tokens):
        wanted = "an empty list" if kind == "bytes" else "a list of base64 texts"
        raise InputError(f'{path}: field "{field}" must be {wanted}; save the tokenizer again.')
    if kind == HUGGING_FACE:
        return Vocabulary(tokens, content["eot"], content["order"])
    return _in_order([*BYTES, *tokens])
