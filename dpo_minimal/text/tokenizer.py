"""Text to token ids and back, through tiktoken: raw bytes, a BPE trained here, or GPT-2's own vocabulary.

Byte-pair encoding (BPE) starts from the 256 bytes, so that any text can be written, and has a list of merges
in order of rank: wherever the two parts of a merge stand side by side in a word, they become one token. Raw
bytes are the BPE without merges. In all three vocabularies end-of-text is the last id.

    bytes   ids 0-255 the bytes                         256 end-of-text       no file, no training
    bpe     ids 0-255 the bytes, 256, 257, ... merges   last  end-of-text       learnt from a text in seconds
    gpt2    OpenAI's 50,256                             50256 end-of-text       for GPT-2's released weights

But: no chat templates, no special tokens beside end-of-text, and text that looks like a special token is
plain text. Who ends a completion with end-of-text is batches.py.
"""

from __future__ import annotations

import base64
import hashlib
import heapq
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from functools import cached_property
from itertools import pairwise
from pathlib import Path

import tiktoken

from ..validation import InputError, check_count
from .runs import read_json_object, write_json

TOKENIZER_FILE = "tiktoken.json"
TOKENIZERS = ("bytes", "bpe", "gpt2")
END_OF_TEXT = "<|endoftext|>"

# GPT-2's rule for cutting text into words before any merge, as tiktoken writes it: a contraction's ending;
# letters, digits or other signs, each with at most one space before them; or white space. No merge crosses
# a border, and the pieces joined are the text.
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"

_LONGEST_SPACE = 100_000  # tiktoken's regular expression engine panics from some 700,000 on
_BYTES = [bytes([value]) for value in range(256)]


