"""A vocabulary as Hugging Face's files give it: `tokenizer.json`, or else `vocab.json` and `merges.txt`.

Those files know a merge by its two parts, tiktoken by the bytes that it makes. Both give every text the same
ids where tiktoken is told of exactly the tokens whose own bytes merge into them, each at the rank of the last
of these merges: as long as no merge crosses its borders, a part of a word merges as if it stood alone, so two
neighbours whose bytes are a token's stand where that token's own bytes come to, and go on as those do.

But: no other kind than byte-level BPE with GPT-2's cut into words. Added tokens are plain text in a text.
"""

from __future__ import annotations

import math
import sys
from itertools import pairwise
from pathlib import Path
from reprlib import repr as short
from typing import Any, NamedTuple

from ..validation import InputError
from .files import read_bytes
from .runs import read_json_object

END_OF_TEXT = "<|endoftext|>"
BYTES = [bytes([value]) for value in range(256)]

# How these files write a byte: a printable sign of Latin-1 as itself, the others as U+0100, U+0101, ...
_PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_OTHERS = [value for value in range(256) if value not in _PRINTABLE]
_BYTE_OF = {chr(v): v for v in _PRINTABLE} | {chr(256 + k): v for k, v in enumerate(_OTHERS)}

_WANTED = {  # field: what a byte-level BPE like GPT-2's has there; None: nothing
    "model.type": ("BPE", None), "model.dropout": (None, 0), "model.ignore_merges": (False, None),
    "model.byte_fallback": (False, None), "model.continuing_subword_prefix": ("", None),
    "model.end_of_word_suffix": ("", None), "normalizer.type": (None,), "pre_tokenizer.type": ("ByteLevel",),
    "pre_tokenizer.add_prefix_space": (False,), "pre_tokenizer.use_regex": (True, None),
    "post_processor.special_tokens": ({}, None), "post_processor.cls": (None,),
    "tokenizer_config.add_prefix_space": (False, None), "tokenizer_config.add_bos_token": (False, None),
}  # fmt: skip


class Vocabulary(NamedTuple):
    """What `Tokenizer` encodes and decodes by."""

    tokens: list[bytes]  # of each id
    eot: int  # the id of end-of-text
    order: list[int]  # ids that texts get: the 256 bytes, then what merges make, the first merge first


def read_vocabulary(folder: Path) -> Vocabulary:
    """The vocabulary of the files in a model's folder, without ids that were added behind end-of-text.

    Raises InputError: no such file, one that is damaged, or another kind of vocabulary, which is named.
    """
    settings = _optional(folder / "special_tokens_map.json") | _optional(folder / "tokenizer_config.json")
    try:
        content = _optional(folder / "tokenizer.json") or _older_files(folder, settings)
        for field, wanted in _WANTED.items():
            part, name = field.split(".")
            value = ((content | {"tokenizer_config": settings}).get(part) or {}).get(name)
            if value not in wanted:
                raise InputError(
                    f"{folder}: its tokenizer has {field} {short(value)}, where a byte-level BPE like "
                    f"GPT-2's, the only kind read here, has {wanted[0]!r}; choose another model."
                )
        added = content.get("added_tokens") or []
        for row in added:
            if row.get("special") is False and row["content"] != END_OF_TEXT:
                raise InputError(
                    f"{folder}: its added token {short(row['content'])} is cut out of texts before any "
                    "merge, which is not done here; mark it as special if your texts do not hold it."
                )
        model, added = content["model"], {row["content"]: row["id"] for row in added}
        merges = (row.split(" ") if isinstance(row, str) else row for row in model["merges"])
        ranks = {(left, right): rank for rank, (left, right) in enumerate(merges)}
        return _vocabulary(folder, model["vocab"], ranks, added, settings.get("eos_token"))
    except InputError:
        raise
    except (OSError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"{folder}: its tokenizer cannot be read ({error!r:.99}); copy it again.") from None


def _optional(path: Path) -> dict[str, Any]:
    return read_json_object(path) if path.exists() else {}


def _older_files(folder: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """vocab.json, merges.txt and the tokens added to them, in the form of a tokenizer.json."""
    if not ((folder / "vocab.json").exists() and (folder / "merges.txt").exists()):
        others = [path.name for pattern in ("vocab.txt", "*.model") for path in folder.glob(pattern)]
        what = f"{others[0]}, WordPiece or SentencePiece," if others else "no tokenizer"
        raise InputError(
            f"{folder}: holds {what} where a byte-level BPE is needed; put tokenizer.json, or vocab.json and "
            "merges.txt, beside the weights."
        )
    lines = read_bytes(folder / "merges.txt").decode().replace("\r\n", "\n").split("\n")
    added = [{"id": number, "content": t} for t, number in _optional(folder / "added_tokens.json").items()]
    added += [row | {"id": int(key)} for key, row in settings.get("added_tokens_decoder", {}).items()]
    merges = [line for line in lines if line and not line.startswith("#version")]
    model = {"vocab": read_json_object(folder / "vocab.json"), "merges": merges}
    as_gpt2 = {"type": "ByteLevel", "add_prefix_space": False}
    return {"model": model, "pre_tokenizer": as_gpt2, "added_tokens": added}


def _vocabulary(
    folder: Path, ids: dict[str, int], ranks: dict[tuple[str, str], int], added: dict[str, int], eos: Any
) -> Vocabulary:
    """The same with bytes for letters, checked."""
    made = {left + right for left, right in ranks}
    unknown = made.union(_BYTE_OF, *ranks) - ids.keys()
    if unknown:
        raise InputError(
            f"{folder}: its tokenizer is no byte-level BPE or damaged, for {len(unknown)} bytes or parts of "
            f"merges are no tokens ({short(min(unknown))}); choose another model."
        )
    last = {name: _last_merge(name, ranks) for name in made if _BYTE_OF.keys() >= set(name)}
    order = sorted(ids[letter] for letter in _BYTE_OF)
    order += [ids[name] for name in sorted(last, key=last.__getitem__) if last[name] < math.inf]
    used = set(order)
    idle = sorted(name for name in ids.keys() - added if ids[name] not in used and name[:1] not in "<[")
    if idle:
        what = f"{len(idle)} tokens of its vocabulary, such as {short(idle[0])}, are made by no merge"
        print(f"note: {folder}: {what}; if its merges were cut, copy them again.", file=sys.stderr)
    eos = eos["content"] if isinstance(eos, dict) else eos
    every, of_config = added | ids, _optional(folder / "config.json").get("eos_token_id")
    ends = [every[eos]] if eos in every else [every.get(END_OF_TEXT), of_config]
    eot = next((end for end in ends if end in every.values() and end not in order), None)
    if eot is None:
        raise InputError(
            f"{folder}: its tokenizer has no end-of-text, for {short(eos)} is none or an ordinary word; name "
            "it as 'eos_token' in tokenizer_config.json."
        )
    names = {number: name for name, number in every.items()}
    size = max(len(ids), eot + 1)
    if len(names) < len(every) or not names.keys() >= set(range(size)):
        raise InputError(f"{folder}: its {size} tokens have not the ids 0 to {size - 1}; copy it again.")
    tokens = []
    for name in map(names.__getitem__, range(size)):
        plain = name in added or not _BYTE_OF.keys() >= set(name)  # made by no merge, so it may be any text
        tokens.append(name.encode("utf-8", "replace") if plain else bytes(_BYTE_OF[c] for c in name))
    return Vocabulary(tokens, eot, order)


def _last_merge(name: str, ranks: dict[tuple[str, str], int]) -> float:
    """The rank of the last merge of a token's own bytes; infinity where they do not become one."""
    parts, rank = list(name), math.inf
    while len(parts) > 1:
        found = [ranks.get(pair, math.inf) for pair in pairwise(parts)]
        rank = min(found)
        if rank == math.inf:
            break
        place = found.index(rank)
        parts[place : place + 2] = [parts[place] + parts[place + 1]]
    return rank