class Tokenizer:
    """A vocabulary: text to ids and back.

    Example:
        >>> tokenizer = byte_tokenizer()
        >>> tokenizer.encode("Hé!")
        [72, 195, 169, 33]
        >>> tokenizer.decode([72, 195, 169, 33, tokenizer.eot])
        'Hé!'
    """

    def __init__(self, kind: str, encoding: tiktoken.Encoding):
        self.kind = kind  # one of `TOKENIZERS`
        self.vocab_size = encoding.n_vocab  # number of ids, end-of-text included
        self.eot = encoding.eot_token  # the id of end-of-text, the last one; `encode` never yields it
        self._encoding = encoding

    def __repr__(self) -> str:
        return f"Tokenizer(kind={self.kind!r}, vocab_size={self.vocab_size})"

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the vocabulary, in hexadecimal: where it is equal, every text gets the same ids."""
        tokens = map(self._encoding.decode_single_token_bytes, range(self.vocab_size))
        return _fingerprint(self._encoding._pat_str, tokens)

    def encode(self, text: str) -> list[int]:
        """Text to ids, never end-of-text: batches.py appends it where a completion ends.

        Raises InputError: a lone surrogate, for which UTF-8 has no bytes; more than 100,000 spaces in a row.
        """
        try:
            text.encode("utf-8")  # tiktoken would put U+FFFD in place of a surrogate and say nothing
        except UnicodeEncodeError as error:
            raise InputError(
                f"text: character {error.start} is the lone surrogate U+{ord(text[error.start]):04X}, which "
                "stands for no character; remove it."
            ) from None
        if len(text) > _LONGEST_SPACE and any(len(run) > _LONGEST_SPACE for run in re.findall(r"\s+", text)):
            raise InputError(
                f"text: more than {_LONGEST_SPACE} spaces in a row cannot be encoded; shorten it."
            )
        return self._encoding.encode_ordinary(text)

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
        return self._encoding.decode_bytes(ids)


def byte_tokenizer() -> Tokenizer:
    """The 256 bytes and end-of-text: 257 ids, no file needed. A letter of English is one id.

    Example:
        >>> byte_tokenizer()
        Tokenizer(kind='bytes', vocab_size=257)
    """
    return _tokenizer("bytes", _BYTES)


def gpt2_tokenizer() -> Tokenizer:
    """GPT-2's own vocabulary, which tiktoken fetches once and then keeps in a folder.

    Raises InputError: there is neither a network nor a folder that holds tiktoken's two files.
    """
    try:
        return Tokenizer("gpt2", tiktoken.get_encoding("gpt2"))
    except (OSError, ValueError) as error:  # OSError of requests: no network; ValueError: a bad download
        raise InputError(
            f"GPT-2's vocabulary: tiktoken could not fetch it ({type(error).__name__}); connect to the "
            "network once, or point TIKTOKEN_CACHE_DIR at a folder that holds tiktoken's files."
        ) from None


def _tokenizer(kind: str, tokens: list[bytes]) -> Tokenizer:
    """Of a list of tokens, the 256 bytes first; end-of-text is added as the last."""
    encoding = tiktoken.Encoding(
        kind,
        pat_str=GPT2_PATTERN,
        mergeable_ranks={token: rank for rank, token in enumerate(tokens)},
        special_tokens={END_OF_TEXT: len(tokens)},
        explicit_n_vocab=len(tokens) + 1,
    )
    return Tokenizer(kind, encoding)


def _fingerprint(pattern: str, tokens: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for part in (pattern.encode("utf-8"), *tokens):
        digest.update(len(part).to_bytes(8, "big") + part)  # with its length: "ab", "c" is not "a", "bc"
    return digest.hexdigest()


# ---------------------------------------------------------------------------------------------- training


def train_bpe(text: str, vocab_size: int) -> Tokenizer:
    """Learn merges from a text: again and again, the most frequent pair of neighbours becomes one token.

    The text is cut into words by GPT-2's pattern. Among pairs that are equally frequent the one with the
    smallest ids (left, then right) goes first, so the result depends on the text alone. A pair that
    occurs only once is no pattern and is not merged.

    Args:
        text: what to learn from; several documents are joined by line ends.
        vocab_size: ids in all: 256 bytes, the merges, and end-of-text; at least 257.
    Returns: a tokenizer of kind "bpe".
    Raises InputError: the text has too few pairs that repeat, and how many ids it can give.

    Example:
        >>> tokenizer = train_bpe("low lower lowest low", 260)
        >>> [tokenizer.token_text(token) for token in tokenizer.encode("lower slow")]
        ['low', 'e', 'r', ' ', 's', 'low']
    """
    check_count("vocab_size", vocab_size, minimum=257)
    merges = _learn_merges(_count_words(text), vocab_size - 257)
    if len(merges) < vocab_size - 257:
        raise InputError(
            f"{vocab_size} ids are more than the text has pairs for; ask for at most "
            f"{257 + len(merges)}, or give more text."
        )
    tokens = list(_BYTES)
    for left, right in merges:
        tokens.append(tokens[left] + tokens[right])
    return _tokenizer("bpe", tokens)


def make_tokenizer(kind: str, texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """One of `TOKENIZERS`; the texts and the number of ids are for a BPE, as in `train_bpe`."""
    if kind == "bpe":
        return train_bpe("\n".join(texts), vocab_size)
    return gpt2_tokenizer() if kind == "gpt2" else byte_tokenizer()


def _count_words(text: str) -> Counter[bytes]:
    import regex  # comes with tiktoken; only training needs it, and it takes as long to import as tiktoken

    return Counter(word.encode("utf-8") for word in regex.findall(GPT2_PATTERN, text))


def _learn_merges(counts: Counter[bytes], most: int) -> list[tuple[int, int]]:
    """At most `most` merges (left id, right id); the k-th makes id 256 + k.

    Counts are kept up to date instead of counted anew: a merge changes only the words that hold its pair.
    """
    words = [(list(word), count) for word, count in counts.items()]
    pair_counts: Counter[tuple[int, int]] = Counter()
    where = defaultdict(set)  # pair -> numbers of the words that hold it, or once did
    for number, (ids, count) in enumerate(words):
        for pair in pairwise(ids):
            pair_counts[pair] += count
            where[pair].add(number)
    heap = [(-count, pair) for pair, count in pair_counts.items()]  # smallest first: frequent, then low ids
    heapq.heapify(heap)
    merges = []
    while len(merges) < most and heap:
        negative_count, pair = heapq.heappop(heap)
        if -negative_count < 2:
            break
        if pair_counts[pair] != -negative_count:
            continue  # an entry from before the count changed
        new = 256 + len(merges)
        merges.append(pair)
        changes: Counter[tuple[int, int]] = Counter()
        for number in where.pop(pair):
            ids, count = words[number]
            merged = _merge(ids, pair, new)
            for old_pair in pairwise(ids):
                changes[old_pair] -= count
            for new_pair in pairwise(merged):
                changes[new_pair] += count
                where[new_pair].add(number)
            words[number] = merged, count
        for changed, change in changes.items():
            if change:
                pair_counts[changed] += change
                heapq.heappush(heap, (-pair_counts[changed], changed))
    return merges


def _merge(ids: list[int], pair: tuple[int, int], new: int) -> list[int]:
    """Replace the pair by `new`, from left to right."""
    merged, place = [], 0
    while place < len(ids):
        here = tuple(ids[place : place + 2]) == pair
        merged.append(new if here else ids[place])
        place += 2 if here else 1
    return merged


# ----------------------------------------------------------------------------------------------- one file


def save_tokenizer(tokenizer: Tokenizer, folder: str | Path) -> None:
    """Write folder/tiktoken.json. Of GPT-2's vocabulary it holds the name and the fingerprint only."""
    content: dict[str, object] = {"kind": tokenizer.kind, "fingerprint": tokenizer.fingerprint}
    if tokenizer.kind != "gpt2":
        merged = map(tokenizer._encoding.decode_single_token_bytes, range(256, tokenizer.eot))
        content["pattern"] = GPT2_PATTERN
        content["merged_tokens"] = [base64.b64encode(token).decode("ascii") for token in merged]
    write_json(Path(folder) / TOKENIZER_FILE, content)


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """Read folder/tiktoken.json, and check that it is whole and unaltered.

    Raises:
        InputError: the file is missing, damaged or altered (the sentence names the field), or of GPT-2's
            vocabulary, which cannot be fetched.
    """
    path = Path(folder) / TOKENIZER_FILE
    content = read_json_object(path)
    kind = content.get("kind")
    if kind not in TOKENIZERS:
        raise InputError(f'{path}: field "kind" must be "bytes", "bpe" or "gpt2", got {kind!r}.')
    fields = {"kind", "fingerprint"} | (set() if kind == "gpt2" else {"pattern", "merged_tokens"})
    for field in sorted(fields ^ set(content)):
        what = "is missing" if field in fields else f"is not one of a {kind} vocabulary"
        raise InputError(f'{path}: field "{field}" {what}; save the tokenizer again.')
    if content.get("pattern", GPT2_PATTERN) != GPT2_PATTERN:
        raise InputError(f'{path}: field "pattern" is not GPT-2\'s, the only one known here; restore it.')
    if kind == "gpt2":
        tokenizer = gpt2_tokenizer()
    else:
        tokenizer = _tokenizer(kind, _BYTES + _merged_tokens(path, kind, content["merged_tokens"]))
    if content["fingerprint"] != tokenizer.fingerprint:
        raise InputError(
            f'{path}: field "fingerprint" does not fit the vocabulary, so the file was altered; restore the '
            "file that was saved with the model."
        )
    return tokenizer


def _merged_tokens(path: Path, kind: str, rows: object) -> list[bytes]:
    """The field "merged_tokens": distinct tokens of two bytes or more."""
    if not isinstance(rows, list) or (kind == "bytes" and rows):
        wanted = "an empty list" if kind == "bytes" else "a list"
        raise InputError(f'{path}: field "merged_tokens" must be {wanted}; save the tokenizer again.')
    tokens: dict[bytes, int] = {}
    for place, row in enumerate(rows):
        try:
            token = base64.b64decode(row, validate=True)
        except (ValueError, TypeError):
            token = b""
        if len(token) < 2 or token in tokens:
            raise InputError(
                f'{path}: field "merged_tokens", entry {place}: must be the base64 of two bytes or more that '
                f"no other entry has, got {row!r}; save the tokenizer again."
            )
        tokens[token] = place
    return list(tokens)
